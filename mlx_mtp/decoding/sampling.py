"""From logits to the distribution that a token is drawn from: processors, filters, temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from mlx_mtp.decoding.config import check_numbers, setting

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""mlx-lm's: ``(tokens [n], logits [1, V]) -> [1, V]``."""
Sampler = Callable[[mx.array], mx.array]
"""mlx-lm's: log-probabilities ``[1, V]`` to a token ``[1]``."""


_MAXIMA = {"top_p": 1, "min_p": 1, "xtc_probability": 1, "xtc_threshold": 0.5}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; names, defaults and the order of the filters are mlx-lm's.

    Attributes:
        temp: temperature, applied after the filters; 0 is greedy.
        top_p: keep the most likely tokens up to this probability (1 keeps all).
        min_p: drop tokens below this fraction of the most likely one's probability.
        top_k: keep that many tokens (0 keeps all).
        min_tokens_to_keep: tokens that ``min_p`` keeps in any case.
        xtc_probability: probability, for each token, that XTC drops the most likely tokens.
        xtc_threshold: XTC drops all tokens above this probability but the least likely of them.
        xtc_special_tokens: ids that XTC never drops; the text functions take None for a line break
            and the end tokens.
        repetition_penalty: divide the logits of recent tokens by this (multiply negative ones).
        repetition_context_size: how many tokens are recent.
        logit_bias: added to the logits, by token id.

    Raises:
        ValueError: a value is out of range.
    """

    temp: float = setting(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = setting(1.0, "Keep the most likely tokens up to this total probability.")
    min_p: float = setting(0.0, "Minimum probability relative to the most likely token.")
    top_k: int = setting(0, "Keep only the k most likely tokens; 0 keeps all.")
    min_tokens_to_keep: int = setting(1, "Minimum number of tokens that min-p keeps.")
    xtc_probability: float = setting(
        0.0, "Probability that XTC drops the most likely tokens, for each token."
    )
    xtc_threshold: float = setting(
        0.1, "Probability above which XTC drops tokens, except for the last of them."
    )
    xtc_special_tokens: tuple[int, ...] | None = setting(None, "Ids that XTC never drops.")
    repetition_penalty: float | None = setting(
        None, "Penalty for repeating recent tokens; 1 is none."
    )
    repetition_context_size: int = setting(
        20, "Number of recent tokens to which the penalty applies."
    )
    logit_bias: dict[int, float] | None = setting(
        None, "Bias to add to the logit of a token id; repeatable."
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if not isinstance(self.logit_bias, dict | None):
            raise ValueError(f"logit_bias must be a dict, got {self.logit_bias!r}")
        for name in ("temp", *_MAXIMA):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.temp < 0:
            raise ValueError(f"temp must be at least 0, got {self.temp}")
        for name, maximum in _MAXIMA.items():
            if not 0 <= getattr(self, name) <= maximum:
                raise ValueError(
                    f"{name} must be between 0 and {maximum}, got {getattr(self, name)}"
                )
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

    @property
    def distribution(self) -> Callable[[mx.array], mx.array] | None:
        """Turns logits ``[..., S]`` of a shortlist into probabilities; None when greedy.

        XTC's special ids index the vocabulary, so a shortlist has none: MLX does not check bounds.
        """
        if self.greedy:
            return None
        return partial(target_probs, sampling=replace(self, xtc_special_tokens=None))

    def logits_processors(self) -> list[LogitsProcessor]:
        """mlx-lm's processors for the penalty and the bias, in its order."""
        from mlx_lm.sample_utils import make_logits_processors

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
    parents: Sequence[int] | None = None,
) -> mx.array:
    """Apply logits processors to each verify row along the drafts before it.

    Args:
        logits: ``[d+1, V]``, row j follows ``context`` and the drafts up to draft j.
        context: every id up to and including the last pending one.
        drafts: the d draft ids.
        parents: the node that each draft follows, as in ``StepLayout``; None for a chain.
        processors: mlx-lm's, each ``(tokens [n], logits [1, V]) -> [1, V]``.

    Returns:
        ``[d+1, V]``.
    """
    if not processors:
        return logits
    paths: list[tuple[int, ...]] = [()]
    followed = range(len(drafts)) if parents is None else parents
    for token, parent in zip(drafts, followed, strict=True):
        paths.append((*paths[parent], token))
    before, rows = mx.array(list(context)), {}
    # Processors that follow the text step back as rarely as possible if branches are not mixed.
    for j in sorted(range(len(paths)), key=lambda j: paths[j]):
        path = mx.array(paths[j], before.dtype)
        tokens, row = mx.concatenate([before, path]), logits[j : j + 1]
        for processor in processors:
            row = processor(tokens, row)
        rows[j] = row
    return mx.concatenate([rows[j] for j in range(len(paths))])


def target_probs(logits: mx.array, sampling: Sampling) -> mx.array:
    """Distribution that plain sampling draws from, float32, ``[..., V]`` to ``[..., V]``.

    The filters see the log-probabilities at temperature 1 in mlx-lm's order (top-p, min-p, XTC,
    top-k); then the temperature is applied and the rest renormalised.  XTC, which mlx-lm applies
    after a toss for each token, makes it a mixture of two such distributions.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < sampling.top_p < 1:
        logprobs = _keep_top_p(logprobs, sampling.top_p)
    if sampling.min_p > 0:
        logprobs = _keep_min_p(logprobs, sampling.min_p, sampling.min_tokens_to_keep)
    share = sampling.xtc_probability
    probs = _probs(logprobs, sampling) if share < 1 else mx.zeros_like(logprobs)
    if share > 0:
        rest = _drop_top(logprobs, sampling.xtc_threshold, sampling.xtc_special_tokens or ())
        probs = (1 - share) * probs + share * _probs(rest, sampling)
    return probs


def _probs(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Apply top-k and the temperature, and renormalise."""
    if 0 < sampling.top_k < logprobs.shape[-1]:
        logprobs = _keep_top_k(logprobs, sampling.top_k)
    return mx.softmax(logprobs * (1 / sampling.temp), axis=-1, precise=True)


# mlx-lm's filters give the same, but are compiled anew for every new value, which takes seconds on
# a CPU.


def _keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep the most likely ids whose predecessors have less than ``top_p`` of the mass."""
    ordered = mx.sort(logprobs, axis=-1)[..., ::-1]
    mass = mx.cumsum(mx.exp(ordered), axis=-1)
    before = mass - mx.exp(ordered)
    kept = mx.where(before < top_p * mass[..., -1:], ordered, mx.inf)
    return mx.where(logprobs < kept.min(axis=-1, keepdims=True), -mx.inf, logprobs)


def _keep_min_p(logprobs: mx.array, min_p: float, min_kept: int) -> mx.array:
    """Keep ids with at least ``min_p`` of the best id's probability, and the best few anyway."""
    bound = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    if min_kept > 1:
        best = mx.topk(logprobs, min(min_kept, logprobs.shape[-1]), axis=-1)
        bound = mx.minimum(bound, best.min(axis=-1, keepdims=True))
    return mx.where(logprobs < bound, -mx.inf, logprobs)


def _keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keep exactly ``top_k`` ids."""
    others = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, others, mx.array(-mx.inf), axis=-1)


def _drop_top(logprobs: mx.array, threshold: float, special: Sequence[int]) -> mx.array:
    """Drop ids above a probability, but not the least likely of them or a special id (XTC)."""
    probs = mx.softmax(logprobs, axis=-1)
    least = mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)
    dropped = probs > least
    known = [token for token in special if 0 <= token < logprobs.shape[-1]]  # MLX does not check
    if known:
        dropped[..., known] = False
    return mx.where(dropped, -mx.inf, logprobs)
