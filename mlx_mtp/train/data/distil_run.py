"""A run of self-distillation: the file that it fills, and the model that fills it.

Work is done in groups of candidates; every candidate has a number, and its random keys come from
that number and the seed alone.  What a group yields depends on the settings and on the records of
earlier groups, so a run that was interrupted does the last group again, adds what is missing, and
ends with the same file.  The settings stand in ``NAME.settings.json`` beside it; a run with others
is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.evaluation.batch_generation import generate_batch
from mlx_mtp.generate import chat_text
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.train.data.clean import Seen
from mlx_mtp.train.data.records import Message, Record, RecordWriter

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

GROUP_BATCHES = 2  # batches of a group: more of them waste less at its end, and lose more to a kill
TOP_P = 0.95
BEGINNING_TOKENS = 24  # what a model without a template draws before it goes on by itself
_MARKER = "WORDS-OF-THE-USER"
_TOPIC = "You are a helpful assistant. The user's message is about this topic: {}"


@dataclass(frozen=True)
class DistilProgress:
    """How far a run is.

    Attributes:
        num_records: records in the file.
        total: records wanted.
        num_tokens: tokens generated in this run.
        dropped: candidates of this run that were dropped, by reason.
    """

    num_records: int
    total: int
    num_tokens: int
    dropped: Counter[str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the records, apart from the model."""

    method: str
    seed: int
    max_prompt_tokens: int
    max_answer_tokens: int
    batch_size: int
    prompt_temp: float
    answer_temp: float
    topics: list[str]
    data: str = ""

    def check(self, model: MTPModel) -> None:
        """Raise ValueError for a setting that cannot be."""
        for name in ("max_prompt_tokens", "max_answer_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prompt_temp", "answer_temp"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        length = self.max_prompt_tokens + self.max_answer_tokens
        if model.max_context is not None and length > model.max_context:
            raise ValueError(
                f"max_prompt_tokens + max_answer_tokens is {length}, "
                f"but {model.name} takes at most {model.max_context}"
            )


@dataclass
class Job:
    """A text that the model goes on with: a conversation, or plain text."""

    number: int
    messages: list[Message] = field(default_factory=list)
    later: list[str] = field(default_factory=list)  # user messages still to be answered
    text: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    cut: bool = False  # whether the last answer stops for lack of room

    @property
    def is_answered(self) -> bool:
        """Whether there is an answer in the conversation."""
        return any(message["role"] == "assistant" for message in self.messages)

    def ask(self, content: str) -> None:
        """Add a user's message."""
        self.messages.append({"role": "user", "content": content})

    def take(self, answer: str, *, cut: bool) -> None:
        """Add what the model wrote."""
        self.cut = cut
        if self.text is not None:
            self.text += answer
        else:
            self.messages.append({"role": "assistant", "content": answer})

    @property
    def prompt(self) -> str:
        """What is compared with other prompts."""
        return self.messages[-1]["content"] if self.text is None else self.text


Finish = Callable[["Run", list["Job"]], Generator[Record, None, None]]


class _Draw:
    """A sampler with random keys of its own, so that its neighbours in a batch do not matter."""

    def __init__(self, seed: int, number: int, what: str, *, temp: float) -> None:
        digest = hashlib.sha256(f"{seed} {number} {what}".encode()).digest()
        self._key = mx.random.key(int.from_bytes(digest[:8], "big"))
        self._temp = temp

    def __call__(self, logprobs: mx.array) -> mx.array:
        from mlx_lm.sample_utils import apply_top_p

        self._key, key = mx.random.split(self._key)
        kept = apply_top_p(logprobs, TOP_P)
        return mx.random.categorical(kept * (1 / self._temp), key=key)


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


class Run:
    """The file that a run writes, and the model that fills it."""

    def __init__(
        self,
        model: MTPModel,
        tokenizer: TokenizerWrapper,
        output: Path,
        settings: Settings,
        *,
        progress: Callable[[DistilProgress], None] | None,
    ) -> None:
        settings.check(model)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.total = 0
        self.num_tokens = 0
        self.dropped: Counter[str] = Counter()
        self.group_size = GROUP_BATCHES * settings.batch_size
        self.specials = special_ids(tokenizer)
        self._progress = progress
        self._writer = RecordWriter(output)
        try:
            self._check_settings(output.with_suffix(".settings.json"))
            self._numbers = [_number(record, output) for record in self.records]
        except BaseException:
            self._writer.close()
            raise
        self.first_group = self._numbers[-1] // self.group_size if self._numbers else 0
        self._seen = Seen()  # prompts of earlier groups
        for number, record in zip(self._numbers, self.records, strict=True):
            if number < self.first_group * self.group_size:
                self._seen.add(_compared(record))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    @property
    def records(self) -> list[Record]:
        """What the file holds."""
        return self._writer.records

    def drop(self, reason: str) -> None:
        """Count a candidate that is left out."""
        self.dropped[reason] += 1
        self.report()

    def report(self) -> None:
        """Tell how far the run is."""
        if self._progress:
            done = len(self.records)
            self._progress(DistilProgress(done, self.total, self.num_tokens, self.dropped.copy()))

    def generate(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], *, what: str
    ) -> Iterator[tuple[int, list[int], bool]]:
        """Continue prompts; ``what`` is "prompt" or "answer" and picks length and temperature."""
        settings = self.settings
        is_prompt = what == "prompt"
        temp = settings.prompt_temp if is_prompt else settings.answer_temp
        most = settings.max_prompt_tokens if is_prompt else settings.max_answer_tokens
        if is_prompt and settings.method == "plain":
            most = min(most, BEGINNING_TOKENS)
        draws = (_Draw(settings.seed, number, what, temp=temp) for number in numbers)
        stops = [[each] for each in sorted(self.tokenizer.eos_token_ids)]
        if is_prompt and settings.method == "magpie":
            stops = [[each] for each in sorted(self.specials)]
            end = token_ids(self.tokenizer, around_user(self.tokenizer)[1])
            stops += [end] if end and end[0] not in self.specials else []
        yield from generate_batch(
            self.model,
            prompts,
            max_tokens=most,
            stops=stops,
            samplers=list(draws) if temp else [_greedy] * len(numbers),
            batch_size=settings.batch_size,
            on_step=self._count,
        )

    def _count(self, num_ids: int) -> None:
        self.num_tokens += num_ids
        self.report()  # at every step, because whoever watches may want to stop

    def fill(self, first: int, jobs: list[Job], finish: Finish) -> None:
        """Do the jobs of a group and write what they yield.

        Args:
            first: number of the group's first candidate.
            jobs: in the order of their numbers.
            finish: turns jobs into records that carry their numbers.
        """
        fresh = Seen()  # prompts of this group, whose answers may yet be dropped
        new = []
        for job in jobs:
            if not self._seen.has(job.prompt) and fresh.add(job.prompt):
                new.append(job)
            else:
                self.drop("duplicate")
        start = sum(number < first for number in self._numbers)
        known = set(self._numbers)
        with contextlib.closing(finish(self, new)) as finished:
            for record in finished:
                if record.meta["number"] not in known:
                    self._writer.append(record)
                    self._numbers.append(record.meta["number"])
                self.report()
                if len(self.records) >= self.total:
                    break
        for record in self.records[start:]:
            self._seen.add(_compared(record))

    def result(self, tell: Callable[[str], None] | None) -> list[Record]:
        """What the file holds, at most as many records as were wanted.

        Raises:
            ValueError: it holds none.
        """
        why = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        if not self.records:
            raise ValueError(f"{self.model.name} wrote no usable text (dropped: {why})")
        if tell and len(self.records) < self.total:
            tell(f"{len(self.records)} of {self.total} records could be made (dropped: {why})")
        return self.records[: self.total]

    def _check_settings(self, path: Path) -> None:
        """Write the settings beside a new file; compare them with those of one begun earlier."""
        values = vars(self.settings) | {
            "fingerprint": fingerprint(self.model.base),
            "template": _template_hash(self.tokenizer),
        }
        if not path.exists():
            if self.records:
                raise ValueError(f"{self._writer.path} holds records, but {path.name} is missing")
            shown = {"model": self.model.name} | values
            write_atomically(path, json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            others = [key for key in values if begun.get(key) != values[key]]
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is damaged") from None
        if others and self.records:
            told = ", ".join(f"{key} {begun.get(key)!r}, not {values[key]!r}" for key in others)
            raise ValueError(f"{self._writer.path} was begun with {told}")
        if others:  # nothing was written with them
            path.unlink()
            self._check_settings(path)


def token_ids(tokenizer: TokenizerWrapper, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text; ``special`` adds the tokenizer's own, as at the start of a document."""
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def decoded(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> str:
    """Text of ids without special tokens, exactly as it was written."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: TokenizerWrapper) -> set[int]:
    """Ids that no text holds: ends, roles, padding."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.eos_token_ids, *(number for number, token in added if token.special)}


def around_user(tokenizer: TokenizerWrapper, topic: str | None = None) -> tuple[str, str]:
    """What the chat template puts before a user's words and behind them.

    Raises:
        ValueError: it takes no system prompt for a topic, or does not show the words once.
    """
    system = [] if topic is None else [{"role": "system", "content": _TOPIC.format(topic)}]
    try:
        text = chat_text(tokenizer, [*system, {"role": "user", "content": _MARKER}])
    except ValueError as error:
        hint = " (topics need a system prompt)" if system else ""
        raise ValueError(f"{error}{hint}") from None
    if text.count(_MARKER) != 1:
        raise ValueError("the chat template does not show a user's words once, as they are")
    before, _, behind = text.partition(_MARKER)
    return before, behind.strip()


def _template_hash(tokenizer: TokenizerWrapper) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def _number(record: Record, path: Path) -> int:
    number = record.meta.get("number")
    if not isinstance(number, int):
        raise ValueError(f"{path} holds a record without a number: it is from elsewhere")
    return number


def _compared(record: Record) -> str:
    """What of a record is compared with prompts: of a text its beginning."""
    if record.text is None:
        return record.prompt
    return record.text[: record.meta.get("given") or record.meta.get("beginning")]
