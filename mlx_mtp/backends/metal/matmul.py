"""Metal kernels for quantised matmuls of few rows: the same in plain operations, and launches.

The source of the kernels is in ``metal/``, whose README explains them.  A launch has two halves:
``..._launch`` describes it (a pure function, so that tests can run the same source on a CPU), and
``run`` passes it to MLX.  ``choice`` decides whether a kernel is used.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.model.lora import GatedTerm

Variant = Literal["scalar", "matrix"]

MAX_ROWS = 32
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
SCALAR_ROWS = 8  # of a tile; more sums would not stay in registers
MATRIX_MIN_ROWS = 4
_SCALAR_THREADS = 128
_DOWN_SIMDGROUPS = 4
_DOWN_ROWS = 4
_RANKS_PER_SIMDGROUP = 2


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """An affine quantised weight as MLX packs it.

    Attributes:
        weight: uint32 ``[N, K * bits / 32]``.
        scales: ``[N, K / group_size]``.
        biases: likewise.
        group_size: weights that share a scale.
        bits: of a weight.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scales.shape[0], self.scales.shape[1] * self.group_size

    @property
    def name(self) -> str:
        """Shape and format, such as ``4096x14336 4-bit g64 float16`` (outputs x inputs)."""
        outputs, inputs = self.shape
        dtype = str(self.scales.dtype).removeprefix("mlx.core.")
        return f"{outputs}x{inputs} {self.bits}-bit g{self.group_size} {dtype}"

    @property
    def is_supported(self) -> bool:
        """Whether there is a kernel for it.

        MLX hands arrays of fewer than 8 elements to kernels in another address space.
        """
        known = self.bits in BITS and self.group_size in GROUP_SIZES
        return known and self.scales.dtype in DTYPES and self.scales.size >= 8


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The arguments of a kernel call in MLX.

    Attributes:
        name: of the kernel; a hash of its source is appended.
        source: the body, a call of a template function.
        inputs: arrays and numbers by parameter name.
        template: types and numbers by the name that the body uses.
        grid: threads.
        threadgroup: threads.
        output_shape: of the first output, ``y``.
        output_dtype: likewise.
        row_contiguous: False passes arrays with their own strides.
        more_outputs: shape and type of further outputs, by parameter name.
    """

    name: str
    source: str
    inputs: dict[str, Any]
    template: dict[str, Any]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shape: tuple[int, ...]
    output_dtype: mx.Dtype
    row_contiguous: bool = True
    more_outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and type of every output by parameter name."""
        return {"y": (self.output_shape, self.output_dtype), **self.more_outputs}


@dataclass(frozen=True, kw_only=True)
class MatrixTiles:
    """How the matrix variant divides its work.

    Attributes:
        row_tiles: tiles of 8 rows.
        column_tiles: tiles of 8 outputs.
        simdgroups: of a threadgroup, 8 or 16.
    """

    row_tiles: int
    column_tiles: int
    simdgroups: int = 16


def matrix_tiles(rows: int, *, simdgroups: int = 16) -> MatrixTiles:
    """Tiles for so many rows: all rows in one threadgroup, at most 16 pairs of sums a lane."""
    row_tiles = min(-(-rows // 8), 4)
    return MatrixTiles(
        row_tiles=row_tiles, column_tiles=4 if row_tiles <= 2 else 2, simdgroups=simdgroups
    )


# --- quantised matmul of few rows ------------------------------------------------------------


def skinny_qmm_ops(
    x: mx.array, packed: PackedWeight, *, gated: GatedTerm | None = None
) -> mx.array:
    """Multiply rows ``[..., K]`` by a packed weight to ``[..., N]``; in plain operations."""
    y = mx.quantized_matmul(
        x,
        packed.weight,
        packed.scales,
        packed.biases,
        transpose=True,
        group_size=packed.group_size,
        bits=packed.bits,
    )
    return y if gated is None else add_gated_ops(y, gated)


def skinny_qmm_launch(
    x: mx.array,
    packed: PackedWeight,
    *,
    variant: Variant = "scalar",
    gated: GatedTerm | None = None,
    simdgroups: int = 16,
) -> Launch:
    """Describe how the kernel multiplies rows ``[..., K]``.

    Args:
        x: ``[..., K]``, M rows of the type of the scales.
        packed: the weight.
        variant: both sum in the same order.
        gated: term to add to the rows from its gate split on.
        simdgroups: of the matrix variant; 8 for devices whose threadgroups are small.
    """
    rows, (outputs, inputs) = math.prod(x.shape[:-1]), packed.shape
    template: dict[str, Any] = {
        "T": x.dtype,
        "group_size": packed.group_size,
        "bits": packed.bits,
    }
    if variant == "scalar":
        tile_rows = min(rows, SCALAR_ROWS)
        columns = 4 if tile_rows <= 4 else 2
        template |= {"rows": tile_rows, "outputs": columns}
        wide, high, threads = 8 * columns, tile_rows, _SCALAR_THREADS
        call = _SCALAR_CALL
    else:
        tiles = matrix_tiles(rows, simdgroups=simdgroups)
        template |= {
            "row_tiles": tiles.row_tiles,
            "column_tiles": tiles.column_tiles,
            "simdgroups": simdgroups,
        }
        wide, high, threads = 8 * tiles.column_tiles, 8 * tiles.row_tiles, 32 * simdgroups
        call = _MATRIX_CALL
    arrays: dict[str, Any] = {
        "x": x,
        "weight": packed.weight,
        "scales": packed.scales,
        "biases": packed.biases,
        "shape": _integers(rows, outputs, inputs),
    }
    store = _PLAIN_STORE
    if gated is not None:
        arrays |= _gated_inputs(gated)
        store = _GATED_STORE
    return Launch(
        name=f"mlx_mtp_skinny_qmm_{variant}{'_gated' if gated else ''}",
        source=store + call,
        inputs=arrays,
        template=template,
        grid=(-(-outputs // wide) * threads, -(-rows // high), 1),
        threadgroup=(threads, 1, 1),
        output_shape=(*x.shape[:-1], outputs),
        output_dtype=x.dtype,
    )


def skinny_qmm_kernel(
    x: mx.array,
    packed: PackedWeight,
    *,
    variant: Variant = "scalar",
    gated: GatedTerm | None = None,
    simdgroups: int = 16,
) -> mx.array:
    """Multiply rows ``[..., K]`` by a packed weight to ``[..., N]``; on Metal."""
    return run(skinny_qmm_launch(x, packed, variant=variant, gated=gated, simdgroups=simdgroups))


# --- gated low-rank weights ------------------------------------------------------------------


def gated_lora_down_ops(x: mx.array, lora_a: mx.array, *, gate_split: int) -> mx.array:
    """Multiply the rows from the gate split on by A; in plain operations.

    Args:
        x: rows ``[M, K]``.
        lora_a: stacked ranks ``[R, K]``.
        gate_split: index of the first row that is taken.

    Returns:
        float32 ``[M - gate_split, R]``.
    """
    return (x[gate_split:] @ lora_a.T).astype(mx.float32)


def gated_lora_down_launch(x: mx.array, lora_a: mx.array, *, gate_split: int) -> Launch:
    """Describe how the kernel multiplies the rows of ``[..., K]`` from the gate split on by A."""
    rows, ranks = math.prod(x.shape[:-1]), lora_a.shape[0]
    taken = rows - gate_split
    tile_rows = min(taken, _DOWN_ROWS)
    threads = 32 * _DOWN_SIMDGROUPS
    return Launch(
        name="mlx_mtp_gated_lora_down",
        source=_DOWN_CALL,
        inputs={
            "x": x,
            "lora_a": lora_a,
            "shape": _integers(rows, ranks, x.shape[-1], gate_split),
        },
        template={"T": x.dtype, "rows": tile_rows, "simdgroups": _DOWN_SIMDGROUPS},
        grid=(
            -(-ranks // (_RANKS_PER_SIMDGROUP * _DOWN_SIMDGROUPS)) * threads,
            -(-taken // tile_rows),
            1,
        ),
        threadgroup=(threads, 1, 1),
        output_shape=(taken, ranks),
        output_dtype=mx.float32,
    )


def gated_lora_down_kernel(x: mx.array, lora_a: mx.array, *, gate_split: int) -> mx.array:
    """Multiply the rows from the gate split on by A; on Metal."""
    return run(gated_lora_down_launch(x, lora_a, gate_split=gate_split))


def add_gated_ops(y: mx.array, gated: GatedTerm) -> mx.array:
    """Add a gated term to ``y`` ``[M, N]``, in plain operations; earlier rows keep their bits."""
    rank = gated.lora_b.shape[0]
    low_rank = gated.low_rank[:, gated.first_rank : gated.first_rank + rank]
    ordinary, adapted = mx.split(y, [gated.gate_split], axis=0)
    adapted = mx.addmm(adapted, low_rank.astype(y.dtype), gated.lora_b, alpha=gated.scale)
    return mx.concatenate([ordinary, adapted], axis=0)


# --- on Metal --------------------------------------------------------------------------------


def run(launch: Launch) -> mx.array:
    """Run a kernel on the GPU; return ``y``.

    Raises:
        RuntimeError: see ``run_all``.
    """
    return run_all(launch)[0]


def run_all(launch: Launch) -> list[mx.array]:
    """Run a kernel on the GPU; return all its outputs.

    Raises:
        RuntimeError: there is no Metal device, or it cannot run so many threads together; the
            latter is raised when the result is evaluated.
    """
    names = (tuple(launch.inputs), tuple(launch.outputs))
    kernel = _kernel(launch.name, launch.source, *names, launch.row_contiguous)
    return kernel(
        inputs=list(launch.inputs.values()),
        template=list(launch.template.items()),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for shape, _ in launch.outputs.values()],
        output_dtypes=[dtype for _, dtype in launch.outputs.values()],
    )


@functools.cache
def kernel_header() -> str:
    """The source of all kernels, complete template functions."""
    folder = files("mlx_mtp") / "metal"
    return "\n".join((folder / f"{name}.metal").read_text(encoding="utf-8") for name in _FILES)


@functools.cache
def _kernel(
    name: str, source: str, inputs: Sequence[str], outputs: Sequence[str], row_contiguous: bool
) -> Any:
    header = kernel_header()
    # Two kernels of one name have run each other's code, so the text is part of the name.
    digest = hashlib.sha256((header + source).encode()).hexdigest()[:12]
    return mx.fast.metal_kernel(
        name=f"{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=row_contiguous,
    )


def _gated_inputs(gated: GatedTerm) -> dict[str, Any]:
    numbers = [
        gated.gate_split,
        gated.lora_b.shape[0],
        gated.low_rank.shape[1],
        gated.first_rank,
    ]
    return {
        "low_rank": gated.low_rank,
        "lora_b": gated.lora_b,
        "gate": _integers(*numbers),
        "lora_scale": number(gated.scale),
    }


@functools.lru_cache(maxsize=4096)
def _integers(*values: int) -> mx.array:
    """An array of integers; a step passes the same ones in every layer."""
    return mx.array(values, dtype=mx.int32)


@functools.lru_cache(maxsize=256)
def number(value: float) -> mx.array:
    """A number as a float32 array."""
    return mx.array(value, dtype=mx.float32)


_FILES = (
    "skinny_qmm",
    "skinny_qmm_matrix",
    "gated_lora",
    "step_attention",
    "step_attention_spans",
    "recurrent_step",
    "gated_delta_step",
    "ssm_step",
)

_PLAIN_STORE = "StoreSum store;\n"
_GATED_STORE = """AddGatedLora<T> store{
    low_rank + gate[3], lora_b, lora_scale, gate[0], gate[1], gate[2], shape[1]};
"""
_SCALAR_CALL = """threadgroup T shared[rows * 1024];
skinny_qmm_scalar<T, rows, outputs, group_size, bits>(
    x, weight, scales, biases, y, SkinnyShape{shape[0], shape[1], shape[2]}, store, shared,
    threadgroup_position_in_grid.xy, thread_index_in_threadgroup);
"""
_MATRIX_CALL = """threadgroup float partial[simdgroups * 64 * column_tiles];
skinny_qmm_matrix<T, row_tiles, column_tiles, simdgroups, group_size, bits>(
    x, weight, scales, biases, y, SkinnyShape{shape[0], shape[1], shape[2]}, store, partial,
    threadgroup_position_in_grid.xy, thread_index_in_threadgroup);
"""
_DOWN_CALL = """gated_lora_down<T, rows, simdgroups>(
    x, lora_a, y, SkinnyShape{shape[0], shape[1], shape[2]}, shape[3],
    threadgroup_position_in_grid.xy, thread_index_in_threadgroup);
"""
