"""API keys: who may come in, and by which name the house calls them.

Invariants:
- without keys everybody may; with keys every route needs one but those in OPEN, which a load balancer, a Prometheus or
  a reader of the documentation asks for, and which say nothing of anybody's requests;
- a key is compared with all keys in constant time, as a digest, so that not even its length can be measured;
- keys are never logged nor said: they are known as key-1, key-2, ... in the order given.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import AuthenticationError
from server.visit import HttpMiddleware, current

OPEN = frozenset(
    ("/health", "/ready", "/metrics", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
)


class Authenticate(HttpMiddleware):
    """Raises AuthenticationError (401)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        super().__init__(app)
        self._digests = [_digest(key.encode()) for key in keys]

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN:
            name = self._name(_presented(scope))
            if (visit := current()) is not None:
                visit.key = name
        await self._app(scope, receive, send)

    def _name(self, presented: bytes | None) -> str:
        if presented is None:
            raise AuthenticationError('You did not provide an API key: send the header "Authorization: Bearer KEY".')
        digest = _digest(presented)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("Incorrect API key provided: ask whoever runs this server for one.")
        return f"key-{matches.index(True) + 1}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _presented(scope: Scope) -> bytes | None:
    header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None
