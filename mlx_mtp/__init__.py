"""mlx-mtp makes a local language model answer several tokens per step, with unchanged output.

    from mlx_mtp import load, generate

    model, tokenizer = load()  # the embedded default model; or a folder or hub id
    text = generate(model, tokenizer, prompt="Once upon a time", verbose=True)

The names and the call style are mlx-lm's.  ``load`` is imported on first use, because mlx-lm takes
seconds to import.
"""

from typing import TYPE_CHECKING, Any

from mlx_mtp.backends.cpu import blas  # noqa: F401 isort: skip  # loads OpenBLAS, before MLX is
from mlx_mtp.batch import batch_generate
from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.generate import ContextOverflow, GenerationResponse, generate, stream_generate
from mlx_mtp.stats import GenerationStats

if TYPE_CHECKING:
    from mlx_mtp.loading import load

    __version__: str

__all__ = [
    "CacheConfig",
    "ContextOverflow",
    "GenerationConfig",
    "GenerationResponse",
    "GenerationStats",
    "Sampling",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mlx_mtp.storage.package import package_version

        return package_version()
    if name == "load":
        from mlx_mtp.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
