"""POST /tokenize and /detokenize, in vLLM's shape: what the model sees of a text, and the text of tokens.

They need the tokenizer only, so they answer while the engine does not.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import ConfigDict, Field, model_validator

from server.openai.answers import DetokenizeAnswer, TokenizeAnswer
from server.openai.params import check_token_ids
from server.openai.schema import Message, RequestBody
from server.openai.service import Service, ServiceDep
from server.openai.tools import turn

router = APIRouter(tags=["tokens"])


class TokenizeRequest(RequestBody):
    """Either a prompt or messages."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = Field(default=None, description="The served model, if absent.")
    prompt: str | None = Field(default=None, description="A text, as for /v1/completions.")
    messages: list[Message] | None = Field(
        default=None, min_length=1, fail_fast=True, description="A conversation, as for /v1/chat/completions."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Add what the model expects around a text, such as `<s>`. Default: true for a prompt, "
        "false for messages, whose template writes it.",
    )
    return_token_strs: bool = Field(default=False, description="Also return each token as the vocabulary has it.")
    add_generation_prompt: bool = Field(default=True, description="Messages: end where the assistant begins.")
    continue_final_message: bool = Field(default=False, description="Messages: leave the last one open.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Messages: handed to the template.")

    @model_validator(mode="after")
    def _is_one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        of_messages = {"add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
        if self.messages is None and (given := sorted(of_messages & self.model_fields_set)):
            raise ValueError(f"{', '.join(given)} cannot be used with prompt, only with messages")
        return self


class DetokenizeRequest(RequestBody):
    """Tokens."""

    model: str | None = Field(default=None, description="The served model, if absent.")
    tokens: list[Annotated[int, Field(ge=0)]] = Field(fail_fast=True, description="Token ids.")


@router.post("/tokenize", summary="Text to tokens")
async def tokenize(request: TokenizeRequest, service: ServiceDep) -> TokenizeAnswer:
    """The tokens that the model would see, special ones included."""
    service.check_model(request.model)
    tokens = await service.threads.run(_encode, request, service)
    names = await service.threads.run(_names, tokens, service) if request.return_token_strs else None
    room = service.engine.info.max_model_len
    return TokenizeAnswer(count=len(tokens), max_model_len=room, tokens=tokens, token_strs=names)


def _names(tokens: list[int], service: Service) -> list[str]:
    return [service.tokenizer.token_name(token) for token in tokens]


def _encode(request: TokenizeRequest, service: Service) -> list[int]:
    if request.messages is None:
        assert request.prompt is not None
        return service.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    return service.tokenizer.chat_prompt(
        [turn(message) for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=request.chat_template_kwargs,
        add_special_tokens=bool(request.add_special_tokens),
    )


@router.post("/detokenize", summary="Tokens to text")
async def detokenize(request: DetokenizeRequest, service: ServiceDep) -> DetokenizeAnswer:
    """The text of tokens, special ones included."""
    service.check_model(request.model)
    check_token_ids(request.tokens, service.engine.info, "tokens")
    text = await service.threads.run(service.tokenizer.decode, request.tokens, skip_special_tokens=False)
    return DetokenizeAnswer(prompt=text)
