"""Counts of one answer and the lines printed from them.

The first three lines have mlx-lm's wording and precision to the byte, so that scripts which read
them keep working; the fourth reports multi-token prediction.  Rates follow mlx-lm too: the
prompt's clock runs until the first step is there, the clock of the generation from then on, and the
stop id that ended an answer counts as a generated token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

RULE = "=" * 10


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """What has been counted so far in one answer.

    Attributes:
        prompt_tokens: ids that were prefilled (ids that were in a cache do not count).
        prompt_tps: prompt tokens per second up to the first step.
        cached_tokens: ids that were in the cache before the prompt.
        generation_tokens: ids emitted, with the stop id if one ended the answer, without ids that
            followed a stop string in the same step.
        generation_tps: generated tokens per second since the first step; 0.0 before the second.
        peak_memory: highest memory in use so far, in GB (10^9 bytes).
        num_steps: forwards that emitted ids, the one that ended the prompt among them.
        num_draft_tokens: drafts verified, all steps together.
        num_accepted: drafts accepted, counted like ``generation_tokens``.
        mtp: whether the model drafts at all; False for plain decoding.
        drafters: verified and accepted drafts by what proposed them, such as "mask" or "lookup".
    """

    prompt_tokens: int
    prompt_tps: float
    cached_tokens: int
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    num_steps: int
    num_draft_tokens: int
    num_accepted: int
    mtp: bool
    drafters: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        """Emitted ids (a stop id is one of them) over steps; 0.0 before the first step."""
        return self.generation_tokens / self.num_steps if self.num_steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over verified drafts, from 0.0 to 1.0; 0.0 when nothing was drafted."""
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def lines(self) -> list[str]:
        """Return the printed lines; plain decoding leaves the last one out."""
        lines = [
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec",
            f"Generation: {self.generation_tokens} tokens, "
            f"{self.generation_tps:.3f} tokens-per-sec",
            f"Peak memory: {self.peak_memory:.3f} GB",
        ]
        if self.mtp:
            rate = f" ({self.acceptance_rate:.1%})" if self.num_draft_tokens else ""
            lines.append(
                f"MTP{self._named()}: {self.num_accepted}/{self.num_draft_tokens} drafts "
                f"accepted{rate}, {self.tokens_per_step:.2f} tokens/step"
            )
        return lines

    def _named(self) -> str:
        """The drafters in parentheses, with their shares if there are several."""
        if len(self.drafters) < 2:
            return "".join(f" ({source})" for source in self.drafters)
        shares = [f"{source} {hits}/{all}" for source, (all, hits) in self.drafters.items()]
        return f" ({', '.join(shares)})"

    def stats_dict(self) -> dict[str, Any]:
        """Return counts and rates as JSON-ready values; all of them are finite."""
        fields = {field.name for field in dataclasses.fields(GenerationStats)}
        return {name: getattr(self, name) for name in sorted(fields)} | {
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
        }


class StatsMeter:
    """Counts one answer while it is generated; its clock starts when it is made."""

    def __init__(
        self,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        mtp: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens
        self._mtp = mtp
        self._clock = clock
        self._started = clock()
        self._first_step = self._last_step = self._started
        self._peak_memory = 0.0
        self._tokens = self._steps = self._drafted = self._accepted = 0
        self._drafters: dict[str, tuple[int, int]] = {}
        self._sources: list[str] = []  # of the drafts of this step, last one first

    def add_step(self, parts: Iterable[tuple[str, int]] = ()) -> None:
        """Count a step that has just arrived; its ids follow one by one.

        Args:
            parts: sources of its drafts, in order, with the number of drafts of each.
        """
        sources = [source for source, count in parts for _ in range(count)]
        for source in sources:
            self._count(source, verified=1)
        self._sources = sources[::-1]
        self._last_step = self._clock()
        if self._steps == 0:
            self._first_step = self._last_step
        self._steps += 1
        self._drafted += len(self._sources)
        self._peak_memory = mx.get_peak_memory() / 1e9

    def add_token(self, *, from_draft: bool) -> None:
        """Count one emitted id of the current step."""
        self._tokens += 1
        self._accepted += from_draft
        if from_draft:
            self._count(self._sources.pop(), accepted=1)

    def _count(self, source: str, *, verified: int = 0, accepted: int = 0) -> None:
        before = self._drafters.get(source, (0, 0))
        self._drafters[source] = (before[0] + verified, before[1] + accepted)

    def counts(self) -> dict[str, Any]:
        """Return the fields of ``GenerationStats`` so far."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "prompt_tps": _rate(self._prompt_tokens, self._first_step - self._started),
            "cached_tokens": self._cached_tokens,
            "generation_tokens": self._tokens,
            "generation_tps": _rate(self._tokens, self._last_step - self._first_step),
            "peak_memory": self._peak_memory,
            "num_steps": self._steps,
            "num_draft_tokens": self._drafted,
            "num_accepted": self._accepted,
            "drafters": dict(self._drafters),
            "mtp": self._mtp,
        }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
