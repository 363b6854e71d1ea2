"""Response formats: any text, any JSON object, or JSON that matches a schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.schemas import Fields
from mlx_mtp.apps.server.errors import refused

ANY_OBJECT: dict[str, Any] = {"type": "object"}
Kind = Literal["text", "json_object", "json_schema"]


class JsonSchema(Fields):
    """OpenAI's ``json_schema``; it is enforced whether or not it is ``strict``."""

    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """OpenAI's ``response_format`` in chat."""

    type: Kind
    json_schema: JsonSchema | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp's place for it


class TextFormat(Fields):
    """``text.format`` of Responses."""

    type: Kind
    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


def chat_format(format: ResponseFormat | None) -> dict[str, Any]:
    """Return the fields of ``Job`` for a response format; none for any text.

    Args:
        format: the request's field.

    Raises:
        ApiError: 400 for a missing schema.
    """
    if format is None:
        return {}
    schema = format.json_schema.content if format.json_schema else None
    if schema is None and format.content is not None:
        return _job_fields(format.type, format.content, "response_format")
    return _job_fields(format.type, schema, "response_format.json_schema")


def schema_format(format: TextFormat | None, where: str) -> dict[str, Any]:
    """Return the same for a format that contains its schema; ``where`` is its place."""
    return {} if format is None else _job_fields(format.type, format.content, where)


def _job_fields(kind: Kind, schema: dict[str, Any] | None, where: str) -> dict[str, Any]:
    if kind == "text":
        return {}
    param = f"{where}.schema"
    if kind == "json_schema" and schema is None:
        raise refused(f"{param} is missing", param=param, code="missing_parameter")
    return {"schema": ANY_OBJECT if schema is None else schema, "schema_param": param}
