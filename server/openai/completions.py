"""POST /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response

from server.engine.messages import Submit
from server.errors import InvalidRequestError
from server.openai.answers import Completion, CompletionChunk
from server.openai.best_of import BestOf
from server.openai.generation import Generation, Piece, TextOptions
from server.openai.logprobs import CompletionLogprobs, prompt_logprobs
from server.openai.pages import END, streamed
from server.openai.params import build_submits, check_stream_options, check_token_ids
from server.openai.reply import Reply
from server.openai.schema import CompletionRequest
from server.openai.service import Service, ServiceDep
from server.openai.structured import checked_grammar
from server.text.prompt import Tokenizer

MAX_TOTAL_CHOICES = 1024

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", summary="Continue a text", responses=streamed(Completion, CompletionChunk, END))
async def create_completion(request: CompletionRequest, http: Request, service: ServiceDep) -> Response:
    """Each prompt goes on, `n` times."""
    arrival = perf_counter()
    service.check_model(request.model)
    _check(request)
    service.check_ready()
    reply_id = f"cmpl-{uuid.uuid4().hex}"
    submits, echoes = await service.threads.run(_prepare, request, service, reply_id)
    service.metrics.params_n.observe(request.n)
    options = TextOptions(
        tuple(request.stop),
        request.include_stop_str_in_output,
        request.skip_special_tokens,
        scores_prompt=request.echo and request.logprobs is not None,
        token_ids=request.return_token_ids,
    )
    generation = _generation(request, service, submits, options, arrival, echoes)
    prompts = [submit.prompt for submit in submits if submit.sampling.choice < request.n]
    shape = CompletionShape(service.tokenizer, request, prompts)
    return await Reply(reply_id, service.model_name, generation, shape).respond(http, request)


def _generation(
    request: CompletionRequest,
    service: Service,
    submits: list[Submit],
    options: TextOptions,
    arrival: float,
    echoes: list[str],
) -> Generation:
    """Making it admits its choices."""
    best_of, n = _num_choices(request), request.n
    if best_of == n:
        return Generation(service, submits, options, arrival, echoes)
    return BestOf(service, submits, options, arrival, echoes, best_of=best_of, n=n)


def _check(request: CompletionRequest) -> None:
    check_stream_options(request)
    if request.best_of is not None and request.best_of < request.n:
        raise InvalidRequestError("best_of must be at least n.", param="best_of")
    if request.stream and _num_choices(request) > request.n:
        raise InvalidRequestError("best_of cannot be streamed: leave out stream.", param="best_of")
    if len(request.prompt) * _num_choices(request) > MAX_TOTAL_CHOICES:
        raise InvalidRequestError(
            f"The prompts times n or best_of must not exceed {MAX_TOTAL_CHOICES}; send several requests.",
            param="prompt",
        )


def _num_choices(request: CompletionRequest) -> int:
    return request.best_of or request.n


def _prepare(request: CompletionRequest, service: Service, reply_id: str) -> tuple[list[Submit], list[str]]:
    """Encode the prompts. Returns the submits and what each choice says first."""
    prompts = [_encode(prompt, request, service) for prompt in request.prompt]
    num_choices = _num_choices(request)
    submits = build_submits(
        request,
        service.engine.info,
        prompts,
        reply_id,
        tokenizer=service.tokenizer,
        param="prompt",
        max_tokens=request.max_tokens if "max_tokens" in request.model_fields_set else None,
        default_max_tokens=request.max_tokens,
        logprobs=0 if request.logprobs is None and num_choices > request.n else request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        num_choices=num_choices,
        grammar=checked_grammar(request, service.tokenizer),
    )
    if not request.echo:
        return submits, [""] * len(submits)
    firsts = submits[::num_choices]
    texts = [
        given if isinstance(given, str) and len(prompt) == len(submit.prompt) else _decode(submit, request, service)
        for given, prompt, submit in zip(request.prompt, prompts, firsts, strict=True)
    ]
    return submits, [text for text in texts for _ in range(num_choices)]


def _encode(prompt: str | list[int], request: CompletionRequest, service: Service) -> list[int]:
    if isinstance(prompt, str):
        return service.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
    check_token_ids(prompt, service.engine.info, "prompt")
    return prompt


def _decode(submit: Submit, request: CompletionRequest, service: Service) -> str:
    return service.tokenizer.decode(submit.prompt, skip_special_tokens=request.skip_special_tokens)


class CompletionShape:
    """The objects of a completion. Chunks are small responses. `prompts` are those of the choices."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest, prompts: Sequence[Sequence[int]]) -> None:
        skip = request.skip_special_tokens
        self._tokenizer = tokenizer
        self._has_logprobs = request.logprobs is not None
        self._logprobs = [
            CompletionLogprobs(tokenizer, request.logprobs or 0, skip_special_tokens=skip) for _ in prompts
        ]
        self._num_prompt_logprobs = request.prompt_logprobs
        self._unsaid_prompts = dict(enumerate(prompts)) if request.return_token_ids else {}

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
            **self._extra(piece),
        }

    choice = chunk

    def _extra(self, piece: Piece) -> dict[str, Any]:
        """vLLM's additions. A choice says its prompt once."""
        extra: dict[str, Any] = {}
        if piece.token_ids is not None:
            extra["token_ids"] = piece.token_ids
            extra["prompt_token_ids"] = self._unsaid_prompts.pop(piece.index, None)
        if self._num_prompt_logprobs is not None:
            entries = piece.prompt_logprobs or ()
            extra["prompt_logprobs"] = prompt_logprobs(self._tokenizer, entries, self._num_prompt_logprobs)
        return extra
