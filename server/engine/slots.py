"""The free list of KV slots. Numbers only; the tensors are the runner's.

Invariant: every slot from 1 to `num_slots` is free or owned exactly once, by a request or by the prefix cache.
Slot 0 is padding and belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class SlotError(AssertionError):
    """A slot was lost or owned twice: a bug of ours, never a user's."""


class SlotPool:
    """A stack of free slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` slots; the caller has made sure that there are so many."""
        if count > len(self._free):
            raise SlotError(f"{count} slots asked for, {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def release(self, slots: Iterable[int]) -> None:
        self._free.extend(slots)

    def check(self, owned: Iterable[int]) -> None:
        """Raise `SlotError` unless `owned` and the free list together name every slot exactly once."""
        owners = np.bincount([*self._free, *owned], minlength=self.num_slots + 1)  # [slots + 1]
        if len(owners) != self.num_slots + 1 or owners[0] or (owners[1:] != 1).any():
            lost, doubled = np.flatnonzero(owners[1:] == 0) + 1, np.flatnonzero(owners > 1)
            raise SlotError(f"{self.num_slots} slots: {len(lost)} have no owner, {len(doubled)} more than one")
