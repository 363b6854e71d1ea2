"""Which drafts hold: pure functions on device arrays, exact in distribution.

Greedy: a draft holds if it is the model's own argmax and every draft before it held.
Sampling: rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
A draft s drawn from ``draft_probs`` holds with probability min(1, target(s) / draft(s)); the first
that does not is replaced by a draw from max(target - draft, 0), renormalised; if all hold, one more
token is drawn from the target.  The emitted tokens then follow ``target_probs`` exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the names, defaults and order of filters are mlx-lm's.

    Attributes:
        temp: temperature, applied after the filters; 0 is greedy.
        top_p: keep the most likely tokens up to this probability (1 keeps all).
        min_p: drop tokens below this fraction of the most likely one's probability.
        top_k: keep that many tokens (0 keeps all).
        repetition_penalty: divide the logits of recent tokens by this (multiply negative ones).
        repetition_context_size: how many tokens are recent.
        logit_bias: added to the logits, by token id.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        for name in ("temp", "top_p", "min_p"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.temp < 0:
            raise ValueError(f"temp must be at least 0, got {self.temp}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if self.min_tokens_to_keep < 1:
            raise ValueError(
                f"min_tokens_to_keep must be at least 1, got {self.min_tokens_to_keep}"
            )
        penalty = self.repetition_penalty
        if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0, got {penalty}")
        if self.repetition_context_size < 1:
            raise ValueError(
                f"repetition_context_size must be at least 1, got {self.repetition_context_size}"
            )
        for token, bias in (self.logit_bias or {}).items():
            if token < 0 or math.isnan(bias):
                raise ValueError(f"logit_bias needs a token id and a number, got {token}: {bias}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temp == 0

    def logits_processors(self) -> list[LogitsProcessor]:
        """mlx-lm's processors for the penalty and the bias, in its order."""
        return make_logits_processors(
            logit_bias=self.logit_bias,
            repetition_penalty=self.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
        )


def process_logits(
    logits: mx.array,
    *,
    context: Sequence[int],
    drafts: Sequence[int],
    processors: Sequence[LogitsProcessor],
) -> mx.array:
    """Apply logits processors to each verify row along the drafted prefix.

    Args:
        logits: ``[d+1, V]``, row j follows ``context`` and the first j drafts.
        context: every id up to and including the last pending one.
        drafts: the d draft ids.
        processors: mlx-lm's, each ``(tokens [n], logits [1, V]) -> [1, V]``.

    Returns:
        ``[d+1, V]``.
    """
    if not processors:
        return logits
    tokens = mx.array([*context, *drafts])
    rows = []
    for j in range(logits.shape[0]):
        row = logits[j : j + 1]
        for processor in processors:
            row = processor(tokens[: len(context) + j], row)
        rows.append(row)
    return mx.concatenate(rows)


def target_probs(logits: mx.array, sampling: Sampling) -> mx.array:
    """Distribution that plain sampling draws from, float32, ``[..., V]`` to ``[..., V]``.

    The filters see the log-probabilities at temperature 1 in mlx-lm's order (top-p, min-p, top-k);
    then the temperature is applied and the rest renormalised.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < sampling.top_p < 1:
        logprobs = _keep_top_p(logprobs, sampling.top_p)
    if sampling.min_p > 0:
        logprobs = _keep_min_p(logprobs, sampling.min_p, sampling.min_tokens_to_keep)
    if 0 < sampling.top_k < logits.shape[-1]:
        logprobs = _keep_top_k(logprobs, sampling.top_k)
    return mx.softmax(logprobs * (1 / sampling.temp), axis=-1, precise=True)


def accept_greedy(logits: mx.array, drafts: mx.array) -> tuple[mx.array, mx.array]:
    """Accept drafts that equal the model's own argmax.

    Args:
        logits: ``[d+1, V]``, processed.
        drafts: ``[d]``.

    Returns:
        tokens ``[d+1]``, of which the first ``num_accepted + 1`` are emitted, and num_accepted.
    """
    tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
    return tokens, count_accepted(tokens[:-1] == drafts)


def accept_sampled(
    probs: mx.array,
    drafts: mx.array,
    candidates: mx.array,
    draft_probs: mx.array,
    *,
    key: mx.array,
) -> tuple[mx.array, mx.array]:
    """Accept drafts by rejection sampling.

    Args:
        probs: the target distributions, ``[d+1, V]``.
        drafts: ``[d]``, each drawn from its row of ``draft_probs``.
        candidates: ids that the draft distributions are over, distinct in a row, ``[d, S]``.
        draft_probs: ``[d, S]``; everything outside ``candidates`` has probability 0.
        key: random key.

    Returns:
        tokens ``[d+1]``, of which the first ``num_accepted + 1`` are emitted, and num_accepted.
    """
    accept_key, bonus_key = mx.random.split(key)
    num_drafts = drafts.size
    if num_drafts == 0:
        num_accepted = mx.array(0)
        return _draw(probs[0], bonus_key)[None], num_accepted
    target = mx.take_along_axis(probs[:-1], drafts[:, None], axis=-1)[:, 0]
    is_draft = candidates == drafts[:, None]
    drafted = mx.where(is_draft, draft_probs, 0).sum(axis=-1)
    uniform = mx.random.uniform(shape=(num_drafts,), key=accept_key)
    num_accepted = count_accepted(uniform * drafted < target)
    # One more row, all zero, stands for "every draft held": its residual is the target itself.
    row = mx.minimum(num_accepted, num_drafts - 1)
    rejected = (num_accepted < num_drafts).astype(mx.float32)
    residual = probs[num_accepted].at[candidates[row]].add(-rejected * draft_probs[row])
    residual = mx.maximum(residual, 0)
    residual = mx.where(residual.sum() > 0, residual, probs[num_accepted])
    bonus = _draw(residual, bonus_key)
    padded = mx.concatenate([drafts.astype(mx.int32), bonus[None]])
    return mx.where(mx.arange(num_drafts + 1) == num_accepted, bonus, padded), num_accepted


def count_accepted(holds: mx.array) -> mx.array:
    """Length of the leading run of True in ``[d]``; a match after a mismatch never counts."""
    return mx.cumprod(holds.astype(mx.int32)).sum() if holds.size else mx.array(0)


# mlx-lm's filters mean the same, but are compiled anew for every new value, which takes seconds on
# a CPU.


def _keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep the most likely ids whose predecessors have less than ``top_p`` of the mass."""
    ordered = mx.sort(logprobs, axis=-1)[..., ::-1]
    mass = mx.cumsum(mx.exp(ordered), axis=-1)
    before = mass - mx.exp(ordered)
    kept = mx.where(before < top_p * mass[..., -1:], ordered, mx.inf)
    return mx.where(logprobs < kept.min(axis=-1, keepdims=True), -mx.inf, logprobs)


def _keep_min_p(logprobs: mx.array, min_p: float, at_least: int) -> mx.array:
    """Keep ids with at least ``min_p`` of the best id's probability, and the best few anyway."""
    bound = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    if at_least > 1:
        best = mx.topk(logprobs, min(at_least, logprobs.shape[-1]), axis=-1)
        bound = mx.minimum(bound, best.min(axis=-1, keepdims=True))
    return mx.where(logprobs < bound, -mx.inf, logprobs)


def _keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keep exactly ``top_k`` ids."""
    others = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, others, mx.array(-mx.inf), axis=-1)


def _draw(weights: mx.array, key: mx.array) -> mx.array:
    """Draw an index from unnormalised weights ``[V]``."""
    return mx.random.categorical(mx.log(weights), key=key).astype(mx.int32)
