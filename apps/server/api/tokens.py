"""``POST /tokenize`` and ``POST /detokenize``, as llama.cpp's server has them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.engine.protocol import Job
from mlx_mtp.apps.server.api.jobs import ServerContext
from mlx_mtp.apps.server.api.schemas import Fields, Many
from mlx_mtp.apps.server.replies import json_response


class TokenizeRequest(Fields):
    """A text; special tokens in it become their ids."""

    content: str = ""
    model: str | None = None
    add_special: bool = False
    unsupported = ("with_pieces",)


class DetokenizeRequest(Fields):
    """Ids."""

    tokens: Many[int]
    model: str | None = None


async def tokenize(request: Request) -> Any:
    """Return the ids of a text."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, TokenizeRequest)
    special = body.add_special
    job = Job(max_tokens=1, prompt=body.content, only="ids", add_special_tokens=special)
    _, group = await context.encode(request, job)
    return json_response({"tokens": group.ids})


async def detokenize(request: Request) -> Any:
    """Return the text of ids."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, DetokenizeRequest)
    _, group = await context.encode(request, Job(max_tokens=1, prompt=body.tokens, only="text"))
    return json_response({"content": group.text})
