"""Verification: all prompts with every layout and depth, then the sampling tests."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.decoding.limits import ContextOverflow, max_new_tokens
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.decoding.sampling import LogitsProcessor
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.verify.copying import decode_copy
from mlx_mtp.verify.near_tie import Divergence, measure
from mlx_mtp.verify.report import RunResult, Tally, VerifyReport
from mlx_mtp.verify.rows import MAX_ROWS, RowTally, compare_rows, have_same_bits, nearest_tie
from mlx_mtp.verify.sampling import check_sampling
from mlx_mtp.verify.settings import COPY, VerifySettings, Way
from mlx_mtp.verify.steps import compare_steps

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Progress = Callable[[str, int, int], None]
"""Called with (phase, units done, units of all phases); a unit is about one decoded token."""
_DRAW_UNITS = 6  # a draw takes about as long as so many tokens


def verify(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    settings: VerifySettings | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that speculative decoding emits what plain decoding emits.

    Args:
        model: a model with its adapter; without one only drafts from a copy are verified.
        tokenizer: its tokenizer; the chat template is used if there is one.
        prompts: user messages.
        settings: what to check.
        progress: called with (phase, units done, units of all phases).

    Raises:
        ValueError: a layout needs an adapter and the model has none, a depth exceeds the adapter's
            k, or a prompt does not fit the context; raised before any work.
    """
    settings, started = settings or VerifySettings(), time.monotonic()
    ways = settings.ways_for(model.num_draft_tokens, name=model.name)
    ids = [_encode(model, tokenizer, prompt) for prompt in prompts]
    if not ids:
        raise ValueError("there are no prompts")
    report = VerifyReport(settings, str(model.dtype).removeprefix("mlx.core."), list(prompts))
    report.runs = [RunResult(layout, depth) for layout, depth in [("plain", 0), *ways]]
    sampled = settings.sampled_ways(ways)
    greedy_units = len(ids) * (len(report.runs) + settings.against_stock)
    greedy_units *= settings.tokens_per_prompt(len(ids))
    units = greedy_units + len(sampled) * len(settings.sampling) * settings.num_draws * _DRAW_UNITS
    progress = progress or (lambda *_: None)
    check = _GreedyCheck(
        model,
        frozenset(tokenizer.eos_token_ids),
        report,
        lambda share: progress("greedy", round(share * greedy_units), units),
    )
    depth = max(depth for _, depth in ways)
    shortest = min(ids, key=len)
    if max_new_tokens(model, len(shortest), depth + 2) == depth + 2:
        progress("rows", 0, units)
        report.steps = compare_steps(model, shortest, ways)
    for index in range(len(ids)):
        check.prompt(index, ids[index], last_index=len(ids) - 1)
    if settings.sampling and sampled:
        # The first token with the highest entropy makes the strongest test.
        index = max(range(len(ids)), key=lambda i: check.entropies[i])
        _sample(
            model,
            ids[index],
            report,
            index=index,
            ways=sampled,
            progress=lambda done: progress("sampling", greedy_units + done * _DRAW_UNITS, units),
        )
    report.seconds = time.monotonic() - started
    return report


def _sample(
    model: MTPModel,
    prompt: list[int],
    report: VerifyReport,
    *,
    index: int,
    ways: list[Way],
    progress: Callable[[int], None],
) -> None:
    """Test sampled answers to one prompt and add the tests to the report."""
    settings = report.settings
    report.sampling_prompt = report.prompts[index].id
    report.sampling = check_sampling(
        model,
        prompt,
        ways=ways,
        settings=settings.sampling,
        num_draws=settings.num_draws,
        seed=settings.seed,
        progress=lambda done, total: progress(done),
    )


class _Reference(ABC):
    """Ids with which a run is compared, and their logits."""

    name: str

    def __init__(self, model: MTPModel, prompt: list[int]) -> None:
        self.model = model
        self.prompt = prompt
        self.ids: list[int] = []
        self.rows = mx.zeros((0, 1))  # logits of the first ids, [N, V]

    @abstractmethod
    def logits_id_at(self, position: int) -> mx.array:
        """Decode again up to a position and return its logits ``[V]``."""


class _Plain(_Reference):
    """This library's plain decoding."""

    name = "plain"

    def logits_id_at(self, position: int) -> mx.array:
        steps = decode(self.model, self.prompt, max_tokens=position + 1, layout="plain")
        *_, last = steps
        return last.logits[-1]


class _Stock(_Reference):
    """Stock mlx-lm on the base model; outside a step the adapter is off."""

    name = "stock"

    def decode(self, *, max_tokens: int, stop_ids: frozenset[int]) -> None:
        """Fill ``ids`` and ``rows``."""
        rows: list[mx.array] = []

        def keep(tokens: mx.array, logits: mx.array) -> mx.array:
            del tokens
            if len(rows) < MAX_ROWS:
                rows.append(logits)
            return logits

        for token, _ in self._steps(max_tokens, keep):
            self.ids.append(int(token))
            if token in stop_ids:
                break
        self.rows = mx.concatenate(rows[: len(self.ids)])

    def logits_id_at(self, position: int) -> mx.array:
        rows: list[mx.array] = []

        def keep(tokens: mx.array, logits: mx.array) -> mx.array:
            del tokens
            rows.append(logits[0])
            return logits

        for _ in self._steps(position + 1, keep):
            pass
        return rows[position]

    def _steps(self, max_tokens: int, *processors: LogitsProcessor) -> Any:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        return generate_step(
            mx.array(self.prompt),
            self.model.base,
            max_tokens=max_tokens,
            logits_processors=list(processors),
            prompt_cache=make_prompt_cache(self.model.base),
        )


@dataclass(frozen=True, eq=False)
class _Text:
    """Ids that a run emitted, and the logits ``[N, V]`` of the first ones."""

    ids: list[int]
    rows: mx.array


class _GreedyCheck:
    """Decodes prompts with every layout and depth, and fills the report's runs."""

    def __init__(
        self,
        model: MTPModel,
        stop_ids: frozenset[int],
        report: VerifyReport,
        progress: Callable[[float], None],
    ) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.report = report
        self.progress = progress
        self.entropies: list[float] = []

    def prompt(self, index: int, prompt: list[int], *, last_index: int) -> None:
        """Decode one prompt with every layout and depth."""
        self.index, self.num_prompts = index, last_index + 1
        self.num_texts = len(self.report.runs) + self.report.settings.against_stock
        self.plain = plain = _Plain(self.model, prompt)
        self.budget = budget = self._budget(len(prompt), num_left=last_index - index + 1)
        references: list[_Reference] = []
        self._begin_text(0)
        if self.report.settings.against_stock:
            stock = _Stock(self.model, prompt)
            stock.decode(max_tokens=budget, stop_ids=self.stop_ids)
            references.append(stock)
        for number, run in enumerate(self.report.runs, start=len(references)):
            self._begin_text(number)
            text = self._decode(run, prompt, budget)
            if run.layout == "plain":
                self._set_plain(text)
            for reference in references:
                divergences = self._compare(run, reference, text, budget)
                run.against.setdefault(reference.name, Tally()).add(divergences)
                self._compare_rows(run, reference, text)
            if run.layout == "plain":
                references.insert(0, plain)
        self._begin_text(self.num_texts)

    def _begin_text(self, number: int, *, num_tokens: int = 0) -> None:
        """Report progress: one of this prompt's texts, and how many of its tokens are decoded."""
        texts = number + min(1.0, num_tokens / self.budget)
        self.progress((self.index + texts / self.num_texts) / self.num_prompts)
        self.number = number

    def _budget(self, prompt_size: int, *, num_left: int) -> int:
        """Maximum number of tokens to decode for the next prompt."""
        budget = self.report.settings.tokens_per_prompt(num_left, done=self.report.num_tokens)
        return max_new_tokens(self.model, prompt_size, budget)

    def _set_plain(self, text: _Text) -> None:
        """Take note of the plain answer, with which the others are compared."""
        self.plain.ids, self.plain.rows = text.ids, text.rows
        self.report.num_tokens += len(text.ids)
        prompt_id = self.report.prompts[self.index].id
        self.report.add_tie(nearest_tie(text.rows, self.model.dtype, prompt_id=prompt_id))

    def _decode(self, run: RunResult, prompt: list[int], max_tokens: int) -> _Text:
        ids: list[int] = []
        rows: list[mx.array] = []
        for step in self._steps(run, prompt, max_tokens):
            if run.layout == "plain" and len(self.entropies) <= self.index:
                self.entropies.append(_entropy(step.logprobs[0]))
            run.count(step)
            if len(ids) < MAX_ROWS:
                rows.append(step.logits[: MAX_ROWS - len(ids)])
            ids += step.tokens
            self._begin_text(self.number, num_tokens=len(ids))
        return _Text(ids, mx.concatenate(rows))

    def _steps(self, run: RunResult, prompt: list[int], max_tokens: int) -> Iterator[StepResult]:
        options = {"max_tokens": max_tokens, "stop_ids": self.stop_ids}
        options["num_draft_tokens"] = run.num_draft_tokens
        if run.layout != COPY:
            return decode(self.model, prompt, layout=run.layout, **options)
        rest = self.plain.ids[len(prompt) - len(self.plain.prompt) :]
        return decode_copy(self.model, prompt, rest, **options)

    def _compare_rows(self, run: RunResult, reference: _Reference, text: _Text) -> None:
        """Compare logits up to the first position at which the ids differ."""
        end = min(len(reference.rows), len(text.rows))
        difference = _first_difference(reference.ids, text.ids, start=0)
        if difference is not None:
            end = min(end, difference + 1)
        tally = compare_rows(reference.rows[:end], text.rows[:end], self.model.dtype)
        run.rows[reference.name] = run.rows.get(reference.name, RowTally()) + tally

    def _compare(
        self, run: RunResult, reference: _Reference, text: _Text, budget: int
    ) -> list[Divergence]:
        """Find where a run diverges from a reference; the last divergence may be a mismatch."""
        divergences: list[Divergence] = []
        ids, start = text.ids, 0
        while (position := _first_difference(reference.ids, ids, start=start)) is not None:
            divergence = measure(
                reference.logits_id_at(position),
                dtype=self.model.dtype,
                prompt_id=self.report.prompts[self.index].id,
                position=position,
                expected=_id_at(reference.ids, position),
                actual=_id_at(ids, position),
                same_bits=None if divergences else _same_bits(reference, text, position),
            )
            divergences.append(divergence)
            start = position + 1
            if not divergence.near_tie or start >= min(budget, len(reference.ids)):
                break
            known = reference.ids[:start]
            ids = known + self._decode(run, reference.prompt + known, budget - start).ids
        return divergences


def _first_difference(expected: list[int], actual: list[int], *, start: int) -> int | None:
    for position in range(start, max(len(expected), len(actual))):
        if _id_at(expected, position) != _id_at(actual, position):
            return position
    return None


def _same_bits(reference: _Reference, text: _Text, position: int) -> bool | None:
    if position >= min(len(reference.rows), len(text.rows)):
        return None
    return bool(have_same_bits(reference.rows[position], text.rows[position]).item())


def _id_at(ids: list[int], position: int) -> int | None:
    return ids[position] if position < len(ids) else None


def _entropy(logprobs: mx.array) -> float:
    """Entropy in nats of log-probabilities ``[V]``."""
    values = np.array(logprobs.astype(mx.float32), dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(-(np.exp(values) * values).sum())


def _encode(model: MTPModel, tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Encode a prompt in the chat template.

    Raises:
        ValueError: the prompt leaves no room for a token in the model's context.
    """
    if tokenizer.has_chat_template:
        text = chat_text(tokenizer, [{"role": "user", "content": prompt.text}])
        ids = encode_prompt(tokenizer, text, add_special_tokens=False)
    else:
        ids = encode_prompt(tokenizer, prompt.text)
    try:
        max_new_tokens(model, len(ids), 1)
    except ContextOverflow as error:
        raise ValueError(f"prompt {prompt.id}: {error}") from None
    return ids
