"""What a request wants its answer's text to be: any text, any JSON object, or JSON of a schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.schemas import Strict
from mlx_mtp.apps.server.errors import refused

ANY_OBJECT: dict[str, Any] = {"type": "object"}
Kind = Literal["text", "json_object", "json_schema"]


class JsonSchema(Strict):
    """OpenAI's ``json_schema``; the answer is held to it whether or not it is ``strict``."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's ``response_format`` in chat."""

    type: Kind
    json_schema: JsonSchema | None = None


class TextFormat(Strict):
    """The same as Responses write it, ``text.format``."""

    type: Kind
    name: str | None = Field(None, min_length=1, max_length=256)
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


def chat_format(given: ResponseFormat | None, *, tools: bool) -> dict[str, Any]:
    """The part of a job that says what the text is held to; empty for any text.

    Args:
        given: what the request says.
        tools: whether the model may call tools.

    Raises:
        ApiError: 400 for what does not fit together.
    """
    if given is None:
        return {}
    schema = given.json_schema.content if given.json_schema else None
    return _job(given.type, schema, "response_format", "response_format.json_schema", tools)


def responses_format(given: TextFormat | None, *, tools: bool) -> dict[str, Any]:
    """The same for Responses."""
    if given is None:
        return {}
    if given.type == "json_schema" and given.name is None:
        raise refused("text.format.name is missing", param="text.format.name")
    return _job(given.type, given.content, "text.format", "text.format", tools)


def _job(
    kind: Kind, schema: dict[str, Any] | None, where: str, inner: str, tools: bool
) -> dict[str, Any]:
    if kind != "json_schema" and schema is not None:
        raise refused(f"{inner} is for the type json_schema, not {kind}", param=inner)
    if kind == "text":
        return {}
    if tools:
        raise refused(
            f"{where}: a text that is held to JSON can call no tools; leave one of the two out",
            param=where,
        )
    param = f"{inner}.schema" if kind == "json_schema" else where
    if kind == "json_schema" and schema is None:
        missing = inner if inner != where else param
        raise refused(f"{missing} is missing", param=missing, code="missing_parameter")
    return {"schema": ANY_OBJECT if schema is None else schema, "schema_param": param}
