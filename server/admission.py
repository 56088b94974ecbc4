"""Who may begin to generate and who waits: the bounded queue, each key's share, the closed door of a server that ends.

A choice is open from its admission to its end. It waits until the engine has scheduled it for the first time, which its
first delta tells. The engine has `max_num_seqs` seats; choices beyond them are what the limit of requests is about.

Invariants:
- a request is admitted with all of its choices or refused;
- whoever was admitted is let go exactly once, at the choice's end or at the latest with the HTTP request;
- a request that could never be admitted is an InvalidRequestError (400): to try again would not help;
- one that finds nobody waiting is never refused for its tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from server.engine.messages import Submit
from server.errors import InvalidRequestError, RateLimitError, ShuttingDownError
from server.options import Limits
from server.visit import Visit, current

Refusal = Literal["requests", "tokens", "key"]


class Admission:
    """One server's door. `on_refusal` hears the reason of each 429."""

    def __init__(
        self, limits: Limits | None = None, on_refusal: Callable[[Refusal], None] = lambda reason: None
    ) -> None:
        self.num_open = 0
        self.num_waiting = 0
        self.num_waiting_tokens = 0
        self.is_closed = False
        self._limits = limits or Limits()
        self._on_refusal = on_refusal
        self._per_key: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    def close(self) -> None:
        """Take nobody in any more."""
        self.is_closed = True

    async def empty(self) -> None:
        """Wait until no choice is open."""
        await self._empty.wait()

    def check_open(self) -> None:
        """Raises ShuttingDownError (503) once the door is closed."""
        if self.is_closed:
            message = "The server is shutting down; send the request again, to another one if there is."
            raise ShuttingDownError(message)

    def admit(self, submits: Sequence[Submit]) -> list[Ticket]:
        """A ticket for each choice of one request. Raises RateLimitError (429) and ShuttingDownError (503)."""
        self.check_open()
        visit = current()
        self._check_requests(len(submits))
        self._check_tokens(sum(len(submit.prompt) for submit in submits))
        if visit is not None:
            self._enter(visit, submits)
        tickets = [Ticket(self, len(submit.prompt), visit) for submit in submits]
        if visit is not None:
            for ticket in tickets:
                visit.at_end.callback(ticket.close)
        return tickets

    def _check_requests(self, count: int) -> None:
        limit = self._limits.max_queued_requests
        if limit is None:
            return
        places = self._limits.max_num_seqs + limit
        if count > places:
            raise InvalidRequestError(
                f"The request asks for {count} choices (prompts times n), but this server takes at most {places} "
                f"at a time; send several requests.",
                param="n",
            )
        if self.num_open + count > places:
            message = f"The queue is full: {self.num_open} choices of {places} are open; try again in a moment."
            raise self._refused("requests", RateLimitError(message, limited="requests"))

    def _check_tokens(self, count: int) -> None:
        limit = self._limits.max_queued_tokens
        if limit is not None and self.num_waiting and self.num_waiting_tokens + count > limit:
            message = (
                f"The queue is full: {self.num_waiting_tokens} prompt tokens of {limit} wait; try again in a moment."
            )
            raise self._refused("tokens", RateLimitError(message, limited="tokens"))

    def _enter(self, visit: Visit, submits: Sequence[Submit]) -> None:
        """Count the visit among its key's, and its prompts once each."""
        if visit.key is not None and visit.num_prompt_tokens is None:
            self._check_key(visit.key)
            self._per_key[visit.key] += 1
            visit.at_end.callback(self._leave, visit.key)
        firsts = [submit for submit in submits if submit.sampling.choice == 0]
        visit.num_prompt_tokens = (visit.num_prompt_tokens or 0) + sum(len(submit.prompt) for submit in firsts)
        visit.num_completion_tokens = visit.num_completion_tokens or 0

    def _check_key(self, key: str) -> None:
        limit = self._limits.max_concurrent_requests_per_key
        if limit is not None and self._per_key[key] >= limit:
            message = f"Your API key has {limit} open requests, which is its share; wait for one to end."
            raise self._refused("key", RateLimitError(message, limited="requests"))

    def _leave(self, key: str) -> None:
        self._per_key[key] -= 1

    def _refused(self, reason: Refusal, error: RateLimitError) -> RateLimitError:
        self._on_refusal(reason)
        return error

    def _opened(self, num_tokens: int) -> None:
        self.num_open += 1
        self.num_waiting += 1
        self.num_waiting_tokens += num_tokens
        self._empty.clear()

    def _started(self, num_tokens: int) -> None:
        self.num_waiting -= 1
        self.num_waiting_tokens -= num_tokens

    def _closed(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self._empty.set()


class Ticket:
    """One choice's admission."""

    def __init__(self, admission: Admission, num_tokens: int, visit: Visit | None) -> None:
        self._admission = admission
        self._num_tokens = num_tokens
        self._visit = visit
        self._is_waiting = self._is_open = True
        admission._opened(num_tokens)

    def start(self) -> None:
        """The engine has begun. Saying it again changes nothing."""
        if self._is_waiting:
            self._is_waiting = False
            self._admission._started(self._num_tokens)

    def note_tokens(self, count: int) -> None:
        """For the access log: so many tokens were generated."""
        if self._visit is not None:
            self._visit.num_completion_tokens = (self._visit.num_completion_tokens or 0) + count

    def close(self) -> None:
        """The choice has ended. Saying it again changes nothing."""
        self.start()
        if self._is_open:
            self._is_open = False
            self._admission._closed()
