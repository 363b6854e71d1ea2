"""Routes for the engine: its state, the local models, and the cost of its steps."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_mtp.apps.chat_app import bodies
from mlx_mtp.apps.chat_app.context import (
    ChatContext,
    chat_context,
    server_context,
    with_http_errors,
)
from mlx_mtp.apps.server.api.jobs import ServerContext
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.storage.gguf.parts import is_gguf
from mlx_mtp.storage.package import package_version

ADAPTER_WEIGHTS = "adapters.safetensors"
_MAX_LISTED = 200


def routes(prefix: str) -> list[BaseRoute]:
    """Return the routes below ``prefix``."""
    return [
        Route(f"{prefix}/state", with_http_errors(state), methods=["GET"]),
        Route(f"{prefix}/models", with_http_errors(models), methods=["GET"]),
        Route(f"{prefix}/model", with_http_errors(choose), methods=["POST"]),
        Route(f"{prefix}/facts", with_http_errors(facts), methods=["GET"]),
    ]


async def state(request: Request) -> Response:
    """Return the loaded model and the state of the engine."""
    server, context = server_context(request), chat_context(request)
    return json_response(_state(server, context))


async def models(request: Request) -> Response:
    """List the models and adapters that can be loaded without a download."""
    del request
    return json_response(await asyncio.to_thread(local_models))


async def choose(request: Request) -> Response:
    """Load another model; running answers are stopped."""
    server, context = server_context(request), chat_context(request)
    body = await read_body(request, bodies.ChosenModel, server.settings)
    if server.engine.state not in ("ok", "broken"):
        raise ApiError(409, "a model is already loading", code="busy")
    await asyncio.to_thread(_check_local, body)
    await context.answers.close()
    previous = (context.model, context.adapter_path)
    context.model, context.adapter_path, context.switch_error = body.model, body.adapter_path, ""
    await server.engine.change(**_choice(context))
    context.switching = asyncio.create_task(_restore_if_broken(server, context, previous))
    return json_response(_state(server, context), status=202)


async def facts(request: Request) -> Response:
    """Return the cost of steps on this machine, and the device."""
    info = server_context(request).info
    return json_response(info.facts | {"num_draft_tokens": info.num_draft_tokens})


def local_models() -> dict[str, Any]:
    """Scan the local Hugging Face cache for models and adapters, which takes a moment.

    Returns:
        ``models`` and ``adapters``, hub ids in alphabetical order, without the built-in model.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    cached: dict[str, list[str]] = {"models": [], "adapters": []}
    with contextlib.suppress(CacheNotFound, OSError):
        for repo in scan_cache_dir().repos:
            for revision in repo.revisions:
                names = {file.file_name for file in revision.files}
                if repo.repo_type == "model" and ADAPTER_WEIGHTS in names:
                    cached["adapters"].append(repo.repo_id)
                elif repo.repo_type == "model" and _looks_like_a_model(names):
                    cached["models"].append(repo.repo_id)
    return {name: sorted(set(repos))[:_MAX_LISTED] for name, repos in cached.items()}


def _looks_like_a_model(names: set[str]) -> bool:
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def _check_local(body: bodies.ChosenModel) -> None:
    """Check that the model and the adapter are on this machine: the page must not start downloads.

    Raises:
        ValueError: one of them is missing.
    """
    cached = local_models()
    for kind, chosen in (("model", body.model), ("adapter", body.adapter_path)):
        if chosen is None or chosen in cached[f"{kind}s"]:
            continue
        path = Path(chosen).expanduser()
        required = "config.json" if kind == "model" else ADAPTER_WEIGHTS
        if kind == "model" and is_gguf(path):
            continue
        if not path.is_dir():
            raise ValueError(
                f"{kind} {chosen} is neither a folder nor in the local Hugging Face cache"
            )
        if not (path / required).is_file():
            raise ValueError(f"{kind} {chosen} contains no {required}")


async def _restore_if_broken(
    server: ServerContext, context: ChatContext, previous: tuple[str | None, str | None]
) -> None:
    """Restore the previous model if the selected one fails to load."""
    await server.engine.settled.wait()
    if server.engine.state == "broken":
        context.switch_error = server.engine.error
        context.model, context.adapter_path = previous
        await server.engine.change(**_choice(context))


def _choice(context: ChatContext) -> dict[str, Any]:
    return {"model": context.model, "adapter_path": context.adapter_path}


def _state(server: ServerContext, context: ChatContext) -> dict[str, Any]:
    info = server.engine.info
    return {
        "version": package_version(),
        "state": server.engine.state,
        "error": context.switch_error or server.engine.error,
        "chosen": _choice(context),
        "model": None
        if info is None
        else {
            "name": server.model_id,
            "adapter": info.adapter,
            "drafters": info.drafters,
            "num_draft_tokens": info.num_draft_tokens,
            "max_context": info.max_context,
            "has_chat_template": info.has_chat_template,
        },
    }
