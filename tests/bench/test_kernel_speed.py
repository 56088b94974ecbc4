"""The kernel benchmark on a tiny model, its statistics on made-up times, and that runs do what they are timed for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.attention import Scoring, tree_attention
from models.kernels.build import KernelError
from models.kernels.cpu import PackedLinear
from models.kernels.reference import linear, quantize_weight
from tests.bench import kernel_speed
from tests.bench.kernel_runs import Sizes, attention_call, linear_call, memory_reads, one_request, scratch
from tests.bench.kernel_speed import (
    Effort,
    alternate,
    attention_speed,
    linear_speed,
    measure,
    publish,
    ratio,
    requests,
    sample,
)

TINY = Sizes(layers=2, hidden=64, inner=96, heads=2, kv_heads=1, dim=32, vocab=160)
SHORT = Effort(rounds=2, seconds=0.0, read_bytes=1 << 16, cached_bytes=1 << 14)


def test_the_sizes_are_those_of_the_default_model() -> None:
    weights = sum(outputs * inputs for outputs, inputs in Sizes().shapes)
    assert weights == 134_479_872  # SmolLM2-135M has 134,515,008 parameters, of which norms take 35,136
    assert len(Sizes().shapes) == 30 * 4 + 1
    assert Sizes().weight_bytes == weights * 34 // 32
    head = 49152 * 576
    assert Sizes(bits=4).weight_bytes == (weights - head) * 20 // 32 + head * 34 // 32


@pytest.mark.parametrize("bits", [8, 4])
def test_a_measurement_has_every_number_and_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    found = measure(replace(TINY, bits=bits), (4, 2), (5, 9), SHORT)
    assert [row.rows for row in found.linear] == [1, 2, 4]
    assert (found.linear[0].to_one_row, found.linear[0].model_to_one_row) == (1, 1)
    assert [(item.context, item.rows) for item in found.attention] == [(5, 1), (5, 8), (9, 1), (9, 8)]
    assert {len(seconds) for seconds in found.seconds.values()} == {2}
    assert all(value > 0 for seconds in found.seconds.values() for value in seconds)
    publish(found, tmp_path / "kernels.json")
    printed = capsys.readouterr().out
    assert str(found.machine) in printed
    assert printed.count("\n|") == 2 * 2 + 3 + 4  # heads, lines under them, rows
    written = json.loads((tmp_path / "kernels.json").read_text())["report"]
    assert written["linear"][2]["seconds"] == found.linear[2].seconds
    assert written["seconds"].keys() == found.seconds.keys()


def test_rounds_run_forth_and_back() -> None:
    heard: list[str] = []
    runs = {name: lambda name=name: heard.append(name) for name in "abc"}
    seconds = alternate(runs, SHORT)
    assert "".join(heard) == "abc" + "abc" + "cba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_sample_is_the_mean_of_the_passes_that_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.03, 0.06, 0.12])
    monkeypatch.setattr(kernel_speed.time, "perf_counter", lambda: next(clock))
    assert sample(lambda: None, 0.1) == pytest.approx(0.04)


def test_speeds_by_hand() -> None:
    seconds = {
        "read: x": [0.5, 1.0, 2.0],
        "ours: 1": [1.0, 2.0, 5.0],
        "ours: 4": [1.5, 4.0, 5.0],
        "torch: 4": [3.0, 8.0, 5.0],
        "model: 1": [1.0, 1.0, 1.0],
        "model: 4": [3.0, 2.0, 2.0],
        "attention: 5, 8": [3.2, 1.6, 6.4],
        "torch attention: 5, 8": [6.4, 6.4, 6.4],
    }
    assert ratio(seconds, "ours: 4", "ours: 1") == 1.5
    row = linear_speed(seconds, TINY, 4, 2 * TINY.weight_bytes, "read: x")
    assert (row.seconds, row.tokens_per_second, row.weight_bytes_per_second) == (4.0, 1.0, TINY.weight_bytes / 4)
    assert (row.to_one_row, row.torch_ratio, row.model_seconds, row.model_to_one_row) == (1.5, 2.0, 2.0, 2.0)
    assert row.share_of_memory == pytest.approx((1 / 3) / 2)
    item = attention_speed(seconds, TINY, 5, 8, requests=2)
    assert (item.seconds, item.torch_ratio) == (1.6, 2.0)
    assert item.seconds_per_row_and_layer == pytest.approx(0.1)


def test_requests_have_more_keys_and_values_than_caches_hold() -> None:
    bytes_per_token = 2 * 1 * 32 * 2 * 2
    assert requests(TINY, 10, Effort(1, cached_bytes=10 * bytes_per_token)) == 1
    assert requests(TINY, 10, Effort(1, cached_bytes=10 * bytes_per_token + 1)) == 2


def test_every_way_reads_all_of_the_memory() -> None:
    reads = {way.removeprefix("read: "): read() for way, read in memory_reads(1 << 16).items()}
    assert len(reads) == 5
    pair = torch.ones(2).view(torch.int64)
    assert (int(reads["torch.sum"]) - (1 << 13) * int(pair)) % (1 << 64) == 0  # it wraps around
    assert sum(reads["numpy.dot"]) == 1 << 14
    assert {int(value) for value in reads["numpy.max"]} == {int(pair)}


def test_the_calls_compute_what_they_are_timed_for() -> None:
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    run, kept = linear_call(PackedLinear(weight), x)
    run()
    torch.testing.assert_close(scratch(3, 48), linear(x, *quantize_weight(weight)), rtol=1e-4, atol=1e-4)
    assert kept is not None

    query, keys, values = torch.randn(4, 2, 32), torch.randn(13, 1, 32), torch.randn(13, 1, 32)
    batch = one_request(2, 7, 1, 3)
    attend, kept = attention_call(query, keys, values, batch)
    attend()
    wanted = tree_attention(query, keys, values, batch, Scoring(32**-0.5))
    torch.testing.assert_close(scratch(4, 64).view(4, 2, 32), wanted, rtol=1e-4, atol=1e-5)
    assert batch.positions.tolist() == [7, 8, 8, 8]


def test_no_kernels_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("There is no C compiler (cc): install gcc.")

    monkeypatch.setattr(kernel_speed, "measure", refuse)
    with pytest.raises(SystemExit, match="bench: There is no C compiler"):
        kernel_speed.main(["--rows", "1"])
