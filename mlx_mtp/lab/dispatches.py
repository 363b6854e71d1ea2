"""Primitives of a step, counted in its graph: ``python -m mlx_mtp.lab.dispatches``.

The host pays for every primitive of a graph, and a GPU launches about one kernel for each that is
no view, so their number is what a step costs apart from its arithmetic.  Nothing is timed: the
graphs of two tiny models, which differ in one layer, are written with ``mx.export_to_dot``.  The
difference of their primitives is that of a layer; what is left belongs to the step (embedding,
masks, head, acceptance, drafting).

On a CPU, MLX composes its fast operations of basic ones, and our Metal kernels cannot be called.
``gpu_graph`` gives each of them one node, as it has in the graph of a GPU.  The last line of the
output is one JSON line.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.attention_layer import attention_operations, use_attention
from mlx_mtp.backends.metal.choice import KernelChoice
from mlx_mtp.backends.metal.layers import matmul_operations, use_kernels
from mlx_mtp.decoding.loop import decode
from mlx_mtp.model.layout import StepLayout, linear_layout, plain_layout, quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.adapter import new_adapter
from mlx_mtp.train.settings import TrainSettings

NUM_DRAFTS = 4
LAYOUTS: dict[str, StepLayout] = {
    "plain": plain_layout(),
    "linear": linear_layout(num_pending=1, num_draft_tokens=NUM_DRAFTS, num_masks=NUM_DRAFTS),
    "quadratic": quadratic_layout(num_pending=1, num_draft_tokens=NUM_DRAFTS, num_masks=NUM_DRAFTS),
    "auto": StepLayout(1, 0, (1,)),
}
"""Auto's is the most frequent one with masks on the default model on a CPU."""
STOCK = "stock"
FORMS: dict[str, dict[str, bool]] = {
    "4-bit": {"quantised": True, "with_kernels": False},
    "4-bit, our kernels": {"quantised": True, "with_kernels": True},
    "float": {"quantised": False, "with_kernels": False},
}
"""Of weights, and whether our kernels compute with them."""
VIEWS = frozenset(
    [
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unflatten",
    ]
)
"""Primitives that launch nothing, except that a reshape of scattered rows copies them."""

_LAYERS = 2
_PROMPT = list(range(1, 9))
_STEPS = 6  # of the loop; the last one is counted
_NODE = re.compile(r'\[label ="([^"]*)", shape=rectangle\]')
_STAND_IN = "Depends"  # a primitive that takes any inputs and returns other arrays


class Size(NamedTuple):
    """Primitives, and how many of them are no views."""

    primitives: int
    launches: int

    @classmethod
    def of(cls, counts: Counter[str]) -> Size:
        """Sum up primitives by name."""
        views = sum(count for name, count in counts.items() if name in VIEWS)
        return cls(counts.total(), counts.total() - views)


def primitives(*arrays: Any) -> Counter[str]:
    """Count what it takes to evaluate arrays, by name of the primitive."""
    flat: Any = [value for _, value in tree_flatten(list(arrays)) if isinstance(value, mx.array)]
    text: Any = io.StringIO()
    mx.export_to_dot(text, *flat)
    return Counter(map(_short, _NODE.findall(text.getvalue())))


def _short(name: str) -> str:
    if name == _STAND_IN:
        return "Kernel"
    return "Compiled" if name.startswith("Compiled") else name.split()[0]


@contextmanager
def gpu_graph() -> Iterator[list[Counter[str]]]:
    """Build graphs as on a GPU; the list fills with what each call of ``mx.eval`` computes.

    What MLX's fast operations and our kernels would compute is replaced by zeros.
    """
    evaluated: list[Counter[str]] = []

    def counting(evaluate: Any) -> Any:
        def count(*arrays: Any) -> None:
            evaluated.append(primitives(*arrays))
            evaluate(*arrays)

        return count

    fast = {
        "rms_norm": lambda x, weight, eps: _node(x.shape, x.dtype, x, weight),
        "layer_norm": lambda x, weight, bias, eps: _node(x.shape, x.dtype, x, weight, bias),
        "rope": _rope,
        "scaled_dot_product_attention": _attention,
    }
    evaluating = {name: counting(getattr(mx, name)) for name in ("eval", "async_eval")}
    patched = [
        (mx.fast, fast),
        (mx, {"dequantize": _dequantize, **evaluating}),
        (kernels, {"run_all": _launch}),
    ]
    with ExitStack() as stack:
        for module, functions in patched:
            stack.enter_context(mock.patch.multiple(module, **functions))
        yield evaluated


def _node(shape: Any, dtype: mx.Dtype, *inputs: Any) -> mx.array:
    """An array of zeros that depends on others by one primitive."""
    arrays = [value for value in inputs if isinstance(value, mx.array)]
    return mx.depends(_zeros(tuple(shape), dtype), arrays)  # type: ignore[return-value]


@cache
def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    zeros = mx.zeros(shape, dtype)
    return mx.array(zeros.tolist(), dtype)  # evaluated, so no primitive


def _rope(x: mx.array, dims: int, *, offset: Any, freqs: Any = None, **options: Any) -> mx.array:
    del dims, options
    return _node(x.shape, x.dtype, x, offset, freqs)


def _attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (*q.shape[:3], k.shape[2]))  # as MLX does
    return _node((*q.shape[:3], v.shape[3]), q.dtype, q, k, v, mask)


def _dequantize(weight: mx.array, scales: mx.array, biases: Any, **options: Any) -> mx.array:
    shape = (*scales.shape[:-1], scales.shape[-1] * options["group_size"])
    return _node(shape, scales.dtype, weight, scales, biases)


def _launch(launch: kernels.Launch) -> list[mx.array]:
    inputs = [value for value in launch.inputs.values() if isinstance(value, mx.array)]
    zeros = [_zeros(tuple(shape), dtype) for shape, dtype in launch.outputs.values()]
    return mx.depends(zeros, inputs)  # type: ignore[return-value]


def tiny_base(*, layers: int, quantised: bool) -> Model:
    """Make a llama of that many layers in bfloat16, its weights 4-bit or not."""
    base = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=128,
            num_hidden_layers=layers,
            intermediate_size=192,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=64,
            tie_word_embeddings=True,
        )
    )
    base.set_dtype(mx.bfloat16)
    if quantised:
        nn.quantize(base, group_size=64, bits=4)
    mx.eval(base.parameters())
    return base


def tiny_model(*, layers: int, quantised: bool, with_kernels: bool = False) -> MTPModel:
    """Make the same with an adapter on all linear layers, and with our kernels if asked for."""
    settings = TrainSettings(num_draft_tokens=NUM_DRAFTS, rank=8)
    model = new_adapter(MTPModel(tiny_base(layers=layers, quantised=quantised)), settings)
    if with_kernels:
        ours = KernelChoice(ours=True, matrix_from=4, gated=True)
        matmuls, attention = matmul_operations(model.base), attention_operations(model.base)
        use_attention(model.base, {operation.key: ours for operation in attention})
        use_kernels(model.base, {operation.name: ours for operation in matmuls})
    mx.eval(model.parameters())
    return model


def forward_counts(model: Any, layout: StepLayout | None) -> Counter[str]:
    """Count the forward of a step after a prompt; a layout of None is mlx-lm's own step."""
    ids: Any = mx.array([_PROMPT])
    with gpu_graph():
        if layout is None:
            cache = make_prompt_cache(model)
            mx.eval(model(ids, cache=cache))
            return primitives(model(mx.array([[0]]), cache=cache))
        caches = model.make_cache()
        rows = mx.array([[0] * layout.num_ordinary + layout.mask_offsets.tolist()])
        mx.eval(model(ids, cache=caches))
        mx.eval(model(rows, cache=caches, layout=layout))  # makes what all later steps share
        caches.rewind(layout.num_rows)
        return primitives(model(rows, cache=caches, layout=layout))


def layer_counts(name: str, *, quantised: bool, with_kernels: bool) -> Counter[str]:
    """Count the primitives of one layer by name.

    Args:
        name: of a layout, or ``stock``.
        quantised: whether its weights are 4-bit.
        with_kernels: whether our kernels are used.
    """
    options: dict[str, Any] = {"quantised": quantised}
    if name == STOCK:
        make: Any = tiny_base
    else:
        make, options = tiny_model, options | {"with_kernels": with_kernels}
    layout = LAYOUTS.get(name)
    fewer, more = (
        forward_counts(make(layers=layers, **options), layout) for layers in (_LAYERS, _LAYERS + 1)
    )
    more.subtract(fewer)
    return +more


def step_counts(name: str, *, quantised: bool, with_kernels: bool) -> Counter[str]:
    """Count a whole step of a loop over two layers: mlx-lm's, or ours with a layout's name."""
    with gpu_graph() as evaluated:
        if name == STOCK:
            base = tiny_base(layers=_LAYERS, quantised=quantised)
            steps: Any = generate_step(mx.array(_PROMPT), base, max_tokens=_STEPS)
        else:
            model = tiny_model(layers=_LAYERS, quantised=quantised, with_kernels=with_kernels)
            tokens = _STEPS * LAYOUTS[name].num_ordinary
            steps = decode(model, _PROMPT, layout=name, max_tokens=tokens, seed=0)
        for _ in range(_STEPS - 2):
            next(steps)
        evaluated.clear()
        next(steps)
        return sum(evaluated, Counter())


def count_all() -> dict[str, dict[str, Any]]:
    """Count layers and steps of all forms and layouts."""
    found: dict[str, dict[str, Any]] = {}
    for form, options in FORMS.items():
        found[form] = {name: _sizes(name, options) for name in (STOCK, *LAYOUTS)}
        stock = found[form][STOCK]["layer"].primitives
        for sizes in found[form].values():
            sizes["ratio"] = round(sizes["layer"].primitives / stock, 3)
    return found


def _sizes(name: str, options: dict[str, bool]) -> dict[str, Any]:
    """Sizes of a layer and of a whole step; the loop chooses auto's layouts itself."""
    sizes = {"layer": Size.of(layer_counts(name, **options))}
    if name != "auto":
        sizes["step"] = Size.of(step_counts(name, **options))
    return sizes


@click.command()
def main() -> None:
    """Count the primitives of a step, per layer and in all."""
    found = count_all()
    print("primitives (those that launch a kernel), per layer and in a whole step of two layers")
    for form, rows in found.items():
        print(f"\n{form:<22}{'layer':>12}{'of stock':>10}{'step':>14}")
        for name, sizes in rows.items():
            layer, step = (_text(sizes.get(part)) for part in ("layer", "step"))
            print(f"{name:<22}{layer:>12}{sizes['ratio']:>10.2f}{step:>14}")
    print(json.dumps(found))


def _text(size: Size | None) -> str:
    return "" if size is None else f"{size.primitives} ({size.launches})"


if __name__ == "__main__":
    main()
