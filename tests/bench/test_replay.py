"""Policies on made-up recordings where the answer is known."""

from __future__ import annotations

import pytest

from tests.bench.costs import FLOOR_SECONDS, cost_model, floor_costs
from tests.bench.made_up import DEPTH, chain, chains, star
from tests.bench.replay import Dynamic, Oracle, Plain, Policy, Speed, Static, best_choices, replay
from tests.bench.traces import Trace

MANY = 10_000  # rows
TOKENS = 20_000
NOISE = 0.02


def run(policy: Policy, texts: list[Trace], floor: int, batch: int = 1, num_tokens: int = TOKENS) -> Speed:
    return replay(policy, cost_model(floor_costs(floor)), texts, batch, num_tokens)


def dynamic(floor: int, *, num_nodes: int = DEPTH, max_rows: int = MANY, control_share: float = 0.0) -> Dynamic:
    return Dynamic(cost_model(floor_costs(floor)), num_nodes, max_rows, control_share)


def statics(texts: list[Trace]) -> list[Static]:
    return [Static(texts, size, MANY) for size in range(1, DEPTH + 1)]


@pytest.mark.parametrize(("num_nodes", "tau"), [(1, 2), (2, 3), (3, 3), (4, 3)])
def test_a_tree_brings_what_is_right_in_it(num_nodes: int, tau: float) -> None:
    texts = [[chain(0.5, 2)] * 60]
    speed = run(Static(texts, num_nodes, MANY), texts, floor=MANY, num_tokens=600)
    assert speed.tau == tau
    assert speed.nodes_per_request == num_nodes
    assert speed.tokens_per_second == pytest.approx(tau / FLOOR_SECONDS, rel=1e-3)


def test_a_step_costs_its_rows() -> None:
    texts = [[chain(0.5, 2)] * 60]
    speed = run(Static(texts, 2, MANY), texts, floor=1, batch=3, num_tokens=900)
    assert speed.tokens_per_second == pytest.approx(3 * 3 / (3 * 3 * FLOOR_SECONDS), rel=1e-3)


def test_the_best_shape_follows_depths_and_ranks() -> None:
    first, second = star((0.4, 0.3), 0), star((0.4, 0.3), 1)
    assert best_choices([[chain(0.9, 4)]], 3) == ((0,), (0, 0), (0, 0, 0))
    assert best_choices([[first, second, second, first, first]], 2) == ((0,), (1,))
    assert best_choices([[star((0.1,), None)]], 1) == ((0,),)


def test_a_right_token_outside_the_shape_is_not_accepted() -> None:
    texts = [[star((0.4, 0.3), right)] for right in (0, 0, 0, 1)]
    assert run(Static(texts, 1, MANY), texts, floor=MANY).tau == pytest.approx(1.75, abs=0.01)
    assert run(Static(texts, 2, MANY), texts, floor=MANY).tau == pytest.approx(2)


def test_where_rows_are_free_many_nodes_are_best() -> None:
    texts = chains((0.9, 0.3))
    speeds = [run(policy, texts, floor=MANY).tokens_per_second for policy in (Plain(), *statics(texts))]
    assert speeds == sorted(speeds)
    best = run(dynamic(MANY), texts, floor=MANY)
    assert best.nodes_per_request == DEPTH
    assert best.tokens_per_second == pytest.approx(speeds[-1], rel=NOISE)


@pytest.mark.parametrize("batch", [1, 16])
def test_where_each_row_costs_a_token_none_are(batch: int) -> None:
    texts = chains((0.9, 0.3))
    plain = run(Plain(), texts, floor=1, batch=batch).tokens_per_second
    assert all(run(policy, texts, 1, batch).tokens_per_second < 0.9 * plain for policy in statics(texts))
    found = run(dynamic(1), texts, floor=1, batch=batch)
    assert (found.nodes_per_request, found.tokens_per_second) == (0, pytest.approx(plain))


@pytest.mark.parametrize(
    ("batch", "floor"),
    [
        *((batch, floor) for batch in (1, 4, 16, 64) for floor in (2, 8, 32)),
    ],
)
def test_the_controller_is_never_worse_than_a_fixed_tree_and_never_better_than_an_oracle(
    batch: int, floor: int
) -> None:
    texts = chains((0.9, 0.5, 0.1))
    fixed = max(run(policy, texts, floor, batch).tokens_per_second for policy in (Plain(), *statics(texts)))
    best = run(Oracle(cost_model(floor_costs(floor)), MANY), texts, floor, batch).tokens_per_second
    found = run(dynamic(floor), texts, floor, batch).tokens_per_second
    assert fixed * (1 - NOISE) < found < best * (1 + NOISE)


def test_trees_that_follow_what_is_known_beat_any_fixed_one() -> None:
    texts = chains((0.95, 0.05))
    fixed = max(run(policy, texts, 16, 8).tokens_per_second for policy in statics(texts))
    assert run(dynamic(16), texts, 16, 8).tokens_per_second > 1.1 * fixed


def test_the_oracle_takes_what_is_right_and_nothing_else() -> None:
    texts = [[chain(0.5, 1), chain(0.5, 0), chain(0.5, 3)] * 20]
    speed = run(Oracle(cost_model(floor_costs(MANY)), MANY), texts, MANY)
    assert speed.nodes_per_request == speed.tau - 1 > 0
    assert speed.asking == 0


@pytest.mark.parametrize(("max_rows", "nodes"), [(4, 0), (6, 0.5), (8, 1), (99, 4)])
def test_rows_are_never_exceeded(max_rows: int, nodes: float) -> None:
    texts = [[chain(0.9, 4)] * 60]
    for policy in (Static(texts, 4, max_rows), dynamic(MANY, max_rows=max_rows)):
        assert run(policy, texts, MANY, batch=4, num_tokens=2000).nodes_per_request == nodes


def test_control_steps_are_plain() -> None:
    texts = [[chain(0.9, 4)] * 60]
    speed = run(dynamic(MANY, control_share=0.25), texts, MANY)
    assert speed.asking == pytest.approx(0.75, abs=0.03)
    assert speed.nodes_per_request == pytest.approx(3, abs=0.12)
