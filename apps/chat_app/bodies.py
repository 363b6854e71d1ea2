"""Request bodies of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_TOKENS = 1_000_000
Text = Annotated[str, Field(max_length=1_000_000)]
Number = Annotated[int, Field(ge=1, lt=2**63)]


class Body(BaseModel):
    """A request body; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AnswerOptions(Body):
    """Options of an answer, as in ``mlx_mtp.decoding.sampling.Sampling`` and ``decode``."""

    temp: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    max_tokens: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    thinking_budget: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    layout: Literal["auto", "tree", "linear", "quadratic", "plain"] = "auto"
    num_draft_tokens: int | None = Field(default=None, ge=0, le=64)


class Session(Body):
    """The access token of the launch."""

    token: str = Field(max_length=200)


class NewConversation(Body):
    """A new conversation."""

    title: str = Field(default="", max_length=200)
    system_prompt: Text = ""
    options: dict[str, Any] = {}


class ChangedConversation(Body):
    """Changes to a conversation; absent fields keep their values."""

    title: str | None = Field(default=None, max_length=200)
    system_prompt: Text | None = None
    options: dict[str, Any] | None = None
    leaf: Number | None = None


class NewAnswer(Body):
    """A new message to answer, or a request for another answer to an existing message.

    ``parent`` is the previous message; without ``text`` it is the user's message to answer.
    """

    parent: Number | None = None
    text: Text | None = None


class Race(Body):
    """A prompt to answer twice: a branch of a conversation, a text, or both."""

    conversation: Number | None = None
    message: Number | None = None
    text: Text | None = None
    options: AnswerOptions = AnswerOptions()


class ChosenModel(Body):
    """The model to load; None is the built-in model."""

    model: str | None = Field(default=None, min_length=1, max_length=1000)
    adapter_path: str | None = Field(default=None, min_length=1, max_length=1000)


class Settings(Body):
    """Settings of the page."""

    values: dict[str, Any]


def checked_options(values: Mapping[str, Any]) -> AnswerOptions:
    """Validate the options of a conversation.

    Raises:
        ValueError: a field is unknown or out of range; the message names it.
    """
    try:
        return AnswerOptions.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        raise ValueError(f"options.{'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
