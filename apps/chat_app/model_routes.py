"""Routes about the engine: how it stands, what there is to load, what its steps cost."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import mlx_mtp
from mlx_mtp.apps.chat_app import bodies
from mlx_mtp.apps.chat_app.desk import ChatDesk, chat_desk, politely, server_desk
from mlx_mtp.apps.server.api.jobs import Desk
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.replies import json_response

ADAPTER_WEIGHTS = "adapters.safetensors"
_MOST_LISTED = 200


def routes(prefix: str) -> list[BaseRoute]:
    """The routes below ``prefix``."""
    return [
        Route(f"{prefix}/state", politely(state), methods=["GET"]),
        Route(f"{prefix}/models", politely(models), methods=["GET"]),
        Route(f"{prefix}/model", politely(choose), methods=["POST"]),
        Route(f"{prefix}/facts", politely(facts), methods=["GET"]),
    ]


async def state(request: Request) -> Response:
    """What is loaded and whether it answers."""
    server, desk = server_desk(request), chat_desk(request)
    return json_response(_state(server, desk))


async def models(request: Request) -> Response:
    """What could be loaded without a download."""
    del request
    return json_response(await asyncio.to_thread(local_models))


async def choose(request: Request) -> Response:
    """Load another model; answers that are being made end."""
    server, desk = server_desk(request), chat_desk(request)
    body = await read_body(request, bodies.ChosenModel, server.settings)
    if server.engine.state not in ("ok", "broken"):
        raise ApiError(409, "a model is being loaded already", code="busy")
    await asyncio.to_thread(_check_local, body)
    await desk.answers.close()
    previous = (desk.model, desk.adapter_path)
    desk.model, desk.adapter_path, desk.switch_error = body.model, body.adapter_path, ""
    await server.engine.change(_choice(desk))
    desk.switching = asyncio.create_task(_go_back_if_broken(server, desk, previous))
    return json_response(_state(server, desk), status=202)


async def facts(request: Request) -> Response:
    """What steps cost on this machine, and on what they run."""
    info = server_desk(request).info
    return json_response(info.facts | {"num_draft_tokens": info.num_draft_tokens})


def local_models() -> dict[str, Any]:
    """Models and adapters in the hub's cache; looking takes a moment.

    Returns:
        ``models`` and ``adapters``, hub ids in alphabetical order.  The embedded model is not
        among them.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found: dict[str, list[str]] = {"models": [], "adapters": []}
    with contextlib.suppress(CacheNotFound, OSError):
        for repo in scan_cache_dir().repos:
            for revision in repo.revisions:
                names = {file.file_name for file in revision.files}
                if repo.repo_type == "model" and ADAPTER_WEIGHTS in names:
                    found["adapters"].append(repo.repo_id)
                elif repo.repo_type == "model" and _looks_like_a_model(names):
                    found["models"].append(repo.repo_id)
    return {name: sorted(set(repos))[:_MOST_LISTED] for name, repos in found.items()}


def _looks_like_a_model(names: set[str]) -> bool:
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def _check_local(body: bodies.ChosenModel) -> None:
    """Refuse what is not on this machine: a page must not start downloads.

    Raises:
        ValueError: it is not there.
    """
    known = local_models()
    for kind, chosen in (("model", body.model), ("adapter", body.adapter_path)):
        if chosen is None or chosen in known[f"{kind}s"]:
            continue
        path = Path(chosen).expanduser()
        needed = "config.json" if kind == "model" else ADAPTER_WEIGHTS
        if not path.is_dir():
            raise ValueError(f"{kind} {chosen} is neither a folder nor in the hub's cache here")
        if not (path / needed).is_file():
            raise ValueError(f"{kind} {chosen} has no {needed}")


async def _go_back_if_broken(
    server: Desk, desk: ChatDesk, previous: tuple[str | None, str | None]
) -> None:
    """Load what was there before where the chosen model cannot be loaded."""
    await server.engine.settled.wait()
    if server.engine.state == "broken":
        desk.switch_error = server.engine.error
        desk.model, desk.adapter_path = previous
        await server.engine.change(_choice(desk))


def _choice(desk: ChatDesk) -> dict[str, Any]:
    return {"model": desk.model, "adapter_path": desk.adapter_path}


def _state(server: Desk, desk: ChatDesk) -> dict[str, Any]:
    info = server.engine.info
    return {
        "version": mlx_mtp.__version__,
        "state": server.engine.state,
        "error": desk.switch_error or server.engine.error,
        "chosen": _choice(desk),
        "model": None
        if info is None
        else {
            "name": server.model_id,
            "adapter": info.adapter,
            "num_draft_tokens": info.num_draft_tokens,
            "max_context": info.max_context,
            "has_chat_template": info.has_chat_template,
        },
    }
