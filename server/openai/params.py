"""From a validated request to the engine's `Submit`s: everything that needs the model to be judged.

Invariants:
- every token id that leaves here is in the vocabulary; every prompt has a token and fits with its completion;
- choices of one prompt share the seed and differ in `choice`, so a choice's text does not depend on its neighbours.
Raises InvalidRequestError and ContextLengthError, with `param` naming the field.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from server.engine.messages import ModelInfo, SamplingParams, SpeculationParams, Submit
from server.errors import ContextLengthError, InvalidRequestError
from server.openai.schema import GenerationRequest, SpeculationOptions
from server.openai.words import bad_words, check_possible
from server.text.prompt import Tokenizer

MIN_TEMPERATURE = 1e-5  # below it, greedy, as in vLLM: the scaled logits would overflow


def build_submits(
    request: GenerationRequest,
    info: ModelInfo,
    prompts: Sequence[Sequence[int]],
    request_id: str,
    *,
    tokenizer: Tokenizer,
    param: str,
    max_tokens: int | None,
    default_max_tokens: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    num_choices: int | None = None,
    prediction: Sequence[int] = (),
    grammar: str | None = None,
) -> list[Submit]:
    """`num_choices` or else `n` submits for each prompt, in the order of their index.

    `param` is the field that the prompts came in. Without `max_tokens` a completion may have `default_max_tokens`, and
    without either all that fit. Of `prompt_logprobs` and the request's own the larger is asked of the engine.
    """
    counts = [count for count in (prompt_logprobs, request.prompt_logprobs) if count is not None]
    same = replace(
        _sampling_params(request, info, tokenizer),
        logprobs=logprobs,
        prompt_logprobs=max(counts, default=None),
        grammar=grammar,
    )
    speculation = speculation_params(request.speculation)
    predicted = tuple(prediction[: info.max_model_len])
    submits: list[Submit] = []
    for whole in prompts:
        prompt = tuple(_truncated(whole, request.truncate_prompt_tokens, info, max_tokens, default_max_tokens))
        limit = _token_limit(len(prompt), max_tokens, default_max_tokens, info.max_model_len, param)
        if request.min_tokens > limit:
            raise InvalidRequestError(
                f"min_tokens is {request.min_tokens}, but at most {limit} tokens can be generated.", param="min_tokens"
            )
        for choice in range(num_choices or request.n):
            sampling = replace(same, max_tokens=limit, choice=choice)
            name = f"{request_id}-{len(submits)}"
            submits.append(Submit(name, prompt, sampling, speculation, request.priority, predicted))
    return submits


def _truncated(
    prompt: Sequence[int], keep: int | None, info: ModelInfo, max_tokens: int | None, default_max_tokens: int | None
) -> Sequence[int]:
    """The last `keep` tokens; -1 are as many as leave room for the completion."""
    if keep == -1:
        room = default_max_tokens or 1 if max_tokens is None else max_tokens
        keep = max(info.max_model_len - room, 1)
    if keep == 0:
        raise InvalidRequestError("truncate_prompt_tokens must leave a token.", param="truncate_prompt_tokens")
    return prompt if keep is None else prompt[-keep:]


def _sampling_params(request: GenerationRequest, info: ModelInfo, tokenizer: Tokenizer) -> SamplingParams:
    """What all choices of all prompts have in common."""
    allowed, words = request.allowed_token_ids, bad_words(request.bad_words, tokenizer)
    check_token_ids(request.stop_token_ids, info, "stop_token_ids")
    check_token_ids(allowed or (), info, "allowed_token_ids")
    check_token_ids(chain.from_iterable(words), info, "bad_words")
    check_possible(request, words, info)
    return SamplingParams(
        max_tokens=0,
        min_tokens=request.min_tokens,
        temperature=0.0 if request.temperature < MIN_TEMPERATURE else request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias, info),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        bad_words=words,
    )


def check_stream_options(request: GenerationRequest) -> None:
    """Options that only streams can honour are refused elsewhere, and those that streams cannot, there."""
    options = request.stream_options
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs cannot be streamed: leave out stream.", param="prompt_logprobs")
    if options is None:
        return
    if not request.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequestError("continuous_usage_stats needs include_usage to be true.", param="stream_options")


def check_token_ids(token_ids: Iterable[int], info: ModelInfo, param: str) -> None:
    """Raises InvalidRequestError for the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"Token id {token_id} is not in the vocabulary, which ends at {info.vocab_size - 1}.", param=param
            )


def speculation_params(options: SpeculationOptions) -> SpeculationParams:
    """Refuses options that the chosen mode would not look at."""
    given = options.model_fields_set
    if options.mode != "typical" and given & {"epsilon", "delta"}:
        raise InvalidRequestError('epsilon and delta need the mode "typical".', param="speculation")
    if options.mode == "off" and options.max_nodes:
        raise InvalidRequestError('max_nodes cannot be used with the mode "off".', param="speculation.max_nodes")
    return SpeculationParams(options.mode, options.max_nodes, options.epsilon, options.delta)


def _logit_bias(bias: dict[str, float], info: ModelInfo) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit()):
            raise InvalidRequestError(f"The keys of logit_bias are token ids; {key!r} is none.", param="logit_bias")
    biases = {int(key): value for key, value in bias.items() if len(key) < 20}
    if len(biases) != len(bias):
        raise InvalidRequestError("logit_bias names a token twice or out of range.", param="logit_bias")
    check_token_ids(biases, info, "logit_bias")
    return tuple(biases.items())


def _token_limit(num_prompt: int, wanted: int | None, default: int | None, max_model_len: int, param: str) -> int:
    """How many tokens may follow `num_prompt` prompt tokens."""
    if num_prompt == 0:
        raise InvalidRequestError("The prompt is empty; send at least one token.", param=param)
    room = max_model_len - num_prompt
    if wanted is None and room > 0:
        return room if default is None else min(default, room)
    if wanted is not None and wanted <= room:
        return wanted
    asked = f"{num_prompt} in the prompt" + (f", {wanted} in the completion" if wanted is not None else "")
    raise ContextLengthError(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{num_prompt + (wanted or 0)} tokens ({asked}). Please reduce the length of the prompt or completion.",
        param=param,
    )
