"""The access log: one line of JSON on stdout for each HTTP request, when its last byte is sent.

Invariants:
- no key, no query string and no text of a request is ever in it; API keys appear by their names;
- a line that cannot be written is the log's trouble, not the request's.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from server.visit import Visit

MAX_PATH = 256  # characters; the rest is the client's invention
CLIENT_GONE = 499  # nginx's


class AccessLog:
    """Writes to whatever stdout is when it is made."""

    def __init__(self) -> None:
        handler = logging.StreamHandler(sys.stdout)
        self._logger = logging.Logger("access")  # of its own: no level or handler of others applies
        self._logger.addHandler(handler)

    def __call__(self, visit: Visit) -> None:
        self._logger.info(json.dumps(entry(visit)))


def entry(visit: Visit) -> dict[str, str | int | float | bool | None]:
    """`complete` is false when the client left, or the connection broke, before the last byte."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": visit.id,
        "client": visit.client,
        "key": visit.key,
        "method": visit.method,
        "path": visit.path[:MAX_PATH],
        "status": visit.status or CLIENT_GONE,
        "error": visit.error,
        "complete": visit.is_complete,
        "seconds": round(visit.seconds, 4),
        "prompt_tokens": visit.num_prompt_tokens,
        "completion_tokens": visit.num_completion_tokens,
    }
