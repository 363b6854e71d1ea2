"""What a run trains, and the weights that the model gets from it.

Usually both are the same.  An adapter of kind ``vera`` trains vectors, from which its low-rank
weights are made.  If the adapter is quantised in its file, the model is evaluated with the numbers
that will be loaded from it, and so are the last gradients.  Rounding has no gradient, so that of
the rounded weights is applied to the weights themselves: the straight-through estimator (Bengio et
al. 2013, arXiv 1308.3432).

A gradient back-end gets weights and returns their gradient, so it needs to know none of this.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.model.adapter_file import is_quantised, rounded
from mlx_mtp.model.config import HeadsConfig, MTPConfig
from mlx_mtp.model.vera import LAMBDA_B, LAMBDA_D, is_vera, materialised, vectors

Parameters = dict[str, mx.array]

_OWNER = "base."  # prefix of the parameters that are low-rank weights
_LEAVES = ("lora_a", "lora_b", LAMBDA_D, LAMBDA_B)


class WeightForm:
    """The relation of what is trained and the weights.

    Args:
        config: of the adapter.
    """

    def __init__(self, config: MTPConfig | HeadsConfig) -> None:
        self._config = config

    def trained(self, weights: Parameters) -> Parameters:
        """What is trained, float32, from weights as ``adapter.trainable`` returns them."""
        if not is_vera(self._config):
            return weights
        low_rank, rest = _divided(weights)
        return _joined(vectors(low_rank, self._config), rest)

    def weights(self, parameters: Parameters, *, rounds: bool = True) -> Parameters:
        """The weights of the model.

        Args:
            parameters: what is trained.
            rounds: whether a quantised adapter gets the numbers of its file.
        """
        low_rank, rest = _divided(parameters)
        if rounds and is_quantised(self._config):
            return _joined(rounded(low_rank, self._config), rounded(rest, self._config))
        if is_vera(self._config):
            low_rank = materialised(low_rank, self._config)
        return _joined(low_rank, rest)

    def gradients(self, gradients: Parameters) -> Parameters:
        """The gradient of what is trained, from that of the weights."""
        if not is_vera(self._config):
            return gradients
        low_rank, rest = _divided(gradients)
        return _joined(vectors(low_rank, self._config, pull_back=True), rest)


def _divided(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Tensors of the adapted layers, by their names in an adapter file, and the others."""
    low_rank, rest = {}, {}
    for name, value in parameters.items():
        if name.startswith(_OWNER) and name.rpartition(".")[2] in _LEAVES:
            low_rank[name.removeprefix(_OWNER)] = value
        else:
            rest[name] = value
    return low_rank, rest


def _joined(low_rank: Parameters, rest: Parameters) -> Parameters:
    """The inverse of ``_divided``, in the order of the names."""
    both = {_OWNER + name: value for name, value in low_rank.items()} | rest
    return dict(sorted(both.items()))
