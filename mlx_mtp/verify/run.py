"""Verification: all prompts with every layout and depth, then the sampling tests."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.decoding.limits import ContextOverflow, max_new_tokens
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import LogitsProcessor
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.verify.near_tie import Divergence, measure
from mlx_mtp.verify.report import RunResult, Tally, VerifyReport
from mlx_mtp.verify.sampling import Way, check_sampling
from mlx_mtp.verify.settings import DEFAULT_MAX_TOKENS, VerifySettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Progress = Callable[[str, int, int], None]


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
        model: a model with its adapter.
        tokenizer: its tokenizer; the chat template is used if there is one.
        prompts: user messages.
        settings: what to check.
        progress: called with (phase, units done, number of units).

    Raises:
        ValueError: the model has no adapter, a depth exceeds the adapter's k, or a prompt does not
            fit the context; raised before any work.
    """
    settings, started = settings or VerifySettings(), time.monotonic()
    if model.config is None:
        raise ValueError(f"{model.name} has no MTP adapter, so there is nothing to verify")
    depths = settings.depths_for(model.num_draft_tokens)
    ids = [_encode(model, tokenizer, prompt) for prompt in prompts]
    if not ids:
        raise ValueError("there are no prompts")
    ways = [(layout, depth) for layout in settings.layouts for depth in depths]
    report = VerifyReport(settings, str(model.dtype).removeprefix("mlx.core."), list(prompts))
    report.runs = [RunResult(layout, depth) for layout, depth in [("plain", 0), *ways]]
    progress = progress or (lambda *_: None)
    check = _GreedyCheck(model, frozenset(tokenizer.eos_token_ids), report, progress)
    for index in range(len(ids)):
        check.prompt(index, ids[index], last_index=len(ids) - 1)
    if settings.sampling:
        # The first token with the highest entropy makes the strongest test.
        index = max(range(len(ids)), key=lambda i: check.entropies[i])
        _sample(model, ids[index], report, index=index, ways=ways, progress=progress)
    report.seconds = time.monotonic() - started
    return report


def _sample(
    model: MTPModel,
    prompt: list[int],
    report: VerifyReport,
    *,
    index: int,
    ways: list[Way],
    progress: Progress,
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
        progress=lambda done, total: progress("sampling", done, total),
    )


class _Reference(ABC):
    """Ids with which a run is compared, and their logits."""

    name: str

    def __init__(self, model: MTPModel, prompt: list[int]) -> None:
        self.model = model
        self.prompt = prompt
        self.ids: list[int] = []

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
        """Fill ``ids``."""
        for token, _ in self._steps(max_tokens):
            self.ids.append(int(token))
            if token in stop_ids:
                break

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


class _GreedyCheck:
    """Decodes prompts with every layout and depth, and fills the report's runs."""

    def __init__(
        self,
        model: MTPModel,
        stop_ids: frozenset[int],
        report: VerifyReport,
        progress: Progress,
    ) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.report = report
        self.progress = progress
        self.entropies: list[float] = []

    def prompt(self, index: int, prompt: list[int], *, last_index: int) -> None:
        """Decode one prompt with every layout and depth."""
        self.index, self.per_prompt = index, len(self.report.runs) + 1
        self.num_units = (last_index + 1) * self.per_prompt
        budget = self._budget(len(prompt), num_left=last_index - index + 1)
        plain, references = _Plain(self.model, prompt), []
        if self.report.settings.against_stock:
            stock = _Stock(self.model, prompt)
            stock.decode(max_tokens=budget, stop_ids=self.stop_ids)
            references.append(stock)
        for unit, run in enumerate(self.report.runs, start=1):
            self.progress("greedy", index * self.per_prompt + unit, self.num_units)
            ids = self._decode(run, prompt, budget)
            for reference in references:
                divergences = self._compare(run, reference, ids, budget)
                run.against.setdefault(reference.name, Tally()).add(divergences)
            if run.layout == "plain":
                plain.ids = ids
                references.insert(0, plain)
                self.report.num_tokens += len(ids)
        self.progress("greedy", (index + 1) * self.per_prompt, self.num_units)

    def _budget(self, prompt_size: int, *, num_left: int) -> int:
        """Maximum number of tokens to decode for the next prompt."""
        settings, budget = self.report.settings, 0
        if settings.num_tokens is not None:
            budget = max(1, math.ceil((settings.num_tokens - self.report.num_tokens) / num_left))
        if settings.max_tokens is not None or not budget:
            limit = settings.max_tokens or DEFAULT_MAX_TOKENS
            budget = min(budget or limit, limit)
        return max_new_tokens(self.model, prompt_size, budget)

    def _decode(self, run: RunResult, prompt: list[int], max_tokens: int) -> list[int]:
        ids: list[int] = []
        for step in decode(
            self.model,
            prompt,
            max_tokens=max_tokens,
            stop_ids=self.stop_ids,
            layout=run.layout,
            num_draft_tokens=run.num_draft_tokens,
        ):
            if run.layout == "plain" and len(self.entropies) <= self.index:
                self.entropies.append(_entropy(step.logprobs[0]))
            run.count(step)
            ids += step.tokens
        return ids

    def _compare(
        self, run: RunResult, reference: _Reference, ids: list[int], budget: int
    ) -> list[Divergence]:
        """Find where a run diverges from a reference; the last divergence may be a mismatch."""
        divergences: list[Divergence] = []
        start = 0
        while (position := _first_difference(reference.ids, ids, start=start)) is not None:
            divergence = measure(
                reference.logits_id_at(position),
                dtype=self.model.dtype,
                prompt_id=self.report.prompts[self.index].id,
                position=position,
                expected=_id_at(reference.ids, position),
                actual=_id_at(ids, position),
            )
            divergences.append(divergence)
            start = position + 1
            if not divergence.near_tie or start >= min(budget, len(reference.ids)):
                break
            known = reference.ids[:start]
            ids = known + self._decode(run, reference.prompt + known, budget - start)
        return divergences


def _first_difference(expected: list[int], actual: list[int], *, start: int) -> int | None:
    for position in range(start, max(len(expected), len(actual))):
        if _id_at(expected, position) != _id_at(actual, position):
            return position
    return None


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
