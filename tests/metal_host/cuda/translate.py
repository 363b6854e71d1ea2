"""Metal text → a CUDA unit for NVRTC: the rewriter's C++, and an entry that takes the buffers.

MLX puts its own utils.h before a kernel's text; of that ours use the names of two types, which
include/metal_stdlib has as well, so it is left out and no preprocessor is needed beforehand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..capture import KernelText
from ..errors import MslError
from ..mlx_headers import kernel_source
from ..rewriter import ADDRESS_SPACES, rewrite
from ..signature import BUILTINS, Kind, Parameter, read_signature

ENTRY = "msl_entry"
LEFT_OUT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
UNROLL = re.compile(r"^#pragma clang loop unroll\(full\)$", re.M)
VALUES = {  # of Metal's positions that our kernels ask for
    "threadgroup_position_in_grid": "metal::uint3(blockIdx.x, blockIdx.y, blockIdx.z)",
    "threadgroups_per_grid": "metal::uint3(gridDim.x, gridDim.y, gridDim.z)",
    "thread_position_in_threadgroup": "metal::uint3(threadIdx.x, threadIdx.y, threadIdx.z)",
    "threads_per_threadgroup": "metal::uint3(blockDim.x, blockDim.y, blockDim.z)",
    "thread_position_in_grid": (
        "metal::uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + "
        "threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z)"
    ),
    "thread_index_in_threadgroup": "metal::msl_thread()",
    "simdgroup_index_in_threadgroup": "metal::msl_thread() / 32",
    "thread_index_in_simdgroup": "metal::msl_thread() % 32",
}
EXPRESSIONS = {BUILTINS[name]: value for name, value in VALUES.items()}


@dataclass(frozen=True)
class CudaUnit:
    """A kernel as NVRTC takes it.

    Attributes:
        source: CUDA text; its entry is ENTRY.
        buffers: how many pointers the entry takes, in the order of Metal's buffer indices.
        grid: blocks.
        block: threads.
    """

    source: str
    buffers: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


def blocks_of(grid: Sequence[int], threadgroup: Sequence[int]) -> tuple[int, int, int]:
    """Blocks of a grid of threads.

    Raises:
        MslError: the grid is not whole threadgroups, which CUDA does not have.
    """
    if any(size < 1 for size in (*grid, *threadgroup)) or math.prod(threadgroup) > 1024:
        raise MslError(f"no launch of {tuple(grid)} threads in {tuple(threadgroup)}")
    if any(size % each for size, each in zip(grid, threadgroup, strict=True)):
        raise MslError(f"a grid of {tuple(grid)} is not whole threadgroups of {tuple(threadgroup)}")
    x, y, z = (size // each for size, each in zip(grid, threadgroup, strict=True))
    return x, y, z


def translate(text: KernelText) -> CudaUnit:
    """What MLX would compile, as CUDA.

    Raises:
        MslError: the text asks for what is not translated.
    """
    metal = LEFT_OUT.sub(_blank, text.source.removeprefix(kernel_source()))
    parameters = read_signature(metal, text.name).parameters
    body = UNROLL.sub("#pragma unroll", rewrite(metal).text)
    block = text.threadgroup
    source = f"""#include <metal_stdlib>
namespace metal::kernel_text {{
# 1 "kernel.metal"
{body}
{_entry(text, parameters)}
}}
"""
    buffers = sum(each.kind == Kind.BUFFER for each in parameters)
    return CudaUnit(source, buffers, blocks_of(text.grid, block), block)


def _entry(text: KernelText, parameters: Sequence[Parameter]) -> str:
    """A kernel whose parameters are pointers alone, and that says how large its blocks are.

    Without the bound the compiler may take more registers than so many threads can have.
    """
    buffers = sorted(each.index for each in parameters if each.kind == Kind.BUFFER)
    if buffers != list(range(len(buffers))):
        raise MslError(f"kernel {text.name}: its buffers are not numbered without gaps")
    taken = ", ".join(f"void* buffer_{index}" for index in buffers)
    given = ", ".join(_argument(each) for each in parameters)
    return (
        f'extern "C" __global__ void __launch_bounds__({math.prod(text.threadgroup)})\n'
        f"{ENTRY}({taken}) {{ {text.name}{text.template_args}({given}); }}"
    )


def _argument(parameter: Parameter) -> str:
    if parameter.kind == Kind.BUILTIN and parameter.index in EXPRESSIONS:
        return EXPRESSIONS[parameter.index]
    if parameter.kind != Kind.BUFFER:
        raise MslError(f"parameter {parameter.name} has no counterpart on CUDA")
    end = parameter.words.index("*" if parameter.is_pointer else "&")
    kind = " ".join(word for word in parameter.words[:end] if word not in ADDRESS_SPACES)
    pointer = f"static_cast<{kind}*>(buffer_{parameter.index})"
    return pointer if parameter.is_pointer else f"*{pointer}"


def _blank(match: re.Match[str]) -> str:
    """A comment's lines, so that those that follow keep their numbers."""
    return " " + "\n" * match.group().count("\n")
