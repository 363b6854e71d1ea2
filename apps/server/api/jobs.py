"""From a request's fields to a job for the engine."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.apps.engine.supervisor import Engine, EngineInfo
from mlx_mtp.apps.server.api.schemas import OpenAISampled, Sampled
from mlx_mtp.apps.server.errors import ApiError, engine_down, refused
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.apps.server.streams import unless_gone

SEEDS = 2**63
LEAST_TOP_P = 1e-9  # for 0, which mlx-lm takes for no limit and the APIs for the tightest
GREEDY_BELOW = 1e-6  # colder than this, float32 cannot tell from greedy


@dataclass(frozen=True)
class Desk:
    """What the routes need: the engine and the operator's settings."""

    engine: Engine
    settings: Settings

    @property
    def info(self) -> EngineInfo:
        """What the model is.

        Raises:
            ApiError: 503 as long as none was loaded.
        """
        if self.engine.info is None:
            raise engine_down(f"the engine is {self.engine.state}")
        return self.engine.info

    @property
    def model_id(self) -> str:
        """What the model is called here."""
        name = self.settings.model_name or self.info.model
        return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name

    def check_model(self, name: str | None) -> None:
        """Refuse requests for a model that is not there.

        Raises:
            ApiError: 404.
        """
        if name not in (None, self.model_id, self.info.model):
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not here, only {self.model_id!r} is",
                param="model",
                code="model_not_found",
            )

    async def begin(self, request: Request, jobs: list[dict[str, Any]]) -> tuple[Batch, Message]:
        """Submit jobs and wait until the first of them begins.

        Raises:
            ApiError: it was refused, or there is no engine.
            ClientDisconnect: the client did not wait.
        """
        batch = self.engine.submit(jobs)
        try:
            return batch, await unless_gone(request, batch.next())
        except BaseException:
            batch.cancel()
            raise

    def job(self, body: Sampled, *, max_tokens: int | None) -> dict[str, Any]:
        """The part of a job that says how tokens are chosen.

        Raises:
            ApiError: 400 for what this model cannot do.
        """
        settings, options = self.settings, body.speculation
        temp = _given(body.temperature, settings.temp)
        layout = options.layout or settings.layout
        k = _given(options.num_draft_tokens, settings.num_draft_tokens)
        if k is not None and k > self.info.num_draft_tokens > 0:
            raise refused(
                f"mtp.num_draft_tokens is {k}, but the adapter was trained for "
                f"{self.info.num_draft_tokens}",
                param="mtp.num_draft_tokens",
            )
        return {
            "max_tokens": _given(max_tokens, settings.max_tokens),
            "temp": temp if temp >= GREEDY_BELOW else 0.0,
            "top_p": _given(body.top_p, settings.top_p) or LEAST_TOP_P,
            "top_k": _given(body.top_k, settings.top_k),
            "min_p": _given(body.min_p, settings.min_p),
            "repetition_penalty": body.repetition_penalty,
            "seed": None if body.seed is None else body.seed % SEEDS,
            "layout": layout,
            "num_draft_tokens": k,
        }

    def openai_job(self, body: OpenAISampled, *, max_tokens: int | None) -> dict[str, Any]:
        """The same for OpenAI's chat and completions.

        Raises:
            ApiError: 400 for what this model cannot do.
        """
        for token in body.logit_bias or ():
            if int(token) >= self.info.vocab_size:
                raise refused(
                    f"logit_bias holds the id {token}, the vocabulary has "
                    f"{self.info.vocab_size} ids",
                    param="logit_bias",
                )
        return self.job(body, max_tokens=max_tokens) | {
            "frequency_penalty": body.frequency_penalty,
            "presence_penalty": body.presence_penalty,
            "logit_bias": body.logit_bias,
            "stop": body.stops,
        }


def choices_of(job: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """One job for each choice; each has a seed of its own."""
    seed = job["seed"]
    return [job | {"seed": None if seed is None else (seed + at) % SEEDS} for at in range(n)]


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
