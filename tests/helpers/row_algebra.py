"""Whether a model computes several rows as it computes one, and which of its modules does not.

The same ids are the rows of one step, and of steps of one row each, which is plain decoding.  The
outputs of all modules of the layers are recorded, and the first one that differs, in the order of
the calls, names the module at fault: what it was given was still equal.

Products must not depend on the number of rows, so that algebra alone can differ: those of MLX's CPU
back-end with the reference BLAS do not, nor do those in half precision with any BLAS.  ``main`` is
for a process with that BLAS (``MLX_MTP_BLAS=reference``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_mtp.lab.tiny_models import build, tiny_config
from mlx_mtp.model.layout import StepLayout, plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import Wrapper, replace

FORMATS = ("float32", "bfloat16", "float16", "4-bit")
NUM_ROWS = 7
_PROMPT = 11


class Recorder(Wrapper):
    """A module whose outputs are appended to a list, with its path and class."""

    def __init__(self, module: nn.Module, path: str, outputs: list[tuple[str, mx.array]]) -> None:
        super().__init__(module)
        self._path = path
        self._outputs = outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        result = self.wrapped(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, mx.array):
            inner: Any = self.wrapped
            while isinstance(inner, Wrapper):
                inner = inner.wrapped
            self._outputs.append((f"{type(inner).__name__} {self._path}", first))
        return result


def tiny(family: str, form: str, **overrides: Any) -> Any:
    """A tiny random model of a family in one of ``FORMATS``.

    MLX's CPU back-end has no product of half-precision experts; these have 8 bits.
    """
    dtype = getattr(mx, form, mx.bfloat16)
    base = build(tiny_config(family, **overrides), dtype=dtype, bits=4 if form == "4-bit" else None)
    if dtype != mx.float32:
        nn.quantize(base, 32, 8, class_predicate=lambda _, each: isinstance(each, SwitchLinear))
        mx.eval(base.parameters())
    return base


def first_difference(make: Callable[[], Any], *, num_rows: int = NUM_ROWS) -> str | None:
    """Compare the rows of one step with steps of one row, which are plain decoding.

    Args:
        make: makes the base model; called twice.
        num_rows: of the step.

    Returns:
        Class and path of the first module that differs, and by how much; None if none does.

    Raises:
        ValueError: the model is refused.
    """
    models = MTPModel(make()), MTPModel(make())
    one, several = (_recorded(model.base) for model in models)
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, models[0].vocab_size, _PROMPT).tolist()
    ids = rng.integers(0, models[0].vocab_size, num_rows).tolist()
    for model, outputs, parts in zip(
        models, (one, several), ([[token] for token in ids], [ids]), strict=True
    ):
        cache = model.make_cache()
        model(mx.array([prompt]), cache=cache, layout=plain_layout(num_pending=_PROMPT))
        outputs.clear()
        for part in parts:
            cache.begin_step()
            layout = StepLayout(1, len(part) - 1, (0,) * len(part))
            hidden = model(mx.array([part]), cache=cache, layout=layout)
            outputs.append(("logits", model.logits(hidden)))
            mx.eval([output for _, output in outputs])
    return _compare(one, several, num_rows)


def _recorded(base: Any) -> list[tuple[str, mx.array]]:
    """Record the outputs of the modules in the layers of a model, but for the smallest."""
    outputs: list[tuple[str, mx.array]] = []
    layers = {id(layer) for layer in base.layers}
    prefixes = [path for path, module in base.named_modules() if id(module) in layers]
    modules = {
        path: Recorder(module, path, outputs)
        for path, module in base.named_modules()
        if path.rpartition(".")[0] in prefixes and not path.rpartition(".")[-1].isdigit()
    }
    replace(base, modules)
    return outputs


def _compare(
    one: list[tuple[str, mx.array]], several: list[tuple[str, mx.array]], num_rows: int
) -> str | None:
    """The first name whose rows differ, in the order of ``several``."""
    singles: dict[str, list[mx.array]] = {}
    for name, output in one:
        singles.setdefault(name, []).append(output)
    places: dict[str, int] = {}
    for name, output in several:
        place = places[name] = places.get(name, -1) + 1  # a module may be called twice a forward
        rows = singles[name][place :: len(singles[name]) // num_rows]
        axis = next(i for i in range(output.ndim) if output.shape[i] != rows[0].shape[i])
        expected = mx.concatenate(rows, axis=axis)
        if not mx.array_equal(output, expected).item():
            a, b = output.astype(mx.float32), expected.astype(mx.float32)
            return f"{name} by {mx.abs(a - b).max().item():.1g} of {mx.abs(b).max().item():.1g}"
    return None


def result_of(family: str, form: str) -> str:
    """``"equal"``, ``"refused: ..."`` or the first difference."""
    try:
        return first_difference(lambda: tiny(family, form)) or "equal"
    except ValueError as error:
        return f"refused: {error}"


def main() -> None:
    """Print the results of families (arguments after the format) as JSON."""
    form, *names = sys.argv[1:]
    print(json.dumps({name: result_of(name, form) for name in names}))


if __name__ == "__main__":
    main()
