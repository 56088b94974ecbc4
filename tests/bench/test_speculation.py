"""`make bench`'s command line, against a made-up server."""

from __future__ import annotations

import json

import pytest

from tests.bench.fake_server import CHUNKS, fake_server
from tests.bench.speculation import main


def test_the_command_compares_tree_sizes_with_plain_decoding(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2,8", "--concurrency", "1,2", "--rounds", "1", "--json", str(tmp_path / "bench.json")]
    options += ["--temperature", "0.7", "--top-p", "0.9"]
    with fake_server() as (port, bodies):
        main(["--port", str(port), *options])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(item["concurrency"], item["side"]) for item in written["summaries"]] == [
        (level, side) for level in (1, 2) for side in ("plain", "medusa, 2 nodes", "medusa, 8 nodes")
    ]
    assert {body["model"] for body in bodies} == {"served"}
    assert {body["speculation"].get("max_nodes") for body in bodies} == {None, 2, 8}
    assert {(body["temperature"], body["top_p"], body["seed"]) for body in bodies} == {(0.7, 0.9, 1)}
    output = capsys.readouterr().out
    assert written["machine"]["cpu"] in output
    assert written["sampling"]["temperature"] == 0.7
    assert "temperature 0.7, top_p 0.9" in output
    assert "| medusa, 8 nodes |" in output
    assert "no heads" not in output


def test_a_server_without_heads_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server((*CHUNKS[:3], CHUNKS[3] | {"metrics": None})) as (port, _):
        main(["--port", str(port), "--concurrency", "1", "--rounds", "1"])
    assert "has no heads" in capsys.readouterr().out


def test_the_command_fails_with_a_sentence() -> None:
    with fake_server(status=503) as (port, _), pytest.raises(SystemExit, match="bench: plain answered 503"):
        main(["--port", str(port)])
