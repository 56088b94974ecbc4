"""Bytes per forward pass and speedup of models that guess n bytes at once, on the Python of the standard library.

Decoding is greedy and self-speculative: all extra heads' first guesses are one chain. Plain decoding, against which
time is measured, is the same model without its extra heads; the two are timed by turns.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from models.backbone import Backbone
from models.mtp import MTPForCausalLM, without_extra_heads
from models.train.acceptance import measure_accuracies, measured_tau
from models.train.byte_tokenizer import END, byte_tokenizer
from models.train.card import markdown_table
from models.train.corpus import Corpus, Windows, encode_document, spread_windows
from models.train.data import DataError, is_held_out
from models.train.experiments.cell import Cell, Measured, Scale
from models.train.experiments.experiment import Experiment
from models.train.experiments.report import Report, against, by_model, spread
from models.train.multi_token import Batches, held_out_losses
from models.train.own_text import backbone_of, rank_continuations
from models.train.pretrain import save_model
from models.train.self_speculation import Decoded, SelfSpeculation, chain

Prompts = Sequence[Sequence[int]]

_HELD_OUT_SHARE = 0.05
_HELD_OUT_WINDOWS = 64
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}


class Bytes(Experiment):
    name = "bytes"
    looked_at = "held-out nats per byte by head"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self._corpus = python_corpus(Path(sysconfig.get_path("stdlib")))

    @property
    def vocabulary(self) -> int:
        return END + 1

    @property
    def data(self) -> str:
        return self._corpus.digest()

    def batches(self, cell: Cell) -> Batches:
        return Windows(self._corpus.training, self.scale.batch_size, self.scale.context + cell.num_heads, cell.seed)

    def judge(self, model: MTPForCausalLM) -> list[float]:
        """Nats per byte of each head."""
        longest = self.scale.context + max(self.scale.heads)
        windows = spread_windows(self._corpus.held_out, longest, _HELD_OUT_WINDOWS)
        return held_out_losses(
            model, windows[:, : self.scale.context + model.config.num_future_tokens], self.scale.batch_size
        )

    def measure(self, cell: Cell, model: MTPForCausalLM, folder: Path) -> dict[str, Any]:
        """Bytes per pass and speedups; keeps the model in `folder`, as the server loads it."""
        extra, count = self.scale.extra, cell.num_heads - 1
        windows = spread_windows(self._corpus.held_out, extra["prompt"] + extra["written"], extra["prompts"])
        prompts = windows[:, : extra["prompt"]].tolist()
        timed = Timed(model)
        own = timed.speculative(prompts, extra["written"])
        texts = rank_continuations(model, prompts, own.tokens)
        given = rank_continuations(model, prompts, windows[:, extra["prompt"] :].tolist())
        save_model(model, byte_tokenizer(), measure_accuracies(texts) if texts else (), folder)
        return {
            "bytes_per_pass": own.tokens_per_pass,
            "bytes_per_pass_of_given_text": measured_tau(given, [(0,) * d for d in range(1, count + 1)])[0]
            if given
            else 1.0,
            "speedup_alone": timed.speedup(prompts[:1], extra["written"], extra["rounds"]),
            "speedup_batch": timed.speedup(prompts[: extra["batch"]], extra["written"], extra["rounds"]),
            "distinct_share": distinct_share(own.tokens),
        }

    def report(self, results: Mapping[Cell, Measured]) -> Report:
        kinds = by_model(results)
        columns = {
            "bytes per pass": "bytes_per_pass",
            "of given text": "bytes_per_pass_of_given_text",
            "speedup, 1 text": "speedup_alone",
            f"speedup, {self.scale.extra['batch']} texts": "speedup_batch",
            "distinct 8-grams": "distinct_share",
        }
        rows = []
        for (shape, count), cells in kinds.items():
            measured = [spread([cell[key] for cell in cells]) for key in columns.values()]
            rows.append([shape, str(count), str(len(cells)), spread(_losses(cells), 3), *measured])
        table = markdown_table(["model", "n", "seeds", "next-byte loss (nats)", *columns], rows)
        lines = {
            name: [(count, sum(cell[key] for cell in cells) / len(cells)) for (_, count), cells in kinds.items()]
            for name, key in list(columns.items())[:4]
        }
        text = "\n\n".join([table, "\n".join(_claims(kinds))]).rstrip() + "\n"
        return Report(text, "Self-speculative decoding of bytes", "n", lines)


def python_corpus(folder: Path) -> Corpus:
    """All Python of the standard library but its tests, split by file. Raises DataError if there is none."""
    sides: dict[bool, list[bytes]] = {False: [], True: []}
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if file.is_file() and not _NOT_LIBRARY & set(inside.parts):
            sides[is_held_out(inside.as_posix(), _HELD_OUT_SHARE)].append(file.read_bytes())
    if not sides[False] or not sides[True]:
        raise DataError(f"{folder} has too little of the standard library's source; use a Python that comes with it.")
    training, held_out = (np.concatenate([encode_document(text, None) for text in sides[s]]) for s in (False, True))
    return Corpus(training, held_out, len(sides[False]) + len(sides[True]))


class Timed:
    """A model's two ways of decoding: with all of its heads, and without the extra ones."""

    def __init__(self, model: MTPForCausalLM) -> None:
        backbone, heads = backbone_of(model)
        self._count = model.config.num_extra_heads
        self._speculation = SelfSpeculation(backbone, heads)
        self._plain = SelfSpeculation(Backbone(_next_token_model(model)), None)

    def speculative(self, prompts: Prompts, num_tokens: int) -> Decoded:
        return self._speculation.decode(prompts, num_tokens, chain(self._count), self._count)

    def plain(self, prompts: Prompts, num_tokens: int) -> Decoded:
        return self._plain.decode(prompts, num_tokens)

    def speedup(self, prompts: Prompts, num_tokens: int, rounds: int) -> float:
        """Bytes per second over those of plain decoding; the median of rounds, in each of which both have a turn."""
        turns = {"plain": self.plain, "speculative": self.speculative}
        ratios = []
        for number in range(rounds + 1):  # the first one warms up
            order = list(turns) if number % 2 else reversed(turns)
            speeds = {name: turns[name](prompts, num_tokens).tokens_per_second for name in order}
            ratios.append(speeds["speculative"] / speeds["plain"])
        return median(ratios[1:])


def _next_token_model(model: MTPForCausalLM) -> MTPForCausalLM:
    """A copy without the extra heads."""
    config = without_extra_heads(copy.deepcopy(model.config))
    lean: MTPForCausalLM = MTPForCausalLM(config).to(model.device)
    weights = model.state_dict()
    lean.load_state_dict({name: weights[name] for name in lean.state_dict()})
    lean.eval()
    return lean


def distinct_share(texts: Prompts, length: int = 8) -> float:
    """Of all runs of `length` bytes within texts, how many are different ones: low where texts go round in circles."""
    runs = [tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)]
    return len(set(runs)) / len(runs)


def _losses(cells: Sequence[Measured]) -> list[float]:
    """Of the next byte, at the end."""
    return [cell["curve"][-1][1][0] for cell in cells]


def _claims(kinds: Mapping[tuple[str, int], list[Measured]]) -> list[str]:
    """Losses are no claim of the paper's, which counts programs that run."""
    claims, fewer = [], None
    for (_, count), cells in kinds.items():
        if count > 1:
            ahead = [cell["speedup_alone"] for cell in cells]
            claims.append(
                against(f"n = {count} is faster than plain decoding, one text (speedup less 1)", ahead, [1.0])
            )
        if fewer is not None:
            less, more = ([cell["bytes_per_pass_of_given_text"] for cell in some] for some in (fewer, cells))
            claims.append(
                against(f"n = {count} brings more bytes per pass of given text than the n before", more, less)
            )
        fewer = cells
    return claims
