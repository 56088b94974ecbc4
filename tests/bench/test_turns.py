"""Who is measured when."""

from __future__ import annotations

from functools import partial

from tests.bench.turns import by_turns


def test_rounds_go_forth_and_back() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return len(order)

    found = by_turns({name: partial(run, name) for name in "abc"}, 3)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert found == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
