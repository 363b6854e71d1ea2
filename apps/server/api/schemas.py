"""What the request models have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlx_mtp.apps.server.errors import refused

MOST_CHOICES = 8
MOST_STOPS = 16
MOST_TOKENS = 2**31 - 1
MOST_BIAS = 100.0

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # a million faults take seconds
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """A model that takes no other fields and turns no type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class MtpOptions(Strict):
    """How to speculate.

    Attributes:
        details: tell with every event what the step did.
        num_draft_tokens: drafts per step.
        layout: where mask tokens go.
    """

    details: bool = False
    num_draft_tokens: int | None = Field(None, ge=0, le=1024)
    layout: Literal["auto", "linear", "quadratic", "plain"] | None = None


class StreamOptions(Strict):
    """OpenAI's options of a stream; obfuscation pads events, which no local client needs."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Strict):
    """What says how tokens are chosen, in all dialects."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    mtp: bool | MtpOptions | None = None

    @property
    def speculation(self) -> MtpOptions:
        """The options of speculation, whatever form they came in."""
        if isinstance(self.mtp, MtpOptions):
            return self.mtp
        return MtpOptions.model_validate({"layout": "plain"} if self.mtp is False else {})


class OpenAISampled(Sampled):
    """The same for OpenAI's chat and completions."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: StopString | Annotated[Many[StopString], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not token.isascii() or not token.isdecimal() or len(token) > 9:
                raise ValueError(f"{token[:40]!r} is not a token id")
            if not -MOST_BIAS <= value <= MOST_BIAS:
                raise ValueError(f"must be between -100 and 100, got {value}")
        return bias

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def flat_text(content: str | list[dict[str, Any]] | None, *, where: str) -> str:
    """The text of a message's content.

    Args:
        content: text or a list of parts.
        where: the field, for messages.

    Raises:
        ApiError: a part is not text.  What it points to is never fetched.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text") or not isinstance(
            part.get("text"), str
        ):
            raise refused(
                f"{where}.{at}: parts of type {str(kind)[:40]!r} are not supported, only text is",
                param=f"{where}.{at}",
                code="unsupported_content",
            )
        texts.append(part["text"])
    return "".join(texts)
