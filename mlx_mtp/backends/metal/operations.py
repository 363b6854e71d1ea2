"""The operations of a step that we have kernels for: quantised matmul, gated LoRA, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.backends.metal.attention import Mask, step_attention_kernel, step_attention_ops
from mlx_mtp.backends.metal.matmul import (
    MAX_ROWS,
    PackedWeight,
    add_gated_ops,
    gated_lora_down_kernel,
    gated_lora_down_ops,
    skinny_qmm_kernel,
    skinny_qmm_ops,
)
from mlx_mtp.backends.metal.operation import CheckError, Kernel, Operation, is_near, same_bits
from mlx_mtp.model.layout import linear_layout
from mlx_mtp.model.lora import GatedTerm

_RANK = 8
_GATED_ROWS, _GATE_SPLIT = 9, 3
_ATTENTION_LAYERS = 4


class MatmulInputs(NamedTuple):
    """Rows ``[M, K]`` and the number of the layer whose weight they are multiplied by."""

    x: mx.array
    layer: int


class Matmul(Operation):
    """Few rows times the weights of one shape, ``[M, K]`` to ``[M, N]``.

    Attributes:
        weights: of different layers of a model; empty where they are not quantised.
        layers: the layers, called if there are no weights.
    """

    kernels = (Kernel(), Kernel("matrix", 16), Kernel("matrix", 8))
    row_axis = 0
    check_rows = (1, 2, 3, 4, 5, 8, 9, 16, 17, MAX_ROWS)
    benchmark_rows = (1, 4, 8, 16)
    decisive_rows = (4, 8)

    def __init__(
        self,
        name: str,
        *,
        weights: Sequence[PackedWeight],
        layers: Sequence[Callable[[mx.array], mx.array]] = (),
        num_inputs: int = 0,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        self.name = name
        self.weights = weights
        self.layers = layers
        self._num_inputs = weights[0].shape[1] if weights else num_inputs
        self._dtype = weights[0].scales.dtype if weights else dtype

    @property
    def is_supported(self) -> bool:
        """Whether there is a kernel for the shape."""
        return bool(self.weights) and self.weights[0].is_supported

    def ours(self, inputs: MatmulInputs, kernel: Kernel) -> mx.array:
        """Our kernel's result."""
        x, layer = inputs
        return skinny_qmm_kernel(
            x, self.weights[layer], variant=kernel.variant, simdgroups=kernel.simdgroups
        )

    def stock(self, inputs: MatmulInputs) -> mx.array:
        """MLX's result."""
        x, layer = inputs
        if self.weights:
            return skinny_qmm_ops(x, self.weights[layer])
        return self.layers[layer](x[None])[0]

    def reference(self, inputs: MatmulInputs) -> mx.array:
        """The result in float32, from weights that were dequantised in float32."""
        x, layer = inputs
        packed = self.weights[layer]
        weight = mx.dequantize(
            packed.weight,
            packed.scales.astype(mx.float32),
            packed.biases.astype(mx.float32),
            group_size=packed.group_size,
            bits=packed.bits,
        )
        return x.astype(mx.float32) @ weight.T

    def check_inputs(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield inputs to compare with the reference."""
        yield f"{max(rows)} rows", MatmulInputs(self._rows_of_seed(0)[: max(rows)], 0)

    def ordered_rows(self, num_rows: int) -> Callable[[int, int], Any]:
        """Draw rows; return a function that gives the inputs of rows ``first`` to ``last``."""
        x = self._rows_of_seed(0)[:num_rows]
        return lambda first, last: MatmulInputs(x[first:last], 0)

    def benchmark_inputs(self, rows: int, context: int) -> list[Any]:
        """Rows for each layer."""
        del context
        x = self._rows_of_seed(1, rows)
        mx.eval(x)
        return [MatmulInputs(x, layer) for layer in range(len(self.weights or self.layers))]

    def with_gated_lora(self) -> GatedMatmul:
        """The same with gated low-rank weights."""
        return GatedMatmul(self)

    def _rows_of_seed(self, seed: int, rows: int = MAX_ROWS) -> mx.array:
        x = mx.random.normal((rows, self._num_inputs), key=mx.random.key(seed))
        return x.astype(self._dtype)


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Gated low-rank weights of one layer, for checks.

    Attributes:
        lora_a: ``[r, K]``.
        lora_b: ``[r, N]``.
        scale: factor.
        gate_split: index of the first adapted row.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    gate_split: int

    @classmethod
    def random(cls, packed: PackedWeight, *, gate_split: int) -> LowRank:
        """Draw weights that fit a packed weight."""
        outputs, inputs = packed.shape
        a_key, b_key = mx.random.split(mx.random.key(2))
        dtype = packed.scales.dtype
        a = mx.random.normal((_RANK, inputs), key=a_key) / inputs**0.5
        b = mx.random.normal((_RANK, outputs), key=b_key)
        return cls(lora_a=a.astype(dtype), lora_b=b.astype(dtype), scale=2.0, gate_split=gate_split)

    def term(self, low_rank: mx.array) -> GatedTerm:
        """What a matmul adds, given ``[G, r]``."""
        return GatedTerm(
            low_rank=low_rank,
            first_rank=0,
            lora_b=self.lora_b,
            scale=self.scale,
            gate_split=self.gate_split,
        )

    def product(self, x: mx.array) -> mx.array:
        """What is added to the adapted rows of ``x``, float32 ``[G, N]``."""
        rows = x[self.gate_split :].astype(mx.float32)
        low = rows @ self.lora_a.astype(mx.float32).T
        return self.scale * (low @ self.lora_b.astype(mx.float32))


class GatedMatmul(Matmul):
    """A matmul with gated low-rank weights: ordinary rows must keep the bits of the plain one."""

    def __init__(self, plain: Matmul) -> None:
        super().__init__(f"gated {plain.name}", weights=plain.weights)
        self._plain = plain
        self._low_rank = [
            LowRank.random(weight, gate_split=_GATE_SPLIT) for weight in plain.weights[:1]
        ]

    def ours(self, inputs: MatmulInputs, kernel: Kernel) -> mx.array:
        """Our kernels' result."""
        x, layer = inputs
        low = self._low_rank[layer]
        down = gated_lora_down_kernel(x, low.lora_a, gate_split=low.gate_split)
        return skinny_qmm_kernel(
            x,
            self.weights[layer],
            variant=kernel.variant,
            gated=low.term(down),
            simdgroups=kernel.simdgroups,
        )

    def stock(self, inputs: MatmulInputs) -> mx.array:
        """MLX's result."""
        low = self._low_rank[inputs.layer]
        down = gated_lora_down_ops(inputs.x, low.lora_a, gate_split=low.gate_split)
        return add_gated_ops(super().stock(inputs), low.term(down))

    def reference(self, inputs: MatmulInputs) -> mx.array:
        """The result in float32."""
        plain = super().reference(inputs)
        low = self._low_rank[inputs.layer]
        split = low.gate_split
        return mx.concatenate([plain[:split], plain[split:] + low.product(inputs.x)])

    def describe(self, kernel: Kernel) -> str:
        """What a message calls a kernel."""
        return f"the gated {kernel.variant} variant"

    def check_kernel(self, kernel: Kernel) -> mx.array:
        """Check one kernel against the reference and, on ordinary rows, against the plain one."""
        inputs = MatmulInputs(self._rows_of_seed(0)[:_GATED_ROWS], 0)
        y, plain = self.ours(inputs, kernel), self._plain.ours(inputs, kernel)
        if not same_bits(y[:_GATE_SPLIT], plain[:_GATE_SPLIT]):
            raise CheckError(f"{self.describe(kernel)} changes ordinary rows")
        if not is_near(y, self.reference(inputs)):
            raise CheckError(f"{self.describe(kernel)} is wrong")
        return y


class AttentionKey(NamedTuple):
    """The shape of a call of attention: what a choice depends on."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, queries: mx.array, keys: mx.array) -> AttentionKey:
        """The key of a call with ``[1, H, M, D]`` queries and ``[1, Hkv, N, D]`` keys."""
        return cls(queries.shape[1], keys.shape[1], keys.shape[3], keys.dtype)

    @property
    def name(self) -> str:
        """Such as ``attention 9/3 heads of 64 float16``."""
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return f"attention {self.heads}/{self.kv_heads} heads of {self.head_dim} {dtype}"


class AttentionInputs(NamedTuple):
    """Queries ``[1, H, M, D]``, keys and values ``[1, Hkv, N, D]`` and a mask ``[M, N]``."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    mask: Mask


class StepAttentionOperation(Operation):
    """Attention of few rows over a context.

    Attributes:
        key: the shape.
        check_contexts: numbers of keys to check.
    """

    row_axis = 2
    check_rows = (1, 2, 3, 5, 8, 16, MAX_ROWS)
    check_contexts: Sequence[int] = (1, 33, 128, 129, 700)
    benchmark_rows = (1, 8, 16)
    decisive_rows = (8, 16)
    contexts = (512, 4096)

    def __init__(self, key: AttentionKey) -> None:
        self.key = key
        self.name = key.name
        self.scale = key.head_dim**-0.5

    def ours(self, inputs: AttentionInputs, kernel: Kernel) -> mx.array:
        """Our kernel's result."""
        del kernel
        *arrays, mask = inputs
        return step_attention_kernel(*arrays, scale=self.scale, mask=mask)

    def stock(self, inputs: AttentionInputs) -> mx.array:
        """MLX's result."""
        *arrays, mask = inputs
        return step_attention_ops(*arrays, scale=self.scale, mask=mask)

    def reference(self, inputs: AttentionInputs) -> mx.array:
        """``[1, H, M, D]`` in float32 operations."""
        repeats = self.key.heads // self.key.kv_heads
        keys, values = (
            mx.repeat(x.astype(mx.float32), repeats, axis=1) for x in (inputs.keys, inputs.values)
        )
        scores = (inputs.queries.astype(mx.float32) * self.scale) @ keys.swapaxes(-1, -2)
        if isinstance(inputs.mask, mx.array):
            scores = mx.where(inputs.mask, scores, -float("inf"))
        return mx.softmax(scores, axis=-1) @ values

    def check_inputs(self, rows: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield inputs to compare with the reference."""
        for context in self.check_contexts:
            for count in (count for count in rows if count <= context):
                inputs = self._random(count, context)
                yield f"{count} rows and {context} keys", inputs

    def ordered_rows(self, num_rows: int) -> Callable[[int, int], Any]:
        """Draw rows; return a function that gives the inputs of rows ``first`` to ``last``."""
        context = max(*self.check_contexts, num_rows)
        queries, keys, values, _ = self._random(num_rows, context)
        before = context - num_rows

        def select(first: int, last: int) -> AttentionInputs:
            return AttentionInputs(
                queries[:, :, first:last],
                keys[..., : before + last, :],
                values[..., : before + last, :],
                "causal" if last - first > 1 else None,
            )

        return select

    def benchmark_inputs(self, rows: int, context: int) -> list[Any]:
        """Rows, keys and values for a few layers."""
        mask = step_mask(rows, context)
        drawn = self._layers if rows <= MAX_ROWS else self._draw_layers(rows)
        layers = [
            AttentionInputs(
                layer.queries[:, :, :rows],
                layer.keys[..., :context, :],
                layer.values[..., :context, :],
                mask,
            )
            for layer in drawn
        ]
        mx.eval(layers)
        return layers

    def describe(self, kernel: Kernel) -> str:
        """What a message calls the kernel."""
        del kernel
        return "attention"

    @cached_property
    def _layers(self) -> list[AttentionInputs]:
        return self._draw_layers(MAX_ROWS)

    def _draw_layers(self, rows: int) -> list[AttentionInputs]:
        context = max(*self.contexts, rows)
        return [self._random(rows, context, seed=seed) for seed in range(_ATTENTION_LAYERS)]

    def _random(self, rows: int, context: int, *, seed: int = 0) -> AttentionInputs:
        """Random rows over random keys and values, with the mask of a step."""
        seeds = mx.random.split(mx.random.key(seed), 3)
        key = self.key
        sizes = ((key.heads, rows), (key.kv_heads, context), (key.kv_heads, context))
        queries, keys, values = (
            mx.random.normal((1, *size, key.head_dim), key=part).astype(key.dtype)
            for size, part in zip(sizes, seeds, strict=True)
        )
        return AttentionInputs(queries, keys, values, step_mask(rows, context))


def step_mask(rows: int, context: int) -> mx.array | None:
    """The mask ``[rows, context]`` of a step, half of whose rows are masks; None for one row."""
    if rows == 1:
        return None
    masks = rows // 2
    layout = linear_layout(num_pending=1, num_draft_tokens=rows - 1 - masks, num_masks=masks)
    return mx.pad(layout.attention, [(0, 0), (context - rows, 0)], constant_values=True)
