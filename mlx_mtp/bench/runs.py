"""One answer of a benchmark: steps in, what they emitted and how long it took out.

The clock starts at the call.  Until the first step is there it counts as the prompt's, from then on
as the generation's, as in ``stats``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from mlx_mtp.planning.plan import LOOKUP

Check = Callable[[], None]
RUN = 4  # ids in a row that tell a repetition from chance


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward of the model emitted.

    Attributes:
        tokens: emitted ids.
        num_draft_tokens, num_accepted: drafts verified and drafts emitted.
        num_masks: mask rows; those of an answer's first step, which no clock looks at, are 0.
        source: where the drafts are from, "" without any.
    """

    tokens: list[int]
    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_masks: int = 0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was counted while an answer came.

    Attributes:
        ids: emitted ids, the stop id among them.
        first: ids of the first step, which the generation's clock leaves out.
        ttft_s: seconds from the call to the first step.
        seconds: from the first step to the last.
        steps: forwards that emitted ids.
        verified, held: by draft position, how often a draft stood there and how often it and all
            before it held; looked-up drafts are left out.
        lookup: looked-up drafts verified, and held.
        layouts: (drafts, masks) of the steps after the first, with their number and seconds.
        peak_bytes: most memory in use above what was in use before.
    """

    ids: list[int]
    first: int
    ttft_s: float
    seconds: float
    steps: int
    verified: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    lookup: tuple[int, int] = (0, 0)
    layouts: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def timed(self) -> int:
        """Ids that came after the first step."""
        return len(self.ids) - self.first


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and its place in the benchmark.

    Attributes:
        prompt, kind: which prompt it answers, and what kind of text that is.
        context: ids of text before the prompt, as wanted.
        mode: how it was decoded.
        repeat: which pass over the prompts.
        number: how many answers came before it.
        prompt_tokens: ids of the conversation.
        timing: what was counted.
        repeated: emitted ids in runs of ``RUN`` that stand in the conversation too.
        joules: energy that the processor took meanwhile, where that can be read.
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
        """Tokens a second after the first step; None where there was no second step."""
        timing = self.timing
        return timing.timed / timing.seconds if timing.seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; ids are counted and hashed."""
        values = asdict(self)
        timing = values.pop("timing")
        ids = timing.pop("ids")
        timing["layouts"] = [[*key, *value] for key, value in timing["layouts"].items()]
        return values | timing | {"tokens": len(ids), "ids_sha256": ids_hash(ids)}


def ids_hash(ids: Sequence[int]) -> str:
    """Tells one answer from another."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def num_repeated(ids: Sequence[int], conversation: Sequence[int]) -> int:
    """How many of the ids lie in a run of ``RUN`` of them that stands in the conversation too."""
    known = {tuple(conversation[at : at + RUN]) for at in range(len(conversation) - RUN + 1)}
    starts = [at for at in range(len(ids) - RUN + 1) if tuple(ids[at : at + RUN]) in known]
    return len({at + each for at in starts for each in range(RUN)})


def timed(begin: Callable[[], Iterator[Step]], *, check: Check = lambda: None) -> Timing:
    """Answer once with the clock on.

    Args:
        begin: starts decoding.
        check: called after every step; may raise to break off.
    """
    ids: list[int] = []
    tally = _Tally()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = first_at = now = time.perf_counter()
    first = steps = 0
    for step in begin():
        last, now = now, time.perf_counter()
        if steps == 0:
            first, first_at = len(step.tokens), now
        else:
            tally.add_layout(step, now - last)
        ids += step.tokens
        steps += 1
        tally.add_drafts(step)
        check()
    return Timing(
        ids=ids,
        first=first,
        ttft_s=first_at - start,
        seconds=now - first_at,
        steps=steps,
        verified=tally.verified,
        held=tally.held,
        lookup=tally.lookup,
        layouts=tally.layouts,
        peak_bytes=max(mx.get_peak_memory() - before, 0),
    )


class _Tally:
    """Counts of the steps of one answer."""

    def __init__(self) -> None:
        self.verified: list[int] = []
        self.held: list[int] = []
        self.lookup = (0, 0)
        self.layouts: dict[tuple[int, int], tuple[int, float]] = {}

    def add_layout(self, step: Step, seconds: float) -> None:
        key = (step.num_draft_tokens, step.num_masks)
        count, before = self.layouts.get(key, (0, 0.0))
        self.layouts[key] = (count + 1, before + seconds)

    def add_drafts(self, step: Step) -> None:
        """Count by position; where the answer ended among its drafts, the rest were not judged."""
        judged, held = step.num_draft_tokens, step.num_accepted
        if held == len(step.tokens):
            judged = held
        if step.source == LOOKUP:
            self.lookup = (self.lookup[0] + judged, self.lookup[1] + held)
            return
        missing = judged - len(self.verified)
        self.verified += [0] * missing
        self.held += [0] * missing
        for at in range(judged):
            self.verified[at] += 1
            self.held[at] += at < held
