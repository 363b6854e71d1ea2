"""Packed weights have the values of PyPI's ``gguf``, exactly where MLX can have them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gguf import quants as reference
from gguf.constants import GGMLQuantizationType as Type

from mlx_mtp.storage.gguf import quants
from mlx_mtp.storage.gguf.quants import GROUP_SIZE, KEPT, dequantise, pack
from tests.helpers.tiny_gguf import random_rows

ROWS, WIDTH = 24, 512
EXACT = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL)
# Largest root mean square of the differences, as a share of the values'.
ROUNDED = {
    **{Type.Q4_K: 5e-4, Type.Q5_K: 5e-4, Type.IQ4_XS: 5e-4, Type.Q6_K: 5e-3},
    **{Type.Q3_K: 0.02, Type.Q2_K: 0.025},
    **dict.fromkeys((Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S), 0.02),
}


def values(kind: Type, rows: np.ndarray) -> np.ndarray:
    """Return what MLX computes from packed weights, ``[R, in]``."""
    weight, scales, biases = (mx.array(part) for part in pack(kind, rows))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    bits = KEPT[kind].bits
    return np.array(mx.dequantize(weight, scales, biases, group_size=GROUP_SIZE, bits=bits))


def test_every_type_has_a_bound() -> None:
    assert set(KEPT) == {*EXACT, *ROUNDED}


@pytest.mark.parametrize("kind", EXACT)
def test_kept_exactly(kind: Type) -> None:
    rows = random_rows(kind, ROWS, WIDTH)
    assert np.array_equal(values(kind, rows), reference.dequantize(rows, kind))
    assert KEPT[kind].note == "kept exactly"


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_a_little(kind: Type) -> None:
    rows = random_rows(kind, ROWS, WIDTH)
    expected = reference.dequantize(rows, kind)
    error = values(kind, rows) - expected
    assert np.sqrt(np.mean(error**2)) < ROUNDED[kind] * np.sqrt(np.mean(expected**2))
    assert KEPT[kind].note != "kept exactly"


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.IQ4_XS])
def test_codes_are_the_files_own(kind: Type) -> None:
    """Only the scales are rounded: by at most half a unit in float16's last place."""
    rows = random_rows(kind, ROWS, WIDTH)
    expected = reference.dequantize(rows, kind).reshape(-1, GROUP_SIZE)
    spread = np.abs(expected).max(axis=1, keepdims=True)
    # Scale and bias are each rounded, and may be far larger than what is left of their sum.
    weight, scales, biases = pack(kind, rows)
    size = np.abs(scales.reshape(-1, 1)).astype(np.float32) * (2 ** KEPT[kind].bits)
    size += np.abs(biases.reshape(-1, 1)).astype(np.float32) + spread
    error = np.abs(values(kind, rows).reshape(-1, GROUP_SIZE) - expected)
    assert (error <= size * 2**-11).all()


def test_the_larger_half_of_a_q6_k_group_is_not_rounded_to_other_codes() -> None:
    rows = random_rows(Type.Q6_K, ROWS, WIDTH)
    expected = reference.dequantize(rows, Type.Q6_K).reshape(-1, 2, 16)
    error = np.abs(values(Type.Q6_K, rows).reshape(-1, 2, 16) - expected)
    scales = np.abs(quants._sixteenth_scales(Type.Q6_K, rows.reshape(-1, 210))).reshape(-1, 2)
    larger = scales.argmax(axis=1)
    index = np.arange(len(larger))
    steps = scales.max(axis=1, keepdims=True)
    assert (error[index, larger] <= steps * 0.02).all()  # of 32 codes, by float16 scales
    assert (error[index, 1 - larger] <= steps * (1 / 4 + 0.02)).all()


@pytest.mark.parametrize("kind", KEPT)
def test_chunks_make_no_difference(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(kind, ROWS, WIDTH)
    whole = pack(kind, rows)
    monkeypatch.setattr(quants, "CHUNK", 1024)
    for part, again in zip(whole, pack(kind, rows), strict=True):
        assert np.array_equal(part, again)


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers_are_refused(kind: Type, number: float) -> None:
    rows = random_rows(kind, 1, WIDTH)
    starts = {Type.Q2_K: 80, Type.Q3_K: 108, Type.Q6_K: 208}
    start = starts.get(kind, 0)
    rows[0, start : start + 2] = np.array([number], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite|NaN"):
        pack(kind, rows)
    with pytest.raises(ValueError, match="NaN or infinite"):
        dequantise(kind, rows)


def test_scales_beyond_float16_are_refused() -> None:
    rows = random_rows(Type.Q8_0, 1, 32)
    rows[0, :2] = np.array([60000], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite in float16"):
        pack(Type.Q8_0, rows)


@pytest.mark.parametrize("kind", [Type.Q8_1, Type.Q8_K, Type.I8, Type.F64])
def test_other_types_are_refused(kind: Type) -> None:
    assert not quants.is_readable(kind)
