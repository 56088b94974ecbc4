"""`medusa-serve export heads`: heads of any format that we read, written in one that other software reads.

| format | files | LM head |
|---|---|---|
| fasterdecoding | config.json, medusa_lm_head.pt | one for each head |
| fasterdecoding-2 | the same (the repository's "version 2") | the base model's, not written |
| tgi | config.json, medusa_lm_head.safetensors | the base model's for one block per head, else one for each head |
| vllm | config.json, model.safetensors | written once (`original_lm_head`), or one for each head |

The formats were read in the loaders of FasterDecoding/Medusa, text-generation-inference and vLLM. Only vLLM knows a
`token_map`; the other loaders skip tensors that they do not look for, so it is written for our own loader, and their
heads guess from the whole vocabulary.

Invariants:
- weights are written as they were read, in their dtype: heads that are read again make the same drafts;
- what a format cannot say is refused, or named in a sentence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from models.backbone import read_sizes
from models.checkpoint import PICKLE_NAME, WEIGHTS_NAME, HeadTensors, check_heads, read_heads
from models.errors import UsageError
from models.sequential_checkpoint import is_sequential
from models.source import resolve
from models.train.command import run
from models.train.trunk import load_trunk


class ExportError(UsageError):
    """Heads cannot be written in this format; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """What is exported: heads, and what they say of their model. `lm_head` is the base model's, [vocab, hidden]."""

    tensors: HeadTensors
    lm_head: Tensor
    base_model: str

    @property
    def lm_heads(self) -> list[Tensor]:
        """Each head's LM head; the same tensor where it is shared."""
        tensors = self.tensors
        if len(tensors.lm_heads) > 1:
            return [tensors.lm_heads[head] for head in range(tensors.num_heads)]
        own = tensors.lm_heads.get(0, tensors.shared_lm_head)
        return [self.lm_head if own is None else own] * tensors.num_heads

    @property
    def is_tied(self) -> bool:
        """All heads use the base model's LM head."""
        return not self.tensors.lm_heads and self.tensors.shared_lm_head is None


def main(argv: list[str]) -> int:
    """Entry of `medusa-serve export heads`; returns the exit code."""
    return run(_export, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve export heads", description="Write heads in the format of other software."
    )
    parser.add_argument("heads", metavar="HEADS", type=Path, help="file or folder of trained heads")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file of the base model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser


def _export(options: argparse.Namespace, console: Console) -> None:
    if is_sequential(options.heads):
        raise ExportError(
            f"The {options.format} format has no place for a sequential drafter; export heads that were trained with "
            "--design resblock."
        )
    tensors = read_heads(options.heads)
    folder = resolve(options.model)
    hidden_size, vocab_size = read_sizes(folder)
    check_heads(tensors, hidden_size=hidden_size, vocab_size=vocab_size)
    check_expressible(tensors, options.format)
    model, _ = load_trunk(folder, "auto", "cpu")
    source = Source(
        tensors, model.get_output_embeddings().weight.detach(), base_model_name(options.heads, options.model)
    )
    export(source, options.format, options.output)
    for remark in remarks(tensors, options.format):
        console.print(remark)
    console.print(f"Heads written to {options.output}")


def base_model_name(heads: Path, model: str) -> str:
    """As the heads' own config.json names it, for that is a name that others know; else `model`."""
    config = heads / "config.json"
    named = json.loads(config.read_text()).get("base_model_name_or_path") if config.is_file() else None
    return str(named or model)


def check_expressible(tensors: HeadTensors, format: str) -> None:
    """Raise ExportError if heads of this kind have no place in the format."""
    if tensors.fusion is not None:
        raise ExportError(
            f"The {format} format has no place for heads that see inner layers; export heads that were trained with "
            "--features last."
        )
    if format == "fasterdecoding-2" and (tensors.lm_heads or tensors.shared_lm_head is not None):
        raise ExportError("fasterdecoding-2 has no LM heads of its own; give --format fasterdecoding for these heads.")


def remarks(tensors: HeadTensors, format: str) -> list[str]:
    """What other software will make of these heads that their author may not expect."""
    said = []
    if tensors.token_map is not None and format != "vllm":
        said.append(
            f"These heads guess {len(tensors.token_map)} tokens; software that does not read token_map will let them "
            "guess from the whole vocabulary."
        )
    if tensors.num_layers > 1 and format.startswith("fasterdecoding"):
        said.append(
            f"FasterDecoding's own code shares one block among the {tensors.num_layers} of a head and cannot run these."
        )
    return said


def export(source: Source, format: str, folder: Path) -> None:
    """Write `folder`. Raises ExportError."""
    check_expressible(source.tensors, format)
    folder.mkdir(parents=True, exist_ok=True)
    config = FORMATS[format](source, folder)
    if source.tensors.accuracies is not None:
        config["accuracies"] = source.tensors.accuracies
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _fasterdecoding(source: Source, folder: Path) -> dict[str, Any]:
    torch.save(_blocks(source.tensors) | _own_lm_heads(source), folder / PICKLE_NAME)  # what is shared is written once
    return _medusa_config(source)


def _fasterdecoding_2(source: Source, folder: Path) -> dict[str, Any]:
    torch.save(_blocks(source.tensors), folder / PICKLE_NAME)
    return _medusa_config(source) | {"version": "2"}


def _tgi(source: Source, folder: Path) -> dict[str, Any]:
    """TGI ties heads to the base LM head if they have one block each, and only then."""
    is_tied = source.is_tied and source.tensors.num_layers == 1
    named = _blocks(source.tensors) | ({} if is_tied else _own_lm_heads(source))
    (folder / WEIGHTS_NAME).write_bytes(save({name: tensor.clone() for name, tensor in named.items()}))
    return _medusa_config(source)


def _vllm(source: Source, folder: Path) -> dict[str, Any]:
    tensors, mapped = source.tensors, source.tensors.token_map
    named = {f"blocks.{head}.layers.{layer}.{kind}": tensor for head, layer, kind, tensor in _each(tensors)}
    rows = [_cut(lm_head, mapped) for lm_head in source.lm_heads]
    is_shared = len(tensors.lm_heads) <= 1
    named |= {"lm_head.weight": rows[0]} if is_shared else {f"lm_heads.{h}.weight": r for h, r in enumerate(rows)}
    if mapped is not None:
        named["token_map"] = mapped.long()
    (folder / "model.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in named.items()}))
    vocab_size, hidden_size = source.lm_head.shape
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": len(rows[0]),
        "num_heads": tensors.num_heads,
        "num_hidden_layers": tensors.num_layers,
        "medusa_fc_bias": True,
        "original_lm_head": is_shared,
        "torch_dtype": str(source.lm_head.dtype).removeprefix("torch."),
    }


FORMATS: dict[str, Callable[[Source, Path], dict[str, Any]]] = {
    "fasterdecoding": _fasterdecoding,
    "fasterdecoding-2": _fasterdecoding_2,
    "tgi": _tgi,
    "vllm": _vllm,
}


def _each(tensors: HeadTensors) -> list[tuple[int, int, str, Tensor]]:
    """Head, layer, kind and tensor of all blocks. Every loader wants biases: zeros where there are none."""
    return [
        (head, layer, kind, tensor.contiguous())
        for (head, layer), block in sorted(tensors.blocks.items())
        for kind, tensor in ({"bias": block["weight"].new_zeros(len(block["weight"]))} | block).items()
    ]


def _blocks(tensors: HeadTensors) -> dict[str, Tensor]:
    named = {f"{head}.{layer}.linear.{kind}": tensor for head, layer, kind, tensor in _each(tensors)}
    return named if tensors.token_map is None else named | {"token_map": tensors.token_map}


def _own_lm_heads(source: Source) -> dict[str, Tensor]:
    """With all rows: loaders other than ours know no shorter ones."""
    vocab_size = len(source.lm_head)
    if any(len(rows) != vocab_size for rows in source.lm_heads):
        raise ExportError("These heads have LM heads of their draft vocabulary alone; only --format vllm can say so.")
    layers = source.tensors.num_layers
    return {f"{head}.{layers}.weight": rows for head, rows in enumerate(source.lm_heads)}


def _cut(rows: Tensor, mapped: Tensor | None) -> Tensor:
    return rows if mapped is None or len(rows) == len(mapped) else rows[mapped.long()]


def _medusa_config(source: Source) -> dict[str, Any]:
    return {
        "base_model_name_or_path": source.base_model,
        "medusa_num_heads": source.tensors.num_heads,
        "medusa_num_layers": source.tensors.num_layers,
    }
