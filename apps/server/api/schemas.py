"""Fields and types that the request models share."""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mlx_mtp.apps.server.body import UNSUPPORTED
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.hints import Note, unnoted

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_TOKENS = 2**31 - 1
MAX_BIAS = 100.0
MIN_PENALTY = 0.01
UNLIMITED = -1  # as maximum number of tokens: as many as the model's context has room for
THOUGHT_TYPES = ("thinking", "reasoning", "reasoning_text", "summary_text")
LEFT_OUT_TYPES = ("redacted_thinking", "encrypted_content", "tool_reference")
MEDIA = ("image", "audio", "video", "file", "document", "screenshot")

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # reporting a million errors takes seconds
StopString = Annotated[str, Field(max_length=1000)]
Limit = Annotated[int, Field(ge=UNLIMITED, le=MAX_TOKENS)]


class Fields(BaseModel):
    """Fields of a request, which do not convert types; null is the same as absent.

    Other fields are hints: they are ignored and noted.  Those in ``unsupported`` would change what
    the answer is about or its form, so values other than empty ones are refused.
    """

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())
    unsupported: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        note: Note = info.context or unnoted
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in values.keys() - known if cls.model_config.get("extra") == "ignore" else ():
            if values[name] and name in cls.unsupported:
                raise PydanticCustomError(UNSUPPORTED, "{name}", {"name": name})
            if values[name] not in (None, False, "", [], {}):
                note(f"the field {name[:60]!r} has no effect")
        return {
            name: _number(value) if name in cls._numbers() else _whole(value)
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    @cache
    def _numbers(cls) -> frozenset[str]:
        """Names of the fields that are numbers and nothing else."""
        return frozenset(
            name
            for name, field in cls.model_fields.items()
            if not {int, float, Limit}.isdisjoint((field.annotation, *get_args(field.annotation)))
        )


def _whole(value: Any) -> Any:
    """An int for a float such as 20.0, which some languages write for whole numbers."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
    return int(value) if is_whole else value


def _number(value: Any) -> Any:
    """A number for its text, which forms and environment variables have; otherwise unchanged."""
    try:
        return _whole(float(value)) if isinstance(value, str) else _whole(value)
    except ValueError:
        return value


class MtpOptions(Fields):
    """Options of multi-token prediction.

    Attributes:
        details: report the counts of each step with its event.
        num_draft_tokens: draft tokens per step.
        layout: placement of mask tokens.
        drafter: what proposes the drafts.
    """

    details: bool = False
    num_draft_tokens: int | None = Field(None, ge=0, le=1024)
    layout: Literal["auto", "tree", "linear", "quadratic", "plain"] | None = None
    drafter: Literal["auto", "mask", "native", "heads", "draft-model", "lookup"] | None = None


class Thinking(Fields):
    """Whether to reason, in the form of Anthropic, DeepSeek, Z.ai and LiteLLM.

    In Messages, a display of ``omitted`` leaves the text of the reasoning out of the answer.
    """

    type: str | None = None
    budget_tokens: int | None = None
    display: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_bool(cls, value: Any) -> Any:
        return {"type": "enabled" if value else "disabled"} if isinstance(value, bool) else value

    @property
    def enable(self) -> bool | None:
        """Whether to reason; None if the request leaves it to the model."""
        return None if self.type is None else self.type != "disabled"


class Effort(Fields):
    """How much to reason, as an object or just as its effort or switch."""

    effort: str | None = None
    enabled: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {"enabled": value}
        return {"effort": value} if isinstance(value, str) else value


class StreamOptions(Fields):
    """OpenAI's stream options; they have no effect without a stream."""

    include_usage: bool = False


def token_limit(limits: dict[str, int | None]) -> int | None:
    """Return the maximum number of tokens that a request sets under one or several names.

    Raises:
        ApiError: 400 for 0 or for different values.
    """
    values = {name: limit for name, limit in limits.items() if limit is not None}
    if len(set(values.values())) > 1:
        raise refused(f"{' and '.join(values)} differ", param=next(iter(values)))
    for name, limit in values.items():
        if limit == 0:
            raise refused(f"{name} should be at least 1, or -1 for no limit", param=name)
        return MAX_TOKENS if limit == UNLIMITED else limit
    return None


class Sampled(Fields):
    """Sampling fields of all APIs."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    repetition_penalty: float | None = Field(None, ge=0, le=10)
    repetition_context_size: int | None = Field(None, ge=0, le=MAX_TOKENS)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    model: str | None = None
    stream: bool | None = None
    mtp: bool | MtpOptions | None = None

    @field_validator("repetition_penalty")
    @classmethod
    def _check_penalty(cls, penalty: float | None) -> float | None:
        if penalty and penalty < MIN_PENALTY:
            raise ValueError(f"should be 0, which is none, or at least {MIN_PENALTY}")
        return penalty or None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs_to_dict(cls, bias: Any) -> Any:
        """Take llama.cpp's form too: pairs of an id and a bias, or false for a forbidden id."""
        if isinstance(bias, dict):
            return {token: _number(value) for token, value in bias.items()}
        if not isinstance(bias, list):
            return bias
        pairs = [pair for pair in bias if isinstance(pair, list) and len(pair) == 2]
        if len(pairs) < len(bias):
            raise ValueError("must be an object, or pairs of an id and a number")
        return {str(token): -MAX_BIAS if value is False else value for token, value in pairs}

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
    def speculation(self) -> MtpOptions:
        """The ``mtp`` field as options."""
        if isinstance(self.mtp, MtpOptions):
            return self.mtp
        return MtpOptions.model_validate({"layout": "plain"} if self.mtp is False else {})


class OpenAISampled(Sampled):
    """Sampling fields of OpenAI's chat and completions."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[Many[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream_options: StreamOptions | None = None
    unsupported = (
        "adapters",
        "allowed_token_ids",
        "bad_words",
        "grammar",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "json_schema",
        "prompt_logprobs",
        "stop_token_ids",
        "structured_outputs",
    )

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return [stop for stop in stops if stop]


def flat_text(
    content: Any,
    *,
    where: str,
    note: Note = unnoted,
    is_answer: bool = False,
    is_result: bool = False,
    start: int = 0,
) -> str:
    """Return the text of a message's content, without thoughts.

    Args:
        content: text or a list of parts; None is empty.
        where: the field, for errors.
        note: logs parts that are left out.
        is_answer: whether a model wrote it; parts that are not known are then left out.
        is_result: whether a tool returned it; values that are not parts are then written as JSON,
            and a line says what was left out, so that the model does not take it for empty.
        start: index of the first part, for errors.

    Raises:
        ApiError: a part is not text; URLs in it are never fetched.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content if isinstance(content, list) else [content], start):
        values = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = str(values.get("type") if isinstance(values, dict) else type(part).__name__)[:40]
        text = _part_text(values, kind) if isinstance(values, dict) else None
        is_media = any(word in kind for word in MEDIA)
        is_known = kind in THOUGHT_TYPES or kind in LEFT_OUT_TYPES
        if is_result and not (is_media or is_known) and (text is None or "type" not in values):
            text = text if values == {"text": text} else json.dumps(part, ensure_ascii=False)
        if text is not None and not is_media:
            texts.append(text)
        elif is_known or is_result or (is_answer and not is_media):
            if kind not in THOUGHT_TYPES:
                note(f"content of type {kind!r} is left out of the prompt")
            if is_media:
                texts.append(f"[content of type {kind!r} was left out: this model reads only text]")
        else:
            raise refused(
                f"{where}.{index}: content of type {kind!r} is not supported, only text",
                param=f"{where}.{index}",
                code="unsupported_content",
            )
    return "".join(texts)


def _part_text(part: dict[str, Any], kind: str) -> str | None:
    """The text of a part; None if it is not text."""
    name = {"refusal": "refusal", "compaction": "content"}.get(kind, "text")
    text = part.get(name)
    if text is None and name in part:
        return ""
    return text if isinstance(text, str) and kind not in THOUGHT_TYPES else None


def thoughts(content: Any) -> str:
    """Return the text of the thoughts in a message's content."""
    parts = content if isinstance(content, list) else []
    values = [part for part in parts if isinstance(part, dict)]
    texts = [
        part.get("thinking") or part.get("text")
        for part in values
        if part.get("type") in THOUGHT_TYPES
    ]
    return "".join(text for text in texts if isinstance(text, str))
