"""Everything that can go wrong with a request, as OpenAI's error object.

Invariants:
- every response that is no success has the body `{"error": {message, type, param, code}}`, `code` a string or null;
- the body is ASCII: a client's own malformed text can be sent back to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from server.errors import InvalidRequestError, MedusaError

RETRY_SECONDS = "5"
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}  # whatever a 200 is
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault: OpenAI's error object.", "content": _ERROR},
    "5XX": {"description": "The server is at fault: OpenAI's error object.", "content": _ERROR},
}


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(MedusaError, _on_ours)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)


async def _on_ours(http: Request, error: Exception) -> Response:
    assert isinstance(error, MedusaError)
    headers = {"Retry-After": RETRY_SECONDS} if error.status == 503 else None
    return _response(error.status, error.body(), headers)


async def _on_validation(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if not _is_json(http) and first["loc"] == ("body",) and first["type"] != "missing":
        message = 'The body is not declared as JSON; send the header "Content-Type: application/json".'
        return _response(415, InvalidRequestError(message).body())
    return _response(400, explain(first).body())


async def _on_http(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{http.method} {http.url.path}"
    known = {
        404: (f"Invalid URL ({where}); there is no such route.", None),
        405: (f"Not allowed: {where}; use another method.", "method_not_supported"),
    }
    message, code = known.get(error.status_code, (str(error.detail), None))
    return _response(error.status_code, InvalidRequestError(message, code=code).body(), error.headers)


async def _on_bug(http: Request, error: Exception) -> Response:
    return _response(500, MedusaError("The server had an error; its log says more.", code="internal_error").body())


def _response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status_code=status, headers=headers, media_type="application/json")


def _is_json(http: Request) -> bool:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def explain(error: Mapping[str, Any]) -> InvalidRequestError:
    """One of pydantic's errors in OpenAI's words."""
    kind, loc = error["type"], error["loc"][1:]
    if kind == "json_invalid":
        return InvalidRequestError(f"The body is not valid JSON: {error['ctx']['error']} at position {loc[0]}.")
    param = _path(loc)
    if kind == "extra_forbidden":
        return InvalidRequestError(f"Unrecognized request argument supplied: {param}.", param=param)
    if param is None and kind != "value_error":
        return InvalidRequestError("The body must be a JSON object.")
    if kind == "missing":
        return InvalidRequestError(f"Missing required parameter: '{param}'.", param=param)
    reason = str(error["ctx"]["error"]) if kind == "value_error" else error["msg"]
    return InvalidRequestError(f"Invalid '{param or 'body'}': {reason[:1].lower()}{reason[1:]}.", param=param)


def _path(loc: Sequence[str | int]) -> str | None:
    """`("messages", 0, "content")` -> `messages[0].content`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None
