"""The logits of a model folder against those of transformers, in float32 on the CPU.

Unlike the verification of a conversion, this has one folder for both sides, so it shows whether
mlx-lm's classes and the translated settings compute what ``config.json`` means.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.converters.reference.model import load_reference
from mlx_mtp.converters.reference.verify import BOUND, on_cpu, relative_error
from mlx_mtp.loading import load
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.plain_weights import plain_weights
from mlx_mtp.storage.safetensors import check_safetensors
from mlx_mtp.terminal import Status

PROMPT_SIZES = (64, 7, 1)
MAX_WINDOW = 512  # longer windows are not filled: a forward in float32 would take minutes
_STACKED = ".switch_mlp."


@dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """How far MLX's logits are from PyTorch's.

    Attributes:
        num_rows: rows compared.
        error: largest over the rows of max |mlx - torch| / max |torch|; NaN if one is not finite.
        first: length of the prompt and position of the first row beyond the bound; None if none.
        bound: largest error that passes.
    """

    num_rows: int
    error: float
    first: tuple[int, int] | None
    bound: float = BOUND

    @property
    def passed(self) -> bool:
        """Whether every row is within the bound."""
        return self.error <= self.bound

    def lines(self) -> list[str]:
        """Return the numbers and the verdict, for printing."""
        lines = [f"{self.num_rows} rows, max relative error {self.error:.1e} (float32)"]
        if self.first is not None:
            size, position = self.first
            lines.append(f"first difference: position {position} of a prompt of {size} tokens")
        verdict = "the same as PyTorch" if self.passed else "NOT the same as PyTorch"
        return [*lines, f"Verdict: {verdict} (bound {self.bound:.0e})."]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        first = self.first and {"prompt_tokens": self.first[0], "position": self.first[1]}
        return {
            "passed": self.passed,
            "max_relative_error": self.error,
            "num_rows": self.num_rows,
            "first_difference": first,
            "bound": self.bound,
        }


def compare_with_pytorch(folder: Path) -> LogitsReport:
    """Compare a model folder's logits with those of transformers.

    Quantised weights are dequantised for both.

    Args:
        folder: the model's folder; an adapter in it is not used.

    Raises:
        ValueError: one side cannot load the folder, or a package is missing; one line.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-verify-") as name, on_cpu():
        with Status("Running the model in MLX ..."):
            model = load(str(folder), mtp=False, kernels=False)[0]
            prompts = _prompts(model)
            actual = [_logits(model, ids) for ids in prompts]
            source = _plain_folder(folder, Path(name) / "plain", model)
        del model  # the two models need not fit into memory together
        with Status("Running the model in PyTorch ..."):
            reference = load_reference(source, None, scratch=Path(name))
            expected = [reference.step(ids).ordinary for ids in prompts]
    rows = [
        (len(ids), position, relative_error(a[position : position + 1], b[position : position + 1]))
        for ids, a, b in zip(prompts, actual, expected, strict=True)
        for position in range(len(ids))
    ]
    wrong = (row[:2] for row in rows if not row[2] <= BOUND)
    errors = [error for *_, error in rows]
    return LogitsReport(num_rows=len(rows), error=float(np.max(errors)), first=next(wrong, None))


def _prompts(model: MTPModel) -> list[list[int]]:
    """Draw random prompts, one of which is longer than the windows of the model's layers."""
    windows = [getattr(layer, "window", 0) for layer in model.make_cache().layers]
    longest = max([PROMPT_SIZES[0], *(window + 16 for window in windows if window <= MAX_WINDOW)])
    limit = model.max_context or longest
    rng = np.random.default_rng(0)
    sizes = dict.fromkeys(min(size, limit) for size in (longest, *PROMPT_SIZES[1:]))
    return [rng.integers(model.vocab_size, size=size).tolist() for size in sizes]


def _logits(model: MTPModel, ids: Sequence[int]) -> np.ndarray:
    """Return the logits ``[L, V]`` of a prompt."""
    hidden = model(mx.array([ids]), cache=model.make_cache())
    return np.array(model.logits(hidden)[0].astype(mx.float32))


def _plain_folder(folder: Path, target: Path, model: MTPModel) -> Path:
    """Return the folder itself, or a copy whose weights are as transformers reads them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stacked = any(
        _STACKED in name
        for file in folder.glob("model*.safetensors")
        for name in check_safetensors(file)
    )
    if "quantization" not in config and not stacked:
        return folder
    tensors: dict[str, mx.array] = {}
    for path, value in plain_weights(model.base):
        tensors.update(_unstacked(path, value))
    target.mkdir()
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "pt"})
    return target


def _unstacked(path: str, value: mx.array) -> dict[str, mx.array]:
    """Name a weight as transformers does, which has one per expert where mlx-lm has a stack."""
    match = re.fullmatch(r"(.*)\.switch_mlp\.(\w+\.weight)", path)
    if match is None:
        return {path: value}
    return {f"{match[1]}.experts.{i}.{match[2]}": part for i, part in enumerate(list(value))}
