"""The command line as an operator sees it: processes, exit codes, one sentence on stderr."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import psutil
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from server import __version__
from server.__main__ import USAGE, main

HERE = Path(__file__).parent
RUN = """
import functools, sys
from server import launch
import small_workers
launch.EngineClient = functools.partial(launch.EngineClient, target=getattr(small_workers, sys.argv[1]))
from server.__main__ import main
code = main(sys.argv[2:])
assert "torch" not in sys.modules
sys.exit(code)
"""
ROOT = HERE.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "vocab_size": 256}))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE({char: id for id, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def started(worker: str, *argv: str, stdout: IO[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command with a small worker in place of the engine, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, worker, *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return line
    raise AssertionError(f"the process ended without saying {word!r}")


def check_gone(process: subprocess.Popen[str], children: list[psutil.Process]) -> None:
    assert process.wait(timeout=20) == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_a_signal_ends_it_cleanly(model: Path, signal_number: int) -> None:
    with started("echo", "serve", str(model), "--port", "0", "--served-model-name", "tiny") as process:
        url = read_until(process, "serving").split()[-1]
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 5}
        answer = httpx.post(f"{url}/completions", json=body).raise_for_status().json()
        assert answer["choices"][0]["text"] == "hello"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        os.killpg(process.pid, signal_number)
        check_gone(process, children)


def test_a_signal_while_the_model_loads_ends_it_cleanly(model: Path) -> None:
    with started("loading", "serve", str(model), "--port", "0") as process:
        read_until(process, "loading")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        check_gone(process, children)


@contextmanager
def streaming(process: subprocess.Popen[str], **body: object) -> Iterator[tuple[str, Iterator[str]]]:
    """The server's address, and the lines of a stream that has begun."""
    url = read_until(process, "serving").split()[-1].removesuffix("/v1")
    body = {"prompt": "hello", "stream": True, "max_tokens": 90, "ignore_eos": True, **body}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: {")
        yield url, lines


def last_of(lines: Iterator[str]) -> tuple[dict, str]:
    *_, event, done = lines
    return json.loads(event.removeprefix("data: ")), done


def test_open_streams_end_and_new_requests_are_refused_while_it_drains(model: Path) -> None:
    with started("steady", "serve", str(model), "--port", "0") as process, streaming(process) as (url, lines):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with httpx.Client(base_url=url) as client:
            assert [client.get(path).status_code for path in ("/ready", "/health", "/v1/models")] == [503, 200, 200]
            refused = client.post("/v1/completions", json={"prompt": "late"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        event, done = last_of(lines)
        assert (event["choices"][0]["finish_reason"], done) == ("length", "data: [DONE]")
        check_gone(process, [])


def test_what_is_open_after_the_time_to_drain_ends_as_an_error(model: Path) -> None:
    command = ("serve", str(model), "--port", "0", "--drain-seconds", "0.3")
    with started("steady", *command) as process, streaming(process, max_tokens=95_000) as (_, lines):
        process.send_signal(signal.SIGTERM)
        event, done = last_of(lines)
        assert (event["error"]["code"], done) == ("shutting_down", "data: [DONE]")
        check_gone(process, [])


def test_a_second_signal_ends_it_at_once(model: Path) -> None:
    with started("steady", "serve", str(model), "--port", "0") as process, streaming(process, max_tokens=95_000):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        started_at = time.monotonic()
        check_gone(process, children)
        assert time.monotonic() - started_at < 3


def test_the_access_log_is_json_on_stdout_and_knows_no_keys(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-one\nsk-two\n")
    log = tmp_path / "log"
    with (
        log.open("w") as stdout,
        started("echo", "serve", str(model), "--port", "0", "--api-key-file", str(keys), stdout=stdout) as process,
    ):
        assert read_until(process, "API keys").split()[-1] == "2"
        url = read_until(process, "serving").split()[-1]
        headers = {"Authorization": "Bearer sk-two", "X-Request-Id": "trace-7"}
        assert httpx.post(f"{url}/completions", json={"prompt": "hello"}).status_code == 401
        answer = httpx.post(f"{url}/completions", json={"prompt": "hello", "max_tokens": 5}, headers=headers)
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "trace-7")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "sk-" not in process.stderr.read()
    refused, done = [json.loads(line) for line in log.read_text().splitlines()]
    assert (refused["status"], refused["error"], refused["key"]) == (401, "invalid_api_key", None)
    assert (done["status"], done["request_id"], done["key"], done["completion_tokens"]) == (200, "trace-7", "key-2", 5)
    assert "sk-" not in log.read_text()


def certificate(folder: Path) -> tuple[str, str]:
    made, key = folder / "cert.pem", folder / "key.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject)
    subprocess.run([*command, "-keyout", str(key), "-out", str(made)], check=True, capture_output=True)
    return str(made), str(key)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_it_speaks_tls(model: Path, tmp_path: Path) -> None:
    made, key = certificate(tmp_path)
    flags = ("serve", str(model), "--port", "0", "--ssl-certfile", made)
    with started("echo", *flags, "--ssl-keyfile", key) as process:
        url = read_until(process, "serving").split()[-1]
        assert url.startswith("https://")
        assert httpx.get(f"{url}/models", verify=ssl.create_default_context(cafile=made)).status_code == 200
    assert "Cannot use the certificate" in fail(*flags)
    assert "--ssl-keyfile needs --ssl-certfile" in fail("serve", str(model), "--port", "0", "--ssl-keyfile", key)


def fail(*argv: str, worker: str = "echo") -> str:
    """The command's last line on stderr; it must leave with 2, and without a traceback."""
    with started(worker, *argv) as process:
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
        assert process.wait(timeout=20) == 2, lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_what_an_operator_got_wrong_is_one_sentence(model: Path, tmp_path: Path) -> None:
    assert fail("serve", "--prot", "1").startswith("error: Cannot understand the command line")
    assert "nothing is no file or folder" in fail("serve", "nothing", "--port", "0")
    assert "There are no heads at /nowhere" in fail("serve", str(model), "--port", "0", "--heads", "/nowhere")
    save_file({"0.0.linear.weight": torch.zeros(4, 4)}, tmp_path / "heads.safetensors")
    heads = str(tmp_path / "heads.safetensors")
    assert "are for hidden size 4, but the model has 8" in fail("serve", str(model), "--port", "0", "--heads", heads)
    (model / "config.json").write_text('{"model_type": "perceptron"}')
    assert "no causal language model of the kind 'perceptron'" in fail("serve", str(model), "--port", "0")


def test_a_taken_port_is_one_sentence(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1:{port}" in fail("serve", str(model), "--port", str(port))
    assert "Cannot listen on no.such.host.invalid" in fail("serve", str(model), "--host", "no.such.host.invalid")


def test_an_engine_that_cannot_start_is_one_sentence(model: Path) -> None:
    assert fail("serve", str(model), "--port", "0", worker="refusing") == (
        "error: There is no such device: pass --device cpu."
    )


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n{USAGE}"
    assert main(["serv"]) == 2
    assert capsys.readouterr().err == USAGE


@pytest.mark.parametrize(
    ("command", "module"),
    [("train heads", "heads"), ("evaluate heads", "evaluate"), ("evaluate perplexity", "perplexity")],
)
def test_the_training_commands_get_the_remaining_flags(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[list[str]] = []
    room = importlib.import_module(f"models.train.{module}")
    monkeypatch.setattr(room, "main", lambda argv, *_: heard.append(argv) or 7)
    assert main([*command.split(), "--epochs", "1"]) == 7
    assert heard == [["--epochs", "1"]]


def test_importing_the_command_line_costs_the_engine_process_nothing() -> None:
    code = "import sys, server.__main__; sys.exit(bool({'uvicorn', 'rich', 'pydantic', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=ENVIRONMENT).returncode == 0
