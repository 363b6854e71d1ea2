"""Small torch models and the modules that training projects attach to them, every one alive.

``tiny_causal_lm`` builds a transformers model with random weights.  The rest is what projects
write themselves: a gate, low-rank layers (with fused projections or bare parameters) and sampler
heads.  Nothing here knows about MLX.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.helpers.fixtures_generate import EOS, VOCAB_SIZE, byte_tokenizer

DIMS = 32
PADDED_VOCAB = VOCAB_SIZE + 12
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 512,
}


def tiny_causal_lm(
    kind: str = "llama",
    *,
    seed: int = 0,
    tied: bool = False,
    vocab_size: int = VOCAB_SIZE,
    rope: dict[str, Any] = ROPE,
    **settings: Any,
) -> PreTrainedModel:
    """A transformers model of 2 layers with random float32 weights, in evaluation mode.

    Its greedy answers are bytes: the logits of other tokens, the end among them, stay near 0.
    """
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        hidden_size=DIMS,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS:] *= 0.02
    return model.float().eval()


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Write a Hugging Face folder with the byte tokenizer; returns it."""
    model.save_pretrained(folder, **options)
    byte_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> PreTrainedModel:
    """Read a Hugging Face folder in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def randomise(module: nn.Module, *, seed: int, only: tuple[str, ...] = ()) -> None:
    """Give every parameter random values; with ``only``, those whose name has one of the words."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(module.named_parameters(), key=lambda item: item[0]):
        if only and not any(word in name for word in only):
            continue
        noise = torch.randn(value.shape, generator=generator)
        is_norm = "norm" in name or value.ndim == 1 and name.endswith("weight")
        if value.ndim == 1:
            value.copy_(is_norm + 0.2 * noise)
        elif "lora" in name.lower() or "mask" in name or "delta" in name:
            value.copy_(0.3 * noise)
        elif "embed" in name:
            value.copy_(0.1 * noise)
        else:
            value.copy_(1.5 / math.sqrt(value.shape[-1]) * noise)


class Gate:
    """Where the mask rows of the forward in progress begin; None when all rows are ordinary."""

    def __init__(self) -> None:
        self.split: int | None = None

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """1 on mask rows and 0 on ordinary rows, ``[L, 1]``."""
        count = x.shape[-2]
        split = count if self.split is None else self.split
        return (torch.arange(count) >= split).to(x.dtype)[:, None]


class GatedLinear(nn.Module):
    """A frozen linear layer and a low-rank one, as two submodules, on mask rows."""

    def __init__(self, base_layer: nn.Linear, *, rank: int, scale: float, gate: Gate) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        self.scale = scale
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.scale * self.gate.rows(x) * self.lora_B(self.lora_A(x))


class BareGatedLinear(nn.Module):
    """The same with bare parameters; ``transposed`` stores them as ``[in, r]`` and ``[r, out]``.

    With ``own_alpha`` each layer has an alpha of its own, kept in a buffer.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        rank: int,
        alpha: float,
        gate: Gate,
        transposed: bool = False,
        lower_case: bool = False,
        own_alpha: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        sizes = [(rank, base_layer.in_features), (base_layer.out_features, rank)]
        self.names = ("lora_a", "lora_b") if lower_case else ("lora_A", "lora_B")
        for name, size in zip(self.names, sizes, strict=True):
            value = torch.zeros(size[::-1] if transposed else size)
            self.register_parameter(name, nn.Parameter(value))
        if own_alpha:
            alpha += base_layer.out_features / 16
            self.register_buffer("alpha", torch.tensor(alpha))
        self.scale = alpha / rank
        self.gate = gate
        self.transposed = transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (getattr(self, name) for name in self.names)
        low_rank = x @ a @ b if self.transposed else x @ a.T @ b.T
        return self.base_layer(x) + self.scale * self.gate.rows(x) * low_rank


class Part(nn.Module):
    """Stands where a projection was and takes its columns of a fused layer's output."""

    def __init__(self, owner: nn.Module, fused: str, columns: slice) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple: not a submodule, so not in the state dict
        self.fused = fused
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.owner[0], self.fused)(x)[..., self.columns]


def fuse(owner: nn.Module, names: tuple[str, ...], fused: str) -> None:
    """Replace linear layers of one module by one layer with all their outputs, in that order."""
    layers: list[nn.Linear] = [owner.get_submodule(name) for name in names]  # type: ignore
    has_bias = layers[0].bias is not None
    width = sum(layer.out_features for layer in layers)
    joined = nn.Linear(layers[0].in_features, width, bias=has_bias)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([layer.weight for layer in layers]))
        if has_bias:
            joined.bias.copy_(torch.cat([layer.bias for layer in layers]))
    setattr(owner, fused, joined)
    start = 0
    for name, layer in zip(names, layers, strict=True):
        setattr(owner, name, Part(owner, fused, slice(start, start + layer.out_features)))
        start += layer.out_features


def replace_linears(model: nn.Module, leaves: tuple[str, ...], make: Any) -> None:
    """Put ``make(leaf, layer)`` in the place of each linear layer with one of these leaf names."""
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if leaf in leaves and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), leaf, make(leaf, module))


class ResidualMlp(nn.Module):
    """``z + MLP([E; z])`` with LayerNorm, whose layers lie in a flat ``mlp``."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * dims, dims), nn.SiLU(), nn.LayerNorm(dims),
            nn.Linear(dims, dims), nn.SiLU(), nn.LayerNorm(dims),
        )  # fmt: skip

    def forward(self, previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(torch.cat([previous, hidden], dim=-1))


class Block(nn.Module):
    """RMSNorm after SiLU after a linear layer without bias."""

    def __init__(self, num_in: int, num_out: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(num_in, num_out, bias=False)
        self.norm = nn.RMSNorm(num_out, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.silu(self.linear(x)))


class InnerResidual(nn.Module):
    """Two blocks; the second one's output is added to its input."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(2 * dims, dims, eps), Block(dims, dims, eps)])

    def forward(self, previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.layers[0](torch.cat([previous, hidden], dim=-1))
        return inner + self.layers[1](inner)


class PlainSampler(nn.Module):
    """What an amateur writes: either order of the halves, either norm, a residual or none."""

    def __init__(self, dims: int, *, hidden_first: bool, rms: bool, residual: bool) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(dims, eps=1e-6)) if rms else (lambda: nn.LayerNorm(dims))
        self.fc1 = nn.Linear(2 * dims, dims, bias=not rms)
        self.norm1 = norm()
        self.fc2 = nn.Linear(dims, dims, bias=not rms)
        self.norm2 = norm()
        self.hidden_first = hidden_first
        self.residual = residual

    def forward(self, previous: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        halves = (hidden, previous) if self.hidden_first else (previous, hidden)
        inner = self.norm1(nn.functional.silu(self.fc1(torch.cat(halves, dim=-1))))
        out = self.norm2(nn.functional.silu(self.fc2(inner)))
        return hidden + out if self.residual else out
