"""The engine process's loop, run in a thread over a model without tensors, and its start in a real process."""

from __future__ import annotations

import gc
import multiprocessing
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
from fakes import FakeRunner, reference

from server.engine import worker
from server.engine.core import Engine
from server.engine.messages import Abort, Delta, EngineConfig, Failed, SamplingParams, Shutdown, Steps, Submit
from server.engine.worker import Inbox, run_worker, serve


def long_submit(name: str, max_tokens: int = 10_000) -> Submit:
    return Submit(name, (1, 2, 3), SamplingParams(max_tokens, temperature=0, ignore_eos=True))


@contextmanager
def served() -> Iterator[tuple[Inbox, Connection]]:
    """A running loop; leaving shuts it down and waits for it."""
    runner = FakeRunner(20_000, max_model_len=20_000)
    engine = Engine(EngineConfig("fake"), runner)
    messages: Inbox = queue.SimpleQueue()
    outbox, loop_end = multiprocessing.Pipe(duplex=False)
    thread = threading.Thread(target=serve, args=(engine, messages, loop_end))
    thread.start()
    try:
        yield messages, outbox
    finally:
        messages.put(Shutdown())
        while thread.is_alive():
            if outbox.poll(0.01):
                outbox.recv()
        thread.join()
        outbox.close()
        loop_end.close()


def deltas_of(message: object) -> list[Delta]:
    assert isinstance(message, Steps)
    return [delta for output in message.outputs for delta in output.deltas]


def hear(outbox: Connection, name: str) -> Iterator[Delta]:
    """Deltas of one request, up to its end."""
    while outbox.poll(10):
        for delta in deltas_of(outbox.recv()):
            if delta.request_id == name:
                yield delta
                if delta.finish is not None:
                    return
    raise AssertionError(f"{name} never ended")


def test_a_request_is_served_and_the_loop_sleeps_until_the_next() -> None:
    with served() as (messages, outbox):
        for name in ("a", "b"):
            messages.put(long_submit(name, 20))
            tokens = [token for delta in hear(outbox, name) for token in delta.token_ids]
            assert tokens == reference([1, 2, 3], 20, ignore_eos=True)
            assert not outbox.poll(0.1)


def test_short_steps_share_a_message_but_no_request_waits_for_its_beginning_or_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "SEND_SECONDS", 1000.0)
    with served() as (messages, outbox):
        messages.put(long_submit("a", 20))
        sizes = [sum(len(delta.token_ids) for delta in deltas_of(outbox.recv())) for _ in range(2)]
        assert sizes == [1, 19]


def test_news_wait_no_longer_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SEND_SECONDS", 0.0)
    with served() as (messages, outbox):
        messages.put(long_submit("a", 200))
        heard = [outbox.recv()]
        while not deltas_of(heard[-1])[-1].finish:
            heard.append(outbox.recv())
        assert len(heard) > 5
        assert {len(message.outputs) for message in heard} == {1}


def test_news_are_sent_before_a_new_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SEND_SECONDS", 1000.0)
    inbox = iter([[long_submit("a")], [], [], [long_submit("b")], [Shutdown()]])
    monkeypatch.setattr(worker, "_wait", lambda *_: next(inbox))
    monkeypatch.setattr(worker, "_pending", lambda _: next(inbox))
    outbox, loop_end = multiprocessing.Pipe(duplex=False)
    serve(Engine(EngineConfig("fake"), FakeRunner(20_000, max_model_len=20_000)), queue.SimpleQueue(), loop_end)
    heard = [[delta.request_id for delta in deltas_of(outbox.recv())] for _ in range(3)]
    assert heard == [["a"], ["a", "a"], ["a", "b"]]
    outbox.close()
    loop_end.close()


def test_abort_is_heard_between_steps() -> None:
    with served() as (messages, outbox):
        messages.put(long_submit("a"))
        deltas = hear(outbox, "a")
        assert next(deltas).token_ids
        messages.put(Abort("a"))
        assert [delta.finish for delta in deltas][-1] == "abort"
        messages.put(Abort("a"))  # unknown by now, and no trouble
        messages.put(long_submit("b", 3))
        assert list(hear(outbox, "b"))[-1].finish == "length"


def test_a_refused_request_is_answered_and_hurts_nobody() -> None:
    with served() as (messages, outbox):
        messages.put(Submit("bad", (), SamplingParams(5)))
        messages.put(long_submit("good", 5))
        ends = {}
        while len(ends) < 2 and outbox.poll(10):
            ends |= {d.request_id: d.finish for d in deltas_of(outbox.recv()) if d.finish}
        assert ends == {"bad": "error", "good": "length"}


def test_shutdown_ends_what_is_open() -> None:
    runner = FakeRunner(20_000, max_model_len=20_000)
    messages: Inbox = queue.SimpleQueue()
    outbox, loop_end = multiprocessing.Pipe(duplex=False)
    messages.put(long_submit("a"))
    messages.put(Shutdown())
    serve(Engine(EngineConfig("fake"), runner), messages, loop_end)
    assert [delta.finish for delta in deltas_of(outbox.recv())] == ["abort"]
    outbox.close()
    loop_end.close()


def test_a_model_that_cannot_load_is_one_sentence() -> None:
    context = multiprocessing.get_context("spawn")
    inbox, _keep = context.Pipe(duplex=False)
    outbox, child_outbox = context.Pipe(duplex=False)
    process = context.Process(target=run_worker, args=(EngineConfig("/nowhere"), inbox, child_outbox))
    process.start()
    child_outbox.close()
    first = outbox.recv()
    process.join(30)
    assert isinstance(first, Failed)
    assert "/nowhere" in first.message
    assert process.exitcode == 0
    for end in (inbox, _keep, outbox):
        end.close()
    process.close()


def test_what_was_loaded_is_no_matter_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.runner.Runner.load", lambda _: FakeRunner(100, max_model_len=60))
    try:
        worker._load(EngineConfig("fake"))
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


def test_the_slots_are_checked_when_nothing_comes_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.01)
    messages: Inbox = queue.SimpleQueue()
    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        messages.put(Abort("x"))

    assert worker._wait(messages, check) == [Abort("x")]
    assert len(checks) == 1
