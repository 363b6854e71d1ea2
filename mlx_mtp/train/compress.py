"""A smaller adapter from a trained one: lower ranks, quantised weights, or both.

The best approximation of a product ``lora_a @ lora_b`` by one of a lower rank keeps its largest
singular values (Eckart and Young 1936).  They come from a product of two small triangular factors,
and the square root of each goes to either side.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.loading import read_any_adapter
from mlx_mtp.model.config import WEIGHTS_FILE, MTPConfig
from mlx_mtp.terminal import human_bytes
from mlx_mtp.train.run.card import training_card
from mlx_mtp.train.run.checkpoint import adapter_file_bytes, save_adapter

Tensors = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How to make an adapter smaller.

    Attributes:
        bits: bits of the low-rank weights; 0 is float16.
        sampler_bits: bits of the sampler head's linear layers; None is ``bits``.
        group_size: number of quantised weights with the same scale.
        max_rank: maximum rank of a layer; None keeps the ranks.
        energy: share of the sum of a layer's squared singular values that its rank has to keep.

    Raises:
        ValueError: a value is out of range.
    """

    bits: int = 0
    sampler_bits: int | None = None
    group_size: int = 64
    max_rank: int | None = None
    energy: float = 1.0

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {self.max_rank}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, got {self.energy}")

    @property
    def keeps_ranks(self) -> bool:
        """Whether no layer gets another rank."""
        return self.max_rank is None and self.energy == 1

    def words(self) -> str:
        """Describe the compression, for the card."""
        parts = [] if self.max_rank is None else [f"rank at most {self.max_rank}"]
        parts += [] if self.energy == 1 else [f"{self.energy:.4g} of the energy of each layer"]
        sampler = self.bits if self.sampler_bits is None else self.sampler_bits
        if self.bits or sampler:
            bits = [f"{count} bits" if count else "float16" for count in (self.bits, sampler)]
            parts += [f"low-rank weights in {bits[0]}, sampler head in {bits[1]}"]
        return ", ".join(parts) or "none"


def compress(
    config: MTPConfig, weights: Mapping[str, mx.array], how: Compression
) -> tuple[MTPConfig, Tensors]:
    """Make an adapter smaller.

    Args:
        config: of the adapter.
        weights: by name, see ``loading.read_adapter``.
        how: to make it smaller.

    Returns:
        The configuration, without an acceptance, and the weights that ``save_adapter`` quantises.

    Raises:
        ValueError: a value is not one of those that a configuration can have.
    """
    sampler_bits = how.bits if how.sampler_bits is None else how.sampler_bits
    config = dataclasses.replace(
        config.as_plain(),
        acceptance=(),
        bits=how.bits,
        sampler_bits=sampler_bits if config.sampler else 0,
        group_size=how.group_size if how.bits or sampler_bits else 64,
    )
    if how.keeps_ranks:
        return config, dict(weights)
    made, ranks = dict(weights), {}
    for name in [name for name in weights if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        a, b = shortened(
            made[name], made[f"{path}.lora_b"], max_rank=how.max_rank, energy=how.energy
        )
        made |= {name: a, f"{path}.lora_b": b}
        ranks[path] = a.shape[-1]
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.rank
    pattern = {path: rank for path, rank in ranks.items() if rank != usual}
    return dataclasses.replace(config, rank=usual, rank_pattern=pattern), made


def shortened(
    lora_a: mx.array, lora_b: mx.array, *, max_rank: int | None = None, energy: float = 1.0
) -> tuple[mx.array, mx.array]:
    """The nearest product of a lower rank.

    Args:
        lora_a: ``[in, r]``, or ``[E, in, r]`` of experts.
        lora_b: ``[r, out]``, or ``[E, r, out]``.
        max_rank: maximum rank of the result.
        energy: share of the squared singular values, of all experts together, to keep.

    Returns:
        Both factors, float32.
    """
    left, r_a = np.linalg.qr(_double(lora_a))
    right, r_b = np.linalg.qr(_double(lora_b).swapaxes(-1, -2))
    u, values, v_t = np.linalg.svd(r_a @ r_b.swapaxes(-1, -2))
    squares = (values**2).reshape(-1, values.shape[-1]).sum(0)
    shares = np.cumsum(squares) / max(float(squares.sum()), 1e-300)
    needed = 1 + int(np.searchsorted(shares, energy * (1 - 1e-12)))
    size = min(needed, values.shape[-1], max_rank or values.shape[-1])
    root = np.sqrt(values[..., None, :size])
    a = left @ (u[..., :size] * root)
    b = right @ (v_t.swapaxes(-1, -2)[..., :size] * root)
    narrow = (part.astype(np.float32) for part in (a, b.swapaxes(-1, -2)))
    first, second = (mx.array(part) for part in narrow)
    return first, second


def save_compressed(folder: Path, output: Path, how: Compression, *, name: str = "") -> MTPConfig:
    """Write a smaller adapter as a folder.

    Args:
        folder: of the adapter.
        output: a new or empty folder.
        how: to make it smaller.
        name: name of the adapter in the card; its path by default.

    Raises:
        ValueError: the adapter cannot be read or has heads, or ``output`` is not empty.
        OSError: a file cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists")
    config, weights = read_any_adapter(folder)
    if not isinstance(config, MTPConfig):
        raise ValueError(f"{name or folder} has heads: only adapters of mask tokens are compressed")
    config, weights = compress(config, weights, how)
    shapes = {key: value.shape for key, value in weights.items()}
    recipe = {
        "compressed from": name or str(folder),
        "compression": how.words(),
        "size": human_bytes(adapter_file_bytes(shapes, config)),
    }
    save_adapter(output, config, weights, readme=training_card(config, recipe=recipe, best=None))
    return config


def weights_bytes(folder: Path) -> int:
    """Size of an adapter's weights file."""
    return (folder / WEIGHTS_FILE).stat().st_size


def _double(value: mx.array) -> np.ndarray:
    return np.array(value.astype(mx.float32)).astype(np.float64)
