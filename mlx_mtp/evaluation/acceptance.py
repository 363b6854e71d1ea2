"""Tokens per step on existing texts, without generating them again.

A greedy decode is determined by its text: which drafts are accepted after a position depends on the
text up to there only, not on the steps before.  So one forward over the anchors of a text counts
the drafts that are accepted after each of them, and walking along these counts gives the steps of a
decode.  Masks are causal in their block, so fewer masks only truncate the counts, and one
evaluation serves every number of masks and both layouts.

    position   n-1  n   n+1 n+2        a prompt of n ids, then its answer
    step 1          x_n                the prompt's forward; then the drafts of anchor n-1
    step 2              x_n+1 x_n+2    one accepted: counts[n-1] == 1; then the drafts of n+1

For text that the model itself generated greedily this is what ``decode`` reports; for other text it
measures how well the drafts predict it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.drafting.shortlist import SHORTLIST, shortlisted
from mlx_mtp.evaluation.forward import draft_states, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.statistics import by_frequency, rank_counts
from mlx_mtp.model.statistics import MAX_RANK, AdapterStatistics, DraftVocabulary, RankCounts

if TYPE_CHECKING:
    from mlx_mtp.evaluation.sequences import TokenSequence
    from mlx_mtp.model.head import PartialHead
from mlx_mtp.model.mtp_model import MTPModel

LAYOUTS = ("quadratic", "linear")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of drafting on some texts.

    Attributes:
        tokens_per_step: tokens of the answers per step of a decode.
        acceptance: for each mask, the fraction of anchors after which its draft and all drafts
            before it are accepted, ``[k]``; anchors whose answer ends before are not counted.
        num_tokens: tokens of the answers.
        num_steps: steps of the decode, including the last prompt chunks.
        num_sequences: sequences with answers.
        kinds: ranks of the right tokens by kind of text, for an adapter's statistics; empty if
            they were not measured, and not among the values of ``to_dict``.
    """

    tokens_per_step: float
    acceptance: tuple[float, ...]
    num_tokens: int
    num_steps: int
    num_sequences: int
    kinds: Mapping[str, RankCounts] = field(default_factory=dict, compare=False, repr=False)

    def monotonic_acceptance(self) -> tuple[float, ...]:
        """The acceptance for an adapter's configuration: rounded and never increasing."""
        return tuple(np.minimum.accumulate(np.round(self.acceptance, 4)).tolist())

    def statistics(
        self, source: str, vocabulary: DraftVocabulary | None
    ) -> AdapterStatistics | None:
        """The statistics of the evaluated adapter; None if ranks were not measured.

        Args:
            source: the evaluated texts, in words.
            vocabulary: counts of the training text, if any.
        """
        if not self.kinds:
            return None
        return AdapterStatistics(source=source, kinds=self.kinds, vocabulary=vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, without ``kinds``."""
        values = {name: getattr(self, name) for name in _SAVED}
        return values | {"acceptance": list(self.acceptance)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Build from the result of ``to_dict``; other keys are ignored.

        Raises:
            ValueError: a key is missing.
        """
        if missing := [name for name in _SAVED if name not in values]:
            raise ValueError(f"an evaluation lacks {', '.join(missing)}")
        fields: dict[str, Any] = {name: values[name] for name in _SAVED}
        fields["acceptance"] = tuple(fields["acceptance"])
        return cls(**fields)


_SAVED = tuple(item.name for item in dataclasses.fields(Evaluation) if item.name != "kinds")


@dataclass(frozen=True)
class Answer:
    """An answer with the number of accepted drafts after each of its anchors.

    Attributes:
        first: position of its first token.
        last: position of the last token that is evaluated.
        end: position after its last token, at least ``last + 1``.
        counts: accepted drafts after anchors ``first - 1 .. last - 2``, ``[last - first]``.
        sequence: index of its sequence.
        kind: kind of its sequence.
        ranks: ranks of the right tokens after these anchors, see ``draft_ranks``, if they were
            measured, ``[last - first, k]``.
    """

    first: int
    last: int
    end: int
    counts: np.ndarray
    sequence: int
    kind: str = ""
    ranks: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Number of evaluated tokens."""
        return self.last - self.first + 1

    @property
    def rooms(self) -> np.ndarray:
        """Tokens of the answer after the one that follows each anchor, ``[last - first]``."""
        return self.end - 1 - np.arange(self.first, self.last)


def accepted_counts(
    model: MTPModel,
    ids: Sequence[int],
    anchors: Sequence[int],
    *,
    num_draft_tokens: int | None = None,
    rows_per_forward: int = 512,
    use_sampler: bool = True,
) -> np.ndarray:
    """Count the accepted drafts after each anchor of a text, int ``[A]``.

    A draft is accepted if it equals the token in ``ids`` and all drafts before it are accepted;
    none is after the end of ``ids``.  Drafts are those of greedy decoding.  If the drafts before
    are accepted, they are tokens of the text, so the sampler head gets those as previous tokens.
    Drafts of independent heads are counted likewise: head j is mask j.

    Args:
        model, ids, anchors, num_draft_tokens, rows_per_forward, use_sampler: see ``draft_ranks``.

    Raises:
        ValueError: an argument is out of range.
    """
    return _leading(
        draft_ranks(
            model,
            ids,
            anchors,
            num_draft_tokens=num_draft_tokens,
            num_candidates=1,
            rows_per_forward=rows_per_forward,
            use_sampler=use_sampler,
        )
    )


def draft_ranks(
    model: MTPModel,
    ids: Sequence[int],
    anchors: Sequence[int],
    *,
    num_draft_tokens: int | None = None,
    num_candidates: int = MAX_RANK,
    rows_per_forward: int = 512,
    use_sampler: bool = True,
) -> np.ndarray:
    """Rank the right tokens among the candidates of the drafts after each anchor, int ``[A, k]``.

    A rank is 1 if the draft is the token in ``ids``, and 1 more for each candidate that the drafter
    prefers to that token; a token that is no candidate has the last rank.  The drafter sees the
    right tokens as previous ones.  A block is followed for as long as the right token has at most
    rank ``num_candidates``; a higher rank is given as ``num_candidates + 1``, and 0 follows it, as
    it follows the end of ``ids``.

    Args:
        model: with its adapter.
        ids: the text ``[L]``.
        anchors: positions of the last tokens that the blocks see, from 0 to L - 1.
        num_draft_tokens: masks of a block; the adapter's k by default.
        num_candidates: ranks to tell apart, at least 1.
        rows_per_forward: maximum mask rows per forward, which limits the memory; a block stays
            whole.
        use_sampler: False drafts with the base model's head only.

    Raises:
        ValueError: an argument is out of range.
    """
    k = checked_num_masks(model, num_draft_tokens)
    if rows_per_forward < 1:
        raise ValueError(f"rows_per_forward must be at least 1, got {rows_per_forward}")
    ranks = np.zeros((len(anchors), k), dtype=np.int64)
    if not len(anchors):
        return ranks
    if min(anchors) < 0 or max(anchors) >= len(ids):
        raise ValueError(f"anchors must lie between 0 and {len(ids) - 1}")
    order = np.argsort(np.array(anchors), kind="stable")
    ordinary = ordinary_rows(model, mx.array(list(ids[: max(anchors) + 1])))
    mx.eval(ordinary.hidden)
    size = max(rows_per_forward // k, 1)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        part = [int(anchors[index]) for index in chunk]
        rows = draft_states(model, ordinary, MaskRows(tuple(part), k))
        rows = rows.reshape(len(part), k, -1)  # [A, k, D]
        mx.eval(rows)
        ranks[chunk] = _follow(model, rows, np.array(ids), part, num_candidates, use_sampler)
    return ranks


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
        counts: accepted drafts after anchors ``first - 1 .. last - 2`` (``accepted_counts``),
            ``[last - first]``.
        first: position of the first token, which the prompt's forward emits.
        last: position of the last token.
        num_draft_tokens: masks of a group and maximum drafts of a step; 0 is plain decoding.
        layout: ``quadratic`` drafts at every step; ``linear`` only after steps whose drafts were
            all accepted, or that had none.

    Raises:
        ValueError: the layout is unknown, or the counts do not match the positions.
    """
    _check_layout(layout)
    if len(counts) != last - first:
        raise ValueError(f"positions {first} to {last} need {last - first} counts")
    position, steps, has_drafts = first, 1, True
    while position < last:
        accepted = min(int(counts[position - first]), num_draft_tokens) if has_drafts else 0
        if layout == "linear":
            has_drafts = not has_drafts or accepted == num_draft_tokens
        position += 1 + accepted
        steps += 1
    return steps


def count_answers(
    model: MTPModel,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = 64,
    num_draft_tokens: int | None = None,
    num_candidates: int = 1,
    rows_per_forward: int = 512,
    use_sampler: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Answer]:
    """Count the accepted drafts along the answers of sequences; see ``evaluate``.

    ``num_candidates`` is that of ``draft_ranks``; with 1, only accepted drafts are followed.
    """
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
        ranks = draft_ranks(
            model,
            sequence.ids,
            [anchor for first, last, _ in spans for anchor in range(first - 1, last - 1)],
            num_draft_tokens=num_draft_tokens,
            num_candidates=num_candidates,
            rows_per_forward=rows_per_forward,
            use_sampler=use_sampler,
        )
        start = 0
        for first, last, end in spans:
            part = ranks[start : start + last - first]
            measured = part if num_candidates == MAX_RANK else None
            yield Answer(first, last, end, _leading(part), index, sequence.kind, measured)
            start += last - first
    if progress:
        progress(len(sequences), len(sequences))


def summarise(
    answers: Sequence[Answer], *, num_draft_tokens: int, layout: str = "quadratic"
) -> Evaluation:
    """Evaluate counted answers with at most as many masks as they were counted with.

    Raises:
        ValueError: there are no answers, or the layout is unknown.
    """
    _check_layout(layout)
    if not answers:
        raise ValueError("there are no answers to evaluate on")
    steps = sum(
        walk(
            answer.counts,
            first=answer.first,
            last=answer.last,
            num_draft_tokens=num_draft_tokens,
            layout=layout,
        )
        for answer in answers
    )
    tokens = sum(answer.num_tokens for answer in answers)
    counts = np.concatenate([answer.counts for answer in answers])
    rooms = np.concatenate([answer.rooms for answer in answers])
    return Evaluation(
        tokens_per_step=tokens / steps,
        acceptance=tuple(
            float((counts[rooms > j] > j).mean()) if (rooms > j).any() else 0.0
            for j in range(num_draft_tokens)
        ),
        num_tokens=tokens,
        num_steps=steps,
        num_sequences=len({answer.sequence for answer in answers}),
        kinds=_kinds(answers, num_draft_tokens),
    )


def _kinds(answers: Sequence[Answer], k: int) -> dict[str, RankCounts]:
    """The ranks of answers by kind, most frequent kinds first; empty if not all have ranks."""
    names = by_frequency(answer.kind for answer in answers)
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in names.values()}
    for answer in answers:
        if answer.ranks is None:
            return {}
        groups[names[answer.kind]].append((answer.ranks[:, :k], answer.rooms))
    return {
        name: rank_counts(*(np.concatenate(parts) for parts in zip(*group, strict=True)))
        for name, group in groups.items()
    }


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
    """Measure tokens per step on the answers of sequences, and the ranks of their tokens.

    Args:
        model: with its adapter; nothing is changed and no gradients are kept.
        sequences: the texts; the first tokens of each answer in them are evaluated.
        max_tokens: maximum number of tokens of an answer.
        num_draft_tokens: masks of a group; the adapter's k by default.
        layout: ``quadratic`` or ``linear``.
        rows_per_forward: maximum mask rows per forward, which limits the memory.
        use_sampler: False drafts with the base model's head only.
        progress: called with (sequences done, number of sequences).

    Raises:
        ValueError: an argument is out of range, or the sequences have no answer.
    """
    _check_layout(layout)
    k = checked_num_masks(model, num_draft_tokens)
    answers = list(
        count_answers(
            model,
            sequences,
            max_tokens=max_tokens,
            num_draft_tokens=k,
            num_candidates=MAX_RANK,
            rows_per_forward=rows_per_forward,
            use_sampler=use_sampler,
            progress=progress,
        )
    )
    return summarise(answers, num_draft_tokens=k, layout=layout)


def checked_num_masks(model: MTPModel, num_draft_tokens: int | None) -> int:
    """Number of drafts after an anchor; by default the adapter's k.

    Raises:
        ValueError: the adapter has fewer, or there is no adapter.
    """
    if model.adapter_config is None:
        raise ValueError(f"{model.name} has no adapter, so there are no drafts to evaluate")
    maximum = model.adapter_config.num_draft_tokens
    k = maximum if num_draft_tokens is None else num_draft_tokens
    if not 1 <= k <= maximum:
        raise ValueError(f"num_draft_tokens must be between 1 and the adapter's {maximum}, got {k}")
    return k


def _answers(sequence: TokenSequence) -> list[tuple[int, int]]:
    """First position of each answer and the position after it; an answer never starts at 0."""
    flags = np.array([False, *sequence.answer, False]).astype(np.int8)
    borders = np.flatnonzero(np.diff(flags)).reshape(-1, 2)
    spans = [(max(int(first), 1), int(end)) for first, end in borders]
    return [(first, end) for first, end in spans if end > first]


def _leading(ranks: np.ndarray) -> np.ndarray:
    """Number of leading ranks of 1 of each anchor, ``[A]``."""
    return np.logical_and.accumulate(ranks == 1, axis=1).sum(axis=1)


def _follow(
    model: MTPModel,
    rows: mx.array,
    ids: np.ndarray,
    anchors: list[int],
    num_candidates: int,
    use_sampler: bool,
) -> np.ndarray:
    """Rank the right tokens after some anchors, see ``draft_ranks``; rows are ``[A, k, D]``."""
    k = rows.shape[1]
    ranks = np.zeros((len(anchors), k), dtype=np.int64)
    alive = np.arange(len(anchors))  # anchors whose blocks are followed so far
    known = None if model.frequent is None else _known_since(model.frequent, ids)
    for j in range(k):
        positions = np.array(anchors)[alive] + 2 + j
        alive = alive[positions < len(ids)]
        if not len(alive):
            break
        positions = np.array(anchors)[alive] + 2 + j
        hidden = rows[mx.array(alive), j]
        previous, right = mx.array(ids[positions - 1]), mx.array(ids[positions])
        vocabulary = None
        if known is not None:
            tokens, since = known
            is_known = since <= np.array(anchors)[alive, None]
            vocabulary = mx.array(tokens), mx.array(is_known.tolist())
        found = np.array(_ranks(model, hidden, previous, right, use_sampler, vocabulary))
        ranks[alive, j] = np.minimum(found, num_candidates + 1)
        alive = alive[found <= num_candidates]
    return ranks


def _known_since(frequent: PartialHead, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The draft vocabulary of a text ``[N]``, and where each token joins it: -1 for frequent ones.

    See ``drafting.vocabulary``; a text with more rare tokens than ``MAX_OWN`` keeps all of them.
    """
    tokens, first = np.unique(ids, return_index=True)
    is_rare = ~np.isin(tokens, np.array(frequent.ids))
    tokens, first = tokens[is_rare], first[is_rare]
    since = np.concatenate([np.full(frequent.ids.size, -1), first])
    return np.concatenate([np.array(frequent.ids), tokens]), since


def _ranks(
    model: MTPModel,
    hidden: mx.array,
    previous: mx.array,
    right: mx.array,
    use_sampler: bool,
    vocabulary: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """Rank of the right token among each mask row's candidates, as decoding scores them, ``[A]``.

    Of equal scores the first is preferred, as by argmax.  A token that is no candidate comes after
    all of them.

    Args:
        model: with its adapter.
        hidden: final hidden states ``[A, D]``.
        previous: the token before each draft ``[A]``.
        right: the right token ``[A]``.
        use_sampler: False does not use the sampler head; all tokens are candidates then.
        vocabulary: tokens ``[N]`` and whether a draft may be one of them ``[A, N]``; None for all.
    """
    logits = model.logits(hidden[None])[0]  # [A, V]
    tokens = mx.arange(logits.shape[-1])
    if vocabulary is not None:
        tokens, may_draft = vocabulary
        logits = mx.where(may_draft, logits[:, tokens], -float("inf"))  # [A, N]
    head = model.sampler_head if use_sampler else None
    if head is None:
        candidates, scores = tokens[None], logits
    else:
        candidates = tokens[shortlisted(logits, SHORTLIST)]  # [A, S]
        states = head(model.embed(previous), hidden)  # [A, D]
        scores = (model.unembed_rows(candidates) @ states[..., None])[..., 0]  # [A, S]
    is_right = (candidates == right[:, None]).astype(mx.int32)
    place = mx.argmax(is_right, axis=-1, keepdims=True)
    score = mx.take_along_axis(scores, place, axis=-1)
    is_before = mx.arange(scores.shape[-1])[None] < place
    num_better = ((scores > score) | ((scores == score) & is_before)).sum(axis=-1)
    return 1 + mx.where(is_right.max(axis=-1) > 0, num_better, scores.shape[-1])


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
