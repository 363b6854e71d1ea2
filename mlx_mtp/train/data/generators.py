"""What generates the training text: mlx-lm, or PyTorch in bfloat16 where a CPU computes that fast.

Both give the model's own greedy text, but round differently, so texts differ where tokens are
nearly tied.  The name of the generator is stored with the settings of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import psutil
from mlx.utils import tree_flatten

from mlx_mtp.evaluation.batch_generation import Draw, generate_batch
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.settings import AUTO, MLX, TORCH


class GenerateBatch(Protocol):
    """``generate_batch`` of a model."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stops: Iterable[Sequence[int]],
        batch_size: int,
        draws: Sequence[Draw] | None = None,
        loop_length: int | None = None,
        on_step: Callable[[int], None] = ...,
    ) -> Iterator[tuple[int, list[int], str]]: ...


@dataclass(frozen=True)
class TextGenerator:
    """A way to generate text.

    Attributes:
        name: back-end and type of the numbers, such as "torch bfloat16".
        generate: continues prompts.
        batch_size: texts that are best generated together.
        group_batches: batches of a group of candidates.  More waste less time at its end, but lose
            more to a kill.
    """

    name: str
    generate: GenerateBatch
    batch_size: int
    group_batches: int


def choose_generator(model: MTPModel, backend: str = AUTO, *, max_tokens: int) -> TextGenerator:
    """Choose what generates text.

    Args:
        model: from ``load``.
        backend: "mlx", "torch", or "auto": PyTorch if MLX computes on a CPU that has instructions
            for bfloat16, PyTorch is installed and knows the architecture, and memory is left for
            its copy of the weights.
        max_tokens: maximum length of a text with its prompt.

    Raises:
        ValueError: PyTorch was asked for, but is missing or does not know the architecture.
    """
    if backend == TORCH or (backend == AUTO and _torch_is_faster() and _copy_fits(model)):
        try:
            return _torch_generator(model, max_tokens=max_tokens)
        except ValueError:
            if backend == TORCH:
                raise
    dtype = str(model.dtype).removeprefix("mlx.core.")
    generate = functools.partial(generate_batch, model)
    return TextGenerator(f"{MLX} {dtype}", generate, batch_size=16, group_batches=2)


def _torch_generator(model: MTPModel, *, max_tokens: int) -> TextGenerator:
    try:
        from mlx_mtp.backends.pytorch.generation import TorchGenerator
    except ImportError as error:
        raise ValueError(f"PyTorch cannot be used: {error}") from None

    generate = TorchGenerator(model)
    size = generate.max_batch_size(max_tokens)
    return TextGenerator(f"{TORCH} {generate.dtype}", generate, batch_size=size, group_batches=4)


def _torch_is_faster() -> bool:
    if mx.default_device().type != mx.DeviceType.cpu:
        return False
    try:
        from mlx_mtp.backends.pytorch.model import has_bfloat16, torch_device

        return has_bfloat16(torch_device("cpu"))
    except (ValueError, ImportError):
        return False


def _copy_fits(model: MTPModel) -> bool:
    """Whether the weights in bfloat16 fit half of the free memory."""
    weights: list[tuple[str, mx.array]] = tree_flatten(model.base.parameters())  # pyright: ignore
    packed = {mx.uint32: 8, mx.uint8: 2}  # numbers of 4 bits in one
    numbers = sum(value.size * packed.get(value.dtype, 1) for _, value in weights)
    return 2 * numbers < psutil.virtual_memory().available / 2
