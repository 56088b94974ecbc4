"""Nothing waits for a reader, and nothing is lost on one that is late."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.mailbox import Mailbox
from server.engine.messages import Delta, TokenLogprobs
from server.errors import EngineDeadError


def scored(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -1.0, ())


async def test_a_reader_that_waits_is_woken_by_each_delta() -> None:
    mailbox = Mailbox()
    for token in range(3):
        reader = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        assert not reader.done()
        mailbox.put(Delta("a", (token,)))
        assert await reader == Delta("a", (token,))


async def test_a_reader_that_falls_behind_finds_one_delta() -> None:
    mailbox = Mailbox()
    mailbox.put(Delta("a", (1,), (scored(1),), prompt_logprobs=(None, scored(7))))
    mailbox.put(Delta("a", (2, 3), (scored(2), scored(3))))
    mailbox.put(Delta("a", (4,), (scored(4),), finish="stop", stop_token_id=4))
    assert await mailbox.get() == Delta(
        "a",
        (1, 2, 3, 4),
        tuple(scored(token) for token in (1, 2, 3, 4)),
        prompt_logprobs=(None, scored(7)),
        finish="stop",
        stop_token_id=4,
    )


async def test_an_error_comes_after_what_was_said_before_it() -> None:
    mailbox = Mailbox()
    mailbox.put(Delta("a", (1,)))
    mailbox.fail(EngineDeadError("gone"))
    assert await mailbox.get() == Delta("a", (1,))
    with pytest.raises(EngineDeadError, match="gone"):
        await mailbox.get()


async def test_a_reader_that_left_is_not_missed() -> None:
    mailbox = Mailbox()
    reader = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait([reader])
    mailbox.put(Delta("a", (1,)))
    mailbox.put(Delta("a", (2,)))
    assert (await mailbox.get()).token_ids == (1, 2)
