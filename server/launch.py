"""`medusa-serve serve`: from settings to a listening server, and down again.

Invariants:
- the port is bound and model and heads are checked before the engine process starts, which is what imports torch;
- SIGINT and SIGTERM end it with exit code 0, at any time, and the engine process with it, once what is open has ended
  (see `drain`); an engine that keeps dying ends it with exit code 1;
- model, heads, engine and address are told on stderr as they become known.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from rich.console import Console
from rich.text import Text

from models.source import DEFAULT_MODEL, check_heads, has_own_heads, read_config, resolve, resolve_heads
from server import __version__
from server.drain import Drain
from server.engine.client import EngineClient
from server.errors import StartupError
from server.metrics import Metrics
from server.options import DoorOptions
from server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

LAST_BYTES_SECONDS = 5  # for clients to take the end of their answers, once the engine has stopped

console = Console(stderr=True, highlight=False, soft_wrap=True)


def serve(settings: Settings) -> int:
    """Serve until a signal comes. Raises StartupError and ModelSourceError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _configure_logging(settings.log_level)
    options = settings.door_options()
    _check_certificate(settings)
    with (
        contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError),
        _bound(settings.host, settings.port) as listener,
    ):
        _tell("medusa-serve", __version__)
        heads = resolve_heads(settings.heads, settings.model)
        folder = resolve(settings.model)
        _tell("model", f"{settings.model_name}  {folder}")
        if heads is not None:
            check_heads(heads, read_config(folder))
        own_heads = settings.heads is None and has_own_heads(read_config(folder))
        _tell("heads", "the model's own" if own_heads else _heads_in_words(settings, heads))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, options, folder, heads, listener))
    return 0


def _check_certificate(settings: Settings) -> None:
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise StartupError("--ssl-keyfile needs --ssl-certfile.")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # SSLError is one
        raise StartupError(f"Cannot use the certificate {settings.ssl_certfile} with its key: {error}.") from error


def _heads_in_words(settings: Settings, heads: Path | None) -> str:
    if heads is not None:
        return str(heads)
    if settings.heads is None and settings.model == DEFAULT_MODEL:
        return "none: the built-in ones are not installed; see medusa-serve train heads"
    return "none: plain decoding"


async def _serve(
    settings: Settings, options: DoorOptions, folder: Path, heads: Path | None, listener: socket.socket
) -> int:
    task = asyncio.current_task()
    assert task is not None
    _on_signals(lambda _: task.cancel())
    metrics = Metrics(settings.model_name)
    config = settings.engine_config(folder, heads)
    given_up = asyncio.Event()
    engine = EngineClient(
        config,
        on_step=metrics.on_step,
        on_restart=metrics.on_restart,
        on_dead=given_up.set,
        timeout_seconds=settings.engine_timeout_seconds,
    )
    try:
        app = await _start(engine, functools.partial(_build_app, engine, metrics, settings, folder, options))
        _tell("API keys", f"{len(options.api_keys) or 'none: anybody may ask'}")
        server = _Server(app, settings, listener)
        drain = Drain(app.state.service.admission, engine, settings.drain_seconds, server.leave)
        _on_signals(lambda _: drain.on_signal())
        watcher = asyncio.create_task(_exit_when(given_up, server))
        try:
            await server.serve(sockets=[listener])
        except OSError as error:  # somebody else bound the port in the same moment and was faster to listen
            raise _taken(settings.host, settings.port, error) from error
        finally:
            watcher.cancel()
    finally:
        await engine.stop()
    return int(given_up.is_set())


async def _exit_when(given_up: asyncio.Event, server: uvicorn.Server) -> None:
    """A server without an engine is of no use: whoever supervises it can start another."""
    await given_up.wait()
    server.should_exit = True


async def _start(engine: EngineClient, build: Callable[[], FastAPI]) -> FastAPI:
    """Start the engine; read the tokenizer and import the routes while it loads."""
    started = time.monotonic()
    with console.status("loading the model"):
        starting = asyncio.create_task(engine.start())
        try:
            app = await asyncio.to_thread(build)
            await starting
        finally:
            starting.cancel()
            await asyncio.wait([starting])
    gc.collect()
    gc.freeze()  # what is loaded stays, and need not be looked at again while others wait
    info = engine.info
    weights = info.dtype if info.quantization == "none" else f"{info.quantization} weights"
    _tell("engine", f"{info.device}, {weights}, {info.num_heads} heads, context {info.max_model_len} tokens")
    _tell("KV cache", f"{info.kv_cache_tokens} tokens")
    _tell("ready after", f"{time.monotonic() - started:.1f} s")
    return app


def _build_app(
    engine: EngineClient, metrics: Metrics, settings: Settings, folder: Path, options: DoorOptions
) -> FastAPI:
    from server.app import create_app
    from server.text.prompt import Tokenizer

    return create_app(
        engine,
        Tokenizer.from_folder(folder),
        model_name=settings.model_name,
        metrics=metrics,
        trust_request_chat_template=settings.trust_request_chat_template,
        options=options,
        tool_call_parser=settings.tool_call_parser,
    )


class _Server(uvicorn.Server):
    """uvicorn on our socket; the signals are ours, and the address is told when it answers."""

    def __init__(self, app: FastAPI, settings: Settings, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # ours is middleware
            ws="none",
            timeout_keep_alive=settings.keep_alive_seconds,
            timeout_graceful_shutdown=LAST_BYTES_SECONDS,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        super().__init__(config)
        self._listener = listener

    def leave(self, at_once: bool) -> None:
        self.should_exit = True
        self.force_exit = at_once

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        _tell("serving", f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that owns the port but does not listen yet: until then, clients are refused and not kept waiting."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _taken(host, port, error) from error
    return listener


def _taken(host: str, port: int, error: OSError) -> StartupError:
    return StartupError(
        f"Cannot listen on {host}:{port} ({error.strerror}): stop what does, or pass another --host or --port."
    )


def _on_signals(action: Callable[[int], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, action, number)


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level == "info":
        for chatty in ("uvicorn.error", "httpx", "huggingface_hub"):
            logging.getLogger(chatty).setLevel(logging.WARNING)


def _tell(what: str, value: str) -> None:
    console.print(Text.assemble((f"{what:>12}  ", "dim"), value))
