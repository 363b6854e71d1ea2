"""Tokens per step on given texts, without generating them again.

A greedy decode is fixed by its text: which drafts hold behind a position depends on the text up to
there alone, not on how the decode came there.  So one packed forward over the anchors of a text
counts the drafts that hold behind each of them, and walking along these counts gives the steps of
a decode.  Masks are causal in their block, so fewer masks only cut the counts off, and one
evaluation serves every number of masks and both layouts.

    position   n-1  n   n+1 n+2        a prompt of n ids, then its answer
    step 1          x_n                the prompt's forward; drafts of anchor n-1 go on
    step 2              x_n+1 x_n+2    one draft held: counts[n-1] == 1; drafts of anchor n+1 go on

For text that the model itself writes greedily this is what ``decode`` reports; elsewhere it tells
how well the drafts foresee the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.drafting.mask_tokens import SHORTLIST, shortlisted
from mlx_mtp.evaluation.forward import OrdinaryRows, mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows

if TYPE_CHECKING:
    from mlx_mtp.evaluation.sequences import TokenSequence
    from mlx_mtp.model.mtp_model import MTPModel

LAYOUTS = ("quadratic", "linear")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What drafting is worth on some texts.

    Attributes:
        tokens_per_step: tokens of the answers over the steps of a decode that emits them.
        acceptance: for each mask, the share of anchors behind which its draft and all drafts
            before it hold, ``[k]``; anchors whose answer ends before do not count.
        num_tokens: tokens of the answers.
        num_steps: steps of the decode, the ones that end the prompts among them.
        num_sequences: sequences that the answers are from.
    """

    tokens_per_step: float
    acceptance: tuple[float, ...]
    num_tokens: int
    num_steps: int
    num_sequences: int

    def falling_shares(self) -> tuple[float, ...]:
        """The acceptance for an adapter's configuration: rounded, and no share above one before."""
        falling = np.minimum.accumulate(np.round(self.acceptance, 4))
        return tuple(falling.tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self) | {"acceptance": list(self.acceptance)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Build from what ``to_dict`` gave; other keys are ignored.

        Raises:
            ValueError: a key is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"an evaluation lacks {', '.join(missing)}")
        given: dict[str, Any] = {name: values[name] for name in names}
        given["acceptance"] = tuple(given["acceptance"])
        return cls(**given)


@dataclass(frozen=True)
class Answer:
    """An answer, and how many drafts hold behind each of its anchors.

    Attributes:
        first: position of its first token.
        last: position of the last token that is walked to.
        end: position behind its last token, at least ``last + 1``.
        counts: drafts that hold behind anchors ``first - 1 .. last - 2``, ``[last - first]``.
        sequence: index of the sequence that it is from.
    """

    first: int
    last: int
    end: int
    counts: np.ndarray
    sequence: int

    @property
    def num_tokens(self) -> int:
        """Tokens walked over."""
        return self.last - self.first + 1


def accepted_counts(
    model: MTPModel,
    ids: Sequence[int],
    anchors: Sequence[int],
    *,
    num_draft_tokens: int | None = None,
    rows_per_forward: int = 512,
    use_sampler: bool = True,
) -> np.ndarray:
    """Count the drafts that hold behind each anchor of a text, int ``[A]``.

    A draft holds if it equals the token that stands in ``ids`` and all drafts before it hold; none
    holds behind the end of ``ids``.  Drafts are those of greedy decoding (see ``draft``).  Where
    the drafts before hold, they are the text's own tokens, so the sampler head is told those.

    Args:
        model: with its adapter.
        ids: the text ``[L]``.
        anchors: positions of the last tokens that the blocks see, each from 0 to L - 1.
        num_draft_tokens: masks of a block; the adapter's k by default.
        rows_per_forward: most mask rows at once, which bounds the memory; a block is never cut.
        use_sampler: False drafts by the base model's head alone.

    Raises:
        ValueError: an argument is out of range.
    """
    k = checked_num_masks(model, num_draft_tokens)
    if rows_per_forward < 1:
        raise ValueError(f"rows_per_forward must be at least 1, got {rows_per_forward}")
    counts = np.zeros(len(anchors), dtype=np.int64)
    if not len(anchors):
        return counts
    if min(anchors) < 0 or max(anchors) >= len(ids):
        raise ValueError(f"anchors must lie between 0 and {len(ids) - 1}")
    order = np.argsort(np.array(anchors), kind="stable")
    ordinary = ordinary_rows(model, mx.array(list(ids[: max(anchors) + 1])))
    mx.eval(ordinary.hidden)
    size = max(rows_per_forward // k, 1)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        some = [int(anchors[at]) for at in chunk]
        counts[chunk] = _count(model, ordinary, np.array(ids), some, k, use_sampler)
    return counts


def walk(
    counts: Sequence[int] | np.ndarray,
    *,
    first: int,
    last: int,
    num_draft_tokens: int,
    layout: str = "quadratic",
) -> int:
    """Steps of a decode that emits the tokens at positions ``first .. last``.

    Args:
        counts: drafts that hold behind anchors ``first - 1 .. last - 2`` (``accepted_counts``),
            ``[last - first]``.
        first: position of the first token, which the prompt's own forward emits.
        last: position of the last token.
        num_draft_tokens: masks of a group and most drafts of a step; 0 decodes plainly.
        layout: ``quadratic`` drafts at every step; ``linear`` only behind steps whose drafts all
            held, or that had none.

    Raises:
        ValueError: the layout is neither, or the counts do not match the positions.
    """
    _check_layout(layout)
    if len(counts) != last - first:
        raise ValueError(f"positions {first} to {last} need {last - first} counts")
    position, steps, drafted = first, 1, True
    while position < last:
        held = min(int(counts[position - first]), num_draft_tokens) if drafted else 0
        if layout == "linear":
            drafted = not drafted or held == num_draft_tokens
        position += 1 + held
        steps += 1
    return steps


def count_answers(
    model: MTPModel,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = 64,
    num_draft_tokens: int | None = None,
    rows_per_forward: int = 512,
    use_sampler: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Answer]:
    """Count the drafts that hold along the answers of sequences; see ``evaluate``."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    for index, sequence in enumerate(sequences):
        if progress:
            progress(index, len(sequences))
        spans = [
            (first, min(first + max_tokens, end) - 1, end) for first, end in _answers(sequence)
        ]
        if not spans:
            continue
        counts = accepted_counts(
            model,
            sequence.ids,
            [anchor for first, last, _ in spans for anchor in range(first - 1, last - 1)],
            num_draft_tokens=num_draft_tokens,
            rows_per_forward=rows_per_forward,
            use_sampler=use_sampler,
        )
        at = 0
        for first, last, end in spans:
            yield Answer(first, last, end, counts[at : at + last - first], index)
            at += last - first
    if progress:
        progress(len(sequences), len(sequences))


def summarise(
    answers: Sequence[Answer], *, num_draft_tokens: int, layout: str = "quadratic"
) -> Evaluation:
    """Walk along counted answers with as many masks or fewer than they were counted with.

    Raises:
        ValueError: there are no answers, or the layout is unknown.
    """
    _check_layout(layout)
    if not answers:
        raise ValueError("there are no answers to evaluate on")
    steps = sum(
        walk(
            each.counts,
            first=each.first,
            last=each.last,
            num_draft_tokens=num_draft_tokens,
            layout=layout,
        )
        for each in answers
    )
    tokens = sum(each.num_tokens for each in answers)
    counts = np.concatenate([each.counts for each in answers])
    rooms = np.concatenate(  # tokens of the answer behind the one that follows the anchor
        [each.end - 1 - np.arange(each.first, each.last) for each in answers]
    )
    return Evaluation(
        tokens_per_step=tokens / steps,
        acceptance=tuple(
            float((counts[rooms > j] > j).mean()) if (rooms > j).any() else 0.0
            for j in range(num_draft_tokens)
        ),
        num_tokens=tokens,
        num_steps=steps,
        num_sequences=len({each.sequence for each in answers}),
    )


def evaluate(
    model: MTPModel,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = 64,
    num_draft_tokens: int | None = None,
    layout: str = "quadratic",
    rows_per_forward: int = 512,
    use_sampler: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure tokens per step on the answers of sequences.

    Args:
        model: with its adapter; nothing is changed and no gradients are kept.
        sequences: the texts; of each answer in them the first tokens are walked over.
        max_tokens: most tokens of an answer.
        num_draft_tokens: masks of a group; the adapter's k by default.
        layout: ``quadratic`` or ``linear``.
        rows_per_forward: most mask rows at once, which bounds the memory.
        use_sampler: False drafts by the base model's head alone.
        progress: called with (sequences done, sequences in all).

    Raises:
        ValueError: an argument is out of range, or the sequences hold no answer.
    """
    _check_layout(layout)
    k = checked_num_masks(model, num_draft_tokens)
    answers = list(
        count_answers(
            model,
            sequences,
            max_tokens=max_tokens,
            num_draft_tokens=k,
            rows_per_forward=rows_per_forward,
            use_sampler=use_sampler,
            progress=progress,
        )
    )
    return summarise(answers, num_draft_tokens=k, layout=layout)


def checked_num_masks(model: MTPModel, num_draft_tokens: int | None) -> int:
    """Masks of a block: as many as wanted, or the adapter's k.

    Raises:
        ValueError: the adapter has fewer, or there is none.
    """
    most = model.num_draft_tokens
    if most == 0:
        raise ValueError(f"{model.name} has no adapter, so there are no drafts to evaluate")
    k = most if num_draft_tokens is None else num_draft_tokens
    if not 1 <= k <= most:
        raise ValueError(f"num_draft_tokens must be between 1 and the adapter's {most}, got {k}")
    return k


def _answers(sequence: TokenSequence) -> list[tuple[int, int]]:
    """First position of each answer and the position behind it; id 0 has nothing before it."""
    flags = np.array([False, *sequence.answer, False]).astype(np.int8)
    borders = np.flatnonzero(np.diff(flags)).reshape(-1, 2)
    spans = [(max(int(first), 1), int(end)) for first, end in borders]
    return [(first, end) for first, end in spans if end > first]


def _count(
    model: MTPModel,
    ordinary: OrdinaryRows,
    ids: np.ndarray,
    anchors: list[int],
    k: int,
    use_sampler: bool,
) -> np.ndarray:
    """Count the drafts that hold behind each of a few anchors, ``[A]``."""
    rows = mask_rows(model, ordinary, MaskRows(tuple(anchors), k))
    rows = rows.reshape(len(anchors), k, -1)  # [A, k, D]
    mx.eval(rows)
    counts = np.zeros(len(anchors), dtype=np.int64)
    held = np.arange(len(anchors))  # anchors behind which all drafts so far hold
    for j in range(k):
        positions = np.array(anchors)[held] + 2 + j
        held = held[positions < len(ids)]
        if not len(held):
            break
        positions = np.array(anchors)[held] + 2 + j
        hidden = rows[mx.array(held), j]
        drafts = _drafts(model, hidden, mx.array(ids[positions - 1]), use_sampler)
        held = held[np.array(drafts) == ids[positions]]
        counts[held] += 1
    return counts


def _drafts(model: MTPModel, hidden: mx.array, previous: mx.array, use_sampler: bool) -> mx.array:
    """The greedy draft of each mask row, as ``draft.draft_tokens`` makes it.

    Args:
        model: with its adapter.
        hidden: final hidden states ``[A, D]``.
        previous: the token before each draft ``[A]``.
        use_sampler: False leaves the sampler head out.
    """
    logits = model.logits(hidden[None])[0]  # [A, V]
    head = model.sampler_head if use_sampler else None
    if head is None:
        return mx.argmax(logits, axis=-1)
    candidates = shortlisted(logits, SHORTLIST)  # [A, S]
    states = head(model.embed(previous), hidden)  # [A, D]
    scores = (model.unembed_rows(candidates) @ states[..., None])[..., 0]  # [A, S]
    picks = mx.argmax(scores, axis=-1, keepdims=True)
    return mx.take_along_axis(candidates, picks, axis=-1)[:, 0]


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
