"""Convert the common fields of a request to a job for the engine."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from mlx_mtp.apps.engine.protocol import Group, Job, Ready, Started
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.api.schemas import MAX_TOKENS, OpenAISampled, Sampled
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError, engine_down, refused
from mlx_mtp.apps.server.hints import Hints
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.apps.server.streams import EventStream, Reply, event, unless_disconnected
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.storage.package import package_version

NUM_SEEDS = 2**63
MIN_TOP_P = 1e-9  # replaces 0, which mlx-lm reads as no limit and the APIs as the tightest
FINGERPRINT = f"mlx-mtp-{package_version()}"
DEFAULT_MODEL = "default_model"  # mlx-lm's name of the served model
MAX_XTC_THRESHOLD = 0.5  # no two tokens are above it, so larger values do the same
GREEDY_BELOW = 1e-6  # in float32, sampling at lower temperatures equals greedy decoding

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class ServerContext:
    """State that the routes share: the engine, the operator's settings and what was logged."""

    engine: Engine
    settings: Settings
    hints: Hints = field(default_factory=Hints)

    @property
    def info(self) -> Ready:
        """Description of the loaded model.

        Raises:
            ApiError: 503 until a model is loaded.
        """
        if self.engine.info is None:
            raise engine_down(f"the engine is {self.engine.state}")
        return self.engine.info

    @property
    def model_id(self) -> str:
        """Name of the model in responses."""
        name = self.settings.model_name or self.info.model
        return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name

    async def read(self, request: Request, model: type[Body]) -> Body:
        """Read the body of a request; fields that have no effect are logged.

        Raises:
            ApiError: the body is invalid, or its model is not available.
            ClientDisconnect: the client disconnected.
        """
        path, note = request.url.path, self.hints.note
        body = await read_body(
            request, model, self.settings, note=lambda text: note(f"{path}: {text}")
        )
        if self.settings.strict_model:
            self.check_model(getattr(body, "model", None))
        return body

    def check_model(self, name: str | None) -> None:
        """Reject the name of another model.

        Raises:
            ApiError: 404, or 503 until a model is loaded.
        """
        known = (None, "", DEFAULT_MODEL, self.model_id, self.info.model)
        if name not in known:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not available, only {self.model_id!r} is",
                param="model",
                code="model_not_found",
            )

    async def respond(
        self,
        request: Request,
        jobs: list[Job],
        reply: Reply,
        *,
        stream: bool | None,
        failed: Callable[[ApiError], bytes] = lambda error: event(error.openai()),
        messages_param: str = "messages",
    ) -> Any:
        """Submit jobs and return the response; its status is known with the first message.

        Args:
            request: the request, whose client may disconnect, which cancels the jobs.
            jobs: the jobs of the request.
            reply: formats the answers.
            stream: whether to stream.
            failed: returns the last event of a stream after an error.
            messages_param: field of the request that contains the conversation, for errors.

        Raises:
            ApiError: the engine refused the first job, or is not running.
            ClientDisconnect: the client disconnected.
        """
        batch = self.engine.submit(jobs)
        try:
            first = await unless_disconnected(request.receive, batch.next())
            if not stream:
                return await unless_disconnected(request.receive, reply.whole(batch, first))
        except ApiError as error:
            batch.cancel()
            if error.param in ("num_draft_tokens", "drafter"):  # in requests, fields of ``mtp``
                raise refused(f"mtp.{error}", param=f"mtp.{error.param}") from None
            if error.param == "messages":
                error.param = messages_param
            raise
        except BaseException:
            batch.cancel()
            raise
        events, ping_s = reply.events(batch, first), self.settings.ping_s
        return EventStream(events, failed=failed, ping_s=ping_s, ended=batch.cancel)

    async def encode(self, request: Request, job: Job) -> tuple[Started, Group]:
        """Run a job that generates nothing.

        Raises:
            ApiError: the prompt is invalid, or the engine is not running.
            ClientDisconnect: the client disconnected.
        """
        batch = self.engine.submit([job])
        started = await unless_disconnected(request.receive, batch.next())
        group = await unless_disconnected(request.receive, batch.next())
        assert isinstance(started, Started) and isinstance(group, Group)
        return started, group

    def job(self, body: Sampled, *, max_tokens: int | None) -> Job:
        """Convert the fields that all APIs share; absent ones have the operator's defaults."""
        settings, options = self.settings, body.speculation
        temp = _or_default(body.temperature, settings.temp)
        return Job(
            max_tokens=_or_default(max_tokens, settings.max_tokens),
            temp=temp if temp >= GREEDY_BELOW else 0.0,
            top_p=_or_default(body.top_p, settings.top_p) or MIN_TOP_P,
            top_k=max(0, _or_default(body.top_k, settings.top_k)),  # -1 is none too
            min_p=_or_default(body.min_p, settings.min_p),
            repetition_penalty=body.repetition_penalty,
            repetition_context_size=_context_size(body.repetition_context_size),
            xtc_probability=_or_default(body.xtc_probability, Sampling.xtc_probability),
            xtc_threshold=min(
                MAX_XTC_THRESHOLD, _or_default(body.xtc_threshold, Sampling.xtc_threshold)
            ),
            frequency_penalty=body.frequency_penalty or None,
            presence_penalty=body.presence_penalty or None,
            logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()}
            or None,
            seed=None if body.seed is None else body.seed % NUM_SEEDS,
            layout=options.layout or settings.layout,
            drafter=options.drafter,
            num_draft_tokens=_or_default(options.num_draft_tokens, settings.num_draft_tokens),
        )

    def openai_job(self, body: OpenAISampled, *, max_tokens: int | None) -> Job:
        """Convert the fields that OpenAI's chat and completions share."""
        return replace(self.job(body, max_tokens=max_tokens), stop=body.stops)


def choices_of(job: Job, n: int) -> list[Job]:
    """Return one job per choice, with different seeds."""
    if job.seed is None:
        return [job] * n
    return [replace(job, seed=(job.seed + index) % NUM_SEEDS) for index in range(n)]


def new_id(prefix: str) -> str:
    """Return a new id."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"


def now() -> int:
    """Return the Unix time in seconds."""
    return int(time.time())


def _context_size(size: int | None) -> int:
    """Number of tokens that the repetition penalty covers; in mlx-lm, 0 is all of them."""
    return MAX_TOKENS if size == 0 else size or Sampling.repetition_context_size


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value
