"""The recipe of a run that has a time instead of settings: pure functions of measured rates.

One continuous run: text is generated first, then trained on in one warm-up and one cosine decay.
The balance between texts and steps follows from the rates.  With N texts, P passes and a gain that
grows with the logarithm of both the number of texts and the number of trained rows, N and N P, the
best P within a time N (g + P t) is g / t: text and training take equal times (g, t: seconds to
generate a text, and to train on it once).  P is kept between 1 and ``MAX_PASSES``: later passes
memorise (``docs/log.md``).

This module imports neither MLX nor NumPy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mtp.train.settings import TrainSettings

NIGHT_S = 10 * 3600
MAX_PASSES = 3.0
MIN_RECORDS, MAX_RECORDS = 40, 50_000
MIN_STEPS = 100
AIM_STEPS = 600  # larger batches only when there are as many steps
BATCH_SIZES = (2, 4, 8, 16, 32)
ANCHORS, MAX_ANCHORS = 40, 96
DROP_LATE = 0.2
CANDIDATES = 8192
PEAK_NEW, PEAK_TRAINED = 8e-4, 3e-4  # learning rate from new weights, and from an adapter
WIDE = 1024  # hidden size above which the learning rate falls with its square root
WARMUP, WARMUP_PART = 100, 0.1
MIN_RATE = 0.02  # of the peak, at the end
EVAL_PART = 0.06  # of the time
EVALS, EVAL_TEXTS = (2, 24), (2, 64)
CHECKPOINTS, CHECKPOINT_S = 40, (10.0, 600.0)
REPORT_S = 20.0
RESERVE = 0.02  # of the time: loading, saving, curves
MEASURE_S, MEASURE_PART = 60.0, 0.05
ORDINARY_ROW = 0.25  # cost of an ordinary row in mask rows, see gradient/step.py
TEXT_SLACK = 1.25  # text may take longer than planned by this factor

_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_time(text: str) -> float:
    """Seconds of a time such as ``2h``, ``90m``, ``1h30m``, ``45s`` or ``overnight`` (10 hours).

    Raises:
        ValueError: it is not one, or it is 0.
    """
    if text.strip().lower() == "overnight":
        return float(NIGHT_S)
    match = _TIME.fullmatch("".join(text.lower().split()))
    parts = [float(part) if part else 0.0 for part in match.groups()] if match else []
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is not a time such as 30m, 2h, 1h30m or overnight")
    return seconds


def measuring_s(total_s: float) -> float:
    """Seconds to measure the rates in."""
    return min(MEASURE_S, MEASURE_PART * total_s)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does with this model.

    Attributes:
        text_tps: generated tokens per second; not used if no text is generated.
        rows_per_s: cost of training steps in mask rows per second; an ordinary row counts as
            ``ORDINARY_ROW``.
        eval_text_s: seconds to evaluate one text with one set of weights.
    """

    text_tps: float
    rows_per_s: float
    eval_text_s: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, as far as the recipe depends on it.

    Attributes:
        hidden_size, vocab_size: of the model.
        answer_tokens: mean number of tokens of an answer.
        sequence_tokens: mean number of tokens of a text.
        generated_tokens: tokens that are generated per kept text; 0 if texts are given.
        num_records: number of texts where it is given, for instance by the data.
        max_records: maximum number of texts.
        held_out: fraction of the texts that is held out.
        starts_trained: whether the run starts from an adapter.
        versions: number of weights that are evaluated, 2 with averaged ones.
        on_cpu: whether this is a CPU.
    """

    hidden_size: int
    vocab_size: int
    answer_tokens: float
    sequence_tokens: float
    generated_tokens: float
    num_records: int | None = None
    max_records: int = MAX_RECORDS
    held_out: float = 0.05
    starts_trained: bool = False
    versions: int = 2
    on_cpu: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run will do, and for how long.

    Attributes:
        num_records: number of texts.
        passes: passes over the texts that are trained on.
        settings: values of ``TrainSettings`` by name, without those that the user has set.
        generate_s, train_s, evaluate_s: predicted seconds of each part.
        step_s, eval_s: predicted seconds per training step and per evaluation.
    """

    num_records: int
    passes: float
    settings: dict[str, Any]
    generate_s: float
    train_s: float
    evaluate_s: float
    step_s: float
    eval_s: float

    @property
    def seconds(self) -> float:
        """Predicted seconds."""
        return self.generate_s + self.train_s + self.evaluate_s


class TooShort(ValueError):
    """The time does not allow a useful run.

    Attributes:
        needed_s: seconds that would.
    """

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"at least {needed_s:.0f} s are needed")
        self.needed_s = needed_s


def masks_per_block(num_draft_tokens: int, drop_late: float) -> float:
    """Mean number of masks of a block, each after the first there with 1 - ``drop_late``."""
    if drop_late == 0:
        return float(num_draft_tokens)
    return (1 - (1 - drop_late) ** num_draft_tokens) / drop_late


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """Seconds of the parts of a run.

    Attributes:
        text_s: to generate a text.
        ordinary_s: for the ordinary rows of a text in a training step.
        anchor_s: for an anchor in a training step.
        max_blocks: places for anchors in a text.
        eval_text_s: to evaluate a text.
    """

    text_s: float
    ordinary_s: float
    anchor_s: float
    max_blocks: float
    eval_text_s: float

    @classmethod
    def of(cls, rates: Rates, task: Task, *, masks: float) -> _Costs:
        return cls(
            text_s=task.generated_tokens / rates.text_tps if task.generated_tokens else 0.0,
            ordinary_s=ORDINARY_ROW * task.sequence_tokens / rates.rows_per_s,
            anchor_s=masks / rates.rows_per_s,
            max_blocks=max(1.0, task.answer_tokens - 2),
            eval_text_s=rates.eval_text_s * task.versions,
        )

    def pass_s(self, anchors: float) -> float:
        """Seconds to train once on a text."""
        return self.ordinary_s + min(anchors, self.max_blocks) * self.anchor_s

    @property
    def least_eval_s(self) -> float:
        """Seconds of the fewest evaluations of the fewest texts."""
        return (EVALS[0] + 1) * EVAL_TEXTS[0] * self.eval_text_s

    def eval_budget_s(self, usable_s: float) -> float:
        """Seconds of the evaluations of a run."""
        return max(EVAL_PART * usable_s, self.least_eval_s)

    def total_s(self, work_s: float) -> float:
        """Seconds of a run with ``work_s`` for texts and steps."""
        return max(work_s / (1 - EVAL_PART), work_s + self.least_eval_s) / (1 - RESERVE)


@dataclass(frozen=True, kw_only=True)
class _Amount:
    """How much a run does.

    Attributes:
        num_records: number of texts.
        num_trained: number of those that are trained on.
        uses: sequences of all training steps together.
        anchors: anchors per sequence.
    """

    num_records: int
    num_trained: int
    uses: float
    anchors: int


def choose(left_s: float, rates: Rates, task: Task, user: Mapping[str, Any]) -> Recipe:
    """Choose what a run does.

    Args:
        left_s: seconds left, after measuring.
        rates: measured here.
        task: what is to be trained.
        user: values of ``TrainSettings`` that the user has set; they win.

    Raises:
        TooShort: with fewer than ``MIN_STEPS`` steps, or text for fewer than ``MIN_RECORDS``.
    """
    k = user.get("num_draft_tokens", TrainSettings().num_draft_tokens)
    masks = masks_per_block(k, user.get("drop_late", DROP_LATE))
    costs = _Costs.of(rates, task, masks=masks)
    usable_s = (1 - RESERVE) * left_s
    amount = _amount(usable_s - costs.eval_budget_s(usable_s), costs, task, user)
    batch = user.get("batch_size") or max(
        (size for size in BATCH_SIZES if amount.uses // size >= AIM_STEPS), default=BATCH_SIZES[0]
    )
    iters = max(1, math.floor(amount.uses / batch))
    step_s = batch * costs.pass_s(amount.anchors)
    train_s = iters * step_s
    num_evals, val_texts = _evaluations(
        costs.eval_budget_s(usable_s) / costs.eval_text_s,
        wanted=round(math.sqrt(usable_s / 60)),
        available=max(1, amount.num_records - amount.num_trained),
    )
    checkpoint_s = min(max(train_s / CHECKPOINTS, CHECKPOINT_S[0]), CHECKPOINT_S[1])
    peak = PEAK_TRAINED if task.starts_trained else PEAK_NEW
    chosen: dict[str, Any] = {
        "iters": iters,
        "batch_size": batch,
        "num_anchors": amount.anchors,
        "drop_late": DROP_LATE,
        "candidates": CANDIDATES if task.on_cpu and task.vocab_size > 2 * CANDIDATES else 0,
        "learning_rate": peak * min(1.0, math.sqrt(WIDE / task.hidden_size)),
        "warmup": min(WARMUP, math.floor(WARMUP_PART * iters)),
        "min_learning_rate": MIN_RATE,
        "steps_per_report": min(max(round(REPORT_S / step_s), 1), 50),
        "steps_per_eval": math.ceil(iters / num_evals),
        "save_every": min(max(round(checkpoint_s / step_s), 1), iters),
        "val_batches": val_texts,
    }
    return Recipe(
        num_records=amount.num_records,
        passes=iters * batch / amount.num_trained,
        settings={name: value for name, value in chosen.items() if name not in user},
        generate_s=amount.num_records * costs.text_s,
        train_s=train_s,
        evaluate_s=(num_evals + 1) * val_texts * costs.eval_text_s,
        step_s=step_s,
        eval_s=val_texts * costs.eval_text_s,
    )


def _amount(work_s: float, costs: _Costs, task: Task, user: Mapping[str, Any]) -> _Amount:
    """Texts and steps for ``work_s`` seconds, see the module docstring."""
    anchors, share = user.get("num_anchors", ANCHORS), 1 - task.held_out
    batch = user.get("batch_size", BATCH_SIZES[0])

    def limit(count: int) -> float:
        """Maximum number of sequences of all steps; there is at least one step."""
        return max(MAX_PASSES * max(1, math.floor(share * count)), batch)

    def least_s(count: int) -> float:
        """Seconds for these texts and the fewest steps over them."""
        return count * costs.text_s + min(min_uses, limit(count)) * once_s

    once_s = costs.pass_s(anchors)
    passes = min(max(costs.text_s / once_s, 1.0), MAX_PASSES)
    each_s = costs.text_s + share * passes * once_s
    min_uses = MIN_STEPS * batch
    if task.num_records is None:
        least = min(max(MIN_RECORDS, math.ceil(min_uses / (passes * share))), task.max_records)
        count = min(math.floor(work_s / each_s), task.max_records)
        if count < least:
            needs = [least * each_s, *([least_s(least)] if least == task.max_records else [])]
            raise TooShort(costs.total_s(max(needs)))
    else:
        count = task.num_records
    num_trained = max(1, math.floor(share * count))
    if task.num_records is None and count < task.max_records:
        uses = passes * share * count
        return _Amount(num_records=count, num_trained=num_trained, uses=uses, anchors=anchors)
    if work_s < least_s(count):
        raise TooShort(costs.total_s(least_s(count)))
    steps_s = work_s - count * costs.text_s
    uses = min(limit(count), steps_s / once_s)
    if uses == limit(count) and "num_anchors" not in user:  # more places of the same texts
        more = math.floor((steps_s / uses - once_s) / costs.anchor_s)
        anchors = min(MAX_ANCHORS, anchors + max(0, more))
    return _Amount(num_records=count, num_trained=num_trained, uses=uses, anchors=anchors)


def _evaluations(fitting: float, *, wanted: int, available: int) -> tuple[int, int]:
    """Number of evaluations after the first, and of their texts.

    Args:
        fitting: number of texts that all evaluations together may have.
        wanted: number of evaluations.
        available: number of texts that are held out.
    """
    num_evals = min(max(wanted, 4), EVALS[1])
    while num_evals > EVALS[0] and fitting / (num_evals + 1) < min(8, available):
        num_evals -= 1
    texts = math.floor(fitting / (num_evals + 1))
    return num_evals, max(1, min(texts, EVAL_TEXTS[1], available))
