"""`medusa-serve evaluate heads`: tokens per step on held-out text, by number of tree nodes.

Invariants: the held-out rows are those that training kept aside (models/train/data.py); the trunk runs in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.checkpoint import load_heads
from models.drafters.resblock import DEFAULT_ACCURACIES, Accuracies
from models.sequential_checkpoint import build_sequential, is_sequential, read_sequential
from models.source import resolve
from models.train.acceptance import Tau, Text, measure_accuracies, tau_by_nodes
from models.train.command import run
from models.train.data import DataError, Example, encode_rows, read_rows
from models.train.designs import AnyHeads, rank
from models.train.trunk import check_device, forward_with_hidden, load_trunk

VALIDATION_FRACTION = 0.06


def held_out(examples: Sequence[Example]) -> list[int]:
    """Numbers of the held-out examples that the model wrote greedily; of all held-out ones if none says so.

    Raises DataError if nothing is held out.
    """
    kept = [i for i, example in enumerate(examples) if example.held_out and any(example.counts)]
    if not kept:
        raise DataError("No row is held out for validation; give more text or a larger --validation-fraction.")
    return [i for i in kept if examples[i].greedy] or kept


def main(argv: list[str]) -> int:
    """Entry of `medusa-serve evaluate heads`; returns the exit code."""
    return run(_evaluate, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve evaluate heads", description="Tokens per step on held-out text."
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or GGUF file of the base model")
    parser.add_argument("--heads", type=Path, required=True, help="file or folder of trained heads")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the files given to training")
    parser.add_argument("--validation-fraction", type=float, default=VALIDATION_FRACTION, help="as in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    check_device(options.device)
    rows = read_rows(options.data)
    model, tokenizer = load_trunk(resolve(options.model), torch.float32, options.device)
    heads = _load_heads(options.heads, model)
    examples = encode_rows(rows, tokenizer, validation_fraction=options.validation_fraction)
    texts: list[Text] = []
    own: list[NDArray[np.bool_]] = []
    for i in track(held_out(examples), "Reading held-out text", console=console, transient=True):
        found, agreed = rank_example(model, heads, examples[i])
        texts += found
        own.append(agreed)
    positions = sum(len(text.ranks) for text in texts)
    console.print(
        f"{len(texts)} held-out answers, {positions} positions; {np.concatenate(own).mean():.1%} of their tokens "
        "are what the model in float32 says greedily."
    )
    console.print(_accuracy_table(measure_accuracies(texts)))
    console.print(_tau_table(tau_by_nodes(texts, heads.accuracies or DEFAULT_ACCURACIES[: heads.num_heads])))


def _load_heads(path: Path, model: Any) -> AnyHeads:
    """Heads of any design. Raises CheckpointError."""
    lm_head = model.get_output_embeddings()
    if is_sequential(path):
        return build_sequential(read_sequential(path), model.get_input_embeddings().weight, lm_head.weight)
    return load_heads(path, lm_head)


@torch.inference_mode()
def rank_example(model: Any, heads: AnyHeads, example: Example) -> tuple[list[Text], NDArray[np.bool_]]:
    """Ranks of one example, and of each counted token whether it is the model's own greedy choice."""
    tokens, counts = np.array(example.tokens), np.array(example.counts)
    hidden, logits = forward_with_hidden(model, torch.from_numpy(tokens)[None].to(model.device))
    greedy = logits[0].argmax(-1).cpu().numpy()
    agreed = (greedy[:-1] == tokens[1:])[counts[1:]]
    return rank(heads, hidden[0], tokens, counts), agreed


def _accuracy_table(accuracies: Accuracies) -> Table:
    table = Table("head", *(f"top {k}" for k in (1, 2, 3, 5, 10)), title="Right token among the first")
    for head, shares in enumerate(accuracies, start=1):
        table.add_row(str(head), *(f"{sum(shares[:k]):.3f}" for k in (1, 2, 3, 5, 10)))
    return table


def _tau_table(rows: Sequence[Tau]) -> Table:
    table = Table("nodes", "tau", "± (standard error)", "if depths were independent", title="Tokens per step")
    for row in rows:
        table.add_row(str(row.nodes), f"{row.measured:.3f}", f"{row.error:.3f}", f"{row.independent:.3f}")
    return table
