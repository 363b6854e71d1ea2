"""Which kernels the dispatch can launch, each as a small launch of it: what the gate compiles.

A template has more arguments than anyone would compile in all combinations.  DEFAULT has every one
of the default format; SAMPLED has each of the other formats, with the number of rows changing from
one to the next, so that all meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.attention import HEAD_DIMS, Mask, merge_launch, step_attention_launch
from mlx_mtp.backends.metal.gated_delta import DeltaRows, gated_delta_step_launch
from mlx_mtp.backends.metal.matmul import Launch, PackedWeight, Variant
from mlx_mtp.backends.metal.recurrence import StepRuns
from mlx_mtp.backends.metal.ssm import SsmRows, SsmWeights, ssm_step_launch
from mlx_mtp.model.layout import quadratic_layout
from mlx_mtp.model.lora import GatedTerm

BITS, GROUP_SIZE = 4, 64  # of the default format, in half and bfloat16
OUTPUTS, INPUTS, RANK = 64, 256, 8
TYPES = {mx.float16: "half", mx.bfloat16: "bfloat16", mx.float32: "float32"}
MATRIX_ROWS = (8, 16, 24, 32)  # one for each number of row tiles
KEYS = 256
STEP = quadratic_layout(num_pending=1, num_draft_tokens=1, num_masks=3)  # of a recurrence
HEADS, VALUE_DIM = 8, 64


@dataclass(frozen=True)
class Case:
    """kernel: for people; rows: of the step; launch: an example."""

    kernel: str
    rows: int
    launch: Launch


def default_cases() -> Iterator[Case]:
    """Every kernel of 4 bits, groups of 64, half and bfloat16; attention from heads of 64."""
    for dtype in (mx.float16, mx.bfloat16):
        for rows in range(1, kernels.SCALAR_ROWS + 1):
            yield matmul(rows, dtype=dtype)
        for rows in MATRIX_ROWS:
            yield matmul(rows, dtype=dtype, variant="matrix")
        for rows in (16, 32):
            yield matmul(rows, dtype=dtype, variant="matrix", simdgroups=8)
        for variant in ("scalar", "matrix"):
            yield matmul(8, dtype=dtype, variant=variant, gated=True)
        for rows in range(1, 5):
            yield lora_down(rows, dtype=dtype)
        for rows in (1, 4, 8, 32):
            yield spans(rows, dtype=dtype, mask="causal")
        yield merge(64, dtype=dtype)
        yield gated_delta(dtype=dtype)
        yield gated_delta(dtype=dtype, by_key=True)
        yield ssm(dtype=dtype)


def sampled_cases() -> Iterator[Case]:
    """Every other format, smaller threadgroups, other heads and masks, at some number of rows."""
    formats = [(bits, size) for bits in kernels.BITS for size in kernels.GROUP_SIZES]
    for i, (bits, size) in enumerate(formats):
        yield matmul(
            i % kernels.SCALAR_ROWS + 1,
            dtype=kernels.DTYPES[(i + i // 3) % 3],
            bits=bits,
            group_size=size,
            gated=i % 4 == 1,
        )
    for i, bits in enumerate(kernels.BITS):
        yield matmul(
            MATRIX_ROWS[i % 4],
            dtype=kernels.DTYPES[(i + i // 3) % 3],
            bits=bits,
            group_size=kernels.GROUP_SIZES[i % 3],
            variant="matrix",
            gated=i % 4 == 2,
            simdgroups=8 if i % 2 else 16,
        )
    for i, head_dim in enumerate(HEAD_DIMS):
        rows, dtype = i + 2, kernels.DTYPES[(i + 1) % 3]
        masks: tuple[Mask, ...] = ("causal", None, mx.zeros((rows, KEYS), dtype=mx.bool_))
        yield spans(rows, dtype=dtype, head_dim=head_dim, mask=masks[i % 3])
        yield merge(head_dim, dtype=kernels.DTYPES[(i + 2) % 3])
    for dims in (64, 256):
        yield gated_delta(dtype=mx.float32, dims=dims, by_key=dims == 256)
        yield ssm(dtype=mx.float32, state_dim=dims)


def matmul(
    rows: int,
    *,
    dtype: mx.Dtype,
    bits: int = BITS,
    group_size: int = GROUP_SIZE,
    variant: Variant = "scalar",
    gated: bool = False,
    simdgroups: int = 16,
) -> Case:
    """A quantised matmul; of a gated one, all rows but the first are adapted."""
    empty = mx.zeros((OUTPUTS, INPUTS), dtype=dtype)
    weight, scales, biases = mx.quantize(empty, group_size=group_size, bits=bits)
    packed = PackedWeight(
        weight=weight, scales=scales, biases=biases, group_size=group_size, bits=bits
    )
    term = GatedTerm(
        low_rank=mx.zeros((rows, RANK)),
        first_rank=0,
        lora_b=mx.zeros((RANK, OUTPUTS), dtype=dtype),
        scale=1.0,
        gate_split=1,
    )
    launch = kernels.skinny_qmm_launch(
        mx.zeros((rows, INPUTS), dtype=dtype),
        packed,
        variant=variant,
        gated=term if gated else None,
        simdgroups=simdgroups,
    )
    name = f"{variant}{' gated' if gated else ''}, {bits} bits by {group_size}, {TYPES[dtype]}"
    return Case(name if simdgroups == 16 else f"{name}, 8 simdgroups", rows, launch)


def lora_down(rows: int, *, dtype: mx.Dtype) -> Case:
    """The first product of gated low-rank weights, of so many adapted rows."""
    x, lora_a = (mx.zeros((count, INPUTS), dtype=dtype) for count in (rows + 1, RANK))
    launch = kernels.gated_lora_down_launch(x, lora_a, gate_split=1)
    return Case(f"gated_lora_down, {TYPES[dtype]}", rows, launch)


def spans(rows: int, *, dtype: mx.Dtype, head_dim: int = 64, mask: Mask = None) -> Case:
    """The first kernel of step attention, three query heads for each kv head."""
    queries = mx.zeros((1, 3, rows, head_dim), dtype=dtype)
    keys = mx.zeros((1, 1, KEYS, head_dim), dtype=dtype)
    launch = step_attention_launch(queries, keys, keys, scale=1.0, mask=mask)
    sees = launch.name.rsplit("_", 1)[-1]
    return Case(f"attention spans, heads of {head_dim}, {sees}, {TYPES[dtype]}", rows, launch)


def merge(head_dim: int, *, dtype: mx.Dtype) -> Case:
    """The second kernel of step attention, which knows nothing of rows."""
    launch = merge_launch(mx.zeros((3, 2, head_dim + 2)), heads=3, dtype=dtype)
    return Case(f"attention merge, heads of {head_dim}, {TYPES[dtype]}", 1, launch)


def gated_delta(*, dtype: mx.Dtype, dims: int = 128, by_key: bool = False) -> Case:
    """The rows of a step through a gated delta rule, two heads of values for each of keys."""
    count = STEP.num_rows
    keys = mx.zeros((count, HEADS // 2, dims), dtype=dtype)
    rows = DeltaRows(
        q=keys,
        k=keys,
        v=mx.zeros((count, HEADS, VALUE_DIM), dtype=dtype),
        g=mx.zeros((count, HEADS, dims) if by_key else (count, HEADS)),
        beta=mx.zeros((count, HEADS), dtype=dtype),
    )
    state = mx.zeros((HEADS, VALUE_DIM, dims))
    launch = gated_delta_step_launch(rows, rows, StepRuns.of(STEP, num_kept=1), state)
    gates = ", gates by key" if by_key else ""
    return Case(f"gated delta, keys of {dims}{gates}, {TYPES[dtype]}", count, launch)


def ssm(*, dtype: mx.Dtype, state_dim: int = 128) -> Case:
    """The rows of a step through Mamba2's recurrence, four heads for each group."""
    count = STEP.num_rows
    group = mx.zeros((count, HEADS // 4, state_dim), dtype=dtype)
    x = mx.zeros((count, HEADS, VALUE_DIM), dtype=dtype)
    rows = SsmRows(x=x, B=group, C=group, dt=mx.zeros((count, HEADS)))
    weights = SsmWeights(A_log=mx.zeros((HEADS,), dtype=dtype), D=mx.zeros((HEADS,), dtype=dtype))
    state = mx.zeros((HEADS, VALUE_DIM, state_dim))
    launch = ssm_step_launch(rows, rows, StepRuns.of(STEP, num_kept=1), state, weights)
    return Case(f"ssm, states of {state_dim}, {TYPES[dtype]}", count, launch)
