"""Live training projects in PyTorch, in the manner of each adapter layout.

A project builds a tiny base model, attaches its own gated low-rank weights, mask tokens and
sampler, writes its checkpoint as such a project does, and stays alive: ``rows`` and
``sampler_logits`` compute in float32 on the very modules that were saved, so a test can hold a
converted adapter against them.  ``PROJECTS`` has all of them by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from tests.converters import torch_modules as parts
from tests.converters.torch_modules import DIMS, PADDED_VOCAB, Gate
from tests.converters.torch_project import Project
from tests.helpers.fixtures_generate import VOCAB_SIZE

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MASKS = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE + 3]


# --- PEFT with mask tokens -----------------------------------------------------------------------


def peft_mtp(
    root: Path,
    *,
    kind: str = "llama",
    tied: bool = False,
    resize: bool = False,
    whole_tables: bool = False,
    sampler: bool = True,
    order: Sequence[int] = MASKS,
    by_name: bool = False,
    rope: dict[str, Any] = parts.ROPE,
    pickled: bool = False,
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> Project:
    """A PEFT model that gates by itself: LoRA is active from the first mask token on."""
    size = VOCAB_SIZE if resize else PADDED_VOCAB
    context = {k: v for k, v in rope.items() if k == "original_max_position_embeddings"}
    context = context if rope["rope_type"] == "longrope" else {}
    live = parts.tiny_causal_lm(kind, tied=tied, vocab_size=size, rope=rope, **context)
    base = parts.save_model(live, root / "base")
    live = parts.load_model(base)
    if resize:
        live.resize_token_embeddings(VOCAB_SIZE + len(MASKS))
    trained: Any = {"embed_tokens": MASKS} if by_name else MASKS
    settings = {"r": 4, "lora_alpha": 10, "target_modules": list(ALL_LINEARS), **lora}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(order),
        trainable_token_indices=None if whole_tables else trained,
        **settings,
    )
    model = peft.get_peft_model(live, config).eval()
    parts.randomise(model, seed=3, only=("lora_", "trainable_tokens_delta"))
    if whole_tables:
        with torch.no_grad():
            rows = torch.randn(len(MASKS), DIMS, generator=torch.Generator().manual_seed(4))
            table: Any = live.get_input_embeddings().weight
            table[MASKS] = 0.3 * rows
    project = Project(
        base=base,
        checkpoint=root / "checkpoint",
        layout="peft-mtp",
        model=model,
        backbone=live,
        k=len(MASKS),
        mask_ids=list(order),
        foreign_columns=tuple(MASKS),
        pickled=pickled,
    )
    _save_peft(project, dtype)
    if sampler:
        project.sampler = _peft_sampler(project.checkpoint)
    return project


def _save_peft(project: Project, dtype: torch.dtype) -> None:
    """``save_pretrained``, in half precision if asked: the live values are rounded first."""
    model: Any = project.model
    if dtype != torch.float32:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_" in name or "delta" in name:
                    value.copy_(value.to(dtype))
            table = project.backbone.get_input_embeddings().weight
            table[project.mask_ids] = table[project.mask_ids].to(dtype).float()
    model.save_pretrained(project.checkpoint, safe_serialization=not project.pickled)
    if dtype != torch.float32:
        path = project.checkpoint / "adapter_model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)


def _peft_sampler(checkpoint: Path) -> nn.Module:
    owner = nn.Module()
    owner.sampler = parts.ResidualMlp(DIMS)
    parts.randomise(owner, seed=5)
    save_file(owner.state_dict(), checkpoint / "sampler_model.safetensors", {"format": "pt"})
    return owner.sampler.eval()


# --- PEFT without mask tokens --------------------------------------------------------------------


def peft_lora(root: Path, *, prefixed: bool = True, noise: bool = False, **lora: Any) -> Project:
    """Ordinary LoRA, gated by the project's own runtime; mask rows are random vocabulary ids."""
    base = parts.save_model(parts.tiny_causal_lm("qwen3"), root / "base")
    live, ids = parts.load_model(base), [0, 1, 2] if noise else [17, 201, 93]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL_LINEARS), **lora}
    model = peft.get_peft_model(live, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    parts.randomise(model, seed=3, only=("lora_",))
    gate = Gate()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.register_forward_hook(_gated_by(gate))
    checkpoint = root / "checkpoint" / "adapter"
    model.save_pretrained(str(checkpoint))
    if not prefixed:
        path = checkpoint / "adapter_model.safetensors"
        tensors = {k.removeprefix("base_model.model."): v for k, v in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    how = {"noise_ids": "1,200"} if noise else {"mask_token_ids": ",".join(map(str, ids))}
    return Project(
        base=base,
        checkpoint=checkpoint,
        layout="peft-lora",
        model=model,
        backbone=live,
        k=len(ids),
        mask_ids=ids,
        gate=gate,
        options={"num_draft_tokens": str(len(ids)), **how},
    )


def _gated_by(gate: Gate) -> Callable[..., torch.Tensor]:
    """A hook that takes back what an ungated LoRA layer did to ordinary rows."""

    def hook(module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        rows = gate.rows(args[0]).bool()
        return torch.where(rows, y, module.base_layer(args[0]))

    return hook


# --- MTP-GLoRA -----------------------------------------------------------------------------------


def mtp_glora(
    root: Path,
    *,
    kind: str = "llama",
    fused: bool = False,
    rslora: bool = False,
    tied: bool = False,
    from_parent: bool = False,
    distributed: bool = False,
    modules: tuple[str, ...] = ALL_LINEARS,
) -> Project:
    """Own gated layers in an outer wrapper; one shared mask token whose row stays as it was."""
    base_model = parts.tiny_causal_lm(kind, tied=tied, vocab_size=PADDED_VOCAB)
    base = parts.save_model(base_model, root / "base")
    live, gate, rank, alpha = parts.load_model(base), Gate(), 4, 6
    live.requires_grad_(False)
    if fused:
        for layer in live.model.layers:
            parts.fuse(layer.self_attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
            parts.fuse(layer.mlp, ("gate_proj", "up_proj"), "gate_up_proj")
    times = {"qkv_proj": 3, "gate_up_proj": 2}

    def make(leaf: str, layer: nn.Linear) -> nn.Module:
        wide, much = times.get(leaf, 1) * rank, times.get(leaf, 1) * alpha
        scale = much / wide**0.5 if rslora else much / wide
        return parts.GatedLinear(layer, rank=wide, scale=scale, gate=gate)

    leaves = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if fused else modules
    parts.replace_linears(live, leaves, make)
    outer = nn.Module()
    outer.model = live
    outer.sampler_head = parts.InnerResidual(DIMS, eps=live.config.rms_norm_eps)
    parts.randomise(outer, seed=3, only=("lora_", "sampler_head"))
    arguments = {
        "model_path": str(base), "dtype": "float32", "fuse_weights": fused, "draft_length": 3,
        "lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.05, "lora_bias": False,
        "lora_use_rslora": rslora, "lora_modules": list(leaves), "max_steps": 30, "seed": 0,
    }  # fmt: skip
    _save_glora(root / "results", outer, arguments, prefix="module." if distributed else "")
    return Project(
        base=base,
        checkpoint=root / "results" if from_parent else root / "results" / "step-30",
        layout="mtp-glora",
        model=live,
        backbone=live,
        k=3,
        mask_ids=[_new_mask_token(base)] * 3,
        gate=gate,
        sampler=outer.sampler_head,
    )


def _new_mask_token(base: Path) -> int:
    """The id that the base model's tokenizer gives to a new token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mask>"]})
    return tokenizer.convert_tokens_to_ids("<mask>")


def _save_glora(folder: Path, outer: nn.Module, arguments: dict[str, Any], *, prefix: str) -> None:
    step = folder / "step-30"
    step.mkdir(parents=True)
    trained = {name for name, value in outer.named_parameters() if value.requires_grad}
    tensors = {name: value for name, value in outer.state_dict().items() if name in trained}
    save_file({prefix + name: value for name, value in tensors.items()}, step / "model.safetensors")
    torch.save({"step": 30, "rng_state_cpu": torch.get_rng_state()}, step / "state.pt")
    (step / "config.json").write_text(json.dumps(arguments))
    (folder / "latest.json").write_text(json.dumps({"latest": step.name}))


# --- amateurs ------------------------------------------------------------------------------------


def amateur(
    root: Path,
    *,
    file: str,
    kind: str = "llama",
    prefix: str = "",
    masks: str = "own",
    hidden_first: bool = False,
    rms: bool = False,
    residual: bool = False,
    sampler: bool = True,
    container: str | None = None,
    whole: bool = False,
    alpha_beside: bool = True,
    **layer: Any,
) -> Project:
    """Bare parameters, saved in whatever way came to mind."""
    base = parts.save_model(parts.tiny_causal_lm(kind), root / "base")
    live, gate, rank, alpha = parts.load_model(base), Gate(), 4, 12
    live.requires_grad_(False)

    def make(leaf: str, linear: nn.Linear) -> nn.Module:
        del leaf
        return parts.BareGatedLinear(linear, rank=rank, alpha=alpha, gate=gate, **layer)

    parts.replace_linears(live, ("q_proj", "v_proj", "up_proj", "down_proj"), make)
    head: nn.Module | None = None
    if sampler:
        head = parts.PlainSampler(DIMS, hidden_first=hidden_first, rms=rms, residual=residual)
        live.sampler = head
    mask_rows = _amateur_masks(live, masks)
    parts.randomise(live, seed=3, only=("lora_", "mask_", "sampler"))
    tensors = {prefix + name: value for name, value in live.state_dict().items() if whole or (
        name.startswith(("sampler.", "mask_")) or "lora_" in name or name.endswith(".alpha")
    )}  # fmt: skip
    settings = {"lora_alpha": alpha, "lora_rank": rank} if alpha_beside else {}
    _save_amateur(root / file, tensors, settings, container=container)
    given = {"residual": "hidden"} if residual else {}
    given |= {"concat": "hidden-embedding"} if hidden_first else {}
    given |= {"norm_eps": "1e-6"} if rms else {}
    given |= {} if alpha_beside or "own_alpha" in layer else {"alpha": str(alpha)}
    given |= {"num_draft_tokens": "5"} if masks == "shared" else {}
    if masks == "table":
        first = live.config.vocab_size - 5
        given["mask_token_ids"] = ",".join(str(first + index) for index in range(5))
    return Project(
        base=base,
        checkpoint=root / file,
        layout="state-dict",
        model=live,
        backbone=live,
        k=5,
        mask_rows=mask_rows.detach().expand(5, -1),
        gate=gate,
        sampler=head,
        options=given,
        pickled=not file.endswith(".safetensors"),
    )


def _amateur_masks(live: Any, masks: str) -> torch.Tensor:
    """Give a model mask rows: of its own, one for all, or new rows of its embedding table."""
    if masks == "table":
        size = live.config.vocab_size
        live.resize_token_embeddings(size + 5)
        return live.get_input_embeddings().weight[size:]
    if masks == "shared":
        live.mask_token = nn.Parameter(torch.zeros(1, 1, DIMS))
        return live.mask_token[0]
    live.mask_embeddings = nn.Parameter(torch.zeros(5, DIMS))
    return live.mask_embeddings


def _save_amateur(
    path: Path, tensors: dict[str, Any], settings: dict[str, Any], *, container: str | None
) -> None:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        (path.parent / "config.json").write_text(json.dumps(settings))
    else:
        content = tensors if container is None else {container: tensors, "config": settings}
        torch.save(content, path)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {"q_proj": 5, r"layers\.0\.self_attn\.(k|v)_proj": 3},
}
PROJECTS: dict[str, tuple[Callable[..., Project], dict[str, Any]]] = {
    "peft-mtp": (peft_mtp, {}),
    "peft-mtp-tied": (peft_mtp, {"tied": True}),
    "peft-mtp-resized": (peft_mtp, {"resize": True, "by_name": True}),
    "peft-mtp-resized-tied": (peft_mtp, {"resize": True, "tied": True}),
    "peft-mtp-whole-tables": (peft_mtp, {"resize": True, "whole_tables": True}),
    "peft-mtp-whole-tied": (peft_mtp, {"resize": True, "whole_tables": True, "tied": True}),
    "peft-mtp-patterns": (peft_mtp, {"kind": "qwen3", **PATTERNS}),
    "peft-mtp-rslora": (
        peft_mtp,
        {"use_rslora": True, "order": [262, 260, 263, 261], "by_name": True, **PATTERNS},
    ),
    "peft-mtp-qwen2": (peft_mtp, {"kind": "qwen2", "sampler": False}),
    "peft-mtp-rope-scaling": (peft_mtp, {"rope": parts.LLAMA3_ROPE}),
    "peft-mtp-phi3": (peft_mtp, {"kind": "phi3", "target_modules": "all-linear"}),
    "peft-mtp-phi3-longrope": (
        peft_mtp,
        {"kind": "phi3", "target_modules": "all-linear", "rope": parts.LONG_ROPE},
    ),
    "peft-mtp-few-targets": (peft_mtp, {"target_modules": r".*layers\.1.*\.(q|o|up)_proj"}),
    "peft-mtp-bfloat16": (peft_mtp, {"dtype": torch.bfloat16}),
    "peft-mtp-whole-bfloat16": (
        peft_mtp,
        {"resize": True, "whole_tables": True, "dtype": torch.bfloat16},
    ),
    "peft-mtp-bin": (peft_mtp, {"pickled": True}),
    "peft-lora": (peft_lora, {}),
    "peft-lora-no-prefix": (peft_lora, {"prefixed": False, "use_rslora": True}),
    "peft-lora-noise": (peft_lora, {"noise": True}),
    "mtp-glora": (mtp_glora, {}),
    "mtp-glora-tied": (mtp_glora, {"tied": True, "from_parent": True, "distributed": True}),
    "mtp-glora-fused": (mtp_glora, {"kind": "qwen3", "fused": True}),
    "mtp-glora-fused-rslora": (mtp_glora, {"kind": "qwen2", "fused": True, "rslora": True}),
    "mtp-glora-phi3": (mtp_glora, {"kind": "phi3", "modules": ("qkv_proj", "gate_up_proj")}),
    "mtp-glora-few-modules": (mtp_glora, {"modules": ("q_proj", "down_proj"), "rslora": True}),
    "amateur-pt": (amateur, {"file": "mtp.pt", "container": "lora"}),
    "amateur-hidden-first": (
        amateur,
        {"file": "adapter.safetensors", "prefix": "module.", "hidden_first": True, "rms": True},
    ),
    "amateur-transposed": (
        amateur,
        {"file": "weights.bin", "transposed": True, "lower_case": True, "alpha_beside": False,
         "residual": True},
    ),
    "amateur-whole-model": (
        amateur,
        {"file": "epoch3.pth", "whole": True, "container": "model_state_dict",
         "prefix": "_orig_mod.", "kind": "qwen3", "rms": True},
    ),
    "amateur-shared-mask": (
        amateur,
        {"file": "lora.safetensors", "masks": "shared", "own_alpha": True, "alpha_beside": False},
    ),
    "amateur-new-rows": (
        amateur,
        {"file": "all.safetensors", "masks": "table", "whole": True, "prefix": "module."},
    ),
    "amateur-no-sampler": (amateur, {"file": "mtp.pt", "sampler": False, "container": "model"}),
}  # fmt: skip


def make_project(name: str, root: Path) -> Project:
    """Build the project of that name below an empty folder."""
    make, settings = PROJECTS[name]
    root.mkdir(parents=True, exist_ok=True)
    return make(root, **settings)
