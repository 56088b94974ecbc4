"""The base class of everything a client sends."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    words = {key: schema.pop(key) for key in ("title", "description", "default", "examples") if key in schema}
    kinds = schema["anyOf"] if schema.keys() == {"anyOf"} else [schema]
    null = {"type": "null"}
    return words | {"anyOf": kinds if null in kinds else [*kinds, null]}


class UnsupportedError(ValueError):
    """A known field, or a value of one, that this server does not offer."""


class Body(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > len(cls.model_fields):
            data = cls._with_one_unknown(data)
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}

    @classmethod
    def _with_one_unknown(cls, data: dict[str, Any]) -> dict[str, Any]:
        """One unknown field is told; a hundred thousand of them would take seconds to find."""
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((key for key in data if key not in known), None)
        return {key: value for key, value in data.items() if key in known or key == unknown}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The OpenAPI page says of null what the validator above does."""
        schema = handler(core)
        own = handler.resolve_ref_schema(schema)
        for name in own.get("properties", {}).keys() - own.get("required", ()):
            own["properties"][name] = _or_null(own["properties"][name])
        return schema
