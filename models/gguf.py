"""A GGUF file as a Hugging Face folder: float32 safetensors, configuration, fast tokenizer, chat template.

Owns what transformers' own reader gets wrong: special tokens, and the pre-tokenizer and decoder of byte-level BPE, are
taken from the file's metadata. Weights are dequantised exactly; `python -m models.gguf SRC DST` does the work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4  # gguf.TokenType
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names: the file's
END_TOKENS = ("eos", "eot", "eom")

# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, `tokenizer.ggml.pre`
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", "")}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
_PLAIN = {"default", "gpt-2"}


class UnknownFormatError(ValueError):
    """This GGUF file cannot be converted faithfully."""


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of the file `gguf` into the existing `folder`.

    Raises UnknownFormatError for a byte-level pre-tokenizer that is not known here.
    """
    metadata = read_metadata(gguf)
    write_tokenizer(gguf, metadata, folder)
    write_model(gguf, metadata, folder)


def read_metadata(gguf: Path) -> dict[str, Any]:
    """Every key of the file's header, arrays included."""
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items() if field.types}


def write_tokenizer(gguf: Path, metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    is_byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    tokenizer = byte_level_tokenizer(metadata) if is_byte_level else _transformers_tokenizer(gguf)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {f"{ours}_token": tokens[id] for ours, id in _special_ids(metadata).items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    _write_json(folder / "tokenizer_config.json", config)
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def byte_level_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """GPT-2's kind of tokenizer. Raises UnknownFormatError if its pre-tokenizer is not known here."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, type) for token, type in zip(tokens, types, strict=True) if type in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=type == CONTROL, normalized=False) for token, type in added])
    if metadata.get("tokenizer.ggml.add_bos_token"):
        _add_bos(tokenizer, metadata["tokenizer.ggml.bos_token_id"])
    return tokenizer


def write_model(gguf: Path, metadata: dict[str, Any], folder: Path) -> None:
    """Write model.safetensors (each tied tensor once), config.json and generation_config.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    state = model.state_dict()
    first_names = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    tensors = {name: state[name].contiguous() for name in first_names.values()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    special = {f"{ours}_token_id": id for ours, id in _special_ids(metadata).items() if ours != "unk"}
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in END_TOKENS]
    config = model.config.to_dict() | special
    config["architectures"] = [type(model).__name__]
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    _write_json(folder / "config.json", config)
    generation = special | {"eos_token_id": sorted({end for end in ends if end is not None})}
    _write_json(folder / "generation_config.json", generation)


def _transformers_tokenizer(gguf: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    return tokenizer


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _PLAIN:
        return gpt2
    if pre in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UnknownFormatError(
        f"The GGUF tokenizer kind {pre!r} is not known here: serve the model's original folder or hub id instead."
    )


def _add_bos(tokenizer: Tokenizer, id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.id_to_token(id)
    tokenizer.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, id)])


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in SPECIAL.items()}
    return {ours: id for ours, id in ids.items() if id is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """`SRC DST`: convert the file SRC into the existing folder DST; the last line on stderr says what went wrong."""
    source, folder = argv
    convert(Path(source), Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
