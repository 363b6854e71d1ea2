"""GGUF's block types as MLX's packed weights: ``w = scale * code + bias`` for groups of 32.

Most types are such codes already, with a scale per 32 values, so they are repacked and not rounded
again.  The others have a scale per 16 values, which MLX has not, and are rounded once more, to
more bits than they have.  What happens to each type is in ``KEPT``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import quants as reference
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

GROUP_SIZE = 32
CHUNK = 1 << 18
FLOATS = (Type.F32, Type.F16, Type.BF16)
_CODEBOOK = np.array(reference.IQ4_NL.kvalues, np.int16)

# Codes of a chunk of blocks, uint8 [B, n], and scales and biases, float32 [B, n / 32].
Codes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Kept:
    """How a type becomes packed weights.

    Attributes:
        bits: of MLX's codes.
        codes: decodes blocks ``uint8 [B, bytes]``.
        note: what changes, for the user.
    """

    bits: int
    codes: Callable[[np.ndarray], Codes]
    note: str


def pack(kind: Type, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Repack rows of a type of ``KEPT``.

    Args:
        kind: the type.
        rows: ``uint8 [R, bytes per row]``.

    Returns:
        Weight ``uint32 [R, in * bits / 32]``, scales and biases ``float16 [R, in / 32]``.

    Raises:
        ValueError: a scale is not finite, or not in float16.
    """
    kept, (block, size) = KEPT[kind], GGML_QUANT_SIZES[kind]
    blocks = rows.reshape(-1, size)
    count = len(blocks) * block
    weight = np.empty(count * kept.bits // 32, np.uint32)
    scales, biases = (np.empty(count // GROUP_SIZE, np.float16) for _ in range(2))
    step = CHUNK // block  # of blocks, so that what is computed in between stays in the cache
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            chunk = kept.codes(np.ascontiguousarray(blocks[start : start + step]))
            at, end = start * block, min(start + step, len(blocks)) * block
            weight[at * kept.bits // 32 : end * kept.bits // 32] = _packed(chunk[0], kept.bits)
            scales[at // GROUP_SIZE : end // GROUP_SIZE] = chunk[1].reshape(-1)
            biases[at // GROUP_SIZE : end // GROUP_SIZE] = chunk[2].reshape(-1)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise ValueError("it has scales that are not finite in float16")
    shape = len(rows), -1
    return weight.reshape(shape), scales.reshape(shape), biases.reshape(shape)


def dequantise(kind: Type, rows: np.ndarray) -> np.ndarray:
    """Return the values of rows, ``float32 [R, in]``.

    Raises:
        ValueError: the type is not read, or a value is not finite.
    """
    try:
        with np.errstate(all="ignore"):
            values = reference.dequantize(rows, kind)
    except NotImplementedError:
        raise ValueError(f"its type {kind.name} is not supported") from None
    if not np.isfinite(values).all():
        raise ValueError("it has NaN or infinite values")
    return values


def is_readable(kind: Type) -> bool:
    """Whether tensors of a type can be converted."""
    return kind in FLOATS or kind in KEPT


def _halves(blocks: np.ndarray) -> np.ndarray:
    """Return 4-bit codes ``[..., 2 n]`` of bytes ``[..., n]``: all low halves, then all high."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1)


def _float16(blocks: np.ndarray, start: int) -> np.ndarray:
    """Return the float16 at a byte of each block, as float32 ``[B, 1]``."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _high_bits(blocks: np.ndarray) -> np.ndarray:
    """Return the fifth bits ``[B, 32]`` of Q5_0 and Q5_1, at their place, of bytes ``[B, 4]``."""
    return np.unpackbits(blocks, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> Codes:
    scales = _float16(blocks, 0)
    return _halves(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks: np.ndarray) -> Codes:
    return _halves(blocks[:, 4:]), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Codes:
    scales = _float16(blocks, 0)
    return _halves(blocks[:, 6:]) | _high_bits(blocks[:, 2:6]), scales, -16 * scales


def _q5_1(blocks: np.ndarray) -> Codes:
    codes = _halves(blocks[:, 8:]) | _high_bits(blocks[:, 4:8])
    return codes, _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Codes:
    scales = _float16(blocks, 0)
    return blocks[:, 2:] ^ 0x80, scales, -128 * scales


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and minima of Q4_K and Q5_K, ``[B, 8]`` each."""
    scales, minima = reference.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _float16(blocks, 0) * scales, _float16(blocks, 2) * -minima.astype(np.float32)


def _q4_k(blocks: np.ndarray) -> Codes:
    codes = _halves(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> Codes:
    low = _halves(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    return (low | high).reshape(-1, 256), *_k_scales(blocks)


def _iq4_nl(blocks: np.ndarray) -> Codes:
    scales = _float16(blocks, 0)
    return _from_codebook(_halves(blocks[:, 2:])), scales, -128 * scales


def _iq4_xs(blocks: np.ndarray) -> Codes:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    high = (high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3  # [B, 8]
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    numbers = (low | (high << 4)).astype(np.float32) - 32
    scales = (_float16(blocks, 0) * numbers).astype(np.float16).astype(np.float32)
    codes = _from_codebook(_halves(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256))
    return codes, scales, -128 * scales


def _from_codebook(indices: np.ndarray) -> np.ndarray:
    return (_CODEBOOK + 128).astype(np.uint8)[indices]


def _rounded(kind: Type, bits: int) -> Callable[[np.ndarray], Codes]:
    """Return a decoder that spreads the range of each 32 values over codes of ``bits``."""

    def codes(blocks: np.ndarray) -> Codes:
        values = reference.dequantize(blocks, kind).reshape(-1, GROUP_SIZE)
        low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
        return _round_to(values, scales=(high - low) / (2**bits - 1), biases=low, bits=bits)

    return codes


def _q3_k(blocks: np.ndarray) -> Codes:
    return _signed(Type.Q3_K, blocks, levels=8, bits=6)


def _q6_k(blocks: np.ndarray) -> Codes:
    return _signed(Type.Q6_K, blocks, levels=64, bits=8)


def _signed(kind: Type, blocks: np.ndarray, *, levels: int, bits: int) -> Codes:
    """Round values with signed codes and a scale per 16 to a scale per 32.

    The steps of the 16 values with the larger scale are whole numbers of the new ones, so that
    these values stay exactly as they are, up to the rounding of the scale to float16.
    """
    values = reference.dequantize(blocks, kind).reshape(-1, GROUP_SIZE)
    halves = _sixteenth_scales(kind, blocks).reshape(-1, 2)
    larger = np.abs(halves).argmax(axis=1, keepdims=True)
    steps = np.take_along_axis(halves, larger, axis=1)  # with their sign: codes are not symmetric
    scales = steps * (levels / 2**bits)
    scales = scales.astype(np.float16).astype(np.float32)
    return _round_to(values, scales=scales, biases=-(2 ** (bits - 1)) * scales, bits=bits)


def _sixteenth_scales(kind: Type, blocks: np.ndarray) -> np.ndarray:
    """Return the scales ``[B, 16]`` of Q6_K and Q3_K."""
    if kind == Type.Q6_K:
        return _float16(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _float16(blocks, 108) * ((low | (high << 4)).astype(np.float32) - 32)


def _round_to(values: np.ndarray, *, scales: np.ndarray, biases: np.ndarray, bits: int) -> Codes:
    """Round values ``[G, 32]`` to codes, by scales and biases ``[G, 1]`` as float16 holds them."""
    scales = scales.astype(np.float16).astype(np.float32)
    biases = biases.astype(np.float16).astype(np.float32)
    factors = 1 / np.where(scales == 0, 1, scales)
    # Values that are not finite have such scales, and are refused with them.
    codes = (values * factors + (0.5 - biases * factors)).clip(0, 2**bits - 1).astype(np.uint8)
    return codes, scales, biases


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes ``uint8 [.., n]`` as MLX does: a stream of bits, the first in the lowest."""
    flat = codes.reshape(-1)
    if bits == 8:
        return np.ascontiguousarray(flat).view("<u4")
    if bits == 4:
        return (flat[0::2] | (flat[1::2] << 4)).view("<u4")
    # Eight codes take ``bits`` bytes.
    groups = flat.reshape(-1, 8).astype(np.uint64)
    words = np.zeros(len(groups), np.uint64)
    for index in range(8):
        words |= groups[:, index] << np.uint64(bits * index)
    return (
        np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1).view("<u4")
    )


_EXACT = "kept exactly"
_ROUNDED_SCALES = "kept; scales rounded to float16"
KEPT = {
    Type.Q4_0: Kept(4, _q4_0, _EXACT),
    Type.Q4_1: Kept(4, _q4_1, _EXACT),
    Type.Q5_0: Kept(5, _q5_0, _EXACT),
    Type.Q5_1: Kept(5, _q5_1, _EXACT),
    Type.Q8_0: Kept(8, _q8_0, _EXACT),
    Type.IQ4_NL: Kept(8, _iq4_nl, _EXACT),
    Type.Q4_K: Kept(4, _q4_k, _ROUNDED_SCALES),
    Type.Q5_K: Kept(5, _q5_k, _ROUNDED_SCALES),
    Type.IQ4_XS: Kept(8, _iq4_xs, _ROUNDED_SCALES),
    Type.Q6_K: Kept(8, _q6_k, "rounded to 8 bits, since MLX has no groups of 16"),
    Type.Q3_K: Kept(6, _q3_k, "rounded to 6 bits, since MLX has no groups of 16"),
    Type.Q2_K: Kept(5, _rounded(Type.Q2_K, 5), "rounded to 5 bits, since MLX has no groups of 16"),
    **{
        kind: Kept(6, _rounded(kind, 6), "rounded to 6 bits, since MLX has no such codebook")
        for kind in (Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S)
    },
}
