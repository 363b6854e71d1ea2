"""Rotary scaling of a GGUF file, as ``rope_scaling`` of ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_mtp.storage.gguf.quants import FLOATS, dequantise
from mlx_mtp.storage.gguf.source import Source

FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_TOLERANCE = 1e-4


def read_rope(source: Source, *, head_dim: int, limit: int) -> dict[str, Any]:
    """Return ``rope_theta`` and, if there is scaling, ``rope_scaling``.

    Args:
        source: the metadata.
        head_dim: rotated dimensions of a head.
        limit: length of the context.

    Raises:
        ValueError: the scaling is of a kind that is not read, or its factors are of no known form.
    """
    theta = source.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise source.refuse("rope.freq_base", theta, "not above 0")
    scaling = _scaling(source, limit=limit)
    if source.has(FACTORS):
        if scaling is not None:
            raise ValueError(f"{source.file.path} has both {FACTORS} and rope.scaling")
        original = source.integer("rope.scaling.original_context_length", 8192)
        scaling = _llama3(source, theta=theta, head_dim=head_dim, original=original)
    return {"rope_theta": theta} | ({} if scaling is None else {"rope_scaling": scaling})


def read_long_rope(
    source: Source, *, head_dim: int, limit: int, original: int
) -> dict[str, Any] | None:
    """Return ``rope_scaling`` with factors for short and for long contexts; None without them.

    Raises:
        ValueError: one list of factors is missing, or they have another length.
    """
    names = (SHORT_FACTORS, LONG_FACTORS)
    found = [name for name in names if source.has(name)]
    attention = source.number("rope.scaling.attn_factor", 1.0)
    if not found:
        if attention != 1:
            raise source.refuse("rope.scaling.attn_factor", attention, f"without {LONG_FACTORS}")
        return None
    if len(found) == 1:
        raise ValueError(f"{source.file.path} has {found[0]} alone, without the other factors")
    short, long = (_factors(source, name, head_dim // 2) for name in names)
    scaling = {"type": "longrope", "rope_type": "longrope"}
    ratio = limit / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if abs(attention - usual) > _TOLERANCE:
        scaling |= {"attention_factor": attention}
    return scaling | {
        "short_factor": [float(str(value)) for value in short],
        "long_factor": [float(str(value)) for value in long],
    }


def _scaling(source: Source, *, limit: int) -> dict[str, Any] | None:
    """Return linear or YaRN scaling; as in llama.cpp, a factor without a type is linear."""
    kind = source.text("rope.scaling.type", "linear")
    factor = source.number("rope.scaling.factor", source.number("rope.scale_linear", 0.0))
    if kind == "none" or factor in (0, 1):
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise source.refuse("rope.scaling.type", kind, "which is not read for this file")
    if source.number("rope.scaling.yarn_log_multiplier", 0.0) != 0:
        key = "rope.scaling.yarn_log_multiplier"
        raise source.refuse(key, source.get(key), f"which is not read for {source.arch}")
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": source.integer(
            "rope.scaling.original_context_length", limit
        ),
    }
    for key, theirs in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = source.number(f"rope.scaling.yarn_{key}", theirs)
        scaling |= {key: value} if value != theirs else {}
    return scaling


def _factors(source: Source, name: str, count: int) -> np.ndarray:
    """Return the factors ``float32 [head_dim / 2]`` of a tensor."""
    info = source.file.tensors[name]
    if info.shape != (count,) or info.type not in FLOATS:
        raise ValueError(
            f"{source.file.path}: {name} is {info.type.name} {list(info.shape)}, expected {count} "
            "numbers"
        )
    values = dequantise(info.type, info.rows())
    if values.min() <= 0:
        raise ValueError(f"{source.file.path}: {name} has factors of 0 or less")
    return values


def _llama3(source: Source, *, theta: float, head_dim: int, original: int) -> dict[str, Any]:
    """Recover Llama 3's scaling from the factors that llama.cpp's converter computed from it.

    Only the parameters' ratios show in the factors: 1 for short wavelengths, ``factor`` for long
    ones, and in between ``1 / f = (1 - s) / factor + s``, where ``s`` falls as 1 / wavelength.
    """
    found = _factors(source, FACTORS, head_dim // 2).astype(np.float64)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(str(np.float32(found.max())))
    for low, high in _candidates(found, wavelengths, factor=factor, original=original):
        expected = _llama3_factors(
            wavelengths, factor=factor, low=low, high=high, original=original
        )
        if np.allclose(found, expected, rtol=_TOLERANCE, atol=0):
            return {
                "type": "llama3",
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(f"{source.file.path}: {FACTORS} is not Llama 3's rotary scaling")


def _candidates(
    found: np.ndarray, wavelengths: np.ndarray, *, factor: float, original: int
) -> Iterator[tuple[float, float]]:
    """Yield low and high frequency factors to try, those of published models first."""
    yield 1.0, 4.0
    between = np.flatnonzero((found > 1.0001) & (found < factor * 0.9999))
    if factor <= 1 or not len(between):
        return
    smooth = (1 / found - 1 / factor) / (1 - 1 / factor)
    frequencies = original / wavelengths
    first, last = between[0], between[-1]
    low = frequencies[first] / (1 + 3 * smooth[first])
    lines = [(low, 4 * low)]  # their usual ratio
    if first != last:
        width = (frequencies[first] - frequencies[last]) / (smooth[first] - smooth[last])
        low = frequencies[first] - smooth[first] * width
        lines.append((low, low + width))
    for low, high in lines:
        yield float(f"{low:.3g}"), float(f"{high:.3g}")
        yield float(low), float(high)


def _llama3_factors(
    wavelengths: np.ndarray, *, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    smooth = (original / wavelengths - low) / (high - low)
    return 1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))
