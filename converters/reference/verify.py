"""Proof of a conversion: PyTorch on the original files against MLX on the written folders.

Both sides run the same prompts, with the mask rows behind each, in float32 on the CPU.  Compared
are the logits of ordinary rows, the hidden states and logits of mask rows, and the logits of the
sampler head.  A model that was quantised or cast cannot agree to the bound, so its original is then
converted once more, to float32, into a scratch folder; the report says so.
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

from mlx_mtp.converters.reference.reference import Reference, StepRows, load_reference
from mlx_mtp.loading import load, read_adapter
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MTPModel
from mlx_mtp.storage.safetensors import read_safetensors

BOUND = 1e-4
PROMPT_SIZES = (24, 7, 1)
SAMPLE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """How far one kind of row is from PyTorch's.

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
    """What a verification found.

    Attributes:
        groups: the kinds of rows that there were to compare.
        bound: largest error that passes.
        notes: what was compared instead of the written files, if anything; one line each.
    """

    groups: tuple[RowGroup, ...]
    bound: float = BOUND
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every kind of row is within the bound; NaN is not."""
        return bool(self.groups) and all(group.error <= self.bound for group in self.groups)

    def lines(self) -> list[str]:
        """A small table and the verdict, for printing."""
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
    """One prompt and what a side computed for it.

    ``previous`` are the ids before each mask row, ``sampler`` the sampler head's logits after them
    ``[k, V]``, or no rows.
    """

    prompt: list[int]
    previous: list[int]
    rows: StepRows
    sampler: np.ndarray


_Pick = Callable[[_Case], np.ndarray]
_Tensors = dict[str, mx.array]


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
        checkpoint: the adapter checkpoint that was converted, if one was.
        mlx_model: the model folder that was written; None takes the base model from ``hf_path``.
        adapter: the adapter folder that was written, if one was.
        allow_pickle: read PyTorch files, in a sandbox.
        trust_remote_code: let the tokenizer's code run where the model is converted once more.
        layout: the checkpoint's layout; found out if None.
        options: the layout options of the conversion.

    Raises:
        ValueError: a side cannot be loaded; one line.
    """
    if (checkpoint is None) != (adapter is None):
        raise ValueError("a checkpoint and its adapter are verified together")
    written = read_adapter(adapter) if adapter is not None else None
    rows = None if written is None else _as_numpy(written[1][MASK_EMBEDDINGS])
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-verify-") as name, _on_cpu():
        scratch = Path(name)
        cases, columns, sample = _torch_side(
            load_reference(
                hf_path,
                checkpoint,
                scratch=scratch,
                layout=layout,
                options=options,
                allow_pickle=allow_pickle,
                written_rows=rows,
            )
        )
        reason = None if mlx_model is None else lossy(mlx_model, sample)
        if mlx_model is None or reason:
            folder = scratch / "mlx"
            _convert_again(
                hf_path, folder, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
            )
        else:
            folder = mlx_model
        model = _mlx_model(folder, written)
        found = [_mlx_case(model, case) for case in cases]
    notes = (f"the model that was written {reason}: compared was its original",) if reason else ()
    return ConversionReport(groups=_compare(found, cases, columns), notes=notes)


@contextmanager
def _on_cpu() -> Iterator[None]:
    """MLX's CPU: only there is float32 arithmetic the same on every machine."""
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(device)


def _torch_side(reference: Reference) -> tuple[list[_Case], np.ndarray, np.ndarray]:
    """Run random prompts of ordinary ids through PyTorch.

    Returns:
        The cases; the ids whose logits can be compared, for mask tokens may have changed their own
        in PyTorch; the first rows of the embedding table ``[n, D]``.  None of it holds on to the
        PyTorch model: the two models need not fit into memory together.
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
    return cases, ids, reference.embedding_rows(SAMPLE_ROWS)


def _convert_again(
    hf_path: Path, target: Path, *, allow_pickle: bool, trust_remote_code: bool
) -> None:
    """Convert the base model to float32, which loses nothing."""
    from mlx_mtp.converters.base.model import convert_base

    target.mkdir()
    convert_base(
        str(hf_path),
        target,
        dtype="float32",
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )


def lossy(mlx_model: Path, sample: np.ndarray) -> str | None:
    """Why a converted model cannot agree to the bound, if it cannot.

    Args:
        mlx_model: the model folder.
        sample: the first rows of the original's embedding table, ``[n, D]``.

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


def _mlx_model(folder: Path, written: tuple[MTPConfig, dict[str, mx.array]] | None) -> MTPModel:
    """Load the MLX side in float32, with the written adapter."""
    model, _ = load(str(folder), mtp=False)
    if model.dtype != mx.float32:
        raise ValueError(f"{folder} does not fit into memory in float32, so it cannot be verified")
    if written is None:
        return model
    config, weights = written
    return MTPModel(model.base, name=config.base_model, config=config, weights=weights)


def _mlx_case(model: MTPModel, case: _Case) -> _Case:
    """Run one prompt through MLX, all rows in one step."""
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
    found: Sequence[_Case], wanted: Sequence[_Case], columns: np.ndarray
) -> tuple[RowGroup, ...]:
    """Sum up all cases by kind of row; a kind that neither side has is left out."""
    kinds: dict[str, tuple[_Pick, ...]] = {
        "ordinary rows": (lambda case: case.rows.ordinary[:, columns],),
        "mask rows": (lambda case: case.rows.masks[:, columns], lambda case: case.rows.hidden),
        "sampler rows": (lambda case: case.sampler[:, columns],),
    }
    groups = []
    for name, picks in kinds.items():
        errors = [
            relative_error(pick(a), pick(b))
            for a, b in zip(found, wanted, strict=True)
            for pick in picks
        ]
        num_rows = sum(len(picks[0](case)) for case in wanted)
        if num_rows or any(errors):
            groups.append(RowGroup(name=name, num_rows=num_rows, error=float(np.max(errors))))
    return tuple(groups)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest max |a - b| / max |b| over the rows of two arrays ``[n, width]``.

    NaN if a value is not finite, infinite if the two have other shapes, 0 if they have no rows.
    """
    if found.shape != wanted.shape:
        return float("inf")
    if not len(wanted):
        return 0.0
    return float((np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max(axis=-1)).max())


def _as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
