"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import uuid
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response

from server.engine.messages import Submit
from server.errors import InvalidRequestError
from server.openai.generation import Generation, Piece, TextOptions
from server.openai.logprobs import CompletionLogprobs
from server.openai.params import build_submits, check_stream_options, check_token_ids
from server.openai.reply import Reply
from server.openai.schema import CompletionRequest
from server.openai.service import Service, ServiceDep
from server.openai.structured import checked_grammar
from server.text.prompt import Tokenizer

MAX_TOTAL_CHOICES = 1024

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: CompletionRequest, http: Request, service: ServiceDep) -> Response:
    """Continue each prompt."""
    arrival = perf_counter()
    service.check_model(request.model)
    _check(request)
    service.check_ready()
    reply_id = f"cmpl-{uuid.uuid4().hex}"
    submits, echoes = await asyncio.to_thread(_prepare, request, service, reply_id)
    service.metrics.params_n.observe(request.n)
    options = TextOptions(tuple(request.stop), request.include_stop_str_in_output, request.skip_special_tokens)
    generation = Generation(service, submits, options, arrival, echoes)
    shape = CompletionShape(service.tokenizer, request, len(submits))
    return await Reply(reply_id, service.model_name, generation, shape).respond(http, request)


def _check(request: CompletionRequest) -> None:
    check_stream_options(request)
    if request.best_of not in (None, request.n):
        raise InvalidRequestError("best_of must equal n: every choice is returned.", param="best_of")
    if request.suffix:
        raise InvalidRequestError("suffix is not supported: the model only continues a prompt.", param="suffix")
    if len(request.prompt) * request.n > MAX_TOTAL_CHOICES:
        raise InvalidRequestError(
            f"The prompts times n must not exceed {MAX_TOTAL_CHOICES}; send several requests.", param="prompt"
        )


def _prepare(request: CompletionRequest, service: Service, reply_id: str) -> tuple[list[Submit], list[str]]:
    """Encode the prompts. Returns the submits and what each choice says first."""
    prompts = [_encode(prompt, service) for prompt in request.prompt]
    submits = build_submits(
        request,
        service.engine.info,
        prompts,
        reply_id,
        param="prompt",
        max_tokens=request.max_tokens if "max_tokens" in request.model_fields_set else None,
        default_max_tokens=request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        grammar=checked_grammar(request, service.tokenizer),
    )
    if not request.echo:
        return submits, [""] * len(submits)
    texts = [_echo(prompt, request, service.tokenizer) for prompt in request.prompt]
    return submits, [text for text in texts for _ in range(request.n)]


def _encode(prompt: str | list[int], service: Service) -> list[int]:
    if isinstance(prompt, str):
        return service.tokenizer.encode(prompt)
    check_token_ids(prompt, service.engine.info, "prompt")
    return prompt


def _echo(prompt: str | list[int], request: CompletionRequest, tokenizer: Tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(prompt, skip_special_tokens=request.skip_special_tokens)


class CompletionShape:
    """The objects of a completion. Chunks are small responses."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest, num_choices: int) -> None:
        skip = request.skip_special_tokens
        self._has_logprobs = request.logprobs is not None
        self._logprobs = [CompletionLogprobs(tokenizer, skip_special_tokens=skip) for _ in range(num_choices)]

    def opening(self, index: int) -> None:
        """Completions begin with text."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """The next part of a choice."""
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs[piece.index].render(piece.tokens) if self._has_logprobs else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }

    choice = chunk
