"""Our training step written in PyTorch, float32, for the comparison in ``lab.train_step``.

Everything that ``train.gradient.step`` computes is repeated here: ordinary rows once and without
gradient, mask rows that see their keys and values, gated LoRA on mask rows, the sampler head, three
terms of the loss over the whole vocabulary, a clipped gradient, AdamW.  PyTorch gets what is fast
on a CPU: its fused attention with grouped queries, its fused AdamW and all cores.  Weights and
their names are those of the MLX model, so that gradients can be compared by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten

from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MTPModel
from mlx_mtp.train.gradient.adapter import trainable
from mlx_mtp.train.gradient.anchors import chunks
from mlx_mtp.train.gradient.step import blocks_of
from mlx_mtp.train.settings import TrainSettings

Tensor = torch.Tensor
_SAMPLER = "sampler_head."


@dataclass(frozen=True)
class _Ordinary:
    """Ordinary rows of a sequence: hidden states ``[L, D]``, keys and values ``[1, H, L, Dh]``."""

    hidden: Tensor
    keys_and_values: list[tuple[Tensor, Tensor]]


class TorchStep:
    """Optimiser steps of a llama with our adapter.

    Args:
        model: from ``adapter.new_adapter``, with float32 weights, which are copied.
        settings: settings of the run; the teacher must be ``argmax``.
        num_threads: number of threads that PyTorch may use.

    Raises:
        ValueError: the model is not a plain llama in float32.
    """

    def __init__(self, model: MTPModel, settings: TrainSettings, *, num_threads: int) -> None:
        _check_model(model)
        assert model.config is not None and settings.teacher == "argmax" and settings.gate
        torch.set_num_threads(num_threads)
        self._settings = settings
        self._args = model.base.args
        self._dims = self._args.head_dim or model.hidden_size // self._args.num_attention_heads
        self._scale = model.config.scale
        self._kind = model.config.sampler_kind if model.sampler_head is not None else None
        self._frozen = _frozen(model)
        self.parameters = {
            name: _tensor(value).requires_grad_() for name, value in trainable(model).items()
        }
        self._masks = next(
            value for name, value in self.parameters.items() if name.endswith(MASK_EMBEDDINGS)
        )
        self._unembedding = self._frozen.get("lm_head.weight", self._embedding)
        self._cos, self._sin = _rotary_tables(self._args, self._dims)
        self._optimiser = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=1e-8,
            fused=True,
        )

    def load(self, parameters: Mapping[str, mx.array]) -> None:
        """Copy trainable parameters of the MLX model by name."""
        with torch.no_grad():
            for name, value in parameters.items():
                self.parameters[name].copy_(_tensor(value))

    def gradient(
        self,
        data: Sequence[TokenSequence],
        chosen: Sequence[int],
        *,
        step: int,
        max_rows: int | None = None,
    ) -> dict[str, float]:
        """Compute the gradient of a step; it is stored in ``parameters``.

        Args:
            data: all sequences.
            chosen: indices of the step's sequences.
            step: number of the step, which decides the anchors.
            max_rows: maximum mask rows per forward; None runs one forward per sequence.

        Returns:
            The terms of the loss by name.
        """
        self._optimiser.zero_grad()
        places = [
            (data[index], blocks_of(data[index], self._settings, key=(step, place)))
            for place, index in enumerate(chosen)
        ]
        total = sum(rows.num_rows for _, rows in places)
        sums: dict[str, float] = {}
        for sequence, rows in places:
            if not rows.anchors:
                continue
            ids = torch.tensor(sequence.ids)
            ordinary = self._ordinary_rows(ids)
            for part in chunks(rows, max_rows=max_rows or rows.num_rows):
                terms = self._loss_terms(ordinary, ids, part, total=total)
                weights = self._settings.loss_weights
                loss = sum(value * getattr(weights, name) for name, value in terms.items())
                cast(Tensor, loss).backward()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
        return sums

    def __call__(
        self,
        data: Sequence[TokenSequence],
        chosen: Sequence[int],
        *,
        step: int,
        max_rows: int | None = None,
    ) -> dict[str, float]:
        """Run an optimiser step; see ``gradient``."""
        terms = self.gradient(data, chosen, step=step, max_rows=max_rows)
        if self._settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._settings.clip)
        self._optimiser.step()
        return terms

    def gradients(self) -> dict[str, np.ndarray]:
        """The current gradient by name."""
        return {
            name: np.zeros(value.shape, np.float32) if value.grad is None else value.grad.numpy()
            for name, value in self.parameters.items()
        }

    @property
    def _embedding(self) -> Tensor:
        return self._frozen["model.embed_tokens.weight"]

    @torch.no_grad()
    def _ordinary_rows(self, ids: Tensor) -> _Ordinary:
        keys_and_values: list[tuple[Tensor, Tensor]] = []
        positions = torch.arange(len(ids))
        hidden = self._backbone(self._embedding[ids], positions, output=keys_and_values)
        return _Ordinary(hidden, keys_and_values)

    def _loss_terms(
        self, ordinary: _Ordinary, ids: Tensor, rows: MaskRows, *, total: int
    ) -> dict[str, Tensor]:
        """The loss terms of mask blocks, as parts of a mean over ``total`` rows."""
        positions = torch.from_numpy(rows.row_positions).long()
        seen = max(rows.anchors) + 1
        cached = [
            (keys[..., :seen, :], values[..., :seen, :])
            for keys, values in ordinary.keys_and_values
        ]
        mask = torch.from_numpy(np.array(rows.attention(seen)))
        offsets = torch.from_numpy(rows.mask_offsets).long()
        hidden = self._backbone(self._masks[offsets], positions, cached=cached, mask=mask)
        targets = self._targets(ordinary, positions)
        terms = {"base": self._cross_entropy(hidden, targets) / total}
        if self._kind is not None:
            state = self._sampler(self._embedding[ids[positions]], hidden)
            terms["sampler"] = self._cross_entropy(state, targets) / total
        difference = hidden - ordinary.hidden[positions]
        terms["lcm"] = difference.square().mean(dim=-1).sum() / total
        return terms

    @torch.no_grad()
    def _targets(self, ordinary: _Ordinary, positions: Tensor) -> Tensor:
        """The base model's most likely token after each position."""
        needed, where = torch.unique(positions, return_inverse=True)
        return (ordinary.hidden[needed] @ self._unembedding.T).argmax(dim=-1)[where]

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, self._unembedding), targets, reduction="sum")

    def _sampler(self, previous: Tensor, hidden: Tensor) -> Tensor:
        assert self._kind is not None
        inner = self._sampler_block("1", torch.cat([previous, hidden], dim=-1))
        out = self._sampler_block("2", inner)
        if self._kind.residual == "none":
            return out
        return (hidden if self._kind.residual == "hidden" else inner) + out

    def _sampler_block(self, number: str, x: Tensor) -> Tensor:
        assert self._kind is not None
        get = self.parameters.get
        linear, norm = f"{_SAMPLER}linear_{number}.", f"{_SAMPLER}norm_{number}."
        x = F.silu(F.linear(x, self.parameters[linear + "weight"], get(linear + "bias")))
        weight = self.parameters[norm + "weight"]
        if self._kind.norm == "rms":
            return F.rms_norm(x, weight.shape, weight, self._kind.norm_eps)
        return F.layer_norm(x, weight.shape, weight, get(norm + "bias"), self._kind.norm_eps)

    def _backbone(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        cached: Sequence[tuple[Tensor, Tensor]] = (),
        mask: Tensor | None = None,
        output: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Map ``[R, D]`` to final hidden states; with a mask, rows are mask rows with LoRA.

        Args:
            x: embeddings.
            positions: positions of the rows, ``[R]``.
            cached: keys and values before those of the rows, by layer.
            mask: which row sees what, bool; None is causal.
            output: receives the keys and values of each layer.
        """
        rotation = self._cos[positions], self._sin[positions]
        for index in range(self._args.num_hidden_layers):
            path = f"model.layers.{index}."
            normed = self._norm(x, path + "input_layernorm")
            before = cached[index] if cached else None
            x = x + self._attention(normed, path, rotation, cached=before, mask=mask, output=output)
            normed = self._norm(x, path + "post_attention_layernorm")
            gate = F.silu(self._linear(normed, path + "mlp.gate_proj", adapt=mask is not None))
            up = self._linear(normed, path + "mlp.up_proj", adapt=mask is not None)
            x = x + self._linear(gate * up, path + "mlp.down_proj", adapt=mask is not None)
        return self._norm(x, "model.norm")

    def _attention(
        self,
        x: Tensor,
        path: str,
        rotation: tuple[Tensor, Tensor],
        *,
        cached: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        output: list[tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        queries, keys, values = (
            self._linear(x, f"{path}self_attn.{name}_proj", adapt=mask is not None)
            .view(1, len(x), -1, self._dims)
            .transpose(1, 2)
            for name in ("q", "k", "v")
        )
        queries, keys = _rotate(queries, *rotation), _rotate(keys, *rotation)
        if output is not None:
            output.append((keys, values))
        if cached is not None:
            keys = torch.cat([cached[0], keys], dim=2)
            values = torch.cat([cached[1], values], dim=2)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        out = out.transpose(1, 2).reshape(len(x), -1)
        return self._linear(out, path + "self_attn.o_proj", adapt=mask is not None)

    def _linear(self, x: Tensor, path: str, *, adapt: bool) -> Tensor:
        y = F.linear(x, self._frozen[path + ".weight"])
        lora_a = self.parameters.get(f"base.{path}.lora_a")
        if not adapt or lora_a is None:
            return y
        return torch.addmm(y, x @ lora_a, self.parameters[f"base.{path}.lora_b"], alpha=self._scale)

    def _norm(self, x: Tensor, path: str) -> Tensor:
        weight = self._frozen[path + ".weight"]
        return F.rms_norm(x, weight.shape, weight, self._args.rms_norm_eps)


def _check_model(model: MTPModel) -> None:
    """Check that a model is a plain llama in float32.

    Raises:
        ValueError: it is not; the message names what it has.
    """
    args: Any = model.base.args
    if model.base.model_type != "llama":
        raise ValueError(f"the PyTorch step is written for llama, not for {model.base.model_type}")
    if model.dtype != mx.float32:
        raise ValueError(f"the PyTorch step needs float32 weights, {model.name} has {model.dtype}")
    unsupported = [
        name
        for name in ("attention_bias", "mlp_bias", "rope_traditional", "rope_scaling")
        if getattr(args, name)
    ]
    unsupported += ["sliding_attention"] if "sliding_attention" in args.layer_types else []
    if unsupported:
        raise ValueError(
            f"the PyTorch step is for a plain llama, {model.name} has {unsupported[0]}"
        )


def _frozen(model: MTPModel) -> dict[str, Tensor]:
    """The base model's tensors under the names that they have without an adapter."""
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.base.parameters()))
    return {
        name.replace(".linear.", ".").replace(".embedding.", "."): _tensor(value)
        for name, value in flat
        if name.endswith(".weight")
    }


def _tensor(value: mx.array) -> Tensor:
    return torch.from_numpy(np.array(value))


def _rotary_tables(args: Any, dims: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, ``[P, Dh / 2]`` each."""
    rates = float(args.rope_theta) ** (-np.arange(0, dims, 2) / dims)
    angles = np.arange(args.max_position_embeddings or 8192)[:, None] * rates[None]
    return (
        torch.from_numpy(np.cos(angles).astype(np.float32)),
        torch.from_numpy(np.sin(angles).astype(np.float32)),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[1, H, R, Dh]``; a pair is a dimension of the first half and one of the second."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
