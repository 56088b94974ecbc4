"""The simulator's command line, on a made-up recording."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import policies
from tests.bench.costs import floor_costs
from tests.bench.made_up import chains
from tests.bench.traces import Traces, write_traces

QUICK = ["--tokens", "2000", "--batch", "1,8", "--static", "1,4", "--control-share", "0"]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl"
    write_traces(path, Traces({"model": "made up", "costs": floor_costs(1)}, chains((0.9, 0.3))))
    return path


def test_a_table_everything_in_a_file_and_a_picture(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, picture = tmp_path / "speeds.json", tmp_path / "speeds.svg"
    policies.main([str(recording), "--floor", "1000", *QUICK, "--json", str(written), "--plot", str(picture)])
    found = json.loads(written.read_text())
    assert list(found["relative"]) == ["none", "static 1", "static 4", "dynamic", "oracle"]
    assert found["relative"]["none"] == {"1": 1.0, "8": 1.0}
    assert found["relative"]["static 4"]["8"] > found["relative"]["static 1"]["8"] > 1.4
    assert found["about"]["model"] == "made up"
    assert [(item["policy"], item["batch"]) for item in found["speeds"]][4:6] == [("oracle", 1), ("none", 8)]
    assert len(list(ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}polyline"))) == 5
    head, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("|")]
    assert [cell.strip() for cell in head.strip("| ").split("|")][-2:] == ["oracle", "nodes of dynamic"]
    assert [row.strip("| ").split()[0] for row in rows] == ["1", "8"]
    assert rows[0].strip("| ").split()[-1] == "4.0"


def test_costs_come_from_the_recording_or_a_file(recording: Path, tmp_path: Path) -> None:
    curve, written = tmp_path / "curve.json", tmp_path / "speeds.json"
    curve.write_text(json.dumps(floor_costs(1000)))
    fastest = []
    for options in ([], ["--curve", str(curve)]):
        policies.main([str(recording), *options, *QUICK, "--json", str(written)])
        fastest.append(json.loads(written.read_text())["relative"]["static 4"]["1"])
    assert fastest[0] < 1 < fastest[1]


def test_a_recording_can_be_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    made = Traces({"costs": floor_costs(1)}, chains((0.5,)))
    monkeypatch.setattr(policies, "resolve", Path)
    monkeypatch.setattr(policies, "record", lambda *given: asked.append(given) or made)
    path = tmp_path / "new.jsonl"
    policies.main(["--record", str(path), "--model", "m", "--heads", str(tmp_path), "--nodes", "16", *QUICK])
    ((model, heads, prompts, nodes, max_tokens),) = asked
    assert (model, heads, len(prompts), nodes, max_tokens) == (Path("m"), tmp_path, 16, 16, 96)
    assert path.read_text().count("\n") == 1 + 4 * 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["a.jsonl", "--record", "b"], "not allowed with"),
        (["a.jsonl", "--nodes", "8"], "--nodes is for --record"),
        (["a.jsonl", "--max-tokens", "8"], "--max-tokens is for --record"),
        (["--record", "b", "--nodes", "64"], "1 to 63"),
        (["a.jsonl", "--floor", "0"], "at least 1 row"),
        (["a.jsonl", "--floor", "9", "--curve", "c"], "not allowed with"),
        (["a.jsonl", "--control-share", "1"], "below 1"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        policies.parse(arguments)
    assert message in capsys.readouterr().err


def test_without_costs_the_command_fails_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, Traces({}, chains((0.5,), num_texts=1, num_steps=2)))
    with pytest.raises(SystemExit, match="bench: the recording says nothing of costs"):
        policies.main([str(path)])


def test_a_missing_recording_is_a_sentence() -> None:
    with pytest.raises(SystemExit, match=r"bench: .*No such file"):
        policies.main(["nowhere.jsonl"])
