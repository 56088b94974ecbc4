"""The estimate of what speculation saves, against engines whose times are known."""

from __future__ import annotations

import random
from math import exp

import pytest

from server.engine.cost import CostModel, Load
from server.engine.speedup import LEAST_STEPS, SpeedupMeter

NOTHING = (0.0, 0.0, 0.0, 0.0)


class Played:
    """An engine that takes 1 ms and 0.05 ms a row, and a model of it that is wrong by `bias`."""

    def __init__(self, seed: int, *, bias: float = 1.0, noise: float = 0.08) -> None:
        self.source, self.noise = random.Random(seed), noise
        self.cost = CostModel()
        self.cost.run.measure([(1, bias * self.seconds(1)), (512, bias * self.seconds(512))])
        self.meter = SpeedupMeter(self.cost)
        self.plain = self.taken = 0.0

    @staticmethod
    def seconds(rows: int) -> float:
        return 0.00095 + 0.00005 * rows

    def step(self, batch: int, nodes: int, accepted: int, *, is_control: bool = False, prompt_rows: int = 0) -> None:
        nodes, accepted = (0, 0) if is_control else (nodes, accepted)
        load = Load(batch + prompt_rows, prompt_rows, batch, NOTHING, NOTHING)
        draft = 0.0003 if nodes else 0.0
        noise = exp(self.source.gauss(0, self.noise))
        taken = noise * (self.seconds(load.num_rows + nodes) + draft)
        node_seconds = self.cost.run.seconds(load.num_rows + nodes) - self.cost.run.seconds(load.num_rows) + draft
        plain = self.meter.plain(load, taken, node_seconds, is_control=is_control)
        self.meter.add(load, taken, plain, accepted, is_settled=is_control)
        self.taken += taken
        self.plain += self.seconds(load.num_rows) + accepted / batch * self.seconds(batch)

    def play(self, steps: int, batch: int, *, prompts: bool = False) -> None:
        for i in range(steps):
            accepted = sum(self.source.random() < 0.5 for _ in range(batch))
            rows = 100 if prompts and i % 7 == 0 else 0
            self.step(batch, 3 * batch, accepted, is_control=self.source.random() < 0.02, prompt_rows=rows)

    @property
    def truth(self) -> float:
        return self.plain / self.taken


@pytest.mark.parametrize("bias", [0.8, 1.0, 1.25])
@pytest.mark.parametrize(("batch", "prompts"), [(1, False), (16, False), (4, True)])
def test_the_ratio_is_found_though_the_model_is_wrong(bias: float, batch: int, prompts: bool) -> None:
    for seed in range(5):
        played = Played(seed, bias=bias)
        played.play(6000, batch, prompts=prompts)
        assert played.meter.speedups()[-1].ratio == pytest.approx(played.truth, rel=0.05)


def test_the_interval_holds_the_truth_mostly() -> None:
    held = 0
    for seed in range(60):
        played = Played(seed)
        played.play(600, 2)
        found = played.meter.speedups()[-1]
        held += found.low <= played.truth <= found.high
        assert found.low < found.ratio < found.high
    assert held >= 54


def test_batch_sizes_are_told_apart() -> None:
    played = Played(0, noise=0.0)
    played.play(400, 1)
    for _ in range(400):
        played.step(32, 64, 0)
    one, crowd, everything = played.meter.speedups()
    assert (one.batch, crowd.batch, everything.batch) == ("1", "17-32", "all")
    assert one.ratio > 1 > crowd.ratio
    assert crowd.ratio < everything.ratio < one.ratio


def test_plain_steps_neither_save_nor_lose() -> None:
    played = Played(0, noise=0.0)
    for _ in range(100):
        played.step(4, 0, 0)
    assert [found.ratio for found in played.meter.speedups()] == pytest.approx([1.0, 1.0])


def test_little_is_nothing_to_speak_of() -> None:
    played = Played(0)
    played.play(int(LEAST_STEPS) // 2, 1)
    assert played.meter.speedups() == ()


def test_a_step_that_something_else_hit_counts_for_nothing() -> None:
    played = Played(0, noise=0.0)
    played.play(300, 1)
    before = played.meter.speedups()[0].ratio
    load = Load(1, 0, 1, NOTHING, NOTHING)
    plain = played.meter.plain(load, 1.0, 0.0, is_control=False)
    for is_settled in (False, True):
        assert played.meter.add(load, 1.0, plain, 1, is_settled=is_settled) < -0.9
    assert played.meter.speedups()[0].ratio == before
