"""``/health``, ``/metrics``, ``/v1/models`` and ``/openapi.json``: answered without the engine."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlx_mtp.apps.server.api.jobs import Desk
from mlx_mtp.apps.server.metrics import CONTENT_TYPE
from mlx_mtp.apps.server.openapi import document
from mlx_mtp.apps.server.replies import json_response


async def health(request: Request) -> Response:
    """Whether answers can be had: 200, or 503 while an engine is being loaded."""
    desk: Desk = request.app.state.desk
    engine = desk.engine
    content: dict[str, Any] = {"status": engine.state, "engine_restarts": engine.restarts}
    if engine.info is not None:
        content |= {
            "model": desk.model_id,
            "adapter": engine.info.adapter,
            "num_draft_tokens": engine.info.num_draft_tokens,
        }
    return json_response(content, status=200 if engine.state == "ok" else 503)


async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    desk: Desk = request.app.state.desk
    return Response(desk.engine.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def models(request: Request) -> Response:
    """The models: one."""
    desk: Desk = request.app.state.desk
    return json_response({"object": "list", "data": [_model(desk)]})


async def model(request: Request) -> Response:
    """One model by its id."""
    desk: Desk = request.app.state.desk
    desk.check_model(request.path_params["model"])
    return json_response(_model(desk))


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    del request
    return json_response(document())


def _model(desk: Desk) -> dict[str, Any]:
    """A model in OpenAI's shape; Anthropic's fields are there too."""
    info = desk.info
    return {
        "id": desk.model_id,
        "object": "model",
        "type": "model",
        "display_name": desk.model_id,
        "created": 0,
        "created_at": "1970-01-01T00:00:00Z",
        "owned_by": "mlx-mtp",
        "max_context": info.max_context,
        "num_draft_tokens": info.num_draft_tokens,
        "adapter": info.adapter,
        "tools": info.has_tools,
    }
