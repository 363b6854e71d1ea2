"""The gradient of a training step in PyTorch: bfloat16 on CPUs that have it, and NVIDIA GPUs.

Only the gradient is computed here, with the sequences, blocks and losses of ``step``; parameters
and gradients are MLX's float32 arrays, so what follows a step is the same with either back-end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from mlx_mtp.backends.pytorch.model import refusal, tensor, torch_device
from mlx_mtp.backends.pytorch.rows import OrdinaryRows, TorchRows
from mlx_mtp.evaluation.forward import mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, SAMPLER_PREFIX, MTPModel
from mlx_mtp.train.gradient.adapter import trainable
from mlx_mtp.train.gradient.anchors import chunks
from mlx_mtp.train.gradient.step import Parameters, Part, StepGradient, blocks_of
from mlx_mtp.train.gradient.torch_losses import loss_terms, make_targets, sampler_head
from mlx_mtp.train.settings import TrainSettings

_BASE = "base."
_CHECKED = MaskRows((3, 20), (2, 3))  # blocks of a text of 24 ids
_MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class TorchGradient(StepGradient):
    """Computes the gradient of steps in PyTorch; see ``StepGradient``.

    Args:
        model: from ``adapter.new_adapter``.
        settings: of the run.
        num_threads: threads of this process on a CPU; 0 leaves it to PyTorch.
        dtype: of the products; None is the fastest of the device.
        device: None is an NVIDIA GPU if there is one, else the CPU.

    Raises:
        ValueError: PyTorch is missing, or it cannot train such an adapter or model.
    """

    def __init__(
        self,
        model: MTPModel,
        settings: TrainSettings,
        *,
        num_threads: int = 0,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(model, settings)
        if model.config is None or not settings.gate:
            raise ValueError("backend torch trains gated adapters of mask tokens only")
        if settings.grad_checkpoint:
            raise ValueError("grad_checkpoint cannot be used with backend torch")
        place = torch_device(device)
        if num_threads:
            torch.set_num_threads(num_threads)
        self.shares_cores = place.type == "cpu"
        self._rows = TorchRows(model, dtype=dtype, device=place)
        self._is_warm = True  # it compiles nothing that workers could find
        parameters = trainable(model)
        self._masks = next(name for name in parameters if name.endswith(MASK_EMBEDDINGS))
        linears = {
            f"{_BASE}{path}.{x}" for path in self._rows.linears for x in ("lora_a", "lora_b")
        }
        for name in parameters:
            if not (name in linears or name == self._masks or name.startswith(SAMPLER_PREFIX)):
                raise refusal(model, f"it does not know the parameter {name}")
        self._check(parameters)

    @property
    def line(self) -> str:
        """What computes the gradients, for the user."""
        device, kind = self._rows.device, str(self._rows.dtype).removeprefix("torch.")
        place = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        return f"Gradients are computed by PyTorch in {kind} on {place}"

    def part(
        self,
        parameters: Parameters,
        places: Sequence[tuple[int, TokenSequence]],
        *,
        step: int,
        total: int,
    ) -> Part | None:
        """Compute the part of some sequences in a step; see ``StepGradient.part``."""
        leaves = self._leaves(parameters)
        sums = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
        losses: list[tuple[Tensor, dict[str, Tensor]]] = []
        for place, sequence in places:
            rows = blocks_of(sequence, self._settings, key=(step, place))
            for terms, share in self._terms(leaves, sequence, rows, total=total):
                weights = self._settings.loss_weights
                loss = (
                    share
                    * torch.stack(
                        [term * getattr(weights, name) for name, term in terms.items()]
                    ).sum()
                )
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for total_gradient, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total_gradient += gradient
                terms = {name: share * term.detach() for name, term in terms.items()}
                losses.append((loss.detach(), terms))
        if not losses:
            return None
        terms = {name: float(sum(x[1][name] for x in losses)) for name in losses[0][1]}
        gradients = {name: mx.array(value.cpu().numpy()) for name, value in sums.items()}
        return gradients, float(sum(x[0] for x in losses)), terms

    def _leaves(self, parameters: Parameters) -> dict[str, Tensor]:
        """The parameters as tensors that have a gradient; low-rank weights have the rows' type."""
        device = self._rows.device
        leaves = {}
        for name, value in parameters.items():
            dtype = self._rows.dtype if name.startswith(_BASE) and name != self._masks else None
            leaves[name] = tensor(value).to(device, dtype or torch.float32).requires_grad_()
        for path, linear in self._rows.linears.items():
            linear.lora_a = leaves[f"{_BASE}{path}.lora_a"]
            linear.lora_b = leaves[f"{_BASE}{path}.lora_b"]
        return leaves

    def _terms(
        self, leaves: Mapping[str, Tensor], sequence: TokenSequence, rows: MaskRows, *, total: int
    ) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Yield the terms of each forward of a sequence and its share of the step's rows."""
        if not rows.anchors:
            return
        model, kind = self._rows, self._model.config and self._model.config.sampler_kind
        ids = torch.tensor(sequence.ids, device=model.device)
        ordinary = model.ordinary(ids[: int(rows.row_positions.max()) + 1])
        sampler = None
        if self._model.sampler_head is not None and kind is not None:
            weights = {
                name.removeprefix(SAMPLER_PREFIX): leaf
                for name, leaf in leaves.items()
                if name.startswith(SAMPLER_PREFIX)
            }
            sampler = sampler_head(weights, kind, dtype=model.dtype)
        for part in chunks(rows, max_rows=self._settings.rows_per_forward):
            terms = loss_terms(
                model,
                ordinary,
                part,
                self._hidden(leaves, ordinary, part),
                make_targets(model, ordinary, ids, part, teacher=self._settings.teacher),
                candidates=self._candidates,
                weights=self._settings.row_weights,
                sampler=sampler,
            )
            yield terms, part.num_rows / total

    def _hidden(
        self, leaves: Mapping[str, Tensor], ordinary: OrdinaryRows, rows: MaskRows
    ) -> Tensor:
        """Final hidden states of mask rows ``[R, D]``."""
        offsets = torch.from_numpy(rows.mask_offsets.astype(np.int64)).to(self._rows.device)
        return self._rows.masks(ordinary, rows, leaves[self._masks][offsets])

    @torch.no_grad()
    def _check(self, parameters: Parameters) -> None:
        """Compare mask rows of a random text with those of MLX, with noise in the adapter."""
        masks = self._model.num_draft_tokens
        rows = MaskRows(_CHECKED.anchors, tuple(min(masks, n) for n in (2, 3)))
        keys = mx.random.split(mx.random.key(0), len(parameters) + 1)
        noisy = {
            name: value + 0.02 * mx.random.normal(value.shape, key=key)
            for (name, value), key in zip(parameters.items(), keys[1:], strict=True)
        }
        ids = mx.random.randint(0, self._model.vocab_size, (24,), key=keys[0])
        self.load(noisy)
        expected = tensor(mask_rows(self._model, ordinary_rows(self._model, ids), rows))
        self.load(parameters)
        ordinary = self._rows.ordinary(tensor(ids).long().to(self._rows.device))
        actual = self._hidden(self._leaves(noisy), ordinary, rows).float().cpu()
        error = float((actual - expected).norm() / expected.norm())
        if not error <= _MAX_ERROR[self._rows.dtype]:
            raise refusal(self._model, f"its mask rows differ from MLX's (by {error:.1g})")
