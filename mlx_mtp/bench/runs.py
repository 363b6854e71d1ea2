"""Times one answer of a benchmark.

The clock starts at the call.  Until the first step the time counts as the prompt's, from then on as
the generation's, as in ``stats``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from mlx_mtp.planning.plan import LOOKUP, counts_by_source

Check = Callable[[], None]
RUN = 4  # consecutive ids that count as a repetition, not as chance


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward of the model emitted.

    Attributes:
        tokens: emitted ids.
        num_draft_tokens, num_accepted: verified drafts and accepted drafts.
        num_masks: mask rows; 0 for the first step of an answer, which is not timed as a layout.
        parts: sources of the drafts, in order, with the number of drafts of each.
    """

    tokens: list[int]
    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_masks: int = 0
    parts: tuple[tuple[str, int], ...] = ()


@dataclass(kw_only=True)
class Timing:
    """Counts and times of one answer.

    Attributes:
        ids: emitted ids, including the stop id.
        first: number of ids of the first step, which the generation's time excludes.
        ttft_s: seconds from the call to the first step.
        seconds: seconds from the first step to the last.
        steps: forwards that emitted ids.
        verified, accepted: by draft position, how often a draft was verified and how often it was
            accepted with all drafts before it; without looked-up drafts.
        drafters: drafts verified and accepted, by what proposed them.
        layouts: number and seconds of the steps after the first, by (drafts, masks).
        peak_bytes: maximum memory in use above that before the answer.
    """

    ids: list[int] = field(default_factory=list)
    first: int = 0
    ttft_s: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafters: dict[str, tuple[int, int]] = field(default_factory=dict)
    layouts: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def num_timed(self) -> int:
        """Number of ids after the first step."""
        return len(self.ids) - self.first

    def add(self, step: Step, seconds: float) -> None:
        """Count a step that took this long."""
        if self.steps == 0:
            self.first, self.ttft_s = len(step.tokens), seconds
        else:
            self.seconds += seconds
            layout = step.num_draft_tokens, step.num_masks
            count, before = self.layouts.get(layout, (0, 0.0))
            self.layouts[layout] = (count + 1, before + seconds)
        self.ids += step.tokens
        self.steps += 1
        self._add_drafts(step)

    def _add_drafts(self, step: Step) -> None:
        """Count by source and position; drafts after the end of the answer were not verified."""
        num_left = step.num_draft_tokens
        if step.num_accepted == len(step.tokens):
            num_left = step.num_accepted
        position = 0
        for source, count, accepted in counts_by_source(step.parts, step.num_accepted):
            verified = min(count, num_left)
            num_left -= verified
            before = self.drafters.get(source, (0, 0))
            self.drafters[source] = (before[0] + verified, before[1] + accepted)
            if source != LOOKUP:
                self._add_positions(position, verified, accepted)
                position += verified

    def _add_positions(self, first: int, verified: int, accepted: int) -> None:
        missing = first + verified - len(self.verified)
        self.verified += [0] * missing
        self.accepted += [0] * missing
        for index in range(verified):
            self.verified[first + index] += 1
            self.accepted[first + index] += index < accepted


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and its place in the benchmark.

    Attributes:
        prompt, kind: id and kind of its prompt.
        context: requested number of ids of text before the prompt.
        mode: name of the mode.
        repeat: index of the pass over the prompts.
        number: number of answers before it.
        prompt_tokens: number of ids of the conversation.
        timing: counts and times.
        repeated: emitted ids in runs of ``RUN`` that also occur in the conversation.
        joules: energy used by the processor, or None if it cannot be read.
    """

    prompt: str
    kind: str
    context: int
    mode: str
    repeat: int
    number: int
    prompt_tokens: int
    timing: Timing
    repeated: int = 0
    joules: float | None = None

    @property
    def tps(self) -> float | None:
        """Tokens per second after the first step; None without a second step."""
        timing = self.timing
        return timing.num_timed / timing.seconds if timing.seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, with the number and a hash of the ids."""
        values = asdict(self)
        timing = values.pop("timing")
        ids = timing.pop("ids")
        timing["layouts"] = [[*key, *value] for key, value in timing["layouts"].items()]
        timing = {"held" if key == "accepted" else key: value for key, value in timing.items()}
        timing["lookup"] = list(self.timing.drafters.get(LOOKUP, (0, 0)))
        return values | timing | {"tokens": len(ids), "ids_sha256": ids_hash(ids)}


def ids_hash(ids: Sequence[int]) -> str:
    """Hash of the ids of an answer."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def num_repeated(ids: Sequence[int], conversation: Sequence[int]) -> int:
    """Number of ids that lie in a run of ``RUN`` ids that also occurs in the conversation."""
    known = {tuple(conversation[i : i + RUN]) for i in range(len(conversation) - RUN + 1)}
    starts = [i for i in range(len(ids) - RUN + 1) if tuple(ids[i : i + RUN]) in known]
    return len({start + offset for start in starts for offset in range(RUN)})


def time_answer(begin: Callable[[], Iterator[Step]], *, check: Check = lambda: None) -> Timing:
    """Decode one answer and time it.

    Args:
        begin: starts decoding.
        check: called after every step; may raise to stop.
    """
    timing = Timing()
    memory_before = mx.get_active_memory()
    mx.reset_peak_memory()
    previous = time.perf_counter()
    for step in begin():
        now = time.perf_counter()
        timing.add(step, now - previous)
        previous = now
        check()
    timing.peak_bytes = max(mx.get_peak_memory() - memory_before, 0)
    return timing
