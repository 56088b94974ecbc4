"""Everything that can go wrong with a request, as OpenAI's error object.

Invariants:
- every response that is no success has the body `{"error": {message, type, param, code}}`, `code` a string,
  also where middleware or a bug is the reason;
- the body is ASCII: a client's own malformed text can be sent back to it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from server.errors import InternalError, InvalidRequestError, MedusaError
from server.openai.schema.body import UnsupportedError
from server.visit import HttpMiddleware, current, note_error

logger = logging.getLogger(__name__)
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}  # whatever a 200 is
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault: OpenAI's error object.", "content": _ERROR},
    "5XX": {"description": "The server is at fault: OpenAI's error object.", "content": _ERROR},
}
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}  # of pydantic's kinds


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(MedusaError, _on_ours)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)


class AnswerErrors(HttpMiddleware):
    """Answers what the middleware inside of it raises, and bugs. When the answer has begun, nothing can be added."""

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except MedusaError as error:
            await self._answer(error, scope, receive, send)
        except Exception:
            logger.exception("A request failed: %s %s", scope["method"], scope["path"])
            await self._answer(InternalError(), scope, receive, send)

    async def _answer(self, error: MedusaError, scope: Scope, receive: Receive, send: Send) -> None:
        visit = current()
        assert visit is not None, "the visit begins outside of this"
        if visit.status is None:
            await _response(error)(scope, receive, send)


async def _on_ours(http: Request, error: Exception) -> Response:
    assert isinstance(error, MedusaError)
    return _response(error)


async def _on_validation(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if not _is_json(http) and first["loc"] == ("body",) and first["type"] != "missing":
        message = 'The body is not declared as JSON; send the header "Content-Type: application/json".'
        return _response(InvalidRequestError(message, code="unsupported_media_type"), 415)
    return _response(explain(first, error.body))


async def _on_http(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, MedusaError):  # FastAPI's wrapping of what reading the body raised
        return _response(error.__cause__)
    where = f"{http.method} {http.url.path}"
    known = {
        400: ("The body cannot be read: it must be JSON, in UTF-8, and not nested too deeply.", "invalid_json"),
        404: (f"Invalid URL ({where}); there is no such route.", "unknown_url"),
        405: (f"Not allowed: {where}; use another method.", "method_not_supported"),
    }
    message, code = known.get(error.status_code, (str(error.detail), "invalid_request"))
    return _response(InvalidRequestError(message, code=code), error.status_code, error.headers)


def _response(error: MedusaError, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    note_error(error)
    return Response(
        json.dumps(error.body()),
        status_code=status or error.status,
        headers=headers or error.headers,
        media_type="application/json",
    )


def _is_json(http: Request) -> bool:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def explain(error: Mapping[str, Any], body: Any = None) -> InvalidRequestError:
    """One of pydantic's errors in OpenAI's words. `body` is what the client sent, if it is known."""
    kind, loc = error["type"], error["loc"][1:]
    if kind == "json_invalid":
        message = f"The body is not valid JSON: {error['ctx']['error']} at position {loc[0]}."
        return InvalidRequestError(message, code="invalid_json")
    param, code = _path(loc if body is None else _sent(loc, body, kind)), _code(error)
    if kind == "extra_forbidden":
        return InvalidRequestError(f"Unrecognized request argument supplied: {param}.", param=param, code=code)
    if param is None and kind != "value_error":
        return InvalidRequestError("The body must be a JSON object.", code="invalid_type")
    if kind == "missing":
        return InvalidRequestError(f"Missing required parameter: '{param}'.", param=param, code=code)
    reason = str(error["ctx"]["error"]) if kind == "value_error" else error["msg"]
    message = f"Invalid '{param or 'body'}': {reason[:1].lower()}{reason[1:]}."
    return InvalidRequestError(message, param=param, code=code)


def _code(error: Mapping[str, Any]) -> str:
    """OpenAI's word for one of pydantic's errors."""
    kind = error["type"]
    if kind == "value_error" and isinstance(error["ctx"]["error"], UnsupportedError):
        return "unsupported_value"
    return _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")


def _sent(loc: Sequence[str | int], body: Any, kind: str) -> list[str | int]:
    """The parts of `loc` that are in the body, and the field that is missing: others are pydantic's names of types."""
    found: list[str | int] = []
    for part in loc:
        if _has(body, part):
            found, body = [*found, part], body[part]
        elif kind == "missing" and part is loc[-1]:
            found = [*found, part]
    return found


def _has(body: Any, part: str | int) -> bool:
    if isinstance(body, list):
        return isinstance(part, int) and part < len(body)
    return isinstance(body, dict) and part in body


def _path(loc: Sequence[str | int]) -> str | None:
    """`("messages", 0, "content")` -> `messages[0].content`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None
