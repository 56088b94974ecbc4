"""Recorded drafts: what was guessed after each token of a text, how sure that was, and what of it came.

They are recorded while the model decodes plainly and its drafter is asked at every token nevertheless. So there is a
draft wherever another policy may come to stand, and any number of its nodes can be taken afterwards.

A file has a line that says what was recorded, with what steps cost there, then a line for each draft:

    {"text": 0, "keys": 41, "parents": [-1, 0, -1], "values": [0.6, 0.4, 0.1], "right": [0, 1]}

Invariants:
- nodes are in the order of their values, best first, and a node comes after its parent, -1 is the root: so the first n
  of them are the tree of n nodes, depths follow from the parents, and ranks from the order among siblings;
- a value is the calibrated probability that a node and all its ancestors are right, as it was when they were guessed;
- `right` is the path of those that were, from depth 1 on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.bench.client import BenchError

DIGITS = 4  # of a value


@dataclass(frozen=True, eq=False)
class Step:
    """The draft after one token of a text."""

    num_keys: int  # tokens before that one
    parents: tuple[int, ...]
    values: tuple[float, ...]
    right: tuple[int, ...]

    @cached_property
    def right_ranks(self) -> tuple[int, ...]:
        """Of the nodes that were right, from depth 1 on: each one's place among its siblings."""
        return tuple(self.parents[:node].count(self.parents[node]) for node in self.right)


Trace = Sequence[Step]  # of one text


@dataclass(frozen=True, slots=True)
class Traces:
    """A recording. `about` is what its first line says."""

    about: Mapping[str, Any]
    texts: Sequence[Trace]


def right_path(tokens: Sequence[int], parents: Sequence[int], came: Sequence[int]) -> tuple[int, ...]:
    """The nodes that are the beginning of what came."""
    nodes = {pair: node for node, pair in enumerate(zip(parents, tokens, strict=True))}
    path: list[int] = []
    for token in came:
        node = nodes.get((path[-1] if path else -1, token))
        if node is None:
            break
        path.append(node)
    return tuple(path)


def write_traces(path: Path, traces: Traces) -> None:
    lines: list[Mapping[str, Any]] = [traces.about]
    for text, steps in enumerate(traces.texts):
        lines += [_line(text, step) for step in steps]
    path.write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines), encoding="utf-8")


def _line(text: int, step: Step) -> dict[str, Any]:
    values = [round(value, DIGITS) for value in step.values]
    return {"text": text, "keys": step.num_keys, "parents": step.parents, "values": values, "right": step.right}


def read_traces(path: Path) -> Traces:
    """Raises BenchError for a file of another kind, or one without drafts."""
    try:
        about, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        texts = [list(steps) for steps in _texts(lines)]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} holds no traces ({error}); --record makes such a file") from error
    if not texts:
        raise BenchError(f"{path} holds no drafts; record more tokens, of a model that has heads")
    return Traces(about, texts)


def _texts(lines: Iterable[Mapping[str, Any]]) -> Iterator[Iterator[Step]]:
    for _, group in groupby(lines, key=lambda line: line["text"]):
        yield (
            Step(line["keys"], tuple(line["parents"]), tuple(line["values"]), tuple(line["right"])) for line in group
        )
