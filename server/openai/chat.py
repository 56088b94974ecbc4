"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response

from server.engine.messages import Submit
from server.errors import InvalidRequestError
from server.openai.answers import ChatCompletion, ChatCompletionChunk
from server.openai.generation import Generation, Piece, TextOptions
from server.openai.logprobs import chat_logprobs, prompt_logprobs
from server.openai.pages import END, streamed
from server.openai.params import build_submits, check_stream_options
from server.openai.reply import Reply
from server.openai.schema import ChatRequest
from server.openai.service import Service, ServiceDep
from server.openai.tools import call_deltas, plan, turn, whole_calls
from server.text.prompt import Tokenizer
from server.text.tools import ToolFormat

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    responses=streamed(ChatCompletion, ChatCompletionChunk, END),
)
async def create_chat_completion(request: ChatRequest, http: Request, service: ServiceDep) -> Response:
    """The assistant's next turn, by the model's chat template."""
    arrival = perf_counter()
    service.check_model(request.model)
    _check(request)
    service.check_ready()
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    prepared = await service.threads.run(prepare, request, service, reply_id)
    generation = generate(request, service, prepared, arrival)
    has_tools = prepared.format is not None
    shape = ChatShape(service.tokenizer, has_logprobs=request.logprobs, has_tools=has_tools)
    extra = partial(_extra, request, service.tokenizer, prepared.submits[0].prompt)
    return await Reply(reply_id, service.model_name, generation, shape, extra=extra).respond(http, request)


def _check(request: ChatRequest) -> None:
    check_stream_options(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
        raise InvalidRequestError(
            "max_tokens is the older name of max_completion_tokens; send one of them.", param="max_tokens"
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request: what the engine is asked for, what every choice says first, and how calls are to be read."""

    submits: list[Submit]
    echo: str
    format: ToolFormat | None


def prepare(request: ChatRequest, service: Service, reply_id: str) -> Prepared:
    """Raises InvalidRequestError and ContextLengthError."""
    _check_template(request, service)
    planned = plan(request, service)
    prompt = service.tokenizer.chat_prompt(
        [turn(message) for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=(request.chat_template_kwargs or {}) | _variables(request),
        template=request.chat_template,
        add_special_tokens=request.add_special_tokens,
        tools=planned.tools,
    )
    submits = build_submits(
        request,
        service.engine.info,
        [prompt],
        reply_id,
        tokenizer=service.tokenizer,
        param="messages",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prediction=_prediction(request, service.tokenizer),
        grammar=planned.grammar,
    )
    last = request.messages[-1]
    continues = last.role == "assistant" or request.continue_final_message
    return Prepared(submits, (last.content or "") if request.echo and continues else "", planned.format)


def _check_template(request: ChatRequest, service: Service) -> None:
    """Raises InvalidRequestError for a template that is not trusted, and for variables that no template would read."""
    if request.chat_template is not None and not service.trust_request_chat_template:
        raise InvalidRequestError(
            "This server was started without --trust-request-chat-template: leave chat_template out.",
            param="chat_template",
        )
    known = service.tokenizer.template_variables(request.chat_template)
    for name in _variables(request):
        if name not in known:
            raise InvalidRequestError(
                f"{name} is not supported: the model's chat template has no such variable.", param=name
            )


def _variables(request: ChatRequest) -> dict[str, Any]:
    """Fields that are variables of the chat template."""
    fields = {name: getattr(request, name) for name in ("documents", "reasoning_effort", "verbosity")}
    return {name: value for name, value in fields.items() if value is not None}


def _extra(
    request: ChatRequest, tokenizer: Tokenizer, prompt: Sequence[int], pieces: Sequence[Piece]
) -> dict[str, Any]:
    """vLLM's additions, which are said once for all choices."""
    extra: dict[str, Any] = {}
    if request.return_token_ids:
        extra["prompt_token_ids"] = prompt
    if request.prompt_logprobs is not None and pieces:
        extra["prompt_logprobs"] = prompt_logprobs(tokenizer, pieces[0].prompt_logprobs or (), request.prompt_logprobs)
    return extra


def _prediction(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    if request.prediction is None:
        return []
    return tokenizer.encode(request.prediction.content, add_special_tokens=False)


def generate(request: ChatRequest, service: Service, prepared: Prepared, arrival: float) -> Generation:
    """The submits at the engine, as text."""
    service.metrics.params_n.observe(request.n)
    format = prepared.format
    options = TextOptions(
        tuple(request.stop),
        request.include_stop_str_in_output,
        request.skip_special_tokens and format is None,  # the tags of calls may be special tokens
        token_ids=request.return_token_ids,
        parser=None if format is None else format.parser,
    )
    return Generation(service, prepared.submits, options, arrival, [prepared.echo] * len(prepared.submits))


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
            **({} if piece.token_ids is None else {"token_ids": piece.token_ids}),
        }
