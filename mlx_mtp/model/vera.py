"""Low-rank weights made of random matrices that all layers share, and a vector on either side.

VeRA (Kopiczko et al. 2024, arXiv 2310.11454) trains d and b in ``y += diag(b) B diag(d) A x`` with
frozen random A and B.  Here ``lora_a = A[:in] * d`` and ``lora_b = B[:, :out] * b``, so that a
layer computes as with any low-rank weights and only ``d`` ``[r]`` and ``b`` ``[out]`` are stored.

Entries of A are uniform between ``-in**-0.5`` and ``in**-0.5`` and those of B between ``-r**-0.5``
and ``r**-0.5``, as ``nn.Linear`` begins.  They are made of raw bits of Philox (Salmon et al. 2011),
a counter-based generator whose stream is fixed by its definition, so that a seed means the same
matrices in every version of NumPy and MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import mlx.core as mx
import numpy as np

from mlx_mtp.model.config import VERA, MTPConfig

LAMBDA_D, LAMBDA_B = "vera_lambda_d", "vera_lambda_b"  # PEFT's names
INITIAL_D = 0.1  # PEFT's default

Tensors = dict[str, mx.array]


class SharedMatrices:
    """The random matrices of a configuration, drawn as large as they are asked for.

    Args:
        config: of an adapter of kind ``vera``.
    """

    def __init__(self, config: MTPConfig) -> None:
        self._config = config
        self._rows: dict[tuple[int, int], mx.array] = {}

    def of(self, path: str, *, out_dims: int) -> tuple[mx.array, mx.array]:
        """The parts of a layer, float32: A ``[in, r]`` and B ``[r, out]``."""
        rank, in_dims = self._config.rank_of(path), self._config.vera_dims[leaf_of(path)]
        a = self._uniform(0, in_dims, rank) * in_dims**-0.5
        return a, self._uniform(1, out_dims, rank).T * rank**-0.5

    def _uniform(self, index: int, rows: int, rank: int) -> mx.array:
        """The first rows of a random matrix ``[..., rank]`` between -1 and 1."""
        known = self._rows.get((index, rank))
        if known is None or known.shape[0] < rows:
            key = np.array([self._config.vera_seed, index], np.uint64)
            bits = np.random.Philox(key=key).random_raw(rows * rank)
            numbers = (bits >> np.uint64(40)).astype(np.float32) * 2.0**-23 - 1.0  # exact
            known = self._rows[index, rank] = mx.array(numbers.reshape(rows, rank))
        return known[:rows]


def leaf_of(path: str) -> str:
    """Name of a layer in its owner."""
    return path.rpartition(".")[-1]


def materialised(tensors: Mapping[str, mx.array], config: MTPConfig) -> Tensors:
    """Replace the vectors of all layers by the low-rank weights that they stand for, float32.

    Args:
        tensors: those of an adapter, by name; vectors as ``PATH.vera_lambda_d`` and
            ``PATH.vera_lambda_b``.  Other tensors are unchanged.
        config: of an adapter of kind ``vera``.

    Raises:
        ValueError: a vector is missing or of another size.
    """
    shared, weights = SharedMatrices(config), {}
    for name, value in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind not in (LAMBDA_D, LAMBDA_B):
            weights[name] = value
            continue
        lambda_d, lambda_b = (tensors.get(f"{path}.{key}") for key in (LAMBDA_D, LAMBDA_B))
        rank = config.rank_of(path)
        if lambda_d is None or lambda_b is None or lambda_d.shape != (rank,) or lambda_b.ndim != 1:
            raise ValueError(f"{path} must have {LAMBDA_D} [{rank}] and {LAMBDA_B} [out]")
        if leaf_of(path) not in config.vera_dims:
            raise ValueError(f"vera_dims has no {leaf_of(path)}")
        if kind == LAMBDA_D:
            a, b = shared.of(path, out_dims=lambda_b.size)
            weights[f"{path}.lora_a"] = a * lambda_d.astype(mx.float32)
            weights[f"{path}.lora_b"] = b * lambda_b.astype(mx.float32)
    return weights


def vectors(
    weights: Mapping[str, mx.array], config: MTPConfig, *, pull_back: bool = False
) -> Tensors:
    """Replace low-rank weights by vectors: those they are made of, or gradients of these.

    The inverse of ``materialised`` is a projection onto the random weights; the gradient of a
    vector, by the chain rule, is the same sum without the norm of these.

    Args:
        weights: by name, with layers as ``PATH.lora_a`` and ``PATH.lora_b``.
        config: of an adapter of kind ``vera``.
        pull_back: take ``weights`` as gradients.
    """
    shared, found = SharedMatrices(config), {}
    for name, value in weights.items():
        path, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b"):
            found[name] = value
            continue
        is_a = kind == "lora_a"
        matrix = shared.of(path, out_dims=weights[f"{path}.lora_b"].shape[1])[0 if is_a else 1]
        sums = (value.astype(mx.float32) * matrix).sum(axis=0)
        if not pull_back:
            sums = sums / (matrix * matrix).sum(axis=0)
        found[f"{path}.{LAMBDA_D if is_a else LAMBDA_B}"] = sums
    return found


def is_vera(config: object) -> TypeGuard[MTPConfig]:
    """Whether an adapter's low-rank weights are made of random ones."""
    return isinstance(config, MTPConfig) and config.adapter_kind == VERA
