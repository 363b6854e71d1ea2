"""A byte tokenizer and a scripted loop for the tests of the text layer; no model, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_mtp.calibration.stored_costs import SPECULATIONS
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.limits import max_new_tokens
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import GPU_GUESS, LiveCosts

EOS = 256
USER = 257
ASSISTANT = 258
SYSTEM = 259
VOCAB_SIZE = 260
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if not loop.last or m['role'] != 'assistant' or not continue_final_message %}"
    "{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(*, naive: bool = False, template: str | None = TEMPLATE) -> TokenizerWrapper:
    """Ids 0 to 255 are bytes; then ``<eos>`` and one token for each role."""
    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name in ("<eos>", "<user>", "<assistant>", "<system>"):
        tokenizer.add_special_tokens([AddedToken(name, special=True)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    detokenizer: Any = NaiveStreamingDetokenizer if naive else BPEStreamingDetokenizer
    return TokenizerWrapper(fast, detokenizer)


REASONING_TEMPLATE = TEMPLATE.replace(
    "{{ '<assistant>' }}",
    "{{ '<assistant><think>\n' + ('' if enable_thinking else '\n</think>\n\n') }}",
).replace(
    "+ m['content']",
    "+ ('<think>' + m['reasoning_content'] + '</think>' if m['reasoning_content'] else '')"
    " + m['content']",
)


def reasoning_tokenizer(
    *,
    single: bool = True,
    template: str | None = REASONING_TEMPLATE,
    marks: tuple[str, str] = ("<think>", "</think>"),
    special: bool = False,
) -> TokenizerWrapper:
    """The byte tokenizer of a reasoning model.

    Args:
        single: whether the marks are single tokens.
        template: its chat template, which puts the opening mark into the prompt.
        marks: the marks.
        special: whether single tokens are special tokens.
    """
    tokenizer = byte_tokenizer(template=template)
    fast: Any = tokenizer._tokenizer
    if single:
        fast.add_tokens([AddedToken(mark, special=special) for mark in marks])
    detokenizer: Any = BPEStreamingDetokenizer
    return TokenizerWrapper(fast, detokenizer)


def ids_of(text: str) -> list[int]:
    """The byte tokenizer's ids of a text without special tokens."""
    return list(text.encode())


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte, as published with GPT-2."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


class FakeCache:
    """Remembers the ids it holds."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.rewindable = True

    @property
    def offset(self) -> int:
        return len(self.ids)

    def can_rewind(self, num_rows: int) -> bool:
        return self.rewindable and num_rows <= len(self.ids)

    def checkpoint(self) -> None: ...

    def rewind_point(self, max_rows: int) -> int:
        return max_rows if self.can_rewind(len(self.ids) - max_rows) else 0

    def rewind(self, num_rows: int) -> None:
        assert num_rows == 0 or self.can_rewind(num_rows)
        del self.ids[len(self.ids) - num_rows :]


def _measured() -> Speculation:
    curve = replace(GPU_GUESS, source="a test", is_guess=False)
    return Speculation(LiveCosts(curve), Acceptance([0.5]))


@dataclass
class FakeModel:
    """Stands in for an MTPModel; its answers are written down beforehand.

    Attributes:
        answers: ids of each answer, taken in turn; a stop id ends one.
        group: ids emitted per step after the first, which emits one.
        source: where the drafts are from.
        calls: the arguments of every call of the loop.
        speculation: what its planner knows; nothing is measured.
    """

    answers: list[list[int]] = field(default_factory=list)
    group: int = 3
    k: int | None = 4
    name: str = "fake"
    max_context: int | None = 1000
    source: str = "mask"
    speculation: Speculation = field(default_factory=_measured)
    calls: list[SimpleNamespace] = field(default_factory=list)
    caches: list[FakeCache] = field(default_factory=list)
    cache_options: dict[str, Any] = field(default_factory=dict)

    native = heads = draft_model = None

    def __post_init__(self) -> None:
        SPECULATIONS.set(self, self.speculation)

    @property
    def num_draft_tokens(self) -> int:
        return self.k or 0

    @property
    def config(self) -> Any:
        return None if self.k is None else SimpleNamespace(num_draft_tokens=self.k)

    def make_cache(self, **options: Any) -> FakeCache:
        self.cache_options = options
        self.caches.append(FakeCache())
        return self.caches[-1]


def fake_decode(
    model: FakeModel,
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    cache: FakeCache,
    **defined: Any,
) -> Iterator[Any]:
    """The loop's contract, without a model: groups of the written answer, cut at the end."""
    options = dict.fromkeys(("prompt_progress_callback", "explain", "sampling"))
    options |= vars(config) | defined
    max_new_tokens(cast(MTPModel, model), cache.offset + len(prompt), config.max_tokens)
    model.calls.append(SimpleNamespace(prompt=list(prompt), cached=list(cache.ids), **options))
    if options["num_draft_tokens"] is not None and options["num_draft_tokens"] > (model.k or 0):
        raise ValueError(f"num_draft_tokens must be at most {model.k}")
    answer = model.answers.pop(0)
    return _steps(model, list(prompt), answer, cache, options)


def _steps(
    model: FakeModel, prompt: list[int], answer: list[int], cache: FakeCache, options: Any
) -> Iterator[Any]:
    if options["prompt_progress_callback"]:
        options["prompt_progress_callback"](len(prompt), len(prompt))
    cache.ids += prompt
    limit = len(answer) if options["max_tokens"] == -1 else options["max_tokens"]
    size, done, fed = 1, 0, True
    while True:
        tokens = answer[done : min(done + size, limit)]
        stops = [i for i, token in enumerate(tokens) if token in options["stop_ids"]]
        tokens = tokens[: stops[0] + 1] if stops else tokens
        done += len(tokens)
        cache.ids += tokens[:-1] if fed else [answer[done - len(tokens) - 1], *tokens[:-1]]
        reason = "stop" if stops else "length" if done == limit else None
        drafts = 0 if fed or model.k is None else size
        if options["explain"]:
            options["explain"](f"step: {len(tokens)} tokens")
        yield SimpleNamespace(
            tokens=tokens,
            num_draft_tokens=drafts,
            source=model.source if drafts else "",
            parts=((model.source, drafts),) if drafts else (),
            num_accepted=min(len(tokens), max(size - 1, 0)) if drafts else 0,
            finish_reason=reason,
            logprobs=mx.zeros((len(tokens), VOCAB_SIZE)),
        )
        if reason:
            return
        size, fed = model.group, False


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """A fake model whose answers the real text layer streams."""
    monkeypatch.setattr("mlx_mtp.decoding.loop.decode", fake_decode)
    return FakeModel()
