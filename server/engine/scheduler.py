"""Which tokens of which requests are computed in the next step, and in which slots.

Invariants:
- `running` and `waiting` are disjoint and together hold every open request;
- a step has at most `max_num_batched_rows` rows and `max_num_seqs` requests;
- slots for a step are taken from the free list, then from the prefix cache, then from running requests that come
  later in order and are not yet part of the step: they are preempted and recomputed. Tree nodes never preempt;
- among requests of one priority, those that decode go before those that compute their prompts, and neither preempts
  the other's step; whoever decodes ends, so every request gets its turn and ends.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Sequence

from server.engine.prefix import Node, PrefixCache
from server.engine.request import Draft, Request, Work
from server.engine.slots import SlotPool


class Scheduler:
    """Owns queues, slots and the prefix cache."""

    def __init__(
        self, num_slots: int, *, max_num_seqs: int, max_num_batched_rows: int, use_prefix_cache: bool = True
    ) -> None:
        self.slots = SlotPool(num_slots)
        self.prefix = PrefixCache()
        self.waiting: list[Request] = []  # sorted by order
        self.running: list[Request] = []  # sorted by order
        self.prefix_queries = 0  # prompt tokens looked up in this step
        self.prefix_hits = 0  # of them, found
        self.max_num_seqs = max_num_seqs
        self._max_rows = max_num_batched_rows
        self._use_prefix_cache = use_prefix_cache
        self._preempted: list[Request] = []
        self._num_rows = 0  # of this step, so far
        self._reserved = 0

    @property
    def num_preemptions(self) -> int:
        """Requests preempted in this step."""
        return len(self._preempted)

    @property
    def num_available(self) -> int:
        """Slots that can be had without preempting anyone."""
        return self.slots.num_free + self.prefix.num_evictable

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=lambda r: r.order)

    def schedule(self, reserve: int = 0) -> tuple[list[Work], list[Request]]:
        """The step's chains, and the requests that were preempted for them.

        In order of priority; of equals decode rows first, then chunks of prompts, which leave `reserve` rows to trees.
        """
        works: list[Work] = []
        self._preempted = []
        self._num_rows = 0
        self.prefix_queries = self.prefix_hits = 0
        self._reserved = reserve
        for request in sorted(self.running, key=lambda r: (r.submit.priority, r.num_remaining > 1, r.arrival)):
            if request.prefix_node is not None:  # else preempted a moment ago
                self._extend(works, request)
        self._admit(works)
        return works, self._preempted

    @property
    def has_prompts(self) -> bool:
        """Is there anybody who does not decode yet?"""
        return bool(self.waiting) or any(request.num_remaining > 1 for request in self.running)

    @property
    def rows_left(self) -> int:
        """Rows that the step still has, and slots to put them into."""
        return min(self._max_rows - self._num_rows, self.num_available)

    def place(self, work: Work, draft: Draft) -> None:
        """Hang a tree below the chain of `work`."""
        work.node_tokens, work.node_parents, work.node_sources = draft.tokens, draft.parents, draft.sources
        work.prediction_start = draft.prediction_start
        work.node_slots = self._take(len(draft.tokens))
        self._num_rows += len(draft.tokens)

    def commit(self, work: Work, path: Sequence[int]) -> None:
        """Keep the chain and the accepted nodes, free the others. No K or V moves."""
        request = work.request
        was_prompt = request.num_computed < request.num_prompt
        kept = [work.node_slots[node] for node in path]
        request.slots.extend(work.chain_slots)
        self.slots.release([slot for slot in work.node_slots if slot not in kept])
        if self._use_prefix_cache and was_prompt and request.num_computed >= request.num_prompt:
            self._share(request)
        request.slots.extend(kept)

    def withdraw(self, work: Work) -> None:
        """Forget what a step that failed may have left in its slots."""
        self.slots.release([*work.chain_slots, *work.node_slots])

    def finish(self, request: Request) -> None:
        """Forget a request, wherever it is; what it computed stays in the prefix cache."""
        if request.prefix_node is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._give_back(request)

    def check(self) -> None:
        """Every slot is owned exactly once; raises `SlotError`."""
        owned = [slot for request in self.running for slot in request.own_slots]
        self.slots.check([*owned, *self.prefix.owned()])

    def _extend(self, works: list[Work], request: Request) -> None:
        """Give a running request as many rows as are left for it."""
        rows_left = self._max_rows - self._num_rows
        wanted = 1 if request.num_remaining == 1 else min(request.num_remaining, rows_left - self._reserved)
        if wanted <= 0 or rows_left <= 0:
            return
        while self.num_available < 1:
            victim = self._victim(works, request)
            if victim is None:
                return
            self._preempt(victim)
            if victim is request:
                return
        slots = self._take(min(wanted, self.num_available))
        works.append(Work(request, request.num_computed, slots))
        self._num_rows += len(slots)

    def _victim(self, works: list[Work], request: Request) -> Request | None:
        """The last in order that is not part of the step, `request` itself at the earliest."""
        scheduled = {id(work.request) for work in works}
        later = (r for r in reversed(self.running) if id(r) not in scheduled and r.order >= request.order)
        return next(later, None)

    def _admit(self, works: list[Work]) -> None:
        """Start waiting requests in order while seats, rows and slots last."""
        computing = {r.submit.prompt for r in self.running if r.num_prompt - r.num_computed > 1}
        for request in list(self.waiting):
            is_full = self._num_rows + self._reserved >= self._max_rows
            if len(self.running) >= self.max_num_seqs or is_full or self._preempted:
                return
            if self._looks_up(request) and request.submit.prompt in computing:
                continue  # its twin's prompt will be in the cache in a few steps
            if not self._start(request):
                return
            if request.num_prompt - request.num_computed > 1:
                computing.add(request.submit.prompt)
            self._extend(works, request)

    def _start(self, request: Request) -> bool:
        """Move a request from waiting to running, on top of its cached prefix. False if the slots would not do."""
        node, slots = self._lookup(request)
        self.prefix.lock(node)
        if self.running and len(request.tokens) - len(slots) + 1 > self.num_available:
            self.prefix.unlock(node)
            return False
        request.prefix_node, request.slots, request.num_shared = node, array("q", slots), len(slots)
        if self._looks_up(request) and request.num_preemptions == 0:
            request.num_cached_tokens = len(slots)
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += len(slots)
        self.waiting.remove(request)
        insort(self.running, request, key=lambda r: r.order)
        return True

    def _lookup(self, request: Request) -> tuple[Node, list[int]]:
        """The cached prefix. The last token is always computed, and all of them if their log-probabilities are due."""
        if not self._looks_up(request):
            return self.prefix.root, []
        return self.prefix.match(request.tokens[:-1])

    def _looks_up(self, request: Request) -> bool:
        return self._use_prefix_cache and request.prompt_logprobs is None

    def _take(self, count: int) -> list[int]:
        missing = count - self.slots.num_free
        if missing > 0:  # a search for leaves costs the same for one slot or many
            self.slots.release(self.prefix.evict(max(missing, self.slots.num_slots // 64)))
        return self.slots.allocate(count)

    def _preempt(self, request: Request) -> None:
        """Back to waiting; what it computed may stay in the prefix cache until the slots are needed."""
        self.running.remove(request)
        self._give_back(request)
        request.num_preemptions += 1
        self._preempted.append(request)
        self.add(request)

    def _give_back(self, request: Request) -> None:
        """End the request's claim on slots: what was computed goes to the cache, the rest is free."""
        num_valid = min(request.num_computed, len(request.tokens))
        self.slots.release(request.slots[num_valid:])
        del request.slots[num_valid:]
        if self._use_prefix_cache:
            self._share(request)
        else:
            self.slots.release(request.own_slots)
        assert request.prefix_node is not None
        self.prefix.unlock(request.prefix_node)
        request.prefix_node, request.slots, request.num_shared = None, array("q"), 0

    def _share(self, request: Request) -> None:
        """Hand what the request has computed to the cache and go on using it there."""
        node, cached = self.prefix.insert(request.tokens[: request.num_computed], request.slots)
        self.slots.release(own for own, kept in zip(request.slots, cached, strict=True) if own != kept)
        self.prefix.lock(node)
        assert request.prefix_node is not None
        self.prefix.unlock(request.prefix_node)
        request.prefix_node, request.slots, request.num_shared = node, array("q", cached), len(cached)
