"""The comparison of tree sizes, with made-up servers in the place of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import fake_server, trees
from tests.bench.launch import Program


def test_servers_differ_by_their_flags_only() -> None:
    options = trees.parse(["--model", "m", "--heads", "h", "--", "--num-threads", "1"])
    commands = [program.command for program in trees.programs(options)]
    assert [command[command.index("h") + 1 : -2] for command in commands] == [
        (),
        ("--static-trees", "--num-nodes", "63"),
    ]


def test_every_category_has_a_rounds_worth_of_prompts() -> None:
    sizes = {name: len(set(prompts)) for name, prompts in trees.read_categories(trees.CATEGORIES).items()}
    assert len(sizes) == 6
    assert min(sizes.values()) >= 4


def test_other_prompts_are_one_category(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (plan,) = trees.plans(trees.parse(["--prompts", str(tmp_path / "prompts.txt")])).values()
    assert [prompt.user for prompt in plan.prompts] == ["one", "two"]


def test_sizes_share_a_server_and_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = (sys.executable, fake_server.__file__)
    monkeypatch.setattr(trees, "programs", lambda options: [Program(name, fake) for name in ("dynamic", "static")])
    (tmp_path / "prompts.txt").write_text("one\n")
    path = tmp_path / "bench.json"
    trees.main(["--nodes", "2,5", "--rounds", "1", "--prompts", str(tmp_path / "prompts.txt"), "--json", str(path)])
    (summary,) = json.loads(path.read_text())["summaries"].values()
    assert [item["side"] for item in summary] == ["plain", "dynamic", "static 2", "static 5"]
    assert all(set(item["ratios"]) == {"static", "plain"} for item in summary)
    assert "| static 5 |" in capfd.readouterr().out


def test_what_is_asked_of_each_side() -> None:
    servers = trees.Field(
        {"dynamic": None, "static": None}, [trees.Side("dynamic", 1, "m"), trees.Side("static", 2, "m")]
    )  # type: ignore[dict-item]
    found = trees.sides(servers, [4])
    assert [(side.port, side.extra) for side in found.sides] == [
        (1, {"speculation": {"mode": "off"}}),
        (1, {}),
        (2, {"speculation": {"max_nodes": 4}}),
    ]
