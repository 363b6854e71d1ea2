"""Tiny random models of mlx-lm's families with random adapters, as training would make them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_mtp.lab.tiny_models import tiny_model
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.settings import TrainSettings


def family_base(family: str, *, mode: str | None = None, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model of a family, in float32.

    Args:
        family: name of its file in mlx-lm.
        mode: ``"affine"`` quantises all weights, ``"mxfp4"`` those of experts; 4 bits, groups of
            32.
        seed: seed of the weights.
        overrides: keys of its configuration.
    """
    base = tiny_model(family, seed=seed, **overrides)
    if mode is not None:
        # an embedding in mxfp4 would make the whole model bfloat16
        kinds = (SwitchLinear,) if mode == "mxfp4" else (nn.Linear, nn.Embedding, SwitchLinear)

        def is_quantised(path: str, module: nn.Module) -> bool:
            fits = isinstance(module, kinds) and module.weight.shape[-1] % 32 == 0
            return fits and path.rpartition(".")[-1] != "gate"

        nn.quantize(base, group_size=32, bits=4, mode=mode, class_predicate=is_quantised)
        mx.eval(base.parameters())
    return base


def family_mtp(
    family: str,
    *,
    mode: str | None = None,
    adapt: str = "shared",
    adapter_scale: float = 0.3,
    adapter_seed: int = 1,
    **overrides: Any,
) -> MTPModel:
    """A tiny model with the adapter that training would make, with random values in it.

    Args:
        family: name of its file in mlx-lm.
        mode: see ``family_base``.
        adapt: see ``TrainSettings``.
        adapter_scale: standard deviation of the adapter's values.
        adapter_seed: their seed.
        overrides: keys of the model's configuration.
    """
    base = MTPModel(family_base(family, mode=mode, **overrides))
    model = new_adapter(base, TrainSettings(num_draft_tokens=4, rank=4, adapt=adapt))
    rng = np.random.default_rng(adapter_seed)
    values = {
        name: mx.array(adapter_scale * rng.standard_normal(value.shape).astype(np.float32))
        for name, value in trainable(model).items()
    }
    model.update(tree_unflatten(list(values.items())))
    model.eval()
    mx.eval(model.parameters())
    return model
