"""Small tokenizers of the two families that text is made of: byte-level BPE, and sentencepiece with byte fallback."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from server.text.prompt import Tokenizer


def byte_level(template: str | None = None, special: dict[str, str] | None = None) -> Tokenizer:
    """Token 0 to 255 are bytes, 256 and up merges of "he", " t" and the halves of "é", then `<|end|>` and `日本`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ã", "©")]
    vocab = {token: id for id, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens(["日本"])
    return Tokenizer(backend, template=template, special=special)


def byte_fallback() -> Tokenizer:
    """As Llama 2's: `▁` for a space, `<0xNN>` for what the vocabulary lacks, `<s>` before a text."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a", "▁b", "▁▁"]
    vocab = {token: id for id, token in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("<s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend)
