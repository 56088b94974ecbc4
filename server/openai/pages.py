"""The OpenAPI document behind /docs: what FastAPI knows of the routes, and what it cannot know.

Invariant: every answer of every route has a schema, and so has every event of a stream.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.openai.answers import ChatCompletionChunk, CompletionChunk, ErrorAnswer
from server.openai.responses_answers import ResponseStreamEvent

OTHERS: tuple[type[BaseModel], ...] = (CompletionChunk, ChatCompletionChunk, ResponseStreamEvent, ErrorAnswer)
COMPONENT = "#/components/schemas/{model}"
END = "[DONE]"
ABOUT = """OpenAI's API for the model that this server has, with what vLLM adds and what we add: `speculation` and
`metrics`. Unknown fields are refused. `model` may be left out."""
TAGS = [
    {"name": "generation", "description": "Text from the model."},
    {"name": "models", "description": "The model."},
    {"name": "tokens", "description": "What the model sees of a text."},
    {"name": "operation", "description": "For whoever runs the server."},
]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
    "/v1/chat/completions": {"messages": CHAT, "max_completion_tokens": 64},
    "/v1/responses": {"instructions": "Be brief.", "input": "What is the capital of France?", "max_output_tokens": 64},
    "/tokenize": {"messages": CHAT, "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}


def streamed(answer: type[BaseModel], event: type[BaseModel], end: str = "") -> dict[int | str, dict[str, Any]]:
    """A 200 that is one object or server-sent events, one of which may be the bare word `end`."""
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": _name(event)}}
    data = {"anyOf": [chunk, {"const": end}]} if end else chunk
    words = "Server-sent events, if `stream` is set. This describes one event."
    item = {"type": "object", "properties": {"data": data}, "required": ["data"], "description": words}
    stream = {"text/event-stream": {"schema": item}}
    return {200: {"model": answer, "description": "The answer.", "content": stream}}


def _name(model: type[BaseModel]) -> str:
    return COMPONENT.format(model=model.__name__)


def install(app: FastAPI) -> None:
    """Complete the document when it is asked for."""
    app.description, app.openapi_tags = ABOUT, TAGS
    of_routes = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(of_routes())
        return of_routes()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    _, found = models_json_schema([(model, "serialization") for model in OTHERS], ref_template=COMPONENT)
    document["components"]["schemas"] |= found["$defs"]
    for path, example in EXAMPLES.items():
        document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] = example
