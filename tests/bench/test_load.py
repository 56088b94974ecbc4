"""The load bench's command line, with a made-up server in the place of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import fake_server, jump, load
from tests.bench.launch import Program
from tests.bench.load import Told, counted
from tests.bench.report import Summary

FAKE = Program("fake", (sys.executable, fake_server.__file__))


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "program", lambda options, heads: FAKE)


def told(counted: float | None, index: int = 0) -> Told:
    return Told("medusa", 4, index, counted, (1.25, 1.5, 2.0), 0.25)


def summary(side: str, ratio: float, num_same_text: int | None) -> Summary:
    return Summary(side, 4, 100.0 * ratio, 25.0, {"plain": (1.0, ratio, 3.0)}, 0.1, 2.5, num_same_text, 8, 50, 9, 0.1)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_the_server_is_asked_both_ways_and_says_what_it_thinks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.json"
    load.main(["--concurrency", "1,8", "--rounds", "2", "--requests", "3", "--json", str(path)])
    written = json.loads(path.read_text())
    order = [(item["concurrency"], item["index"], item["side"]) for item in written["rounds"]]
    assert order[:4] == [(1, 0, "plain"), (1, 0, "medusa"), (1, 1, "medusa"), (1, 1, "plain")]
    assert [len(item["samples"]) for item in written["rounds"]] == [4] * 4 + [24] * 4
    assert [(item["concurrency"], item["index"], item["side"]) for item in written["told"]] == order
    assert all(item["counted"] == pytest.approx(1.5) for item in written["told"])
    assert [item["gauge"] for item in written["told"]] == [[1.125, 1.25, 1.5]] * 4 + [None] * 4
    assert written["program"]["name"] == "fake"
    assert written["phases"] == []
    rows = [cells(line) for line in capfd.readouterr().out.splitlines() if line.strip().startswith("|")]
    assert [row[0] for row in rows] == ["streams", "-" * len(rows[1][0]), "1", "8"]
    assert [row[5:] for row in rows[2:]] == [
        ["1.50 (1.50..1.50)", "1.25 (1.12..1.50)", "25% / 25%", "2.33", "8/8"],
        ["1.50 (1.50..1.50)", "-", "25% / 25%", "2.33", "48/48"],
    ]


def test_the_table_has_what_was_measured_beside_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    summaries = [summary("plain", 1.0, None), summary("medusa", 2.0, 7)]
    load.output().print(load.table(summaries, [told(1.5), told(2.5, 1), told(1.75, 2)]))
    row = cells(capsys.readouterr().out.strip().splitlines()[-1])
    assert row[:4] == ["4", "100.0", "medusa", "200.0"]
    assert row[4:] == ["2.00 (1.00..3.00)", "1.75 (1.50..2.50)", "1.50 (1.25..2.00)", "- / 25%", "2.50", "7/8"]


def test_what_was_not_said_of_every_round_is_not_summed_up() -> None:
    assert counted([told(1.0), told(3.0), told(2.0)]) == (1.0, 2.0, 3.0)
    assert counted([told(1.0), told(None)]) is None
    assert counted([]) is None


def test_a_crowd_comes_and_goes_for_each_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PHASE_SECONDS", 0.3), ("WINDOW_SECONDS", 0.05), ("MANY", 4)):
        monkeypatch.setattr(jump, name, value)
    path = tmp_path / "load.json"
    load.main(["--concurrency", "1", "--rounds", "1", "--jump", "--json", str(path)])
    phases = json.loads(path.read_text())["phases"]
    assert [(item["side"], item["num_clients"]) for item in phases] == [
        (side, clients) for side in ("plain", "medusa") for clients in (2, 4, 2)
    ]
    assert "settled after, s" in capfd.readouterr().out


def test_mixed_requests_differ_in_length_and_are_the_same_for_both_sides() -> None:
    options = load.parse(["--mixed", "--concurrency", "2", "--rounds", "1", "--max-tokens", "100"])
    with fake_server.fake_server() as (port, bodies):
        load.asyncio.run(load.measured(load.field(port, options), options))
    asked = bodies[32:]  # behind both sides' warming up
    prompts = [(body["messages"], body["max_tokens"]) for body in asked]
    assert sorted(map(str, prompts[:4])) == sorted(map(str, prompts[4:]))
    assert len({limit for _, limit in prompts}) > 2
    assert {body["min_tokens"] for body in asked} == {4}
    assert all(message[0]["role"] == "system" for message, _ in prompts)


def arguments(*options: str) -> list[str]:
    """What follows `serve` and its usual flags."""
    command = ORIGINAL(load.parse(options), "heads").command
    return list(command[command.index("--no-access-log") + 1 :])


ORIGINAL = load.program


def test_the_server_has_room_for_all_streams() -> None:
    assert arguments("--model", "m", "--", "--num-threads", "1") == [
        *("m", "--max-num-seqs", "128", "--heads", "heads", "--num-threads", "1")
    ]
    assert arguments("--concurrency", "1,2")[2] == "64"
    assert "--no-prefix-cache" in arguments("--mixed")
    assert "--no-prefix-cache" not in arguments("--jump")


def test_random_heads_are_there_while_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "resolve", Path)
    monkeypatch.setattr(load, "write_random_heads", lambda folder, model: (folder / str(model)).touch())
    with load.chosen_heads(load.parse(["--random-heads", "--model", "m"])) as heads:
        assert (Path(str(heads)) / "m").exists()
    assert not Path(str(heads)).exists()
    with load.chosen_heads(load.parse(["--heads", "h"])) as heads:
        assert heads == "h"


def test_heads_are_named_or_random(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.parse(["--random-heads", "--heads", "h"])
    assert "name one of them" in capsys.readouterr().err


def test_the_command_fails_with_a_sentence(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    ends = Program("fake", (sys.executable, "-c", "raise SystemExit(2)"))
    monkeypatch.setattr(load, "program", lambda options, heads: ends)
    with pytest.raises(SystemExit, match="bench: fake exited with code 2"):
        load.main([])
