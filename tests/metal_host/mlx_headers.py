"""MLX's own Metal kernels: the headers that its wheel ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import MslError

KERNELS = "mlx/backend/metal/kernels"


def include_folder() -> Path:
    """The folder to put into `include`; MslError where MLX's wheel has no Metal headers."""
    spec = importlib.util.find_spec("mlx")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "include"
        if (folder / KERNELS / "utils.h").exists():
            return folder
    raise MslError("the installed MLX has no Metal kernel headers")


def kernel_source(*headers: str) -> str:
    """A source that includes these headers of MLX's kernel folder, after its utils.h."""
    lines = [f'#include "{KERNELS}/{name}"' for name in ("utils.h", *headers)]
    return "\n".join(lines) + "\n"


def quantized_source() -> str:
    """MLX's affine quantised kernels: qmv, qmv_fast, qmv_wide, qvm, qmm_t, qmm_n ..."""
    return kernel_source("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")


def attention_source() -> str:
    """MLX's sdpa_vector."""
    return kernel_source("sdpa_vector.h")
