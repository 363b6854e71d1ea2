"""Run Metal compute kernels on a CPU and watch them: see README.md."""

from .arrays import from_bfloat16, to_bfloat16
from .capture import KernelText, kernel_text, kernel_texts
from .errors import MslError
from .kernel import BufferCounts, Counts, Kernel, Report

__all__ = [
    "BufferCounts",
    "Counts",
    "Kernel",
    "KernelText",
    "MslError",
    "Report",
    "from_bfloat16",
    "kernel_text",
    "kernel_texts",
    "to_bfloat16",
]
