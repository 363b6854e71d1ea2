"""Tiny models with native modules in their published names, and the same modules in PyTorch.

transformers makes the models and writes their checkpoints.  A module's decoder layer is a layer of
a second model of the same configuration; everything around it is written here from the published
equations (DeepSeek-V3 report, section 2.2; PaddleFormers for Ernie 4.5).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.model.base import open_base
from tests.helpers.tiny import build

COMMON: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
}
_HEADS = {"head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
_LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 32},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 32},
}
_LINEAR = {
    **{"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    },
}
_WINDOWED = {
    **{"num_hidden_layers": 4, "sliding_window": 6},
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}


_STEP_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
}


def _appended(index: int, name: str, layers: int) -> str:
    parts = {"norm": "shared_head.norm", "head": "shared_head.head", "embedding": "embed_tokens"}
    parts |= {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj"}
    return f"model.layers.{layers + index}.{_renamed(name, parts)}"


def _step(index: int, name: str, layers: int) -> str:
    start = f"model.layers.{layers + index}."
    own = _appended(index, name, layers).removeprefix(start)
    inner = "" if own.startswith(("enorm", "hnorm", "eh_proj", "embed_tokens")) else "transformer."
    return f"{start}{inner}{own.replace('shared_head.head', 'shared_head.output')}"


def _mtp(index: int, name: str, layers: int) -> str:
    del layers
    if name.startswith("layer."):
        return f"mtp.layers.{index}.{name.removeprefix('layer.')}"
    parts = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden"}
    return f"mtp.{_renamed(name, parts | {'projection': 'fc'})}"


def _mimo(index: int, name: str, layers: int) -> str:
    del layers
    parts = {"embedding_norm": "token_layernorm", "hidden_norm": "hidden_layernorm"}
    parts |= {"projection": "input_proj", "norm": "final_layernorm"}
    return f"model.mtp_layers.{index}.{_renamed(name, parts)}"


def _ernie(index: int, name: str, layers: int) -> str:
    del layers
    if name.startswith("layer."):
        return f"model.mtp_block.{index}.{name.removeprefix('layer.')}"
    parts = {"embedding_norm": "mtp_emb_norm", "hidden_norm": "mtp_hidden_norm"}
    part, _, leaf = name.rpartition(".")
    return f"model.{(parts | {'projection': 'mtp_linear_proj'})[part]}.{index}.{leaf}"


def _renamed(name: str, parts: dict[str, str]) -> str:
    part, _, leaf = name.rpartition(".")
    return f"{parts[part]}.{leaf}" if part in parts else name.removeprefix("layer.")


@dataclass(frozen=True)
class Kind:
    """What is particular to a family.

    Attributes:
        settings: of its configuration.
        name: from a module's index, a canonical name in it and the number of layers to the
            published name.
        count: number of modules.
        layer: index of the layer that a module's is like.
        transformers: its type in transformers, if that has another name.
        zero_centred, hidden_first, before_norm: see ``mlx_mtp.model.native.names``.
        own_head: whether modules have a norm and a head, published even where they are shared.
    """

    settings: dict[str, Any]
    name: Callable[[int, str, int], str] = _appended
    count: int = 1
    layer: int = -1
    transformers: str = ""
    zero_centred: bool = False
    hidden_first: bool = False
    before_norm: bool = False
    has_norm: bool = True
    own_head: bool = False


KINDS = {
    "deepseek_v3": Kind(_LATENT | _ROUTED | {"rope_interleave": True}, count=2, own_head=True),
    "glm4_moe": Kind(
        _HEADS
        | _ROUTED
        | {"use_qk_norm": True}
        | {"rope_parameters": _LINEAR["rope_parameters"] | {"partial_rotary_factor": 0.5}}
    ),
    "glm4_moe_lite": Kind(_LATENT | _ROUTED),
    "qwen3_next": Kind(
        _HEADS
        | _EXPERTS
        | _LINEAR
        | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []},
        _mtp,
        zero_centred=True,
    ),
    "qwen3_5": Kind(_HEADS | _LINEAR, _mtp, transformers="qwen3_5_text", zero_centred=True),
    "qwen3_5_moe": Kind(
        _HEADS | _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 32},
        _mtp,
        transformers="qwen3_5_moe_text",
        zero_centred=True,
    ),
    "mimo": Kind({}, _mimo, count=2, transformers="qwen2", hidden_first=True),
    "ernie4_5_moe": Kind(
        {
            **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "use_bias": False},
            **{"moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
        },
        _ernie,
        layer=0,
        before_norm=True,
        has_norm=False,
    ),
    "exaone_moe": Kind(
        _HEADS
        | _EXPERTS
        | _WINDOWED
        | {"num_shared_experts": 1, "n_group": 1, "topk_group": 1}
        | {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
        _mtp,
        layer=0,
    ),
    "mellum": Kind(
        _HEADS | _EXPERTS | _WINDOWED | {"mlp_layer_types": ["sparse"] * 4}, _mtp, layer=0
    ),
    "step3p5": Kind(
        _HEADS
        | _WINDOWED
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"share_expert_dim": 32, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
        | {"rope_parameters": _STEP_ROPES},
        _step,
        count=2,
        layer=0,
        zero_centred=True,
        before_norm=True,
        own_head=True,
    ),
}


@dataclass
class Published:
    """A tiny model and its modules, in MLX and in PyTorch.

    Attributes:
        base: the mlx-lm model.
        config: its ``config.json``.
        tensors: the modules' tensors by published name.
        reference: the same in PyTorch.
    """

    base: Any
    config: dict[str, Any]
    tensors: dict[str, mx.array]
    reference: Reference


@dataclass
class Module:
    """One module in PyTorch: its layer, and its other tensors by canonical name."""

    layer: Any
    tensors: dict[str, Any]
    rows: list[tuple[Any, int]] = field(default_factory=list)


class Reference:
    """Modules in PyTorch.  Each call runs all rows again, without a cache.

    States that are passed on have the form that the family was trained with.
    """

    def __init__(self, kind: Kind, model: Any, modules: list[Module]) -> None:
        self.kind, self.modules = kind, modules
        self.config, self.rotary = model.config, model.model.rotary_emb
        self.table, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.final_norm = model.model.norm.weight

    def norm(self, x: Any, weight: Any) -> Any:
        """The norm of the family."""
        import torch

        eps = self.config.rms_norm_eps
        scale = 1 + weight if self.kind.zero_centred else weight
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * scale

    def run(self, hidden: Any, ids: list[int], *, index: int = 0) -> Any:
        """Append rows, states ``[L, D]`` and ids, to a module; return the states ``[L, D]``."""
        import torch

        own = self.modules[index % len(self.modules)]
        own.rows += list(zip(hidden, ids, strict=True))
        states = torch.stack([state for state, _ in own.rows])
        table = own.tensors.get("embedding.weight", self.table)
        embedded = table[torch.tensor([token for _, token in own.rows])]
        pair = [
            self.norm(embedded, own.tensors["embedding_norm.weight"]),
            self.norm(states, own.tensors["hidden_norm.weight"]),
        ]
        if self.kind.hidden_first:
            pair.reverse()
        x = torch.cat(pair, -1) @ own.tensors["projection.weight"].T
        x = self._layer(own.layer, x[None])[0]
        if self.kind.has_norm and not self.kind.before_norm:
            x = self.norm(x, own.tensors["norm.weight"])
        return x[-len(ids) :]

    def logits(self, states: Any, *, index: int = 0) -> Any:
        """Logits ``[L, V]`` of what ``run`` returned."""
        own = self.modules[index % len(self.modules)].tensors
        if self.kind.before_norm:
            states = self.norm(states, own.get("norm.weight", self.final_norm))
        return states @ own.get("head.weight", self.head).T

    def set(self, tensors: dict[str, mx.array]) -> None:
        """Set tensors by canonical name, other than norms, as ``canonical_tensors`` makes them."""
        for index, module in enumerate(self.modules):
            prefix = f"{index}."
            own = {
                name.removeprefix(prefix): to_torch(value)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            layer = {
                name.removeprefix("layer."): own.pop(name)
                for name in list(own)
                if name.startswith("layer.")
            }
            module.tensors |= own
            module.layer.load_state_dict(module.layer.state_dict() | _in_transformers(layer))

    def _layer(self, layer: Any, x: Any) -> Any:
        import torch

        count = x.shape[1]
        row, seen = torch.arange(count)[:, None], torch.arange(count)[None]
        sees = seen <= row
        kinds = getattr(self.config, "layer_types", None) or []
        kind = kinds[self.kind.layer] if kinds else ""
        if kind == "sliding_attention":
            sees &= row - seen < self.config.sliding_window
        mask = torch.where(sees, 0.0, -torch.inf)[None, None]
        positions = torch.arange(count)[None]
        has_ropes = self.config.model_type in ("mellum", "step3p5")
        nested = {"layer_type": kind} if has_ropes else {}
        rotations = self.rotary(x, positions, **nested)
        out = layer(x, attention_mask=mask, position_embeddings=rotations, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out


def publish(name: str, folder: Path, *, count: int | None = None, **settings: Any) -> Published:
    """Make a tiny model of a family with its modules, as many as usual or ``count``."""
    import torch
    from transformers import AutoConfig

    kind = KINDS[name]
    kind = replace(kind, count=count or kind.count)
    config = AutoConfig.for_model(
        kind.transformers or name, **{**COMMON, **kind.settings, **settings}
    )
    model = _model(config, 0)
    layers = config.num_hidden_layers
    place = range(layers)[kind.layer]
    rng = torch.Generator().manual_seed(99)
    modules, tensors = [], {}
    for index in range(kind.count):
        donor = _model(config, index + 1)
        own = _layer_tensors(donor, place, folder / f"donor{index}")
        others = _others(kind, config, model, rng)
        own |= {key: mx.array(value.numpy()) for key, value in others.items()}
        tensors |= {kind.name(index, key, layers): value for key, value in own.items()}
        modules.append(Module(donor.model.layers[place], others))
    if name == "step3p5":
        base, written = _step_base(model, kind.count)
    else:
        model.save_pretrained(folder)
        written = _rewrite_config(folder, name, kind.count)
        if name == "qwen3_5_moe":
            _fuse_experts(folder / "model.safetensors")
        base = open_base(folder)[0]
    return Published(base, written, tensors, Reference(kind, model, modules))


def _in_transformers(layer: dict[str, Any]) -> dict[str, Any]:
    """Undo what mlx-lm's ``sanitize`` does to a layer: stacked experts, split latent attention."""
    import torch

    made = dict(layer)
    if experts := [name for name in layer if ".switch_mlp." in name]:
        gate, up, down = (
            made.pop(f"mlp.switch_mlp.{kind}.weight")
            for kind in ("gate_proj", "up_proj", "down_proj")
        )
        assert len(experts) == 3
        made["mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        made["mlp.experts.down_proj"] = down
    if "self_attn.embed_q.weight" in layer:
        keys = made.pop("self_attn.embed_q.weight").transpose(1, 2)
        values = made.pop("self_attn.unembed_out.weight")
        made["self_attn.kv_b_proj.weight"] = torch.cat([keys, values], 1).flatten(0, 1)
    return made


def _model(config: Any, seed: int) -> Any:
    """A random model; zero-centred norms have weights around 0, others around 1."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    loader: Any = AutoModelForCausalLM
    if config.model_type == "step3p5":
        model: Any = _step_model(config).float().eval()
    else:
        model = loader.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
            else:
                value.normal_(0, 1.2 / value.shape[-1] ** 0.5)
        model.model.embed_tokens.weight.normal_(0, 0.5)
        model.requires_grad_(False)
    return model


def _layer_tensors(donor: Any, place: int, folder: Path) -> dict[str, mx.array]:
    """Published tensors of a layer, as names in it."""
    if donor.config.model_type == "step3p5":  # published as they are named in a dense layer
        state = donor.model.layers[place].state_dict()
        return {f"layer.{key}": mx.array(value.numpy()) for key, value in state.items()}
    donor.save_pretrained(folder)
    saved: Any = mx.load(str(folder / "model.safetensors"))
    start = f"model.layers.{place}."
    return {
        f"layer.{key.removeprefix(start)}": value
        for key, value in saved.items()
        if key.startswith(start)
    }


def _step_model(config: Any) -> Any:
    """The text model of Step 3.5 with a head; transformers has both in the vision model only."""
    import torch
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    config._attn_implementation = "eager"
    whole = torch.nn.Module()
    whole.config, whole.model = config, Step3p7TextModel(config)
    whole.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return whole


def _step_base(model: Any, count: int) -> tuple[Any, dict[str, Any]]:
    """Step 3.5's model in mlx-lm, with random layers, and its configuration as published."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    keys += ("num_attention_heads", "rms_norm_eps", "sliding_window", "moe_intermediate_size")
    config: Any = {key: getattr(model.config, key) for key in (*keys, "max_position_embeddings")}
    config |= {"model_type": "step3p5", "num_attention_groups": 2, "share_expert_dim": 32}
    config |= {"moe_num_experts": 4, "moe_top_k": 2, "moe_layers_enum": "1,2,3"}
    config |= {"layer_types": [*model.config.layer_types, *["sliding_attention"] * count]}
    config |= {"rope_theta": [1e4] * 3 + [1e5] + [1e4] * count, "num_nextn_predict_layers": count}
    config |= {"partial_rotary_factors": [1.0] * 3 + [0.5] + [1.0] * count}
    base = build(config)
    base.model.embed_tokens.weight = mx.array(model.model.embed_tokens.weight.numpy())
    base.model.norm.weight = 1 + mx.array(model.model.norm.weight.numpy())
    base.lm_head.weight = mx.array(model.lm_head.weight.numpy())
    return base, config


def _others(kind: Kind, config: Any, model: Any, rng: Any) -> dict[str, Any]:
    """Random tensors of a module that are not in its layer, by canonical name."""
    import torch

    dims, centre = config.hidden_size, 0.0 if kind.zero_centred else 1.0
    names = ["embedding_norm.weight", "hidden_norm.weight"]
    names += ["norm.weight"] if kind.has_norm else []
    others = {name: centre + 0.2 * torch.randn(dims, generator=rng) for name in names}
    others["projection.weight"] = torch.randn(dims, 2 * dims, generator=rng) / (2 * dims) ** 0.5
    if kind.own_head:
        others["head.weight"] = torch.randn(config.vocab_size, dims, generator=rng) / dims**0.5
        others["embedding.weight"] = model.model.embed_tokens.weight.detach().clone()
    return others


def _rewrite_config(folder: Path, name: str, count: int) -> dict[str, Any]:
    """Write the configuration as the family publishes it; return it."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": name}
    if name in ("qwen3_5", "qwen3_5_moe"):
        text = config | {"model_type": f"{name}_text", "mtp_num_hidden_layers": count}
        config = {"model_type": name, "text_config": text, "tie_word_embeddings": False}
    else:
        config["num_nextn_predict_layers"] = count
    if name == "exaone_moe":
        config["is_moe_layer"] = [kind == "sparse" for kind in config["mlp_layer_types"]]
    path.write_text(json.dumps(config))
    return config


def _fuse_experts(path: Path) -> None:
    """Write a checkpoint's experts as one tensor per layer, as Qwen3.5 publishes them."""
    tensors: Any = mx.load(str(path))
    tensors = fused(tensors)
    mx.save_safetensors(str(path), tensors)


def fused(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Fuse the experts of each layer."""
    experts: dict[str, dict[tuple[int, str], mx.array]] = {}
    done: dict[str, mx.array] = {}
    for name, value in tensors.items():
        prefix, found, rest = name.partition(".experts.")
        if found:
            number, kind, _ = rest.split(".")
            experts.setdefault(prefix, {})[int(number), kind] = value
        else:
            done[name] = value
    for prefix, by_kind in experts.items():
        numbers = range(len(by_kind) // 3)
        both = [mx.concatenate([by_kind[i, "gate_proj"], by_kind[i, "up_proj"]]) for i in numbers]
        done[f"{prefix}.experts.gate_up_proj"] = mx.stack(both)
        done[f"{prefix}.experts.down_proj"] = mx.stack([by_kind[i, "down_proj"] for i in numbers])
    return done


def to_torch(value: mx.array) -> Any:
    """An array as a tensor."""
    import torch

    return torch.from_numpy(np.array(value))
