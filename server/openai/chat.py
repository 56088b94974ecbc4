"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import uuid
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response

from server.engine.messages import Submit
from server.errors import InvalidRequestError
from server.openai.generation import Generation, Piece, TextOptions
from server.openai.logprobs import chat_logprobs
from server.openai.params import build_submits, check_stream_options
from server.openai.reply import Reply
from server.openai.schema import ChatRequest
from server.openai.service import Service, ServiceDep
from server.openai.tools import call_deltas, plan, turn, whole_calls
from server.text.prompt import Tokenizer
from server.text.tools import ToolFormat

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: ChatRequest, http: Request, service: ServiceDep) -> Response:
    """Answer a conversation."""
    arrival = perf_counter()
    service.check_model(request.model)
    _check(request)
    service.check_ready()
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    submits, format = await asyncio.to_thread(_prepare, request, service, reply_id)
    service.metrics.params_n.observe(request.n)
    generation = Generation(service, submits, _text_options(request, format), arrival)
    shape = ChatShape(service.tokenizer, has_logprobs=request.logprobs, has_tools=format is not None)
    return await Reply(reply_id, service.model_name, generation, shape).respond(http, request)


def _check(request: ChatRequest) -> None:
    check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequestError(
            "max_tokens is the older name of max_completion_tokens; send one of them.", param="max_tokens"
        )


def _text_options(request: ChatRequest, format: ToolFormat | None) -> TextOptions:
    """The tags of calls may be special tokens; where calls are looked for, these are text."""
    skip = request.skip_special_tokens and format is None
    parser = None if format is None else format.parser
    return TextOptions(tuple(request.stop), request.include_stop_str_in_output, skip, parser)


def _prepare(request: ChatRequest, service: Service, reply_id: str) -> tuple[list[Submit], ToolFormat | None]:
    """The submits, and how calls are to be read."""
    planned = plan(request, service)
    prompt = service.tokenizer.chat_prompt(
        [turn(message) for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=request.chat_template_kwargs,
        tools=planned.tools,
    )
    submits = build_submits(
        request,
        service.engine.info,
        [prompt],
        reply_id,
        param="messages",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=planned.grammar,
    )
    return submits, planned.format


class ChatShape:
    """The objects of a chat completion."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool, has_tools: bool = False) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._has_tools = has_tools

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        delta = {"role": "assistant", "content": None if self._has_tools else "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """What is said next."""
        content = {"content": piece.text} if piece.text else {}
        calls = {"tool_calls": call_deltas(piece.calls)} if piece.calls else {}
        return {"index": piece.index, "delta": content | calls, **self._rest(piece)}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """All that was said."""
        content = (piece.text or None) if self._has_tools else piece.text
        calls = {"tool_calls": whole_calls(piece.calls)} if piece.calls else {}
        message = {"role": "assistant", "content": content, "refusal": None} | calls
        return {"index": piece.index, "message": message, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        return {
            "logprobs": chat_logprobs(self._tokenizer, piece.tokens) if self._has_logprobs and piece.tokens else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }
