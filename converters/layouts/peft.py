"""The two PEFT layouts: mask tokens with a sampler head (pull request 3541), and only LoRA (Uno).

Both are folders written by ``save_pretrained`` of a PEFT model.  The first has trained rows for its
mask tokens, which PEFT saves as separate rows, as rows next to whole tables if the vocabulary was
enlarged, or inside such a table.  The second (arXiv 2609.04010) has neither mask tokens nor a
sampler head: its mask rows are random tokens of the base model's vocabulary, drawn in every step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_mtp.converters.layouts.common import (
    HEAD,
    BaseFacts,
    ConvertedAdapter,
    LayoutSummary,
    LowRankLayer,
    assemble,
    refuse,
)
from mlx_mtp.converters.layouts.low_rank import Pair, leaves, pair_up, ranks, resolve_layers
from mlx_mtp.converters.layouts.options import Options
from mlx_mtp.converters.layouts.peft_config import EMBEDDING, PeftSettings, read_settings
from mlx_mtp.converters.layouts.tables import (
    ask_for_masks,
    check_table,
    mask_rows,
    named_masks,
    noise_rows,
    random_rows,
)
from mlx_mtp.model.config import SamplerKind
from mlx_mtp.storage.contents import ADAPTER_CONFIG, PEFT_ROWS, PEFT_TABLE

if TYPE_CHECKING:
    from mlx_mtp.converters.checkpoint import Checkpoint

PREFIX = "base_model.model."
SAMPLER_LAYERS = {"0": "linear_1", "2": "norm_1", "3": "linear_2", "5": "norm_2"}

_LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_SAMPLER = re.compile(r"(?:.+\.)?sampler\.mlp\.([0235])\.(weight|bias)")
# Why a tensor is refused, by a part of its name.
_REASONS = {
    "lora_magnitude_vector": "belongs to DoRA, which is not supported",
    "lora_embedding_": "contains low-rank weights of an embedding, which are not supported",
    ".bias": "is a trained bias, which is not supported",
}
_UNKNOWN_K = (
    "an ordinary fine-tune looks the same, so the number of drafts cannot be detected; for an "
    "adapter of Uno add --checkpoint-option num_draft_tokens=7 (its block of 8 tokens less the "
    "sure one; up to 15 for blocks of 16)"
)
_RECURRENT = re.compile(r"sampler\.(?:rnn|mlp_pre|mlp_post)\.")


@dataclass(kw_only=True)
class PeftTensors:
    """The tensors of a checkpoint by kind, with their names for messages."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    rows: dict[str, tuple[str, mx.array]] = field(default_factory=dict)
    tables: dict[str, mx.array] = field(default_factory=dict)
    sampler: dict[str, mx.array] = field(default_factory=dict)

    @property
    def embeddings(self) -> list[tuple[str, mx.array]]:
        """Embedding tables that training may have changed; PEFT may write one under two names."""
        return [
            (name, table)
            for name, table in self.tables.items()
            if (match := PEFT_TABLE.fullmatch(name)) and match.groups() == (EMBEDDING, None)
        ]


def convert_peft_mtp(checkpoint: Checkpoint, base: BaseFacts, options: Options) -> ConvertedAdapter:
    """Convert the layout of PEFT pull request 3541."""
    settings, tensors = _read(checkpoint)
    masks, notes = _masks(settings, tensors, base, options, checkpoint.added_tokens)
    return assemble(
        _layers(settings, tensors, base),
        layout="peft-mtp",
        masks=masks,
        sampler=SamplerKind() if tensors.sampler else None,
        sampler_tensors=tensors.sampler,
        base_model=settings.base_model,
        notes=notes,
        default=(settings.rank, settings.scale(settings.rank, settings.alpha)),
    )


def convert_peft_lora(
    checkpoint: Checkpoint, base: BaseFacts, options: Options
) -> ConvertedAdapter:
    """Convert LoRA without mask tokens and without a sampler head."""
    settings, tensors = _read(checkpoint)
    if tensors.sampler or tensors.rows or settings.trained:
        raise ValueError("layout peft-lora has neither mask tokens nor a sampler head")
    if options.mask_token_ids is None:
        masks, notes = noise_rows(base, options, block_size=settings.block_size, why=_UNKNOWN_K)
    elif options.noise_ids is None:
        masks, note = random_rows(base, options, why=_UNKNOWN_K)
        notes = [note]
    else:
        raise ValueError("layout options noise_ids and mask_token_ids exclude each other")
    for name, table in tensors.tables.items():
        notes += check_table(name, table, base, mask_ids=())
    return assemble(
        _layers(settings, tensors, base),
        layout="peft-lora",
        masks=masks,
        sampler=None,
        sampler_tensors={},
        base_model=settings.base_model,
        notes=notes,
        default=(settings.rank, settings.scale(settings.rank, settings.alpha)),
    )


def describe_peft_mtp(checkpoint: Checkpoint) -> LayoutSummary:
    """Describe the layout of PEFT pull request 3541."""
    return _describe(checkpoint, "peft-mtp")


def describe_peft_lora(checkpoint: Checkpoint) -> LayoutSummary:
    """Describe LoRA without mask tokens and without a sampler head."""
    return _describe(checkpoint, "peft-lora")


def _describe(checkpoint: Checkpoint, layout: str) -> LayoutSummary:
    config = checkpoint.configs.get(ADAPTER_CONFIG, {})
    settings, problems = read_settings(config)
    tensors, unknown = sort_tensors(checkpoint.tensors)
    problems += unknown + _rank_problems(settings, tensors)
    ids = settings.order
    try:
        ids = _order(settings, tensors, named_masks(checkpoint.added_tokens))
    except ValueError as error:
        problems.append(str(error))
    sampler = "mlp, LayerNorm, residual hidden" if tensors.sampler else None
    if any(_RECURRENT.search(name) for name in checkpoint.tensors):
        sampler = "recurrent"
    return LayoutSummary(
        layout=layout,
        base_model=settings.base_model,
        num_draft_tokens=len(ids) if ids else None,
        rank=settings.rank,
        scale=settings.scale(settings.rank, settings.alpha),
        targets=leaves(tensors.pairs),
        sampler=sampler,
        problems=tuple(problems),
    )


def _read(checkpoint: Checkpoint) -> tuple[PeftSettings, PeftTensors]:
    if ADAPTER_CONFIG not in checkpoint.configs:
        raise ValueError(f"{ADAPTER_CONFIG} is missing")
    settings, problems = read_settings(checkpoint.configs[ADAPTER_CONFIG])
    tensors, unknown = sort_tensors(checkpoint.tensors)
    refuse(problems + unknown + _rank_problems(settings, tensors))
    return settings, tensors


def sort_tensors(tensors: Mapping[str, mx.array]) -> tuple[PeftTensors, list[str]]:
    """Sort tensors by kind; also return problems, with every unknown tensor by name."""
    groups, halves, problems = PeftTensors(), [], []
    for name, tensor in sorted(tensors.items()):  # so that messages always name the same tensor
        if match := _LORA.fullmatch(name):
            halves.append((match[1].removeprefix(PREFIX), match[2], name, tensor))
        elif match := PEFT_ROWS.fullmatch(name):
            _put(groups.rows, match[1], name, tensor, problems)
        elif PEFT_TABLE.fullmatch(name):
            groups.tables[name] = tensor
        elif match := _SAMPLER.fullmatch(name):
            groups.sampler[f"{SAMPLER_LAYERS[match[1]]}.{match[2]}"] = tensor
        elif _RECURRENT.search(name):
            problems.append(
                f"the recurrent sampler ({name}) is not supported, only the one without "
                "recurrence, sampler.mlp"
            )
        else:
            reason = next((why for part, why in _REASONS.items() if part in name), "is unknown")
            problems.append(f"tensor {name} {reason}")
    groups.pairs, pair_problems = pair_up(halves)
    return groups, problems + pair_problems + _sampler_problems(groups.sampler)


def _put(
    group: dict[str, tuple[str, mx.array]],
    key: str,
    name: str,
    tensor: mx.array,
    problems: list[str],
) -> None:
    if key in group:
        problems.append(f"{group[key][0]} and {name} are both {key}")
    group[key] = (name, tensor)


def _sampler_problems(sampler: Mapping[str, mx.array]) -> list[str]:
    names = [f"{name}.{leaf}" for name in SAMPLER_LAYERS.values() for leaf in ("weight", "bias")]
    missing = [name for name in names if name not in sampler]
    return [f"the sampler lacks {', '.join(missing)}"] if sampler and missing else []


def _rank_problems(settings: PeftSettings, tensors: PeftTensors) -> list[str]:
    layer_ranks, problems = ranks(tensors.pairs)
    for layer, rank in layer_ranks.items():
        if rank != settings.rank_of(layer):
            problems.append(f"{layer} has rank {rank}, but {ADAPTER_CONFIG} says "
                            f"{settings.rank_of(layer)}")  # fmt: skip
    return problems


def _layers(settings: PeftSettings, tensors: PeftTensors, base: BaseFacts) -> list[LowRankLayer]:
    paths = resolve_layers(tensors.pairs, base)
    return [
        LowRankLayer(
            path=paths[layer],
            lora_a=pair.a.T,
            lora_b=pair.b.T,
            scale=settings.scale_of(layer),
        )
        for layer, pair in tensors.pairs.items()
    ]


def _masks(
    settings: PeftSettings,
    tensors: PeftTensors,
    base: BaseFacts,
    options: Options,
    added: Mapping[str, int],
) -> tuple[mx.array, list[str]]:
    """Return mask embeddings ``[k, D]`` in drafting order, and notes."""
    named = named_masks(added) or base.named_masks
    order, notes = options.mask_token_ids or _order(settings, tensors, named), []
    tables = tensors.embeddings
    if order is None:
        if not tables:
            raise ValueError("neither trainable_token_indices nor alora_invocation_tokens is set")
        order, note = mask_rows(*tables[0], base, options, added)
        notes.append(note)
    if EMBEDDING in tensors.rows:
        masks = _trained_rows(settings, tensors, order)
    elif tables and settings.trained is None:
        masks = _rows_of(tables, order)
    else:
        raise ValueError(f"no tensor ends in {EMBEDDING}.token_adapter.trainable_tokens_delta")
    if settings.head_saved and HEAD in base.linears and base.unembed is None:
        raise ValueError("modules_to_save lm_head: the unembedding may have been trained")
    for name, table in tensors.tables.items():
        notes += check_table(name, table, base, mask_ids=order)
    return masks, notes


def _order(
    settings: PeftSettings, tensors: PeftTensors, named: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the mask tokens that the settings name, None if they name none.

    Raises:
        ValueError: tokens were trained, but nothing says that they are mask tokens.
    """
    if settings.order is not None or settings.trained is None:
        return settings.order
    if set(named) == set(settings.trained):
        return named
    if tensors.sampler:  # only a checkpoint for drafts has a sampler
        return settings.trained
    found = f"the trainable_token_indices {list(settings.trained)}"
    raise ValueError(ask_for_masks(found, settings.trained))


def _trained_rows(settings: PeftSettings, tensors: PeftTensors, order: tuple[int, ...]) -> mx.array:
    """Return the trained rows in drafting order.  PEFT calls them a delta but stores the rows."""
    name, rows = tensors.rows[EMBEDDING]
    if settings.trained is None:
        raise ValueError(
            f"{name}: trainable_token_indices is missing, so the tokens of these rows are unknown"
        )
    if sorted(order) != sorted(settings.trained):
        raise ValueError(
            f"mask tokens {list(order)} and trainable_token_indices {list(settings.trained)} "
            "must be the same tokens"
        )
    if rows.ndim != 2 or rows.shape[0] != len(order):
        raise ValueError(f"{name} must have {len(order)} rows, its shape is {tuple(rows.shape)}")
    if HEAD in tensors.rows:
        head_name, head_rows = tensors.rows[HEAD]
        if head_rows.shape != rows.shape or not mx.array_equal(head_rows, rows).item():
            raise ValueError(f"{head_name} differs from {name}: trained unembedding rows are "
                             "not supported")  # fmt: skip
    return rows[mx.array([settings.trained.index(token) for token in order])]


def _rows_of(tables: Sequence[tuple[str, mx.array]], order: tuple[int, ...]) -> mx.array:
    """Return rows of a table; if there are several tables, their rows must be equal."""
    rows = []
    for name, table in tables:
        if table.ndim != 2 or max(order) >= table.shape[0]:
            shape = tuple(table.shape)
            raise ValueError(f"{name} has shape {shape}: no row for token {max(order)}")
        rows.append(table[mx.array(order)])
        if not mx.array_equal(rows[0], rows[-1]).item():
            raise ValueError(f"the mask tokens' rows of {tables[0][0]} and {name} differ")
    return rows[0]
