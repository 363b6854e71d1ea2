"""Verification of a conversion: PyTorch on the original files against MLX on the written folders.

Both run the same prompts, followed by the mask rows, in float32 on the CPU.  The logits of ordinary
rows, the hidden states and logits of mask rows, and the logits of the sampler head are compared.
A model that was quantised or cast cannot match within the bound, so its original is converted once
more, to float32, into a scratch folder; the report says so.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_mtp.converters.base.model import convert_base
from mlx_mtp.converters.reference.model import Reference, StepRows, load_reference
from mlx_mtp.loading import load, read_adapter
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.safetensors import read_safetensors
from mlx_mtp.terminal import Status

BOUND = 1e-4
PROMPT_SIZES = (24, 7, 1)
SAMPLE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The difference between MLX and PyTorch for one kind of row.

    Attributes:
        name: ``"ordinary rows"``, ``"mask rows"`` or ``"sampler rows"``.
        num_rows: rows compared.
        error: largest over the rows of max |mlx - torch| / max |torch|.
    """

    name: str
    num_rows: int
    error: float


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The result of a verification.

    Attributes:
        groups: the kinds of rows that were compared.
        bound: largest error that passes.
        notes: what was compared instead of the written files, if anything; one line each.
    """

    groups: tuple[RowGroup, ...]
    bound: float = BOUND
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the error of every kind of row is within the bound; NaN is not."""
        return bool(self.groups) and all(group.error <= self.bound for group in self.groups)

    def lines(self) -> list[str]:
        """Return a small table and the verdict, for printing."""
        rows = [f"{g.name:<14}{g.num_rows:>6}   {g.error:.1e}" for g in self.groups]
        verdict = "the same as PyTorch" if self.passed else "NOT the same as PyTorch"
        return [
            f"{'':<14}{'rows':>6}   max relative error",
            *rows,
            *self.notes,
            f"{verdict} (float32, bound {self.bound:.0e})",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "passed": self.passed,
            "bound": self.bound,
            "max_relative_error": {group.name: group.error for group in self.groups},
            "num_rows": {group.name: group.num_rows for group in self.groups},
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One prompt and what PyTorch or MLX computed for it.

    Attributes:
        prompt: ids of the prompt.
        previous: an id per mask row, for the sampler head.
        rows: the results of one step.
        sampler: the sampler head's logits after ``previous`` ``[k, V]``, or no rows.
    """

    prompt: list[int]
    previous: list[int]
    rows: StepRows
    sampler: np.ndarray


def verify_conversion(
    *,
    hf_path: Path,
    checkpoint: Path | None,
    mlx_model: Path | None,
    adapter: Path | None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    layout: str | None = None,
    options: Mapping[str, str] | None = None,
) -> ConversionReport:
    """Compare a conversion with its originals.

    Args:
        hf_path: Hugging Face folder of the base model.
        checkpoint: adapter checkpoint that was converted, if any.
        mlx_model: model folder that was written; None converts ``hf_path`` for the comparison.
        adapter: adapter folder that was written, if any.
        allow_pickle: whether PyTorch files may be read, in a sandbox.
        trust_remote_code: whether the tokenizer's code may run if the model is converted again.
        layout: layout of the checkpoint; detected if None.
        options: layout options of the conversion.

    Raises:
        ValueError: a model or an adapter cannot be loaded; one line.
    """
    if (checkpoint is None) != (adapter is None):
        raise ValueError("a checkpoint and its adapter are verified together")
    written = read_adapter(adapter) if adapter is not None else None
    if written is not None and written[0].noise_ids:  # the ids of ``_run_mlx``
        ids = ",".join(map(str, range(written[0].num_draft_tokens)))
        options = {**(options or {}), "mask_token_ids": ids}
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-verify-") as name, on_cpu():
        scratch = Path(name)
        with Status("Running the original in PyTorch ..."):
            reference = load_reference(
                hf_path,
                checkpoint,
                scratch=scratch,
                layout=layout,
                options=options,
                allow_pickle=allow_pickle,
            )
            expected, columns = _run_torch(reference)
        sample = reference.embedding_rows(SAMPLE_ROWS)
        del reference  # the two models need not fit into memory together
        reason = None if mlx_model is None else lossy(mlx_model, sample)
        folder = mlx_model
        if folder is None or reason:
            folder = scratch / "mlx"
            folder.mkdir()
            convert_base(
                str(hf_path),
                folder,
                dtype="float32",
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )
        with Status("Running the converted model ..."):
            model = _load_mlx(folder, written)
            actual = [_run_mlx(model, case) for case in expected]
    notes = (f"the model that was written {reason}: compared was its original",) if reason else ()
    return ConversionReport(groups=_compare(actual, expected, columns), notes=notes)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Run MLX on the CPU, where float32 arithmetic is the same on every machine."""
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(device)


def _run_torch(reference: Reference) -> tuple[list[_Case], np.ndarray]:
    """Run random prompts of ordinary ids through PyTorch.

    Returns:
        The cases, and the ids whose logits can be compared: PyTorch may have changed those of mask
        tokens.
    """
    rng = np.random.default_rng(0)
    adapter = reference.adapter
    ids = np.setdiff1d(np.arange(reference.vocab_size), adapter.mask_ids if adapter else ())
    cases = []
    for size in PROMPT_SIZES:
        prompt = cast(list[int], rng.choice(ids, size).tolist())
        rows = reference.step(prompt)
        previous = cast(list[int], rng.choice(ids, len(rows.masks)).tolist())
        sampler = rows.masks[:0]
        if adapter is not None and adapter.sampler is not None:
            sampler = reference.sampler_logits(rows.hidden, previous)
        cases.append(_Case(prompt=prompt, previous=previous, rows=rows, sampler=sampler))
    return cases, ids


def lossy(mlx_model: Path, sample: np.ndarray) -> str | None:
    """Return why a converted model cannot match within the bound, or None if it can.

    Args:
        mlx_model: model folder.
        sample: first rows of the original's embedding table, ``[n, D]``.

    Raises:
        ValueError: the folder cannot be read.
    """
    path = mlx_model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        files = [read_safetensors(file) for file in sorted(mlx_model.glob("model*.safetensors"))]
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read the model in {mlx_model}: {error}") from None
    if "quantization" in config:
        return "is quantised"
    for name, value in (item for file in files for item in file.items()):
        original = mx.array(sample)
        if name.endswith("embed_tokens.weight") and not mx.array_equal(
            original.astype(value.dtype).astype(mx.float32), original
        ):
            return f"is {str(value.dtype).removeprefix('mlx.core.')}, which its original is not"
    return None


def _load_mlx(folder: Path, written: tuple[MTPConfig, dict[str, mx.array]] | None) -> MTPModel:
    """Load the converted model in float32, with the written adapter."""
    model, _ = load(str(folder), mtp=False)
    if model.dtype != mx.float32:
        raise ValueError(f"{folder} does not fit into memory in float32, so it cannot be verified")
    if written is None:
        return model
    config, weights = written
    return MTPModel(model.base, name=config.base_model, config=config, weights=weights)


def _run_mlx(model: MTPModel, case: _Case) -> _Case:
    """Run one prompt and the mask rows through MLX in one step."""
    split, k = len(case.prompt), model.num_draft_tokens
    step = StepLayout(split, 0, (k,))
    ids = mx.array([[*case.prompt, *range(k)]])
    hidden = model(ids, cache=model.make_cache(), layout=step)
    logits = _as_numpy(model.logits(hidden)[0])
    rows = StepRows(
        ordinary=logits[:split], masks=logits[split:], hidden=_as_numpy(hidden[0, split:])
    )
    sampler = rows.masks[:0]
    if model.sampler_head is not None and len(case.previous) == k:
        states = model.sampler_head(model.embed(mx.array(case.previous)), hidden[0, split:])
        sampler = _as_numpy(model.logits(states[None])[0])
    return _Case(prompt=case.prompt, previous=case.previous, rows=rows, sampler=sampler)


def _compare(
    actual: Sequence[_Case], expected: Sequence[_Case], columns: np.ndarray
) -> tuple[RowGroup, ...]:
    """Summarise all cases by kind of row; a kind that neither has is left out."""
    kinds: dict[str, tuple[Callable[[_Case], np.ndarray], ...]] = {
        "ordinary rows": (lambda case: case.rows.ordinary[:, columns],),
        "mask rows": (lambda case: case.rows.masks[:, columns], lambda case: case.rows.hidden),
        "sampler rows": (lambda case: case.sampler[:, columns],),
    }
    groups = []
    for name, parts in kinds.items():
        errors = [
            relative_error(part(a), part(b))
            for a, b in zip(actual, expected, strict=True)
            for part in parts
        ]
        num_rows = sum(len(parts[0](case)) for case in expected)
        if num_rows or any(errors):
            groups.append(RowGroup(name=name, num_rows=num_rows, error=float(np.max(errors))))
    return tuple(groups)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest max |a - b| / max |b| over the rows of two arrays ``[n, width]``.

    NaN if a value is not finite, infinite if the shapes differ, 0 if there are no rows.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not len(expected):
        return 0.0
    return float((np.abs(actual - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())


def _as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
