"""One request's trouble stays its own: what fails for many requests together is done again for each alone.

Invariants:
- whoever can be served is served: only items that fail alone have no result;
- an exception leaves here only through `check`, which raises when nobody can be served any more.

What is called must be safe to call again with the same items.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

FAILED = "The engine failed on this request; its log says more."

logger = logging.getLogger(__name__)


def guarded(
    call: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], check: Callable[[], None]
) -> list[Result | None]:
    """What `call` returns for all items; if it fails, for each alone, and None for those it fails on."""
    if not items:
        return []
    try:
        return list(call(items))
    except Exception:
        check()
        if len(items) == 1:
            logger.exception("A request failed.")
            return [None]
    return [result for item in items for result in guarded(call, [item], check)]
