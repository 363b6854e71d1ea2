"""One algebra for every number of rows: rows of a step are computed as mlx-lm computes one row.

Some layers of mlx-lm compute one row in another way than several, which in half precision is
another result.  Plain decoding takes the form for one row for every token after the prompt, so the
rows that verify drafts must take it too; the rows of a prompt chunk take the form for several, as
in mlx-lm.  Here are

- multi-head latent attention, which multiplies the query by the key's up-projection for one row,
  and expands keys and values for several (``one_row_function``, ``OneRowProducts``; the seam in
  ``attention`` calls them);
- experts, which are sorted from 64 pairs of a row and an expert on (``StepExperts``).

Recurrent layers take their rows one by one where they must (``caches.recurrent``).
``tests/model/test_row_algebra.py`` lists the branches of mlx-lm.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlx_mtp.model.layout import RowLayout, StepScope
from mlx_mtp.model.wrappers import Wrapper, replace

SORTED_FROM = 64  # row-expert pairs from which mlx-lm sorts them
_PRODUCTS = ("embed_q", "unembed_out")


def is_latent_attention(block: nn.Module) -> bool:
    """Whether a module is multi-head latent attention with a form of its own for one row.

    With an indexer it has more such forms, which are not right for several rows.
    """
    if "indexer" in block:
        return False
    products = [_unwrapped(block.get(name), OneRowProducts) for name in _PRODUCTS]
    return all(isinstance(each, MultiLinear | QuantizedMultiLinear) for each in products)


def wrap_latent_products(base: nn.Module, scope: StepScope) -> bool:
    """Let the per-head products of latent attention treat each verify row alone, in place.

    Returns:
        Whether there is such attention.
    """
    paths = [path for path, block in base.named_modules() if is_latent_attention(block)]
    modules = dict(base.named_modules())
    names = [f"{path}.{name}" for path in paths for name in _PRODUCTS]
    products = {name: _unwrapped(modules[name], OneRowProducts) for name in names}
    replace(base, {name: OneRowProducts(each, scope) for name, each in products.items()})
    return bool(paths)


def wrap_experts(base: nn.Module, scope: StepScope) -> None:
    """Let the experts of a model treat the rows of a step as they treat one row, in place."""
    modules = {path: _unwrapped(each, StepExperts) for path, each in base.named_modules()}
    experts = {k: each for k, each in modules.items() if isinstance(each, SwitchGLU | SwitchMLP)}
    replace(base, {path: StepExperts(each, scope) for path, each in experts.items()})


class OneRowProducts(Wrapper):
    """A product per head that multiplies every ordinary row of a step as a matrix of one row."""

    def __init__(self, product: nn.Module, scope: StepScope) -> None:
        super().__init__(product)
        self._scope = scope

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Map ``[1, H, L, in]`` to ``[1, H, L, out]``."""
        layout = self._scope.layout
        if layout is None or layout.is_prompt_chunk or layout.gate_split == 0:
            return self.wrapped(x, transpose=transpose)
        ordinary, *masks = mx.split(x, [layout.gate_split], axis=2)
        rows = self.wrapped(ordinary.transpose(2, 1, 0, 3), transpose=transpose)
        rows = rows.transpose(2, 1, 0, 3)
        if layout.num_masks == 0:
            return rows
        return mx.concatenate([rows, self.wrapped(masks[0], transpose=transpose)], axis=2)


class StepExperts(Wrapper):
    """Experts whose verify rows are never sorted; from 64 pairs on they are computed in parts.

    Rows of the prompt that a first step still has, and mask rows, are each computed together.
    """

    def __init__(self, experts: nn.Module, scope: StepScope) -> None:
        super().__init__(experts)
        self._scope = scope

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Map ``[..., L, D]`` and expert indices ``[..., L, k]`` to ``[..., L, k, D]``."""
        layout, rows = self._scope.layout, indices.ndim - 2
        if layout is None or layout.is_prompt_chunk or indices.size < SORTED_FROM:
            return self.wrapped(x, indices)
        num_rows = indices.shape[rows]  # all, or without masks, which an adapter keeps apart
        expected = (layout.gate_split, layout.gate_split + layout.num_masks)
        if layout.gate_split == 0 or num_rows not in expected:
            return self.wrapped(x, indices)
        limit = max((SORTED_FROM - 1) // indices.shape[-1], 1)
        ends = [end for end in part_ends(layout, limit) if end < num_rows]
        parts = zip(mx.split(x, ends, axis=rows), mx.split(indices, ends, axis=rows), strict=True)
        return mx.concatenate([self.wrapped(*part) for part in parts], axis=rows)


def _unwrapped(module: Any, kind: type[Wrapper]) -> Any:
    """The module in a wrapper that another model of the same base has put in place."""
    return module.wrapped if isinstance(module, kind) else module


def part_ends(layout: RowLayout, limit: int) -> list[int]:
    """Where the parts of a step's ordinary rows end, of at most ``limit`` verify rows each.

    Several pending rows are what a prompt has left, and one part.
    """
    if layout.gate_split == 0:
        return []
    ends, start = [], 0
    steps: Any = getattr(layout, "layouts", (layout,))
    for step in steps:
        end = start + step.num_ordinary
        if step.num_pending > 1:
            start += step.num_pending
            ends.append(start)
        ends += [*range(start + limit, end, limit), end] if end > start else []
        start = end
    return ends


def one_row_function(call: Any, names: dict[str, Any]) -> Callable[..., mx.array]:
    """Make the code of a block's ``__call__`` in which any number of rows counts as one.

    mlx-lm's latent attention says ``if L == 1``, with L from ``x.shape``.  Both forms are right for
    any L, so the test alone is replaced.

    Args:
        call: the block's ``__call__``.
        names: the namespace of the new function.

    Raises:
        ValueError: there is no such test.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    edit = _AsOneRow(_shape_names(tree))
    function = edit.visit(tree).body[0]
    if not edit.count:
        raise ValueError(f"{call.__qualname__} has no form of its own for one row")
    function.decorator_list = []
    code = compile(ast.fix_missing_locations(tree), inspect.getfile(call), "exec")
    scope: dict[str, Any] = {}
    exec(code, names, scope)
    made = scope[function.name]
    return types.FunctionType(
        made.__code__, names, call.__name__, call.__defaults__, made.__closure__
    )


def _shape_names(tree: ast.AST) -> set[str]:
    """Names that get their values from a ``.shape``."""
    return {
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
        if node.value.attr == "shape"
        for target in node.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }


class _AsOneRow(ast.NodeTransformer):
    """Replaces ``L == 1`` by True."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.count = 0

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Replace one comparison."""
        is_one = isinstance(node.left, ast.Name) and node.left.id in self.names
        right = node.comparators[0]
        is_one = is_one and isinstance(node.ops[0], ast.Eq) and len(node.ops) == 1
        if not (is_one and isinstance(right, ast.Constant) and right.value == 1):
            return node
        self.count += 1
        return ast.copy_location(ast.Constant(True), node)
