"""Messages between the server and the engine, and how they are written to the two pipes.

A message is a JSON object after its length in four little-endian bytes.  The engine receives
``Load`` once and first, then ``Submit`` and ``Cancel``.  It sends ``Ready`` or ``Broken`` once,
then for each job ``Refused``, or ``Started``, any number of ``Prefill`` and ``Group``, and finally
``Finished`` or ``Failed``.

Messages are plain dataclasses, because a ``Group`` is sent for every step; pydantic validates them
once, where they are read.
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field, TypeAdapter

_LENGTH_BYTES = 4


@dataclass(kw_only=True, slots=True)
class Job:
    """A request for one answer; a field that is None or missing has its default.

    Attributes:
        max_tokens: maximum number of tokens to generate.
        messages: conversation for the chat template; None to continue ``prompt``.
        prompt: text or token ids.
        template_config: more arguments of the chat template.
        enable_thinking: whether the model is to reason; None is the template's default.
        reasoning_effort: see ``template_settings``.
        thinking_budget: maximum number of tokens of reasoning.
        split_reasoning: whether reasoning is reported apart from the text; for ``messages`` only.
        tools: tools for the chat template, in OpenAI's form.
        required_tools: names of tools; the answer must be calls of these and nothing else.
        parallel_tool_calls: whether there may be more than one call; later ones are left out.
        schema: JSON schema that the answer must match; with ``tools`` it may be calls instead.
        schema_param: field of the request that contains the schema, for errors.
        temp, top_p, min_p, top_k, repetition_penalty, repetition_context_size, xtc_probability,
            xtc_threshold, logit_bias: see ``Sampling``.
        frequency_penalty, presence_penalty: see ``answer_penalty``.
        seed: random seed.
        layout: placement of mask tokens; "plain" decodes without drafts.
        drafter: what proposes drafts, as in ``GenerationConfig``; None is that of ``Load``.
        num_draft_tokens: draft tokens per step.
        stop: strings that end the answer.
        top_logprobs: number of most likely tokens to report per token; None for no logprobs.
        pieces: whether to report the ids and the text of each token.
        fresh: whether to ignore the prefix cache and leave it unchanged.
        only: generate nothing: report the ids of the prompt, or its text, in a ``group``.
        add_special_tokens: whether a ``prompt`` of text gets special tokens; None adds them unless
            it begins with the BOS token.
    """

    max_tokens: int
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    template_config: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
    split_reasoning: bool = True
    tools: list[dict[str, Any]] | None = None
    required_tools: list[str] | None = None
    parallel_tool_calls: bool = True
    schema: dict[str, Any] | None = None
    schema_param: str | None = None
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    layout: str = "auto"
    drafter: str | None = None
    num_draft_tokens: int | None = None
    stop: list[str] | None = None
    top_logprobs: int | None = None
    pieces: bool = False
    fresh: bool = False
    only: Literal["ids", "text"] | None = None
    add_special_tokens: bool | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        """Validate the fields of a job.

        Raises:
            ValueError: a field is missing or has the wrong type.
        """
        return _adapter(cls).validate_python(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None}


@dataclass(kw_only=True, slots=True)
class Load:
    """Load a model; the fields are the options of ``mlx-mtp serve``.

    Attributes:
        cache: fields of ``CacheConfig``; empty for the defaults.
        chat_template: source that replaces the model's chat template.
        chat_template_args: arguments of the chat template where a job has none.
    """

    type: Literal["load"] = "load"
    model: str | None = None
    adapter_path: str | None = None
    draft_model: str | None = None
    adapter: bool = True
    mtp: bool = True
    trust_remote_code: bool = False
    extra_eos_token: tuple[str, ...] = ()
    drafter: str = "auto"
    layout: str = "auto"
    lookup: bool = True
    num_draft_tokens: int | None = None
    prefill_step_size: int = 256
    prefix_cache_bytes: int = 2**30
    prefix_files_bytes: int = 0
    prefix_files_folder: str | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Submit:
    """Start a job; ``job`` has the fields of ``Job``, validated when the job is prepared."""

    type: Literal["submit"] = "submit"
    id: int
    job: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Cancel:
    """Cancel a job."""

    type: Literal["cancel"] = "cancel"
    id: int


@dataclass(kw_only=True, slots=True)
class Ready:
    """The model is loaded.

    Attributes:
        model: name of the model.
        adapter: whether it has an MTP adapter.
        draft_model: name of the draft model, if there is one.
        num_draft_tokens: the adapter's k; 0 without an adapter.
        drafters: what proposes drafts where a job sets no options.
        max_context: maximum number of tokens of prompt and answer; None if unknown.
        has_chat_template: whether it takes conversations.
        has_reasoning: whether it has marks of reasoning.
        chat_template: source of the chat template.
        bos_token, eos_token: special tokens, as text.
        facts: device and step costs, for display.
    """

    type: Literal["ready"] = "ready"
    model: str
    adapter: bool
    draft_model: str | None = None
    num_draft_tokens: int
    drafters: list[str] = field(default_factory=list)
    max_context: int | None = None
    has_chat_template: bool
    has_reasoning: bool = False
    chat_template: str = ""
    bos_token: str = ""
    eos_token: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Broken:
    """The model cannot be loaded; the engine ends."""

    type: Literal["broken"] = "broken"
    message: str


@dataclass(kw_only=True, slots=True)
class CacheCounts:
    """The state of the prefix cache after an answer.

    Attributes:
        memory_bytes: size of the blocks in memory.
        file_bytes: size of all files, as last seen.
        num_dropped: blocks dropped from memory since the last message.
        num_removed: files removed to make room since the last message.
    """

    type: Literal["cache"] = "cache"
    memory_bytes: int
    file_bytes: int
    num_dropped: int
    num_removed: int


@dataclass(kw_only=True, slots=True)
class JobMessage:
    """A message about a job.

    Attributes:
        id: the job; set by the scheduler.
        index: position of the job in its batch; set by the supervisor, not sent.
    """

    id: int = 0
    index: Annotated[int, Field(exclude=True)] = 0


@dataclass(kw_only=True, slots=True)
class Started(JobMessage):
    """The prompt is encoded.

    Attributes:
        prompt_tokens: number of its tokens.
        cached_tokens: number of them in the prefix cache.
        read_tokens: number of those that were read from files.
    """

    type: Literal["started"] = "started"
    prompt_tokens: int
    cached_tokens: int
    read_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class Prefill(JobMessage):
    """The first ``done`` tokens of the prompt are processed."""

    type: Literal["prefill"] = "prefill"
    done: int


@dataclass(kw_only=True, slots=True)
class Group(JobMessage):
    """One decoding step.

    Attributes:
        text: new text, without reasoning.
        reasoning: new text of the reasoning.
        tokens: number of emitted tokens.
        accepted: accepted draft tokens among them.
        parts: what proposed the verified drafts, in order, with the number of drafts of each.
        pieces: text of each token, with reasoning and marks, if the job asks for it.
        span: where the reasoning is in all pieces, if the job asks for them and it has changed; see
            ``ReasoningParser``.
        ids: ids of the tokens, if the job asks for pieces.
        logprobs: logprobs of each token in OpenAI's form, if the job asks for them.
    """

    type: Literal["group"] = "group"
    text: str
    tokens: int
    accepted: int
    parts: list[tuple[str, int]] = field(default_factory=list)
    reasoning: str = ""
    pieces: list[str] | None = None
    span: list[int] | None = None
    ids: list[int] | None = None
    logprobs: list[dict[str, Any]] | None = None

    @property
    def drafted(self) -> int:
        """Verified draft tokens."""
        return sum(count for _, count in self.parts)

    @property
    def source(self) -> str:
        """What proposed the drafts, such as "mask" or "mask+lookup"; "" without any."""
        return "+".join(source for source, _ in self.parts)


@dataclass(kw_only=True, slots=True)
class Finished(JobMessage):
    """The answer is complete or cancelled.

    Attributes:
        reason: "stop", "length", "tool_calls" or "cancelled".
        stop_string: stop string that ended the answer.
        tool_calls: ``{"name": str, "arguments": JSON text}`` per call.
        reasoning_tokens: number of tokens of the reasoning, without its marks.
        stats: ``GenerationStats.stats_dict()``; empty if cancelled.
    """

    type: Literal["finished"] = "finished"
    reason: str
    stop_string: str | None = None
    tool_calls: list[dict[str, str]] = field(default_factory=list)
    reasoning_tokens: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Refused(JobMessage):
    """The job is invalid: an error of the client."""

    type: Literal["refused"] = "refused"
    message: str
    param: str | None = None
    code: str | None = None


@dataclass(kw_only=True, slots=True)
class Failed(JobMessage):
    """An internal error has ended the job."""

    type: Literal["failed"] = "failed"
    message: str


Command = Load | Submit | Cancel
Event = Ready | Broken | CacheCounts | Started | Prefill | Group | Finished | Refused | Failed
_COMMAND = Annotated[Command, Field(discriminator="type")]
_EVENT = Annotated[Event, Field(discriminator="type")]


@cache
def _adapter(message_type: Any) -> TypeAdapter[Any]:
    """The validator and serializer of a type; built on first use, which takes milliseconds."""
    return TypeAdapter(message_type)


def pack(message: Command | Event | JobMessage) -> bytes:
    """Encode one message; fields that are None are left out."""
    body = _adapter(type(message)).dump_json(message, exclude_none=True)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def read_command(pipe: BinaryIO) -> Command | None:
    """Read one command; None at the end of the pipe.

    Raises:
        ValueError: the bytes are not a command.
    """
    head = pipe.read(_LENGTH_BYTES)
    size = int.from_bytes(head, "little")
    body = pipe.read(size) if len(head) == _LENGTH_BYTES else b""
    if not body or len(body) != size:
        return None
    return _adapter(_COMMAND).validate_json(body)


async def read_event(pipe: asyncio.StreamReader) -> Event | None:
    """Read one event; None at the end of the pipe.

    Raises:
        ValueError: the bytes are not an event.
    """
    try:
        size = int.from_bytes(await pipe.readexactly(_LENGTH_BYTES), "little")
        body = await pipe.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _adapter(_EVENT).validate_json(body)
