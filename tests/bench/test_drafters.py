"""The comparison of drafters, with made-up servers in the place of all sides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import drafters, fake_server
from tests.bench.launch import Program


def test_sides_differ_by_their_flags_only() -> None:
    options = drafters.parse(["--model", "m", "--heads", "h", "--", "--num-threads", "1"])
    commands = [program.command for program in drafters.programs(options)]
    own = [command[command.index("h") + 1 : -2] for command in commands]
    assert own == [("--num-nodes", "0"), ("--no-ngram",), ("--heads", "none"), ()]
    assert {command[-2:] for command in commands} == {("--num-threads", "1")}


def test_the_texts_to_copy_have_lines() -> None:
    prompts = drafters.read_texts(drafters.COPYING)
    assert len(prompts) == 8
    assert all("\n" in prompt.user for prompt in prompts)


def test_the_command_measures_both_workloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = (sys.executable, fake_server.__file__)
    monkeypatch.setattr(drafters, "programs", lambda options: [Program(name, fake) for name in drafters.FLAGS])
    path = tmp_path / "bench.json"
    drafters.main(["--concurrency", "1", "--rounds", "1", "--json", str(path)])
    written = json.loads(path.read_text())
    assert list(written["summaries"]) == ["chat", "copying"]
    assert [item["side"] for item in written["summaries"]["copying"]] == list(drafters.FLAGS)
    assert capfd.readouterr().out.count("| heads, n-gram |") == 2


def test_one_workload_may_be_chosen() -> None:
    assert list(drafters.plans(drafters.parse(["--only", "copying"]))) == ["copying"]
