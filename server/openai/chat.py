"""POST /v1/chat/completions."""

from __future__ import annotations

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
from server.openai.schema import ChatRequest, Message
from server.openai.service import Service, ServiceDep
from server.text.prompt import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: ChatRequest, http: Request, service: ServiceDep) -> Response:
    """Answer a conversation."""
    arrival = perf_counter()
    service.check_model(request.model)
    _check(request)
    service.check_ready()
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    submits = await service.threads.run(_prepare, request, service, reply_id)
    service.metrics.params_n.observe(request.n)
    options = TextOptions(tuple(request.stop), request.include_stop_str_in_output, request.skip_special_tokens)
    generation = Generation(service, submits, options, arrival)
    shape = ChatShape(service.tokenizer, has_logprobs=request.logprobs)
    return await Reply(reply_id, service.model_name, generation, shape).respond(http, request)


def _check(request: ChatRequest) -> None:
    check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequestError(
            "max_tokens is the older name of max_completion_tokens; send one of them.", param="max_tokens"
        )


def _prepare(request: ChatRequest, service: Service, reply_id: str) -> list[Submit]:
    prompt = service.tokenizer.chat_prompt(
        [_turn(message) for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=request.chat_template_kwargs,
    )
    return build_submits(
        request,
        service.engine.info,
        [prompt],
        reply_id,
        param="messages",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _turn(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": message.content}
    return turn if message.name is None else {**turn, "name": message.name}


class ChatShape:
    """The objects of a chat completion."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """What is said next."""
        return {"index": piece.index, "delta": {"content": piece.text} if piece.text else {}, **self._rest(piece)}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """All that was said."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        return {
            "logprobs": chat_logprobs(self._tokenizer, piece.tokens) if self._has_logprobs and piece.tokens else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }
