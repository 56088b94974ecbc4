"""An engine that says what a test wrote down, a tokenizer of bytes, and the application around them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import tokenizers
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from server.app import create_app
from server.engine.messages import (
    ControllerState,
    Delta,
    FinishReason,
    ModelInfo,
    RequestStats,
    SpeculationStats,
    Submit,
    TokenLogprobs,
)
from server.metrics import Metrics
from server.options import DoorOptions
from server.text.prompt import Tokenizer

MODEL = "org/tiny"
EOS = 256
VOCAB = 300  # padded, as models' vocabularies are
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('user first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
HANG = "wait until somebody leaves"
Script = Callable[[Submit], Sequence[Delta | Exception | str]]


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Token 0 to 255 are the bytes of that value, 256 is the special `<|end|>`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    chars = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in chars.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend, template=template)


def stats(submit: Submit, num_output: int, **speculation: Any) -> RequestStats:
    return RequestStats(len(submit.prompt), 2, num_output, 0, 0.1, 0.2, 0.3, SpeculationStats(**speculation))


def scored(token_id: int, num_top: int) -> TokenLogprobs:
    """The token has log-probability -1, its successors in the vocabulary -2, -3 and so on."""
    return TokenLogprobs(token_id, -1.0, tuple((token_id + n, -1.0 - n) for n in range(num_top)))


def say(
    submit: Submit,
    text: str | Sequence[int],
    *,
    finish: FinishReason = "length",
    by: int = 1,
    speculation: dict[str, Any] | None = None,
) -> list[Delta]:
    """Deltas of `by` tokens each. A text that ends with `stop` names its last token as the reason."""
    tokens = list(text.encode()) if isinstance(text, str) else list(text)
    params = submit.sampling
    deltas = []
    for start in range(0, max(len(tokens), 1), by):
        ids = tuple(tokens[start : start + by])
        logprobs = () if params.logprobs is None else tuple(scored(token, params.logprobs) for token in ids)
        deltas.append(Delta(submit.request_id, ids, logprobs))
    if params.prompt_logprobs is not None:
        known = tuple(replace(scored(token, params.prompt_logprobs), rank=1) for token in submit.prompt[1:])
        deltas[0] = replace(deltas[0], prompt_logprobs=(None, *known))
    deltas[-1] = replace(
        deltas[-1],
        finish=finish,
        stop_token_id=tokens[-1] if finish == "stop" else None,
        stats=stats(submit, len(tokens), **(speculation or {})),
    )
    return deltas


class ScriptedEngine:
    """Implements `service.Engine`. Remembers what was asked, and what was left before its end."""

    def __init__(self, script: Script | None = None, *, max_model_len: int = 64) -> None:
        self.info = ModelInfo("tiny", VOCAB, max_model_len, (EOS,), 4, 1024, "cpu", "float32", "none")
        self.status = "ready"
        self.controller: ControllerState | None = None
        self.script: Script = script or (lambda submit: say(submit, "Hello"))
        self.submits: list[Submit] = []
        self.aborted: list[str] = []
        self.stopped = False

    async def stop(self) -> None:
        self.stopped = True

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        self.submits.append(submit)
        finished = False
        try:
            for item in self.script(submit):
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    finished = True
                    raise item
                if submit.request_id in self.aborted:
                    finished = True
                    yield Delta(submit.request_id, finish="abort", stats=stats(submit, 1, num_spec_steps=2))
                    return
                if isinstance(item, str):
                    await asyncio.Event().wait()
                    continue
                finished = item.finish is not None
                yield item
        finally:
            if not finished:
                self.aborted.append(submit.request_id)


def app_of(engine: ScriptedEngine, *, template: str | None = TEMPLATE, options: DoorOptions | None = None) -> FastAPI:
    return create_app(engine, byte_tokenizer(template), model_name=MODEL, metrics=Metrics(MODEL), options=options)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def events(body: str) -> list[dict[str, Any]]:
    """The chunks of a well-formed event stream; its end is checked and left out."""
    parts = body.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@contextlib.contextmanager
def live(app: FastAPI) -> Iterator[str]:
    """A real server in a thread; yields its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
