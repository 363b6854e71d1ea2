"""Which drafters a model's folder has, and what each of the others would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_mtp.model.native.names import family_of, num_modules
from mlx_mtp.model.native.stored import StoredModules, find_native, precision
from mlx_mtp.planning.plan import DRAFT_MODEL, HEADS, LOOKUP, MASK, NATIVE


@dataclass(frozen=True, kw_only=True)
class DrafterFacts:
    """One kind of drafter.

    Attributes:
        source: its name, as in plans and statistics.
        is_available: whether the folder has what it needs.
        detail: what there is, or what it would need.
        facts: numbers about it.
    """

    source: str
    is_available: bool
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)


def describe_drafters(
    folder: Path, config: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> tuple[DrafterFacts, ...]:
    """Describe the drafters of a model; no tensor is read.

    Args:
        folder: the model's folder.
        config: its ``config.json``.
        adapter: facts about the adapter in it, if there is one.

    Raises:
        ValueError: a file of native modules is broken; one line that names it.
    """
    k = None if adapter is None else adapter.get("k")
    has_heads = adapter is not None and "head" in adapter
    mask = "needs an adapter: mlx-mtp train makes one"
    heads = "needs heads: mlx-mtp train --drafter heads makes some"
    if adapter is not None:
        mask, heads = (mask, f"adapter, k {k}") if has_heads else (f"adapter, k {k}", heads)
    return (
        DrafterFacts(source=MASK, is_available=adapter is not None and not has_heads, detail=mask),
        describe_native(find_native(folder, config), config),
        DrafterFacts(source=HEADS, is_available=has_heads, detail=heads),
        DrafterFacts(
            source=DRAFT_MODEL,
            is_available=False,
            detail="needs a small model with the same tokenizer: --draft-model FOLDER",
        ),
        DrafterFacts(source=LOOKUP, is_available=True, detail="always"),
    )


def describe_native(found: StoredModules | None, config: Mapping[str, Any]) -> DrafterFacts:
    """Describe the native modules of a folder, or why it has none."""
    announced = num_modules(config)
    if found is None:
        detail = "the model was published without native MTP modules, as far as config.json says"
        if announced > 0:
            detail = f"config.json announces {_count(announced)}, which this conversion has dropped"
            if family_of(config) is not None:
                detail += ": mlx-mtp convert --hf-path ORIGINAL keeps the original's"
        return DrafterFacts(source=NATIVE, is_available=False, detail=detail)
    count, size = len(found.indices), f"{found.num_bytes / 1e6:.1f} MB"
    if found.missing:
        files = ", ".join(sorted(set(found.missing.values())))
        detail = f"{len(found.missing)} of their tensors are missing from {files}"
    elif not found.is_supported:
        detail = f"{len(found.files)} tensors, {size}, of a family that is not supported"
    else:
        kind, names = precision(found, config), sorted({p.name for p in found.files.values()})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return DrafterFacts(
            source=NATIVE,
            is_available=True,
            detail=f"{_count(count)}, {kind}, {size}, in {names[0]}{more}",
            facts={"num_modules": count, "precision": kind, "num_bytes": found.num_bytes},
        )
    return DrafterFacts(source=NATIVE, is_available=False, detail=detail)


def _count(number: int) -> str:
    return f"{number} module{'' if number == 1 else 's'}"
