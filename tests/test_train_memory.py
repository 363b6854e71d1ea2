"""A run that does not fit is refused with advice that fits what is too large."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import tiny_base

from mlx_mtp.model import MTPModel
from mlx_mtp.train.adapter import new_adapter
from mlx_mtp.train.memory import MemoryEstimate, estimate
from mlx_mtp.train.settings import TrainSettings

SMALL = MemoryEstimate(
    weights_bytes=1, trainable_bytes=1, optimizer_bytes=1, ordinary_bytes=1,
    activation_bytes=1, logits_bytes=1, available_bytes=10**9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        ("weights_bytes", "smaller model"),
        ("trainable_bytes", "--rank"),
        ("optimizer_bytes", "--rank"),
        ("ordinary_bytes", "--max-seq-length"),
        ("activation_bytes", "--grad-checkpoint"),
        ("logits_bytes", "--rows-per-forward"),
    ],
)
def test_the_advice_fits_what_is_too_large(part: str, advice: str) -> None:
    SMALL.check()
    with pytest.raises(ValueError, match=f"about 31.2 GB of memory, 1.0 GB are .*{advice}"):
        dataclasses.replace(SMALL, **{part: int(31.2e9)}).check()


def test_the_parts_grow_with_what_they_are_made_of() -> None:
    model = new_adapter(MTPModel(tiny_base()), TrainSettings(rank=4))
    few = estimate(model, TrainSettings(rows_per_forward=64), longest=256)
    many = estimate(model, TrainSettings(rows_per_forward=256), longest=256)
    kept = estimate(model, TrainSettings(rows_per_forward=64, grad_checkpoint=True), longest=256)
    assert many.activation_bytes > 3 * few.activation_bytes
    assert many.logits_bytes == pytest.approx(4 * few.logits_bytes, abs=4)
    assert kept.activation_bytes < few.activation_bytes
    assert estimate(model, TrainSettings(), longest=1024).total_bytes > few.total_bytes
    assert few.lines()[-1].startswith("available") and len(few.lines()) == 8
