"""A small byte-level tokenizer that merges as JSON is merged: `{"`, `":`, `":"`, `name` and all their beginnings."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

EOS = 0
WORDS = ["name", "count", "tags", "red", "green", "true", "arguments", "tool_call"]
SIGNS = ['{"', '":', '":"', '":Ġ"', '",', ',Ġ"', "Ġ[", '"]', '"}', "}}", "</", "<tool_call"]
VOCAB_SIZE = 400  # padded beyond the tokenizer's


def json_tokenizer() -> tokenizers.Tokenizer:
    """Token 0 is `<|end|>`, then the bytes, then every beginning of WORDS and SIGNS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = dict.fromkeys((text[:n], text[n]) for text in [*WORDS, *SIGNS] for n in range(1, len(text)))
    tokens = ["<|end|>", *alphabet, *("".join(pair) for pair in merges)]
    assert len(tokens) < VOCAB_SIZE
    backend = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return backend
