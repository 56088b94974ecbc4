"""`medusa-serve evaluate perplexity`: what int8 or int4 weights cost a model, against float32 on one text.

Invariants:
- both read the same windows, each from an empty context, through the pool and the kernels that serve;
- the first token of a window is not scored; of chats only what the assistant wrote is (models/train/data.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.kv_pool import KVPool
from models.quantize import Quantization
from models.source import resolve
from models.train.command import positive, run
from models.train.data import DataError, Example, encode_rows, read_rows

WINDOW = 512  # tokens that are read together


class Window(NamedTuple):
    tokens: Tensor  # [rows] int64
    scored: Tensor  # [n] int64; rows whose next token counts


class Score(NamedTuple):
    """Sums over the scored tokens of one window."""

    tokens: int
    float32: float  # negative log-likelihood
    quantized: float  # negative log-likelihood
    divergence: float  # KL(float32 || quantized)
    agreed: int  # tokens where both have the same favourite


@dataclass(frozen=True, slots=True)
class Comparison:
    quantization: str
    windows: int
    tokens: int
    float32: float  # perplexity
    quantized: float  # perplexity
    difference: float  # of the quantized from float32, in percent
    error: float  # its standard error, paired by window, in percent
    divergence: float  # KL(float32 || quantized) per token, in nats
    agreement: float  # share of tokens where both have the same favourite


def main(argv: list[str]) -> int:
    """Entry of `medusa-serve evaluate perplexity`; returns the exit code."""
    return run(_evaluate, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medusa-serve evaluate perplexity",
        description="Perplexity with int8 or int4 weights against float32, on a CPU.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or GGUF file")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL (chats or text) or plain text files")
    parser.add_argument(
        "--quantization", choices=get_args(Quantization), help="by default, the one that serve would choose"
    )
    parser.add_argument("--max-tokens", type=positive, default=20_000, help="tokens to score, from the start (20000)")
    parser.add_argument(
        "--validation-fraction", type=float, default=1.0, help="read only what training with this fraction keeps aside"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    return parser


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    rows = read_rows(options.data)
    folder = resolve(options.model)
    quantized = _load(folder)
    quantized.quantize(options.quantization or quantized.default_quantization())
    exact = _load(folder)
    width = min(WINDOW, exact.max_position_embeddings or WINDOW)
    examples = encode_rows(rows, _tokenizer(folder), validation_fraction=options.validation_fraction, max_length=width)
    windows = cut_windows(examples, options.max_tokens)
    comparison = compare(exact, quantized, track(windows, "Reading", console=console, transient=True))
    console.print(_table(comparison))
    if options.json:
        options.json.write_text(json.dumps(asdict(comparison), indent=1) + "\n", encoding="utf-8")


def _load(folder: Path) -> Backbone:
    return Backbone.load(folder, dtype=torch.float32, device=torch.device("cpu"))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"The tokenizer in {folder} cannot be loaded: {error}; get the folder anew.") from error


def cut_windows(examples: Sequence[Example], max_tokens: int) -> list[Window]:
    """The held-out examples until `max_tokens` are scored. Raises DataError if they are too few to tell an error."""
    windows, left = [], max_tokens
    for example in examples:
        scored = [row for row, counts in enumerate(example.counts[1:]) if counts][:left]
        if example.held_out and scored:
            windows.append(Window(torch.tensor(example.tokens), torch.tensor(scored)))
            left -= len(scored)
    if len(windows) < 2:
        raise DataError(
            f"There are fewer than two windows of text to read; give more --data (a window is {WINDOW} tokens or a "
            "whole shorter text), a larger --max-tokens or a larger --validation-fraction."
        )
    return windows


def compare(exact: Backbone, quantized: Backbone, windows: Iterable[Window]) -> Comparison:
    """Read every window with both; `exact` in float32, `quantized` after `Backbone.quantize`."""
    pools = [KVPool(side.kv_shapes, WINDOW, dtype=side.kv_dtype, device="cpu") for side in (exact, quantized)]
    scores = [_score(window, (exact, pools[0]), (quantized, pools[1])) for window in windows]
    return summarize(scores, quantized.quantization)


def _score(window: Window, exact: tuple[Backbone, KVPool], quantized: tuple[Backbone, KVPool]) -> Score:
    p, q = _log_probs(window, *exact), _log_probs(window, *quantized)
    following = window.tokens[window.scored + 1][:, None]
    return Score(
        tokens=len(following),
        float32=-float(p.gather(1, following).double().sum()),
        quantized=-float(q.gather(1, following).double().sum()),
        divergence=float((p.exp() * (p - q)).sum(-1).double().sum()),
        agreed=int((p.argmax(-1) == q.argmax(-1)).sum()),
    )


def _log_probs(window: Window, backbone: Backbone, pool: KVPool) -> Tensor:
    """Of every possible next token at the scored rows: [n, vocab]."""
    rows = len(window.tokens)
    segment = Segment(rows, torch.empty(0, dtype=torch.int64), rows, ())
    batch = build_batch([segment], torch.arange(rows), torch.arange(1, rows + 1), "cpu")
    logits, _ = backbone.forward(window.tokens, batch, pool, window.scored)
    return logits.log_softmax(-1)


def summarize(scores: Sequence[Score], quantization: str) -> Comparison:
    """The error is a ratio estimator's over windows, of the difference of the mean log-likelihoods."""
    sums: NDArray[np.float64] = np.array(scores, dtype=np.float64)  # [windows, fields of Score]
    tokens, float32, quantized, divergence, agreed = sums.sum(0)
    gap = (quantized - float32) / tokens
    residuals = sums[:, 2] - sums[:, 1] - gap * sums[:, 0]
    spread = math.sqrt(len(sums) / (len(sums) - 1) * float((residuals**2).sum()))
    return Comparison(
        quantization=quantization,
        windows=len(sums),
        tokens=int(tokens),
        float32=math.exp(float32 / tokens),
        quantized=math.exp(quantized / tokens),
        difference=100 * math.expm1(gap),
        error=100 * math.exp(gap) * spread / float(tokens),
        divergence=float(divergence / tokens),
        agreement=float(agreed / tokens),
    )


def _table(found: Comparison) -> Table:
    table = Table("", "", title=f"{found.quantization} against float32", show_header=False)
    table.add_row("tokens", f"{found.tokens} in {found.windows} windows")
    table.add_row("perplexity, float32", f"{found.float32:.4f}")
    table.add_row(f"perplexity, {found.quantization}", f"{found.quantized:.4f}")
    table.add_row("difference", f"{found.difference:+.3f} % ± {found.error:.3f} (standard error)")
    table.add_row("KL divergence", f"{found.divergence:.6f} nats per token")
    table.add_row("same favourite", f"{found.agreement:.2%}")
    return table
