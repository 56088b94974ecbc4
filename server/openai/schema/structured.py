"""What a completion must look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.openai.schema.body import Body

MAX_GRAMMAR_CHARS = 256 * 1024
MAX_FORMAT_CHOICES = 4096

Schema = dict[str, Any] | bool


class JsonSchema(Body):
    """OpenAI's wrapper of a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Names the schema in error messages.")
    description: str | None = Field(
        default=None, description="What the schema is for. For people: the grammar follows the schema alone."
    )
    schema_: Schema | None = Field(
        default=None, alias="schema", description="The JSON schema, draft 2020-12. Without one, any JSON object."
    )
    strict: bool | None = Field(
        default=None, description="The schema is always followed; `false` would allow less than that, and gets no less."
    )


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text`, `json_object` (any JSON object) or `json_schema`."
    )
    json_schema: JsonSchema | None = Field(default=None, description="Needed with the type `json_schema`.")

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with the type "json_schema", and with no other')
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: exactly one of its fields."""

    json_: Schema | str | None = Field(default=None, alias="json", description="A JSON schema, as object or text.")
    json_object: Literal[True] | None = Field(default=None, description="Any JSON object.")
    regex: Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)] | None = Field(
        default=None, description="A regular expression for the whole text (Rust's syntax, without look-around)."
    )
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, min_length=1, max_length=MAX_FORMAT_CHOICES, description="The text is one of these."
    )
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = Field(
        default=None, description="A context-free grammar: Lark as llguidance takes it, or llama.cpp's GBNF."
    )

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("send exactly one of json, json_object, regex, choice and grammar")
        return self
