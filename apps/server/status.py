"""What the server says about itself, its model and its state, without the engine."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.apps.server.api.jobs import FINGERPRINT, ServerContext
from mlx_mtp.apps.server.metrics import CONTENT_TYPE
from mlx_mtp.apps.server.openapi import document
from mlx_mtp.apps.server.replies import ANTHROPIC_HEADER, json_response

CONTEXT_FIELDS = ("max_context", "max_model_len", "context_length", "max_input_tokens")


async def health(request: Request) -> Response:
    """State of the engine: 200, or 503 if it is not ready."""
    context: ServerContext = request.app.state.context
    engine = context.engine
    content: dict[str, Any] = {"status": engine.state, "engine_restarts": engine.restarts}
    if engine.info is not None:
        content |= {
            "model": context.model_id,
            "adapter": engine.info.adapter,
            "num_draft_tokens": engine.info.num_draft_tokens,
            "drafters": engine.info.drafters,
        }
    return json_response(content, status=200 if engine.state == "ok" else 503)


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    context: ServerContext = request.app.state.context
    return Response(context.engine.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def root(request: Request) -> Response:
    """A line for people; Claude Code asks for its headers at ``/`` or ``/api/hello``."""
    context: ServerContext = request.app.state.context
    text = f"{FINGERPRINT}: the engine is {context.engine.state}. The API is at /v1.\n"
    return Response(text, media_type="text/plain")


async def props(request: Request) -> Response:
    """llama.cpp's properties of the server and its model."""
    context: ServerContext = request.app.state.context
    info, settings = context.info, context.settings
    params = {name: getattr(settings, name) for name in ("top_p", "top_k", "min_p")}
    params |= {"temperature": settings.temp, "n_predict": settings.max_tokens}
    content = {
        "default_generation_settings": {"n_ctx": info.max_context, "params": params},
        "total_slots": context.engine.max_concurrent,
        "model_alias": context.model_id,
        "model_path": info.model,
        "modalities": {"vision": False, "audio": False},
        "chat_template": info.chat_template,
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
        "build_info": FINGERPRINT,
    }
    return json_response(content)


async def models(request: Request) -> Response:
    """List the models, which is one, in the form of the API that the request is of."""
    context: ServerContext = request.app.state.context
    model = _model(context)
    if ANTHROPIC_HEADER in request.headers:
        content = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}
    else:
        content = {"object": "list"}
    return json_response(content | {"data": [model]})


async def model(request: Request) -> Response:
    """One model by its id."""
    context: ServerContext = request.app.state.context
    context.check_model(request.path_params["model"])
    return json_response(_model(context))


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    del request
    return json_response(document())


def _model(context: ServerContext) -> dict[str, Any]:
    """A model with the fields of OpenAI and of Anthropic."""
    info = context.info
    return {
        "id": context.model_id,
        "object": "model",
        "type": "model",
        "display_name": context.model_id,
        "created": 0,
        "created_at": "1970-01-01T00:00:00Z",
        "owned_by": "mlx-mtp",
        **dict.fromkeys(CONTEXT_FIELDS, info.max_context),
        "num_draft_tokens": info.num_draft_tokens,
        "adapter": info.adapter,
        "drafters": info.drafters,
        "tools": info.has_chat_template,
        "reasoning": info.has_reasoning,
    }
