"""Which drafters an answer has: those that its model has the means for, or the one chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_mtp.drafting.chain import ChainDrafter
from mlx_mtp.drafting.draft_model import DraftModelDrafter
from mlx_mtp.drafting.drafter import Distribution, Drafter
from mlx_mtp.drafting.heads import HeadsDrafter
from mlx_mtp.drafting.lookup import LookupDrafter, text_of
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.drafting.mask_trees import MaskTreeDrafter
from mlx_mtp.drafting.native import NativeDrafter
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.plan import (
    AUTO,
    CHAIN,
    DRAFT_MODEL,
    HEADS,
    LOOKUP,
    MASK,
    NATIVE,
    SOURCES,
    TREE,
)

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
        num_prompt: number of ids of the prompt, which are not in the cache yet.
        lookup_ids: texts apart from these that drafts are looked up in.
        cache: the caches.
        distribution: turns logits into the probabilities that drafts are drawn from; None drafts
            the most likely tokens.
        speculation: what is known about drafts in general.
        trees: whether mask tokens should draft trees.
        max_drafts: maximum drafts per step; None leaves it to the drafter.
        draft_model: the draft model, if there is one.
        num_before: ids in the cache before ``ids``, which are not known.
        prefill_step_size: prompt rows per forward.
    """

    model: MTPModel
    ids: Sequence[int]
    num_prompt: int
    cache: MTPCache
    distribution: Distribution | None
    speculation: Speculation
    trees: bool = False
    max_drafts: int | None = None
    lookup_ids: Sequence[Sequence[int]] = ()
    draft_model: MTPModel | None = None
    num_before: int = 0
    prefill_step_size: int = 2048


def _mask(answer: Answer) -> Drafter:
    model, distribution, ids = answer.model, answer.distribution, answer.ids
    if answer.trees:
        return MaskTreeDrafter(model, distribution, answer.speculation, ids)
    return MaskTokenDrafter(model, distribution, ids)


def _lookup(answer: Answer) -> Drafter:
    text = text_of(
        answer.cache, answer.ids, num_prompt=answer.num_prompt, sources=answer.lookup_ids
    )
    return LookupDrafter(text, answer.speculation.lookup)


def _native(answer: Answer) -> Drafter:
    return NativeDrafter(
        answer.model, answer.cache, answer.distribution, max_drafts=answer.max_drafts
    )


def _heads(answer: Answer) -> Drafter:
    return HeadsDrafter(
        answer.model, answer.cache, answer.distribution, max_drafts=answer.max_drafts
    )


def _draft_model(answer: Answer) -> Drafter:
    assert answer.draft_model is not None
    return DraftModelDrafter(
        answer.draft_model,
        answer.model,
        answer.ids,
        answer.distribution,
        memory=answer.cache.drafter_memory,
        num_before=answer.num_before,
        max_drafts=answer.max_drafts,
        prefill_step_size=answer.prefill_step_size,
    )


_MAKERS: dict[str, Callable[[Answer], Drafter]] = {
    MASK: _mask,
    NATIVE: _native,
    HEADS: _heads,
    DRAFT_MODEL: _draft_model,
    LOOKUP: _lookup,
}


def available_sources(model: MTPModel, draft_model: MTPModel | None = None) -> tuple[str, ...]:
    """The drafters that a model has the means for, in the order of ``SOURCES``.

    Args:
        model: the model.
        draft_model: the draft model of an answer, if it is not the model's own.
    """
    has = {
        MASK: model.num_draft_tokens > 0,
        NATIVE: model.native is not None,
        HEADS: model.heads is not None,
        DRAFT_MODEL: draft_model is not None or model.draft_model is not None,
        LOOKUP: True,
    }
    return tuple(source for source in SOURCES if has.get(source))


def answer_sources(
    model: MTPModel,
    *,
    drafter: str,
    layout: str,
    lookup: bool,
    max_drafts: int | None,
    draft_model: MTPModel | None = None,
) -> tuple[str, ...]:
    """The drafters of an answer.

    Args:
        model: the model.
        drafter: one of ``DRAFTERS``.
        layout: one of ``LAYOUTS``; a fixed one has one drafter, and ``"tree"`` lookup too.
        lookup: whether lookup is among several drafters.
        max_drafts: maximum drafts per step; 0 has no drafters.
        draft_model: the draft model, if there is one.

    Raises:
        ValueError: the model lacks what the drafter needs.
    """
    available = available_sources(model, draft_model)
    if drafter not in (AUTO, *available):
        raise ValueError(f"drafter is {drafter}, but {model.name} {_MISSING[drafter]}")
    if layout == "plain" or max_drafts == 0:
        return ()
    if drafter != AUTO:
        return (drafter,)
    others = tuple(source for source in available if source != LOOKUP)
    if layout not in ("auto", TREE):
        return others[:1]
    if layout == TREE:
        others = others[:1]
    return (*others, LOOKUP) if lookup else others


def make_drafters(sources: Sequence[str], answer: Answer) -> list[Drafter]:
    """Make the drafters of an answer by their names, and a chain of those that can follow."""
    drafters = {source: _MAKERS[source](answer) for source in sources}
    masks, lookup = drafters.get(MASK), drafters.get(LOOKUP)
    if isinstance(masks, MaskTreeDrafter) and isinstance(lookup, LookupDrafter):
        masks.lookup = lookup
    if isinstance(masks, MaskTokenDrafter) and isinstance(lookup, LookupDrafter):
        drafters[CHAIN] = ChainDrafter(masks, lookup)
    return list(drafters.values())
