"""``/health``, ``/metrics``, ``/v1/models`` and ``/openapi.json``: without the engine."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.apps.server.api.jobs import ServerContext
from mlx_mtp.apps.server.metrics import CONTENT_TYPE
from mlx_mtp.apps.server.openapi import document
from mlx_mtp.apps.server.replies import json_response


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
        }
    return json_response(content, status=200 if engine.state == "ok" else 503)


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    context: ServerContext = request.app.state.context
    return Response(context.engine.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def models(request: Request) -> Response:
    """List the models: one."""
    context: ServerContext = request.app.state.context
    return json_response({"object": "list", "data": [_model(context)]})


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
        "max_context": info.max_context,
        "num_draft_tokens": info.num_draft_tokens,
        "adapter": info.adapter,
        "tools": info.has_tools,
    }
