"""The OpenAPI document, generated from the request models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mlx_mtp.apps.server.api.anthropic_messages import MessagesRequest, PromptRequest
from mlx_mtp.apps.server.api.openai_chat import ChatRequest
from mlx_mtp.apps.server.api.openai_completions import CompletionRequest
from mlx_mtp.apps.server.api.responses_schema import ResponsesRequest
from mlx_mtp.apps.server.api.tokens import DetokenizeRequest, TokenizeRequest
from mlx_mtp.storage.package import package_version

_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation (OpenAI)."),
    "/v1/completions": (CompletionRequest, "Continue a text (OpenAI)."),
    "/v1/responses": (ResponsesRequest, "Answer a conversation (OpenAI's Responses)."),
    "/v1/messages": (MessagesRequest, "Answer a conversation (Anthropic)."),
    "/v1/messages/count_tokens": (PromptRequest, "Count the tokens of a conversation (Anthropic)."),
    "/tokenize": (TokenizeRequest, "Return the ids of a text (llama.cpp)."),
    "/detokenize": (DetokenizeRequest, "Return the text of ids (llama.cpp)."),
}
_GETS = {
    "/health": "State of the engine.",
    "/props": "Properties of the server and its model (llama.cpp).",
    "/metrics": "Prometheus metrics.",
    "/v1/models": "The models.",
    "/v1/models/{model}": "One model.",
    "/openapi.json": "This document.",
}


def document() -> dict[str, Any]:
    """Return the document, OpenAPI 3.1."""
    models = [(model, "validation") for model, _ in _POSTS.values()]
    references, schemas = models_json_schema(
        models,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {path: {"get": _get(path, text)} for path, text in _GETS.items()}
    for path, (model, text) in _POSTS.items():
        paths[path] = {"post": _post(references[(model, "validation")], text)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-mtp serve", "version": package_version()},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _get(path: str, text: str) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": text, "responses": _responses()}
    if "{model}" in path:
        name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    return operation


def _post(schema: Any, text: str) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {
        "summary": text,
        "requestBody": {"required": True, "content": content},
        "responses": _responses(),
    }


def _responses() -> dict[str, Any]:
    return {
        "200": {"description": "The answer."},
        "4XX": {"description": "The request is invalid or not supported."},
        "503": {"description": "The engine is not ready."},
    }
