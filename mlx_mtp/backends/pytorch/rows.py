"""Ordinary rows and mask rows of a sequence in transformers' model, with gated LoRA.

Ordinary rows are computed once and without gradient; the attention function keeps their keys and
values.  Mask rows then see those up to their anchor and the masks of their own block up to
themselves.  Linear layers that have low-rank weights apply them while the gate is open, which is in
forwards of mask rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from mlx_mtp.backends.pytorch.model import head_logits, refusal, torch_model
from mlx_mtp.model.lora import GatedLoRALinear
from mlx_mtp.model.mtp_model import MTPModel

ATTENTION = "mlx_mtp_rows"  # name of ``attend`` among transformers' attention functions


class MaskBlocks(Protocol):
    """Mask blocks of a sequence; see ``evaluation.mask_blocks.MaskRows``."""

    @property
    def anchors(self) -> tuple[int, ...]:
        """Position of the last token that each block sees."""
        ...

    @cached_property
    def row_anchors(self) -> np.ndarray:
        """The anchor of each row ``[R]``."""
        ...

    @cached_property
    def row_blocks(self) -> np.ndarray:
        """The block of each row ``[R]``, ascending."""
        ...

    @cached_property
    def mask_offsets(self) -> np.ndarray:
        """The place of each row in its block ``[R]``."""
        ...


@dataclass(frozen=True)
class OrdinaryRows:
    """The base model's output for a sequence, without gradient.

    Attributes:
        hidden: final hidden states ``[L, D]``.
        layers: keys and values of each layer by its index, ``[H, L, Dh]`` each.
    """

    hidden: Tensor
    layers: Mapping[int, tuple[Tensor, Tensor]]


class Gate:
    """Whether low-rank weights apply."""

    is_open = False


class GatedLinear(nn.Module):
    """A linear layer whose low-rank weights apply while the gate is open.

    Attributes:
        lora_a: ``[in, r]``, of the type of the rows.
        lora_b: ``[r, out]``, likewise.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, linear: nn.Linear, *, scale: float, gate: Gate) -> None:
        super().__init__()
        self.linear = linear
        self._scale, self._gate = scale, gate

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        y = self.linear(x)
        if not self._gate.is_open:
            return y
        low_rank = x.flatten(0, -2) @ self.lora_a
        return torch.addmm(y.flatten(0, -2), low_rank, self.lora_b, alpha=self._scale).view_as(y)


class TorchRows:
    """transformers' model with the low-rank layers of an ``MTPModel``'s adapter.

    Args:
        model: with an adapter of mask tokens.
        dtype: see ``model.torch_model``.
        device: see ``model.torch_model``.

    Attributes:
        linears: the layers with low-rank weights, by path.

    Raises:
        ValueError: see ``model.torch_model``; or an adapted layer is not linear in transformers.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        AttentionInterface.register(ATTENTION, attend)
        if model.parts.per_layer is not None:
            raise refusal(model, "it has embeddings of tokens for each layer")
        self._model = torch_model(model, dtype=dtype, device=device, attention=ATTENTION)
        self._embedding = self._model.get_input_embeddings()
        self._gate = Gate()
        self.linears: dict[str, GatedLinear] = {}
        for path, module in model.base.named_modules():
            if not isinstance(module, GatedLoRALinear):
                continue
            linear = self._model.get_submodule(path)
            if type(linear) is not nn.Linear:
                raise refusal(model, f"transformers' {path} is not linear")
            adapted = GatedLinear(linear, scale=module.scale, gate=self._gate)
            self._model.set_submodule(path, adapted)
            self.linears[path] = adapted

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which type it computes."""
        return self._embedding.weight.dtype

    @torch.no_grad()
    def ordinary(self, ids: Tensor) -> OrdinaryRows:
        """Run the base model over a sequence ``[L]``."""
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        hidden = self._run(_Forward(layers=layers), input_ids=ids[None])
        return OrdinaryRows(hidden, layers)

    def masks(self, ordinary: OrdinaryRows, blocks: MaskBlocks, embeddings: Tensor) -> Tensor:
        """Run mask blocks of a sequence.

        Args:
            ordinary: its ordinary rows.
            blocks: which mask rows there are.
            embeddings: embeddings of the rows, as a table has them, ``[R, D]``.

        Returns:
            Final hidden states ``[R, D]``, with gradients of the embeddings and low-rank weights.
        """
        forward = _Forward(layers=ordinary.layers, blocks=blocks, device=self.device)
        factor = getattr(self._embedding, "embed_scale", 1.0)  # of Gemma's tables
        self._gate.is_open = True
        try:
            rows = (embeddings * factor).to(self.dtype)[None]
            return self._run(forward, inputs_embeds=rows, position_ids=forward.positions[None])
        finally:
            self._gate.is_open = False

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn final hidden states ``[R, D]`` into logits ``[R, V]`` by the base model's head."""
        return head_logits(self._model, hidden[None])[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding table, ``[...]`` to ``[..., D]``."""
        return F.embedding(ids, self._embedding.weight)

    @property
    def unembedding(self) -> Tensor:
        """The weight of the head ``[V, D]``."""
        return self._model.get_output_embeddings().weight

    def _run(self, forward: _Forward, **inputs: Tensor) -> Tensor:
        out = self._model.base_model(**inputs, use_cache=False, mask_rows=forward)
        return out.last_hidden_state[0]


@dataclass(frozen=True)
class _Forward:
    """What the attention function knows of a forward.

    Attributes:
        layers: keys and values of ordinary rows: written if there are no blocks, else read.
        blocks: the rows, if they are mask rows.
        device: of the tensors.
    """

    layers: Any
    blocks: MaskBlocks | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def positions(self) -> Tensor:
        """Position of each mask row ``[R]``."""
        assert self.blocks is not None
        return self._tensor(self.blocks.row_anchors + 1 + self.blocks.mask_offsets)

    @cached_property
    def num_seen(self) -> int:
        """Number of ordinary rows that any mask row sees."""
        assert self.blocks is not None
        return max(self.blocks.anchors) + 1

    @cached_property
    def longest(self) -> int:
        """Rows of the longest block, m."""
        assert self.blocks is not None
        return int(self.blocks.mask_offsets.max()) + 1

    @cached_property
    def places(self) -> Tensor | None:
        """Index of each row among padded blocks ``[R]``; None if no block is padded."""
        assert self.blocks is not None
        places = self.blocks.row_blocks * self.longest + self.blocks.mask_offsets
        return None if self._num_padded == len(places) else self._tensor(places)

    @cached_property
    def rows(self) -> Tensor:
        """Row of each place in the padded blocks ``[n m]``; R, one beyond the last, for none."""
        assert self.places is not None
        rows = torch.full((self._num_padded,), len(self.places), device=self.device)
        rows[self.places] = torch.arange(len(self.places), device=self.device)
        return rows

    @property
    def _num_padded(self) -> int:
        assert self.blocks is not None
        return len(self.blocks.anchors) * self.longest

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    def unseen(self, window: int | None) -> Tensor:
        """Which columns a mask row does not see, bool ``[R, S + m]``: ordinary rows, own block."""
        cached = self._masks.get(window)
        if cached is None:
            assert self.blocks is not None
            seen = np.arange(self.num_seen)[None]
            own, offsets = np.arange(self.longest)[None], self.blocks.mask_offsets[:, None]
            anchors = self.blocks.row_anchors[:, None]
            unseen = np.concatenate([seen > anchors, own > offsets], axis=1)
            if window is not None:
                ages = np.concatenate([anchors + 1 + offsets - seen, offsets - own], axis=1)
                unseen |= ages >= window
            cached = self._masks[window] = torch.from_numpy(unseen).to(self.device)
        return cached

    @cached_property
    def _masks(self) -> dict[int | None, Tensor]:
        return {}

    def to_blocks(self, x: Tensor) -> Tensor:
        """Put rows ``[H, G, R, C]`` into blocks ``[H, n, G m, C]``; padding is zero."""
        heads, groups, _, width = x.shape
        if self.places is not None:
            x = F.pad(x, (0, 0, 0, 1)).index_select(2, self.rows)
        x = x.view(heads, groups, -1, self.longest, width)
        return x.transpose(1, 2).reshape(heads, -1, groups * self.longest, width)

    def from_blocks(self, x: Tensor, groups: int) -> Tensor:
        """The inverse of ``to_blocks``."""
        heads, _, _, width = x.shape
        x = x.view(heads, -1, groups, self.longest, width).transpose(1, 2)
        x = x.reshape(heads, groups, -1, width)
        return x if self.places is None else x.index_select(2, self.places)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mask_rows: _Forward,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers, of ordinary rows or of mask rows.

    Args:
        module: the attention layer.
        query: ``[1, H G, R, Dh]``.
        key: ``[1, H, R, Dh]``.
        value: ``[1, H, R, Dh]``.
        attention_mask: not used: ``mask_rows`` has the rows.
        mask_rows: the forward.
        scaling: factor of the scores; None is the inverse root of Dh.
        sliding_window: number of rows that a row sees.
        softcap: limit of the scores, which is not supported.
        s_aux: attention sinks, likewise.
        options: such as a dropout, which is zero in evaluation.

    Returns:
        ``[1, R, H G, Dh]``, and no weights.

    Raises:
        ValueError: the model needs what is not supported.
    """
    del attention_mask, options
    if softcap is not None or s_aux is not None:
        raise ValueError("its attention has capped scores or sinks")
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    if mask_rows.blocks is None:
        mask_rows.layers[module.layer_idx] = (key[0], value[0])
        out = _causal(query, key, value, scaling=scaling, window=sliding_window)
    else:
        keys, values = (x[:, : mask_rows.num_seen] for x in mask_rows.layers[module.layer_idx])
        attention: Any = _MaskAttention.apply
        out = attention(
            query[0], key[0], value[0], keys, values, mask_rows, scaling, sliding_window
        )[None]
    return out.transpose(1, 2).contiguous(), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
) -> Tensor:
    length, mask = query.shape[2], None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )


class _MaskAttention(torch.autograd.Function):
    """Attention of mask rows to ordinary rows and to their own blocks, in one softmax.

    The scores of the two parts are computed apart, so those between blocks are not.  Ordinary rows
    have no gradient.  ``softmax``'s gradient is that of FlashAttention (arXiv 2205.14135, B.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: _Forward,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Attend.

        Args:
            ctx: for ``backward``.
            query: ``[H G, R, Dh]``.
            key: of the mask rows ``[H, R, Dh]``.
            value: likewise.
            keys: of the ordinary rows ``[H, S, Dh]``.
            values: likewise.
            rows: which row sees what.
            scaling: factor of the scores.
            window: number of rows that a row sees.

        Returns:
            ``[H G, R, Dh]``.
        """
        heads, seen = keys.shape[:2]
        shape = (heads, query.shape[0] // heads, *query.shape[1:])  # [H, G, R, Dh]
        query = query.reshape(shape)
        own_query = rows.to_blocks(query)
        own_key, own_value = rows.to_blocks(key[:, None]), rows.to_blocks(value[:, None])
        scores = _per_head(query, keys.transpose(1, 2))
        own_scores = rows.from_blocks(own_query @ own_key.transpose(2, 3), shape[1])
        joined = torch.cat([scores, own_scores], dim=-1)
        wide = joined.to(torch.promote_types(joined.dtype, torch.float32)).mul_(scaling)
        wide.masked_fill_(rows.unseen(window), -torch.inf)
        probs = wide.softmax(dim=-1).to(query.dtype)
        own_probs = rows.to_blocks(probs[..., seen:])
        out = _per_head(probs[..., :seen], values)
        out += rows.from_blocks(own_probs @ own_value, shape[1])
        ctx.save_for_backward(own_query, own_key, own_value, keys, values, probs, own_probs, out)
        ctx.rows, ctx.scaling = rows, scaling
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``query``, ``key`` and ``value``."""
        (grad,) = grad_outputs
        own_query, own_key, own_value, keys, values, probs, own_probs, out = ctx.saved_tensors
        rows, seen = ctx.rows, keys.shape[1]
        grad = grad.reshape(out.shape)
        own_grad, groups = rows.to_blocks(grad), out.shape[1]
        own_value_grad = rows.from_blocks(own_probs.transpose(2, 3) @ own_grad, 1)
        own_probs_grad = rows.from_blocks(own_grad @ own_value.transpose(2, 3), groups)
        probs_grad = torch.cat([_per_head(grad, values.transpose(1, 2)), own_probs_grad], dim=-1)
        wide = torch.promote_types(grad.dtype, torch.float32)
        mean = (grad.to(wide) * out).sum(dim=-1, keepdim=True)
        scores_grad = ((probs_grad - mean) * probs).mul_(ctx.scaling).to(grad.dtype)
        own_scores_grad = rows.to_blocks(scores_grad[..., seen:])
        query_grad = _per_head(scores_grad[..., :seen], keys)
        query_grad += rows.from_blocks(own_scores_grad @ own_key, groups)
        own_key_grad = rows.from_blocks(own_scores_grad.transpose(2, 3) @ own_query, 1)
        results = query_grad.flatten(0, 1), own_key_grad[:, 0], own_value_grad[:, 0]
        return (*results, None, None, None, None, None)


def _per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply rows ``[H, G, R, A]`` by a matrix of each head ``[H, A, C]``."""
    return torch.bmm(x.flatten(1, 2), matrices).view(*x.shape[:3], -1)
