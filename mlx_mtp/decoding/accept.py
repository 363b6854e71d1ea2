"""Which drafts are accepted: pure functions on device arrays, exact in distribution.

Greedy: a draft is accepted if it is the model's own argmax and all drafts before it are accepted.
Sampling: rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
A draft s drawn from ``draft_probs`` is accepted with probability min(1, target(s) / draft(s)); the
first rejected one is replaced by a draw from max(target - draft, 0), renormalised; if all are
accepted, one more token is drawn from the target.  The emitted tokens then follow ``target_probs``
exactly.
A sampler that is a function, as in mlx-lm: it draws a token for every row, and a draft is accepted
if it is the token drawn.  The emitted tokens are then the sampler's own.

Drafts that branch are chosen, not drawn, and are accepted in that last way whoever draws: at every
node a token is drawn from the target after that node, and the path follows the child that has it.
At each node of the path the emitted token is a draw from the target there, whatever the children
are, so the emitted tokens follow the target exactly.  (It is the multi-candidate rejection sampling
of SpecInfer, arXiv 2305.09781, for one-hot draft distributions: a candidate is accepted with the
probability that the target has for it, and the next one with its share of what is left.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.decoding.sampling import (
    LogitsProcessor,
    Sampler,
    Sampling,
    process_logits,
    target_probs,
)
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.model.layout import tree_ancestry

Accepted = tuple[mx.array, mx.array]
"""The token that follows each node of the drafts, ``[d+1]``, and the last accepted node, a scalar.

Those of node 0 and of the nodes on the path to the last accepted one are emitted.  In a chain these
are the first ``last_node + 1``, and ``last_node`` is the number of accepted drafts.
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the emitted tokens of an answer follow.

    Attributes:
        sampling: how tokens are drawn; greedy drafts are made where there is a ``sampler``.
        processors: applied to the logits first, those of ``sampling`` included.
        sampler: draws the tokens in place of ``sampling``.
    """

    sampling: Sampling = field(default_factory=Sampling)
    processors: tuple[LogitsProcessor, ...] = ()
    sampler: Sampler | None = None

    @classmethod
    def of(
        cls,
        sampling: Sampling | None,
        sampler: Sampler | None = None,
        processors: Sequence[LogitsProcessor] = (),
        *,
        seed: int | None = None,
    ) -> Target:
        """Make it from the arguments of ``decode``.

        Raises:
            ValueError: a sampler excludes ``sampling`` and ``seed``.
        """
        if sampler is not None and sampling is not None:
            raise ValueError("sampler and sampling exclude each other")
        if sampler is not None and seed is not None:
            raise ValueError("seed does not affect a sampler: call mx.random.seed instead")
        sampling = sampling or Sampling()
        return cls(
            sampling=sampling,
            processors=(*sampling.logits_processors(), *processors),
            sampler=sampler,
        )

    def process(
        self,
        logits: mx.array,
        *,
        context: Sequence[int],
        drafts: Drafts,
        parents: Sequence[int] | None = None,
    ) -> mx.array:
        """Apply the processors to the verify rows ``[d+1, V]`` along the drafts."""
        if not self.processors:
            return logits
        return process_logits(
            logits,
            context=context,
            drafts=drafts.ids(),
            parents=parents,
            processors=self.processors,
        )

    def accept(
        self,
        logits: mx.array,
        drafts: Drafts,
        *,
        key: mx.array,
        parents: Sequence[int] | None = None,
    ) -> Accepted:
        """Accept drafts by the processed logits ``[d+1, V]``; ``parents`` as in ``StepLayout``."""
        tree = () if parents is None else (parents,)
        if self.sampler is not None:
            return accept_drawn(logits, drafts.tokens, self.sampler, *tree)
        if self.sampling.greedy:
            return accept_greedy(logits, drafts.tokens, *tree)
        probs = target_probs(logits, self.sampling)
        if parents is not None:
            return last_accepted(_draw(probs, key), drafts.tokens, parents)
        return accept_sampled(probs, drafts.tokens, drafts.candidates, drafts.probs, key=key)


def accept_greedy(
    logits: mx.array, drafts: mx.array, parents: Sequence[int] | None = None
) -> Accepted:
    """Accept drafts that equal the model's own argmax.

    Args:
        logits: ``[d+1, V]``, processed.
        drafts: ``[d]``.
        parents: the node that each draft follows; None for a chain.
    """
    return last_accepted(mx.argmax(logits, axis=-1).astype(mx.int32), drafts, parents)


def accept_drawn(
    logits: mx.array,
    drafts: mx.array,
    sampler: Sampler,
    parents: Sequence[int] | None = None,
) -> Accepted:
    """Accept drafts that equal the tokens that a sampler draws.

    Args:
        logits: ``[d+1, V]``, processed.
        drafts: ``[d]``.
        sampler: called with the log-probabilities of one row after the other.
        parents: the node that each draft follows; None for a chain.
    """
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    rows = [sampler(logprobs[j : j + 1]).reshape(1) for j in range(logits.shape[0])]
    return last_accepted(mx.concatenate(rows).astype(mx.int32), drafts, parents)


def last_accepted(
    tokens: mx.array, drafts: mx.array, parents: Sequence[int] | None = None
) -> Accepted:
    """Accept the drafts on the longest path on which every draft is the token of its parent.

    Args:
        tokens: the token that follows each node, ``[d+1]``.
        drafts: ``[d]``.
        parents: the node that each draft follows; None for a chain.
    """
    if parents is None:
        return tokens, count_accepted(tokens[:-1] == drafts)
    is_wrong = tokens[mx.array(list(parents), mx.int32)] != drafts
    ancestry = tree_ancestry(parents)
    num_wrong = mx.where(mx.array(ancestry[:, 1:]), is_wrong, False).sum(axis=1)
    depths = mx.array(ancestry.sum(axis=1), mx.int32)  # of siblings with one token the first counts
    return tokens, mx.argmax(mx.where(num_wrong == 0, depths, 0)).astype(mx.int32)


def accept_sampled(
    probs: mx.array,
    drafts: mx.array,
    candidates: mx.array,
    draft_probs: mx.array,
    *,
    key: mx.array,
) -> Accepted:
    """Accept the drafts of a chain by rejection sampling.

    Args:
        probs: the target distributions, ``[d+1, V]``.
        drafts: ``[d]``, each drawn from its row of ``draft_probs``.
        candidates: ids that the draft distributions are over, distinct in a row, ``[d, S]``.
        draft_probs: ``[d, S]``; everything outside ``candidates`` has probability 0.
        key: random key.
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
    # If every draft is accepted, nothing is subtracted: the residual is the target itself.
    row = mx.minimum(num_accepted, num_drafts - 1)
    rejected = (num_accepted < num_drafts).astype(mx.float32)
    residual = probs[num_accepted].at[candidates[row]].add(-rejected * draft_probs[row])
    residual = mx.maximum(residual, 0)
    residual = mx.where(residual.sum() > 0, residual, probs[num_accepted])
    bonus = _draw(residual, bonus_key)
    padded = mx.concatenate([drafts.astype(mx.int32), bonus[None]])
    return mx.where(mx.arange(num_drafts + 1) == num_accepted, bonus, padded), num_accepted


def count_accepted(accepted: mx.array) -> mx.array:
    """Length of the leading run of True in ``[d]``; a match after a mismatch never counts."""
    return mx.cumprod(accepted.astype(mx.int32)).sum() if accepted.size else mx.array(0)


def _draw(weights: mx.array, key: mx.array) -> mx.array:
    """Draw an index from unnormalised weights ``[..., V]``."""
    return mx.random.categorical(mx.log(weights), key=key).astype(mx.int32)
