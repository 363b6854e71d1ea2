"""What the page may send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_TOKENS = 1_000_000
Text = Annotated[str, Field(max_length=1_000_000)]
Number = Annotated[int, Field(ge=1, lt=2**63)]


class Body(BaseModel):
    """A request; fields that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AnswerOptions(Body):
    """How an answer is made; as in ``mlx_mtp.decoding.sampling.Sampling`` and ``decode``."""

    temp: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    max_tokens: int = Field(default=1024, ge=1, le=MOST_TOKENS)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    layout: Literal["auto", "linear", "quadratic", "plain"] = "auto"
    num_draft_tokens: int | None = Field(default=None, ge=0, le=64)


class Session(Body):
    """The token of the launch."""

    token: str = Field(max_length=200)


class NewConversation(Body):
    """What a conversation begins with."""

    title: str = Field(default="", max_length=200)
    system_prompt: Text = ""
    options: dict[str, Any] = {}


class ChangedConversation(Body):
    """What changes; absent fields stay."""

    title: str | None = Field(default=None, max_length=200)
    system_prompt: Text | None = None
    options: dict[str, Any] | None = None
    leaf: Number | None = None


class NewAnswer(Body):
    """A message and its answer, or another answer to a message that is there.

    ``parent`` is the message that goes before: the user's own where ``text`` is absent.
    """

    parent: Number | None = None
    text: Text | None = None


class Race(Body):
    """A conversation up to a message, to be answered twice."""

    conversation: Number | None = None
    message: Number | None = None
    text: Text | None = None
    options: AnswerOptions = AnswerOptions()


class ChosenModel(Body):
    """Which model to load; no model is the embedded one."""

    model: str | None = Field(default=None, min_length=1, max_length=1000)
    adapter_path: str | None = Field(default=None, min_length=1, max_length=1000)


class Settings(Body):
    """What the page remembers."""

    values: dict[str, Any]


def checked_options(values: Mapping[str, Any]) -> AnswerOptions:
    """Options of a conversation, as they were sent or kept.

    Raises:
        ValueError: a field is unknown or out of range; the message names it.
    """
    try:
        return AnswerOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ValueError(f"options.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
