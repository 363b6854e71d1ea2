"""Fields and types that the request models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlx_mtp.apps.server.errors import refused

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_TOKENS = 2**31 - 1
MAX_BIAS = 100.0
TEXT_TYPES = ("text", "input_text", "output_text")

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # reporting a million errors takes seconds
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """A model that rejects other fields and does not convert types."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class MtpOptions(Strict):
    """Options of multi-token prediction.

    Attributes:
        details: report the counts of each step with its event.
        num_draft_tokens: draft tokens per step.
        layout: placement of mask tokens.
    """

    details: bool = False
    num_draft_tokens: int | None = Field(None, ge=0, le=1024)
    layout: Literal["auto", "linear", "quadratic", "plain"] | None = None


class StreamOptions(Strict):
    """OpenAI's stream options; ``include_obfuscation``, which pads events, has no effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Strict):
    """Sampling fields of all APIs."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    mtp: bool | MtpOptions | None = None

    @property
    def speculation(self) -> MtpOptions:
        """The ``mtp`` field as options."""
        if isinstance(self.mtp, MtpOptions):
            return self.mtp
        return MtpOptions.model_validate({"layout": "plain"} if self.mtp is False else {})


class OpenAISampled(Sampled):
    """Sampling fields of OpenAI's chat and completions."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[Many[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not token.isascii() or not token.isdecimal() or len(token) > 9:
                raise ValueError(f"{token[:40]!r} is not a token id")
            if not -MAX_BIAS <= value <= MAX_BIAS:
                raise ValueError(f"must be between -100 and 100, got {value}")
        return bias

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


def flat_text(
    content: Any, *, where: str, types: Sequence[str] = TEXT_TYPES, start: int = 0
) -> str:
    """Return the text of a message's content.

    Args:
        content: text or a list of parts; None is empty.
        where: the field, for errors.
        types: types of parts that are text.
        start: index of the first part, for errors.

    Raises:
        ApiError: a part is not text; URLs in it are never fetched.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content if isinstance(content, list) else [content], start):
        values = part if isinstance(part, dict) else {"type": type(part).__name__}
        if values.get("type") not in types or not isinstance(values.get("text"), str):
            raise refused(
                f"{where}.{index}: content of type {str(values.get('type'))[:40]!r} is not "
                "supported, only text",
                param=f"{where}.{index}",
                code="unsupported_content",
            )
        texts.append(values["text"])
    return "".join(texts)
