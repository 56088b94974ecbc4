"""Recordings on disk, and which of the guesses were right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.client import BenchError
from tests.bench.made_up import chain, star
from tests.bench.traces import Step, Traces, read_traces, right_path, write_traces

TREE = Step(7, (-1, 0, -1, 0, 3, 2), (0.6, 0.5, 0.3, 0.2, 0.1, 0.05), (0, 3, 4))


@pytest.mark.parametrize(
    ("came", "path"),
    [((5, 7, 8), (0, 3, 4)), ((5, 7), (0, 3)), ((5, 6, 8), (0, 1)), ((6, 8), (2, 5)), ((9,), ()), ((), ())],
)
def test_the_path_that_came_true(came: tuple[int, ...], path: tuple[int, ...]) -> None:
    assert right_path((5, 6, 6, 7, 8, 8), TREE.parents, came) == path


def test_ranks_are_places_among_siblings() -> None:
    assert TREE.right_ranks == (0, 1, 0)
    assert star((0.4, 0.3, 0.2), 2).right_ranks == (2,)
    assert chain(0.5, 3).right_ranks == (0, 0, 0)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, Traces({"model": "m"}, [[TREE, chain(0.5, 2)], [star((0.5,), None)]]))
    found = read_traces(path)
    assert found.about == {"model": "m"}
    assert [[(step.num_keys, step.parents, step.values, step.right) for step in text] for text in found.texts] == [
        [(7, TREE.parents, TREE.values, (0, 3, 4)), (10, (-1, 0, 1, 2), (0.5, 0.25, 0.125, 0.0625), (0, 1))],
        [(10, (-1,), (0.5,), ())],
    ]


@pytest.mark.parametrize("content", ["", "no JSON", '{"model": "m"}\n{"text": 0}\n', '{"model": "m"}\n[1]\n'])
def test_another_file_is_refused_with_a_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"holds no traces .*--record makes such a file"):
        read_traces(path)


def test_a_recording_of_nothing_is_refused(tmp_path: Path) -> None:
    write_traces(tmp_path / "empty", Traces({}, []))
    with pytest.raises(BenchError, match="holds no drafts"):
        read_traces(tmp_path / "empty")
