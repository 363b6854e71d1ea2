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

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """OpenAI's ``response_format`` in chat."""

    type: Kind
    json_schema: JsonSchema | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp's place for it


class TextFormat(Fields):
    """``text.format`` of Responses."""

    type: Kind
    name: str | None = Field(None, min_length=1, max_length=256)
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


def chat_format(format: ResponseFormat | None, *, tools: bool) -> dict[str, Any]:
    """Return the fields of ``Job`` for a response format; none for any text.

    Args:
        format: the request's field.
        tools: whether the model may call tools.

    Raises:
        ApiError: 400 if fields contradict each other.
    """
    if format is None:
        return {}
    schema = format.json_schema.content if format.json_schema else None
    if schema is None and format.content is not None and format.type != "text":
        where = "response_format"
        return _job_fields("json_schema", format.content, where, where, tools)
    return _job_fields(format.type, schema, "response_format", "response_format.json_schema", tools)


def responses_format(format: TextFormat | None, *, tools: bool) -> dict[str, Any]:
    """Return the same for Responses."""
    if format is not None and format.type == "json_schema" and format.name is None:
        raise refused("text.format.name is missing", param="text.format.name")
    return schema_format(format, "text.format", tools=tools)


def schema_format(format: TextFormat | None, where: str, *, tools: bool) -> dict[str, Any]:
    """Return the same for a format that contains its schema; ``where`` is its place."""
    return {} if format is None else _job_fields(format.type, format.content, where, where, tools)


def _job_fields(
    kind: Kind, schema: dict[str, Any] | None, where: str, inner: str, tools: bool
) -> dict[str, Any]:
    if kind != "json_schema" and schema is not None:
        raise refused(f"{inner} is only allowed with type json_schema, not {kind}", param=inner)
    if kind == "text":
        return {}
    if tools:
        raise refused(
            f"{where}: a JSON format cannot be combined with tools",
            param=where,
        )
    param = f"{inner}.schema" if kind == "json_schema" else where
    if kind == "json_schema" and schema is None:
        missing = inner if inner != where else param
        raise refused(f"{missing} is missing", param=missing, code="missing_parameter")
    return {"schema": ANY_OBJECT if schema is None else schema, "schema_param": param}
