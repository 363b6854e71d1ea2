"""Which back-end computes the gradient of a run: MLX, or PyTorch in bfloat16."""

from __future__ import annotations

import dataclasses
import importlib.util

import mlx.core as mx

from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.settings import AUTO, MLX, TORCH, TrainSettings

_SMALLEST = 256  # hidden size below which products are too small for bfloat16 to pay


def make_gradient(
    model: MTPModel, settings: TrainSettings, *, num_threads: int = 0
) -> tuple[StepGradient, TrainSettings, str | None]:
    """Make what computes gradients.

    ``auto`` takes PyTorch where MLX would compute in float32 on a CPU, and PyTorch, which must be
    installed and support the model, has bfloat16 there or an NVIDIA GPU.

    Args:
        model: from ``adapter.new_adapter``.
        settings: of the run.
        num_threads: threads of this process for PyTorch on a CPU; 0 leaves it to PyTorch.

    Returns:
        It, the settings with the back-end that was chosen, and a line about the choice, if there
        was one.

    Raises:
        ValueError: the back-end that was asked for cannot train this.
    """
    line = None
    if settings.backend == TORCH or (settings.backend == AUTO and _is_faster(model, settings)):
        try:
            from mlx_mtp.train.gradient.torch_gradient import TorchGradient

            gradient = TorchGradient(model, settings, num_threads=num_threads)
            return gradient, dataclasses.replace(settings, backend=TORCH), gradient.line
        except ImportError:
            from mlx_mtp.backends.pytorch.model import INSTALL

            raise ValueError(f"backend torch needs PyTorch: {INSTALL}") from None
        except ValueError as error:
            if settings.backend == TORCH:
                raise
            line = f"Gradients are computed by MLX: {error}"
    return StepGradient(model, settings), dataclasses.replace(settings, backend=MLX), line


def _is_faster(model: MTPModel, settings: TrainSettings) -> bool:
    """Whether PyTorch is expected to be faster than MLX."""
    if model.config is None or not settings.gate or settings.grad_checkpoint:
        return False
    if mx.default_device().type != mx.cpu or model.hidden_size < _SMALLEST:
        return False
    if importlib.util.find_spec("torch") is None:
        return False
    from mlx_mtp.backends.pytorch.model import has_bfloat16, torch_device

    return has_bfloat16(torch_device())
