"""Float32 layers in place of a model's own, for MLX's CPU back-end.

MLX's CPU quantised matmul runs at about 2 GFLOP/s and accumulates in half precision, so on a CPU
device all weights become float32 and matmuls go through BLAS.  For the few rows of a step, BLAS
spends its time packing the weights.  OpenBLAS has kernels that do not pack, for matrices of up to
a million multiply-adds; a weight cut into blocks of output columns that small is read once, takes
no packing, and can be shared between two threads (MLX streams).  Those kernels also sum every row
in the same order whatever the number of rows, so that verifying drafts gives a row the bits that
plain decoding gives it.
"""

from __future__ import annotations

import os
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.backends.cpu.blas import BLAS, has_small_matrix_kernels
from mlx_mtp.backends.cpu.blocks import replace_blocks
from mlx_mtp.model.wrappers import replace

MEMORY_SHARE = 0.8
UNPACKED_LIMIT = 1_000_000  # multiply-adds, see OpenBLAS's sgemm_small_kernel_permit
STEP_ROWS = 25
BLOCK_COLUMNS = (16, 8)
SHARED_SIZE = 500_000  # weights from which a second thread pays


class ColumnBlocks:
    """A weight ``[N, K]`` seen as blocks of output columns, in one part or two.

    Attributes:
        parts: views ``[blocks, K, columns]`` of the weight.
        max_rows: rows up to which the blocks are multiplied without packing.
    """

    def __init__(self, weight: mx.array, columns: int) -> None:
        num_out, num_in = weight.shape
        halves = 2 if weight.size >= SHARED_SIZE and num_out % (2 * columns) == 0 else 1
        size = num_out // halves
        self.parts = [
            weight[start : start + size].reshape(-1, columns, num_in).swapaxes(-1, -2)
            for start in range(0, num_out, size)
        ]
        self.max_rows = min(UNPACKED_LIMIT // (columns * num_in), STEP_ROWS)

    @classmethod
    def of(cls, weight: mx.array) -> ColumnBlocks | None:
        """Cut a weight, or return None where no block is small enough."""
        num_out, num_in = weight.shape
        for columns in BLOCK_COLUMNS:
            if num_out % columns == 0 and columns * num_in * STEP_ROWS <= UNPACKED_LIMIT:
                return cls(weight, columns)
        return None

    def multiply(self, x: mx.array, *, helper: Any) -> mx.array:
        """Multiply ``[1, L, K]`` to ``[1, L, N]``; the second part runs on the helper stream."""
        products = [mx.matmul(x, self.parts[0])]
        products += [mx.matmul(x, part, stream=helper) for part in self.parts[1:]]
        blocks = mx.concatenate(products) if len(products) > 1 else products[0]
        return blocks.swapaxes(0, 1).reshape(1, x.shape[-2], -1)

    def takes(self, x: mx.array) -> bool:
        """Whether ``x`` is one sequence of few enough rows."""
        return x.ndim == 3 and x.shape[0] == 1 and x.shape[1] <= self.max_rows


class DenseLinear(nn.Linear):
    """A float32 linear layer that is fast for the few rows of a step."""

    def __init__(self, weight: mx.array, *, bias: mx.array | None, helper: Any) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        if bias is not None:
            self.bias = bias
        self.blocks = ColumnBlocks.of(weight)
        self.helper = helper

    def select_rows(self, ids: mx.array) -> DenseLinear:
        """A layer with some of the outputs ``[N]``."""
        bias = self.bias[ids] if "bias" in self else None
        return DenseLinear(self.weight[ids], bias=bias, helper=self.helper)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``[..., L, in]`` to ``[..., L, out]``."""
        if self.blocks is None or not self.blocks.takes(x):
            return super().__call__(x)
        y = self.blocks.multiply(x, helper=self.helper)
        return y + self.bias if "bias" in self else y


class DenseEmbedding(nn.Embedding):
    """A float32 embedding whose use as an unembedding is fast for the few rows of a step."""

    def __init__(self, weight: mx.array, *, helper: Any) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self.blocks = ColumnBlocks.of(weight)
        self.helper = helper

    def select_rows(self, ids: mx.array) -> DenseEmbedding:
        """An embedding with some of the rows ``[N]``."""
        return DenseEmbedding(self.weight[ids], helper=self.helper)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map ``[..., L, D]`` to logits ``[..., L, V]``."""
        if self.blocks is None or not self.blocks.takes(x):
            return super().as_linear(x)
        return self.blocks.multiply(x, helper=self.helper)


class ShortConv(nn.Conv1d):
    """A depthwise convolution of a few taps as sums of shifted rows; MLX's is slow on a CPU."""

    def __init__(self, conv: Any) -> None:
        nn.Module.__init__(self)
        dict.update(self, conv)

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve ``[B, K - 1 + L, C]`` to ``[B, L, C]``."""
        taps = self.weight[:, :, 0]  # [C, K]
        num_rows = x.shape[1] - taps.shape[1] + 1
        y = x[:, :num_rows] * taps[:, 0]
        for i in range(1, taps.shape[1]):
            y = y + x[:, i : i + num_rows] * taps[:, i]
        return y + self.bias if "bias" in self else y

    @staticmethod
    def takes(module: Any) -> bool:
        """Whether a module is such a convolution."""
        return (
            isinstance(module, nn.Conv1d)
            and (module.stride, module.padding, module.dilation) == (1, 0, 1)
            and module.weight.shape[0] == module.groups
            and module.weight.shape[2] == 1
        )


def to_float32(base: nn.Module) -> bool:
    """Turn all weights of a model into float32, quantised ones included, in place.

    Returns:
        False if the float32 weights would not fit into memory; the model is then unchanged.
    """
    if _float32_bytes(base) > MEMORY_SHARE * _memory_bytes():
        return False
    helper = mx.new_thread_local_stream(mx.cpu) if has_small_matrix_kernels(BLAS) else None
    replace(
        base,
        {
            path: _float32_layer(module, helper)
            for path, module in base.named_modules()
            if _has_weight(module)
        },
    )
    convs = {path: each for path, each in base.named_modules() if ShortConv.takes(each)}
    replace(base, {path: ShortConv(conv) for path, conv in convs.items()})
    base.apply(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
    replace_blocks(base)
    return True


_LINEAR = nn.Linear | nn.QuantizedLinear
_EMBEDDING = nn.Embedding | nn.QuantizedEmbedding


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, _LINEAR | _EMBEDDING)


def _float32_layer(layer: Any, helper: Any) -> nn.Module:
    """The float32 layer for a linear layer or an embedding, quantised or not."""
    is_linear = isinstance(layer, _LINEAR)
    weight, bias = _float32_weight(layer), layer.get("bias")
    bias = None if bias is None else bias.astype(mx.float32)
    if helper is not None:
        if is_linear:
            return DenseLinear(weight, bias=bias, helper=helper)
        return DenseEmbedding(weight, helper=helper)
    plain = nn.Linear(1, 1, bias=False) if is_linear else nn.Embedding(1, 1)
    plain.weight = weight
    if bias is not None:
        plain.bias = bias
    return plain


def _float32_weight(layer: Any) -> mx.array:
    """The weight of a layer in float32; affine scales are widened before they are applied."""
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return layer.weight.astype(mx.float32)
    scales: mx.array = layer.scales
    biases: Any = layer.get("biases")
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(
        layer.weight,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    ).astype(mx.float32)
    mx.eval(weight)  # one layer after the other, so that no two forms of the model coexist
    return weight


def _float32_bytes(base: nn.Module) -> int:
    """Bytes that the weights would take in float32."""
    total = 0
    for name, value in cast(list[tuple[str, mx.array]], tree_flatten(base.parameters())):
        packed = value.dtype == mx.uint32 and name.endswith("weight")
        total += value.nbytes * 8 if packed else value.size * 4
    return total


def _memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
