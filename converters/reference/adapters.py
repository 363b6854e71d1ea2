"""Adapters of the PyTorch side of a verification, from the original checkpoint's own tensors.

PEFT checkpoints are loaded by PEFT itself.  For the others a hook on each adapted layer adds the
low-rank product as their projects do: fused projections stay whole and give each layer its columns.
Written apart from ``converters.layouts`` so that a mistake there shows up as a difference here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_mtp.converters.reference.files import Original, read_original
from mlx_mtp.converters.reference.reference import EXTRA, Adapter, Gate

if TYPE_CHECKING:
    import torch

PEFT_PREFIX = "base_model.model."
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Sampler = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def attach(
    model: Any,
    checkpoint: Path,
    *,
    base: Path,
    gate: Gate,
    scratch: Path,
    layout: str | None,
    options: Mapping[str, str],
    allow_pickle: bool,
    written_rows: np.ndarray | None,
) -> Adapter:
    """Put the gated layers of a checkpoint into a model; see ``reference.load_reference``.

    Raises:
        ValueError: the checkpoint does not say what is needed, or does not fit the model.
    """
    original = read_original(checkpoint, scratch=scratch, allow_pickle=allow_pickle)
    kind = layout or recognise(original)
    if kind.startswith("peft"):
        return _attach_peft(
            model, original, gate=gate, scratch=scratch, options=options, written=written_rows
        )
    if kind == "mtp-glora":
        return _attach_glora(model, original, gate=gate, base=base, options=options)
    from mlx_mtp.converters.reference.state_dict import attach_state_dict

    return attach_state_dict(model, original, gate=gate, options=options, written=written_rows)


def recognise(original: Original) -> str:
    """Name the layout of a checkpoint by its settings: PEFT's, MTP-GLoRA's, or neither."""
    if "peft_type" in original.configs.get("adapter_config.json", {}):
        return "peft"
    return (
        "mtp-glora" if "draft_length" in original.configs.get("config.json", {}) else "state-dict"
    )


def add_low_rank(
    layer: Any, a: torch.Tensor, b: torch.Tensor, *, scale: float, gate: Gate, columns: slice
) -> None:
    """Hook ``scale * B A x`` to a linear layer's mask rows; ``[r, in]`` and ``[out, r]``."""

    def hook(module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        del module
        low_rank = (args[0] @ a.float().T) @ b.float().T
        return gate.choose(y, y + scale * low_rank[..., columns])

    layer.register_forward_hook(hook)


def id_list(text: str) -> list[int]:
    """Parse a comma list of ids."""
    return [int(part) for part in text.split(",")]


# --- PEFT ----------------------------------------------------------------------------------------


def _attach_peft(
    model: Any,
    original: Original,
    *,
    gate: Gate,
    scratch: Path,
    options: Mapping[str, str],
    written: np.ndarray | None,
) -> Adapter:
    """Let PEFT load its adapter as ordinary LoRA, then gate every layer."""
    import torch

    try:
        from peft import PeftModel
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        raise ValueError(f"verifying a PEFT checkpoint needs peft: {EXTRA}") from None

    config = original.configs["adapter_config.json"]
    tensors = {name: value for name, value in original.tensors.items() if ".lora_" in name}
    tensors |= {name: value for name, value in original.tensors.items() if "embed_tokens" in name}
    tensors |= {name: value for name, value in original.tensors.items() if "lm_head" in name}
    num_rows = model.get_input_embeddings().weight.shape[0]
    ids = _peft_mask_ids(config, options)
    needed = [value.shape[0] for name, value in tensors.items() if _is_table(name)]
    needed += [max(ids) + 1] if ids else []
    if max(needed, default=0) > num_rows:
        model.resize_token_embeddings(max(needed), mean_resizing=False)
    if not ids:
        ids = look_up(model, written)
    tensors = {
        name: _with_base_rows(model, name, value, ids) if _is_table(name) else value
        for name, value in tensors.items()
    }
    with torch.no_grad():
        PeftModel.from_pretrained(model, _peft_folder(scratch / "peft", config, tensors))
        for module in list(model.modules()):
            if isinstance(module, LoraLayer):
                module.register_forward_hook(_gated(gate))  # type: ignore[union-attr]
        mask_rows = model.get_input_embeddings()(torch.tensor(ids))
    chosen = config.get("alora_invocation_tokens") or config.get("trainable_token_indices")
    mask_ids = tuple(ids) if chosen else ()
    return Adapter(mask_rows=mask_rows, sampler=_peft_sampler(original), mask_ids=mask_ids)


def _gated(gate: Gate) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], y: Any) -> Any:
        return gate.choose(module.base_layer(*args), y)

    return hook


def _is_table(name: str) -> bool:
    return name.endswith("weight") and ("embed_tokens" in name or "lm_head" in name)


def _with_base_rows(model: Any, name: str, table: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """A saved table with the base model's own rows, which saving may have rounded."""
    is_head = "lm_head" in name
    own = model.get_output_embeddings() if is_head else model.get_input_embeddings()
    merged = own.weight.detach().clone()[: table.shape[0]]
    rows = [token for token in ids if token < table.shape[0]]
    merged[rows] = table[rows].float()
    return merged


def _peft_mask_ids(config: Mapping[str, Any], options: Mapping[str, str]) -> list[int]:
    """Ids of the mask tokens in drafting order; none where the checkpoint has no mask tokens."""
    if "mask_token_ids" in options:
        return id_list(options["mask_token_ids"])
    trained = config.get("trainable_token_indices")
    if isinstance(trained, Mapping):
        trained = next(iter(trained.values()))
    return list(config.get("alora_invocation_tokens") or trained or [])


def look_up(model: Any, written: np.ndarray | None) -> list[int]:
    """Ids of the base model's tokens whose embeddings were written as mask rows."""
    import torch

    if written is None:
        raise ValueError("the checkpoint has no mask tokens; give mask_token_ids")
    table = model.get_input_embeddings().weight.detach().float()
    ids = []
    for j, row in enumerate(torch.tensor(written)):
        distance = (table - row).abs().amax(dim=1)
        nearest = int(distance.argmin())
        if distance[nearest] > 1e-2 * row.abs().max():
            raise ValueError(f"mask row {j} is not the embedding of any token of the base model")
        ids.append(nearest)
    return ids


def _peft_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> str:
    """Write a PEFT folder without PEFT's own gate, and with PEFT's own prefix."""
    from safetensors.torch import save_file

    folder.mkdir()
    plain = dict(config) | {"alora_invocation_tokens": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")
    named = {PEFT_PREFIX + name.removeprefix(PEFT_PREFIX): v for name, v in tensors.items()}
    contiguous = {name: value.clone().contiguous() for name, value in named.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", {"format": "pt"})
    return str(folder)


def _peft_sampler(original: Original) -> Sampler | None:
    """``z + mlp([E; z])`` with the tensors ``sampler.mlp.*``."""
    import torch
    from torch import nn

    prefix = "sampler.mlp."
    tensors = original.tensors.items()
    state = {k.removeprefix(prefix): v.float() for k, v in tensors if k.startswith(prefix)}
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
    model: Any, original: Original, *, gate: Gate, base: Path, options: Mapping[str, str]
) -> Adapter:
    """Hook MTP-GLoRA's layers on, fused ones on each of their parts."""
    arguments = original.configs.get("config.json", {})
    tensors = {name.removeprefix("module."): v for name, v in original.tensors.items()}
    alpha = float(_argument(arguments, "lora_alpha", options, "alpha"))
    rank = int(_argument(arguments, "lora_rank", options, "rank"))
    k = int(_argument(arguments, "draft_length", options, "num_draft_tokens"))
    for name, a in tensors.items():
        match = re.fullmatch(r"model\.(.+)\.lora_A\.weight", name)
        if match is None:
            continue
        b = tensors[f"model.{match[1]}.lora_B.weight"]
        wide = a.shape[0]
        root = math.sqrt(wide) if arguments.get("lora_use_rslora") else wide
        scale = alpha * (wide / rank) / root  # a fused layer has its rank and alpha multiplied
        _hook_parts(model, match[1], a, b, scale=scale, gate=gate)
    eps = float(options.get("norm_eps", model.config.rms_norm_eps))
    return Adapter(
        mask_rows=_glora_rows(model, tensors, (_glora_mask_ids(base, options) * k)[:k]),
        sampler=_glora_sampler(tensors, eps=eps),
    )


def _argument(
    arguments: Mapping[str, Any], key: str, options: Mapping[str, str], option: str
) -> Any:
    """A training argument, or the layout option that stands in for it."""
    if arguments.get(key) is None and option not in options:
        raise ValueError(f"config.json does not say {key}; give {option}")
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
    """The id of the one mask token: given, known to the tokenizer, or the next new one."""
    from transformers import AutoTokenizer

    if "mask_token_ids" in options:
        return id_list(options["mask_token_ids"])
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return [tokenizer.get_vocab().get("<mask>", len(tokenizer))]


def _glora_rows(model: Any, tensors: Mapping[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    import torch

    table = model.get_input_embeddings()
    saved = [value for name, value in tensors.items() if name.endswith("embed_tokens.weight")]
    if saved and max(ids) < saved[0].shape[0]:
        return saved[0].float()[ids]
    if max(ids) >= table.weight.shape[0]:
        raise ValueError(f"mask token {max(ids)} has no row in the base model's embedding")
    with torch.no_grad():
        return table(torch.tensor(ids))


def _glora_sampler(tensors: Mapping[str, torch.Tensor], *, eps: float) -> Sampler | None:
    """Two blocks of RMSNorm(SiLU(Linear)), the second one added to the first."""
    import torch
    from torch.nn.functional import linear, rms_norm, silu

    prefix = "sampler_head.layers."
    if not any(name.startswith(prefix) for name in tensors):
        return None

    def block(index: int, x: torch.Tensor) -> torch.Tensor:
        y = silu(linear(x, tensors[f"{prefix}{index}.linear.weight"].float()))
        return rms_norm(y, y.shape[-1:], tensors[f"{prefix}{index}.norm.weight"].float(), eps)

    def sampler(previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        inner = block(0, torch.cat([previous, hidden], dim=-1))
        return inner + block(1, inner)

    return sampler
