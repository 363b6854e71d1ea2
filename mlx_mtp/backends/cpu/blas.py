"""A fast BLAS for MLX's CPU back-end on Linux.

MLX's Linux wheel links the reference BLAS.  Loading OpenBLAS with global symbols before MLX is
imported lets its symbols win; on two cores a matmul is then 50 to 80 times faster.  This must
therefore run before the first ``import mlx.core`` of the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

LIBRARY = "libopenblas.so.0"
SWITCH = "MLX_MTP_BLAS"


def preload_openblas() -> str:
    """Load OpenBLAS, if this is Linux and it is installed.

    ``MLX_MTP_BLAS=reference`` leaves MLX's own BLAS in place.

    Returns:
        ``"openblas"``, ``"reference"`` (requested, not installed, or MLX was imported first) or
        ``"system"`` (not Linux).
    """
    if not sys.platform.startswith("linux"):
        return "system"
    if os.environ.get(SWITCH) == "reference" or "mlx.core" in sys.modules:
        return "reference"
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "reference"
    return "openblas"


BLAS = preload_openblas()  # what MLX's CPU back-end computes with in this process


def has_small_matrix_kernels(blas: str) -> bool:
    """Whether matmuls of small matrices skip packing, for a result of ``preload_openblas``.

    OpenBLAS 0.3.17 and later has such kernels for x86-64 processors with AVX-512.
    """
    if blas != "openblas":
        return False
    library = ctypes.CDLL(LIBRARY)
    library.openblas_get_corename.restype = ctypes.c_char_p
    return library.openblas_get_corename() in (b"SkylakeX", b"Cooperlake", b"SapphireRapids")
