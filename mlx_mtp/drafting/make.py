"""Which drafters an answer has: those that its model has the means for, or the one chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_mtp.drafting.drafter import Distribution, Drafter
from mlx_mtp.drafting.heads import HeadsDrafter
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.drafting.native import NativeDrafter
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.plan import AUTO, DRAFT_MODEL, HEADS, LOOKUP, MASK, NATIVE, SOURCES

_MISSING = {
    MASK: "has no adapter with mask tokens",
    NATIVE: "has no MTP modules of its own",
    HEADS: "has no adapter with heads",
    DRAFT_MODEL: "has no draft model (draft_model, --draft-model)",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What drafters need to know of an answer.

    Attributes:
        model: the model.
        ids: ids in the cache, as far as they are known, and the prompt.
        cache: the caches.
        distribution: turns logits into the probabilities that drafts are drawn from; None drafts
            the most likely tokens.
        speculation: what is known about drafts in general.
        max_drafts: maximum drafts per step; None leaves it to the drafter.
    """

    model: MTPModel
    ids: Sequence[int]
    cache: MTPCache
    distribution: Distribution | None
    speculation: Speculation
    max_drafts: int | None = None


def _mask(answer: Answer) -> Drafter:
    return MaskTokenDrafter(answer.model, answer.distribution)


def _lookup(answer: Answer) -> Drafter:
    return LookupDrafter(answer.ids, answer.speculation.lookup)


def _native(answer: Answer) -> Drafter:
    return NativeDrafter(
        answer.model, answer.cache, answer.distribution, max_drafts=answer.max_drafts
    )


def _heads(answer: Answer) -> Drafter:
    return HeadsDrafter(
        answer.model, answer.cache, answer.distribution, max_drafts=answer.max_drafts
    )


_MAKERS: dict[str, Callable[[Answer], Drafter]] = {
    MASK: _mask,
    NATIVE: _native,
    HEADS: _heads,
    LOOKUP: _lookup,
}


def available_sources(model: MTPModel) -> tuple[str, ...]:
    """The drafters that a model has the means for, in the order of ``SOURCES``."""
    has = {
        MASK: model.num_draft_tokens > 0,
        NATIVE: model.native is not None,
        HEADS: model.heads is not None,
        LOOKUP: True,
    }
    return tuple(source for source in SOURCES if has.get(source))


def answer_sources(
    model: MTPModel, *, drafter: str, layout: str, lookup: bool, max_drafts: int | None
) -> tuple[str, ...]:
    """The drafters of an answer.

    Args:
        model: the model.
        drafter: one of ``DRAFTERS``.
        layout: one of ``LAYOUTS``; with a fixed one there is one drafter.
        lookup: whether ``"auto"`` includes lookup.
        max_drafts: maximum drafts per step; 0 has no drafters.

    Raises:
        ValueError: the model lacks what the drafter needs.
    """
    available = available_sources(model)
    if drafter not in (AUTO, *available):
        raise ValueError(f"drafter is {drafter}, but {model.name} {_MISSING[drafter]}")
    if layout == "plain" or max_drafts == 0:
        return ()
    if drafter != AUTO:
        return (drafter,)
    if layout != "auto":
        return tuple(source for source in available if source != LOOKUP)[:1]
    return tuple(source for source in available if lookup or source != LOOKUP)


def make_drafters(sources: Sequence[str], answer: Answer) -> list[Drafter]:
    """Make the drafters of an answer by their names."""
    return [_MAKERS[source](answer) for source in sources]
