"""Adapters for the PyTorch model of a verification, from the tensors of the original checkpoint.

PEFT loads PEFT checkpoints.  MTP-GLoRA's layers are hooked on under their own names, fused ones
whole, so that a mistake in ``converters.layouts`` shows up as a difference.  For other checkpoints
names and shapes are all that there is: they are read by the same rules as in the conversion, which
proves what was written and computed, but not the rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.converters.base.facts import DEFAULT_NORM_EPS, tokenizer_facts
from mlx_mtp.converters.checkpoint import Checkpoint, read_checkpoint
from mlx_mtp.converters.layouts import BaseFacts, convert_layout, recognise
from mlx_mtp.converters.layouts.tables import named_masks
from mlx_mtp.model.config import SamplerKind
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS
from mlx_mtp.storage.contents import PEFT_TABLE

if TYPE_CHECKING:
    import torch

INSTALL = 'pip install "mlx-mtp[convert]"'
PEFT_PREFIX = "base_model.model."
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Sampler = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


class Gate:
    """Index of the first mask row of the forward in progress."""

    def __init__(self) -> None:
        self.split = 0

    def choose(self, plain: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        """Return ordinary rows from ``plain`` and mask rows from ``adapted``, ``[1, L, out]``."""
        import torch

        rows = torch.arange(plain.shape[-2]) >= self.split
        return torch.where(rows[:, None], adapted, plain)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a checkpoint adds to the base model, except for the gated layers inside it.

    Attributes:
        mask_rows: embeddings of the mask rows ``[k, D]``.
        sampler: maps embeddings of previous tokens and hidden states, ``[k, D]`` each.
        mask_ids: ids of mask tokens, which do not occur in text.
    """

    mask_rows: torch.Tensor
    sampler: Sampler | None = None
    mask_ids: tuple[int, ...] = ()


def attach(
    model: Any,
    path: Path,
    *,
    base: Path,
    gate: Gate,
    scratch: Path,
    layout: str | None,
    options: Mapping[str, str],
    allow_pickle: bool,
) -> Adapter:
    """Add the gated layers of a checkpoint to a model; see ``model.load_reference``.

    Raises:
        ValueError: the checkpoint lacks something or does not fit the model.
    """
    checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
    layout = recognise(checkpoint, layout=layout)
    if layout.startswith("peft"):
        folder = scratch / "peft"
        ids = _peft_mask_ids(checkpoint, base, options)
        has_masks = layout == "peft-mtp"
        return _attach_peft(model, checkpoint, folder, gate, ids, has_masks)
    if layout == "mtp-glora":
        return _attach_glora(model, checkpoint, gate=gate, base=base, options=options)
    facts = _base_facts(model, base)
    return _attach_converted(model, checkpoint, facts, gate=gate, layout=layout, options=options)


def add_low_rank(
    layer: Any, a: torch.Tensor, b: torch.Tensor, *, scale: float, gate: Gate, columns: slice
) -> None:
    """Add ``columns`` of ``scale * B A x`` to a linear layer's mask rows.

    Args:
        layer: the linear layer.
        a: A ``[r, in]``.
        b: B ``[out, r]``.
        scale: factor of the product.
        gate: selects the mask rows.
        columns: the layer's part of a fused product.
    """

    def hook(module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        del module
        low_rank = (args[0] @ a.T) @ b.T
        return gate.choose(y, y + scale * low_rank[..., columns])

    layer.register_forward_hook(hook)


def _as_torch(array: mx.array) -> torch.Tensor:
    """Copy an array into a float32 tensor."""
    import torch

    return torch.from_numpy(np.array(array.astype(mx.float32)))


def _as_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.detach().numpy())


def _parse_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


# --- PEFT ----------------------------------------------------------------------------------------


def _attach_peft(
    model: Any,
    checkpoint: Checkpoint,
    folder: Path,
    gate: Gate,
    ids: list[int],
    has_masks: bool,
) -> Adapter:
    """Let PEFT load its adapter as ordinary LoRA, then gate every layer."""
    import torch

    try:
        from peft import PeftModel
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        raise ValueError(f"verifying a PEFT checkpoint needs peft: {INSTALL}") from None

    config = checkpoint.configs["adapter_config.json"]
    tensors = {
        PEFT_PREFIX + name.removeprefix(PEFT_PREFIX): value
        for name, value in checkpoint.tensors.items()
        if ".lora_" in name or "embed_tokens" in name or "lm_head" in name
    }
    tables = [name for name in tensors if PEFT_TABLE.fullmatch(name)]
    num_rows = max([max(ids, default=0) + 1, *(tensors[name].shape[0] for name in tables)])
    if num_rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    if not ids:
        raise ValueError("the checkpoint has no mask tokens: set layout option mask_token_ids")
    for name in tables:
        tensors[name] = _with_base_rows(model, name, tensors[name], ids)
    folder.mkdir()
    # PEFT's own gate goes by token ids, of which a forward on embeddings has none.
    plain = {**config, "alora_invocation_tokens": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})

    def hook(module: Any, args: tuple[Any, ...], y: Any) -> Any:
        return gate.choose(module.base_layer(*args), y)

    with torch.no_grad():
        for module in list(PeftModel.from_pretrained(model, str(folder)).modules()):
            if isinstance(module, LoraLayer):
                module.register_forward_hook(hook)  # type: ignore[union-attr]
        mask_rows = model.get_input_embeddings()(torch.tensor(ids))
    return Adapter(
        mask_rows=mask_rows,
        sampler=_peft_sampler(checkpoint),
        mask_ids=tuple(ids) if has_masks else (),
    )


def _peft_mask_ids(checkpoint: Checkpoint, base: Path, options: Mapping[str, str]) -> list[int]:
    """Ids of the mask tokens in drafting order; empty if the checkpoint has no mask tokens."""
    if "mask_token_ids" in options:
        return _parse_ids(options["mask_token_ids"])
    config = checkpoint.configs["adapter_config.json"]
    if config.get("alora_invocation_tokens"):
        return list(config["alora_invocation_tokens"])
    trained = config.get("trainable_token_indices")
    if isinstance(trained, Mapping):
        trained = next(iter(trained.values()))
    named = named_masks(checkpoint.added_tokens) or tokenizer_facts(base).get("named_masks", ())
    if any("embed_tokens" in name for name in checkpoint.tensors):
        return list(named if named and set(named) == set(trained or named) else trained or [])
    return list(trained or [])


def _with_base_rows(model: Any, name: str, table: mx.array, ids: Sequence[int]) -> mx.array:
    """Return a saved table with the model's own rows, of which it may have lost or rounded some."""
    is_head = "lm_head" in name
    own = model.get_output_embeddings() if is_head else model.get_input_embeddings()
    merged = _as_mlx(own.weight)
    if ids := [token for token in ids if token < table.shape[0]]:
        rows = mx.array(ids)
        merged[rows] = table[rows].astype(mx.float32)
    return merged


def _peft_sampler(checkpoint: Checkpoint) -> Sampler | None:
    """Build ``z + mlp([E; z])`` from the tensors ``sampler.mlp.*``."""
    import torch
    from torch import nn

    prefix = "sampler.mlp."
    tensors = checkpoint.tensors.items()
    state = {k.removeprefix(prefix): _as_torch(v) for k, v in tensors if k.startswith(prefix)}
    if not state:
        return None
    width = state["3.weight"].shape[0]
    mlp = nn.Sequential(
        nn.Linear(2 * width, width), nn.SiLU(), nn.LayerNorm(width),
        nn.Linear(width, width), nn.SiLU(), nn.LayerNorm(width),
    )  # fmt: skip
    mlp.load_state_dict(state)
    return lambda previous, hidden: hidden + mlp(torch.cat([previous, hidden], dim=-1))


# --- MTP-GLoRA -----------------------------------------------------------------------------------


def _attach_glora(
    model: Any, checkpoint: Checkpoint, *, gate: Gate, base: Path, options: Mapping[str, str]
) -> Adapter:
    """Hook MTP-GLoRA's layers on, fused ones on each of their parts."""
    arguments = checkpoint.configs.get("config.json", {})
    tensors = {name.removeprefix("module."): v for name, v in checkpoint.tensors.items()}
    alpha = float(_argument(arguments, "lora_alpha", options, "alpha"))
    rank = int(_argument(arguments, "lora_rank", options, "rank"))
    k = int(_argument(arguments, "draft_length", options, "num_draft_tokens"))
    for name, a in tensors.items():
        if match := re.fullmatch(r"model\.(.+)\.lora_A\.weight", name):
            wide = a.shape[0]
            root = math.sqrt(wide) if arguments.get("lora_use_rslora") else wide
            scale = alpha * (wide / rank) / root  # a fused layer has a multiple of rank and alpha
            b = _as_torch(tensors[f"model.{match[1]}.lora_B.weight"])
            _hook_parts(model, match[1], _as_torch(a), b, scale=scale, gate=gate)
    eps = float(options.get("norm_eps", model.config.rms_norm_eps))
    return Adapter(
        mask_rows=_glora_rows(model, tensors, (_glora_mask_ids(base, options) * k)[:k]),
        sampler=_glora_sampler(tensors, eps=eps),
    )


def _argument(
    arguments: Mapping[str, Any], key: str, options: Mapping[str, str], option: str
) -> Any:
    """Return a training argument, or the layout option that replaces it."""
    if arguments.get(key) is None and option not in options:
        raise ValueError(f"config.json has no {key}: set layout option {option}")
    return options[option] if arguments.get(key) is None else arguments[key]


def _hook_parts(
    model: Any, path: str, a: torch.Tensor, b: torch.Tensor, *, scale: float, gate: Gate
) -> None:
    modules = dict(model.named_modules())
    parent, _, leaf = path.rpartition(".")
    parts = (leaf,) if path in modules else FUSED.get(leaf, (leaf,))
    start = 0
    for part in parts:
        layer = modules.get(f"{parent}.{part}")
        if layer is None:
            raise ValueError(f"the base model has no {parent}.{part}, which {path} adapts")
        columns = slice(start, start + layer.out_features)
        add_low_rank(layer, a, b, scale=scale, gate=gate, columns=columns)
        start = columns.stop
    if start != b.shape[0]:
        raise ValueError(f"{path}.lora_B has {b.shape[0]} rows, the base model's layers {start}")


def _glora_mask_ids(base: Path, options: Mapping[str, str]) -> list[int]:
    """Return the id of the one mask token: from the options, the tokenizer, or the next new one."""
    from transformers import AutoTokenizer

    if "mask_token_ids" in options:
        return _parse_ids(options["mask_token_ids"])
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return [tokenizer.get_vocab().get("<mask>", len(tokenizer))]


def _glora_rows(model: Any, tensors: Mapping[str, mx.array], ids: list[int]) -> torch.Tensor:
    import torch

    table = model.get_input_embeddings().weight.detach()
    saved = [value for name, value in tensors.items() if name.endswith("embed_tokens.weight")]
    if saved and max(ids) < saved[0].shape[0]:
        return _as_torch(saved[0][mx.array(ids)])
    if max(ids) >= table.shape[0]:
        raise ValueError(f"mask token {max(ids)} has no row in the base model's embedding")
    return table[torch.tensor(ids)]


def _glora_sampler(tensors: Mapping[str, mx.array], *, eps: float) -> Sampler | None:
    """Build two blocks of RMSNorm(SiLU(Linear)), the output of the first added to the second."""
    prefix = "sampler_head.layers."
    if not any(name.startswith(prefix) for name in tensors):
        return None
    state = {}
    for index in (0, 1):
        for part in ("linear", "norm"):
            weight = tensors[f"{prefix}{index}.{part}.weight"]
            state[f"sampler_head.{part}_{index + 1}.weight"] = _as_torch(weight)
    return _sampler(state, SamplerKind(norm="rms", norm_eps=eps, bias=False, residual="inner"))


# --- other checkpoints ---------------------------------------------------------------------------


def _attach_converted(
    model: Any,
    checkpoint: Checkpoint,
    facts: BaseFacts,
    *,
    gate: Gate,
    layout: str,
    options: Mapping[str, str],
) -> Adapter:
    """Hook on what the conversion's own rules read from the checkpoint."""
    converted = convert_layout(checkpoint, facts, layout=layout, options=options)
    tensors = {name: _as_torch(value) for name, value in converted.tensors.items()}
    for path in facts.linears:
        if f"{path}.lora_a" in tensors:
            a, b = tensors[f"{path}.lora_a"].T, tensors[f"{path}.lora_b"].T
            scale = converted.scale_pattern.get(path, converted.scale)
            layer = model.get_submodule(path)
            add_low_rank(layer, a, b, scale=scale, gate=gate, columns=slice(None))
    sampler = None if converted.sampler is None else _sampler(tensors, converted.sampler)
    return Adapter(mask_rows=tensors[MASK_EMBEDDINGS], sampler=sampler)


def _base_facts(model: Any, folder: Path) -> BaseFacts:
    """Describe a transformers model to a layout."""
    from torch import nn

    table = model.get_input_embeddings().weight
    return BaseFacts(
        name=folder.name,
        model_type=model.config.model_type,
        hidden_size=table.shape[1],
        num_layers=model.config.num_hidden_layers,
        vocab_size=table.shape[0],
        norm_eps=float(getattr(model.config, "rms_norm_eps", DEFAULT_NORM_EPS)),
        **tokenizer_facts(folder),
        linears={
            path: (module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        },
        embed=lambda ids: _as_mlx(table[list(ids)]),
        unembed=lambda ids: _as_mlx(model.get_output_embeddings().weight[list(ids)]),
    )


def _sampler(tensors: Mapping[str, torch.Tensor], kind: SamplerKind) -> Sampler:
    """Build the sampler head of ``mlx_mtp.model`` from its tensors."""
    import torch
    from torch.nn.functional import layer_norm, linear, rms_norm, silu

    def block(index: int, x: torch.Tensor) -> torch.Tensor:
        name = "sampler_head.{}_{}.{}".format
        weight = tensors[name("linear", index, "weight")]
        y = silu(linear(x, weight, tensors.get(name("linear", index, "bias"))))
        norm = tensors[name("norm", index, "weight")]
        if kind.norm == "layer":
            return layer_norm(
                y, norm.shape, norm, tensors[name("norm", index, "bias")], kind.norm_eps
            )
        return rms_norm(y, norm.shape, norm, kind.norm_eps)

    def sampler(previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        inner = block(1, torch.cat([previous, hidden], dim=-1))
        out = block(2, inner)
        if kind.residual == "none":
            return out
        return out + (hidden if kind.residual == "hidden" else inner)

    return sampler
