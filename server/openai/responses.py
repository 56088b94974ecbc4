"""POST /v1/responses: a chat in another dress.

Invariants:
- a request becomes a chat completion's, so whatever can be asked of a chat is checked and done in one place;
- errors name the fields of this endpoint, not those of the chat;
- `truncation: auto` drops the oldest turns, never system messages or the last user's turn, and as few as will do.
"""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from server.errors import ContextLengthError, InvalidRequestError, MedusaError
from server.openai import chat
from server.openai.faults import explain
from server.openai.pages import streamed
from server.openai.responses_answers import ResponseObject, ResponseStreamEvent
from server.openai.responses_items import Item, MessageItem, as_messages
from server.openai.responses_reply import ResponsesReply
from server.openai.responses_schema import LOGPROBS, SHARED, ResponsesRequest
from server.openai.responses_tools import choice_as_chat
from server.openai.schema import ChatRequest
from server.openai.service import Service, ServiceDep

FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
FLATTENED = {"response_format": "json_schema", "tools": "function", "tool_choice": "function"}

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/responses",
    summary="Answer a conversation, in the newer shape",
    responses=streamed(ResponseObject, ResponseStreamEvent),
)
async def create_response(request: ResponsesRequest, http: Request, service: ServiceDep) -> Response:
    """Nothing is stored: each request brings the whole conversation."""
    arrival = perf_counter()
    service.check_model(request.model)
    _check(request)
    service.check_ready()
    reply_id = f"resp_{uuid.uuid4().hex}"
    chat_request, prepared = await service.threads.run(_prepare, request, service, reply_id)
    generation = chat.generate(chat_request, service, prepared, arrival)
    return await ResponsesReply(reply_id, service, request, generation).respond(http)


def _check(request: ResponsesRequest) -> None:
    if request.top_logprobs is not None and LOGPROBS not in request.include:
        raise InvalidRequestError(f'top_logprobs needs include to have "{LOGPROBS}".', param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")


def _prepare(request: ResponsesRequest, service: Service, reply_id: str) -> tuple[ChatRequest, chat.Prepared]:
    """The request as a chat's, with as much of the conversation as may be dropped and must."""

    def prepared(start: int) -> tuple[ChatRequest, chat.Prepared]:
        with _our_names():
            chat_request = as_chat(request, _since(request.input, start))
            return chat_request, chat.prepare(chat_request, service, reply_id)

    def fits(start: int) -> bool:
        try:
            prepared(start)
        except ContextLengthError:
            return False
        return True

    starts = _starts(request.input) if request.truncation == "auto" else [0]
    best = bisect_left(starts[:-1], True, key=fits)
    return prepared(starts[best])


def _starts(items: Sequence[Item]) -> list[int]:
    """Where a conversation may begin: as it is, or with a later user's turn."""
    return [0, *(index for index, item in enumerate(items) if index and _is_by(item, "user"))]


def _since(items: Sequence[Item], start: int) -> list[Item]:
    return [item for index, item in enumerate(items) if index >= start or _is_by(item, "system", "developer")]


def _is_by(item: Item, *roles: str) -> bool:
    return isinstance(item, MessageItem) and item.role in roles


def as_chat(request: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """The chat completion that answers `items`. Raises InvalidRequestError."""
    instructions = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    has_logprobs = LOGPROBS in request.include
    body = {
        **request.model_dump(include=SHARED, exclude_unset=True),
        "messages": instructions + as_messages(items),
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": has_logprobs,
        "top_logprobs": request.top_logprobs,
        "response_format": _response_format(request.text.format),
        "tools": [tool.as_chat() for tool in request.tools],
        "tool_choice": choice_as_chat(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
    }
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise explain({**first, "loc": ("body", *_ours(first["loc"]))}) from error


def _response_format(format: dict[str, Any]) -> dict[str, Any]:
    """A chat has the schema one level deeper."""
    if format.get("type") != "json_schema":
        return format
    return {"type": "json_schema", "json_schema": {key: value for key, value in format.items() if key != "type"}}


@contextmanager
def _our_names() -> Iterator[None]:
    """Errors of the chat completion under the names of this endpoint's fields."""
    try:
        yield
    except MedusaError as error:
        if error.param is not None:
            error.param = ".".join(_ours(error.param.split(".")))
        raise


def _ours(path: Sequence[Any]) -> list[Any]:
    """`response_format.json_schema.schema` is `text.format.schema` here, and a function's fields are its tool's."""
    head, *rest = path
    flattened = FLATTENED.get(head.partition("[")[0])
    return [*FIELDS.get(head, head).split("."), *(part for part in rest if part != flattened)]
