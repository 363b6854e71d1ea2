"""The primitives of a layer do not grow in number: these are exact, and none depends on a clock."""

from __future__ import annotations

import json
from collections import Counter

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_mtp.lab import dispatches
from mlx_mtp.lab.dispatches import STOCK, Size, gpu_graph, layer_counts, primitives

# Primitives of a layer, and how many of them launch a kernel.
STOCK_LAYER = {"4-bit": (27, 17), "float": (48, 17)}
LAYERS = {
    ("4-bit", False, "plain"): (27, 17),
    ("4-bit", False, "linear"): (44, 32),
    ("4-bit", False, "quadratic"): (49, 32),
    ("4-bit", True, "plain"): (29, 18),
    ("4-bit", True, "linear"): (33, 22),
    ("4-bit", True, "quadratic"): (37, 22),
    ("float", False, "plain"): (48, 17),
    ("float", False, "linear"): (65, 32),
    ("float", False, "quadratic"): (70, 32),
}


@pytest.mark.parametrize("weights", STOCK_LAYER)
def test_a_stock_layer(weights: str) -> None:
    counts = layer_counts(STOCK, quantised=weights == "4-bit", with_kernels=False)
    assert Size.of(counts) == STOCK_LAYER[weights], counts


@pytest.mark.parametrize(("weights", "with_kernels", "layout"), LAYERS)
def test_a_layer_has_as_many_primitives_as_written_here(
    weights: str, with_kernels: bool, layout: str
) -> None:
    counts = layer_counts(layout, quantised=weights == "4-bit", with_kernels=with_kernels)
    assert Size.of(counts) == LAYERS[weights, with_kernels, layout], counts


def test_primitives_are_those_of_the_graph() -> None:
    x = mx.ones((2, 4))
    mx.eval(x)
    halves = mx.split(mx.exp(x) + x, 2, axis=-1)
    assert primitives(*halves) == Counter(Exp=1, Add=1, Split=1)
    mx.eval(halves)
    assert not primitives(*halves)


def test_fast_operations_are_one_primitive_as_on_a_gpu() -> None:
    x, weight = mx.ones((1, 2, 3, 64)), mx.ones((64,))
    mx.eval(x, weight)
    with gpu_graph() as evaluated:
        normed = mx.fast.rms_norm(x, weight, 1e-5)
        turned = mx.fast.rope(normed, 64, traditional=False, base=1e4, scale=1.0, offset=7)
        y = mx.fast.scaled_dot_product_attention(turned, x, x, scale=1.0, mask=None)
        mx.eval(y)
    assert evaluated == [Counter(Kernel=3)]
    assert y.shape == x.shape and primitives(mx.fast.rms_norm(x, weight, 1e-5))["Rsqrt"] == 1


def test_the_command_ends_in_a_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatches, "FORMS", {"4-bit": dispatches.FORMS["4-bit"]})
    done = CliRunner().invoke(dispatches.main)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])["4-bit"]
    assert found["plain"]["layer"] == found["stock"]["layer"] and found["plain"]["ratio"] == 1.0
    for name, sizes in found.items():  # a whole step has its layers, and more
        assert name == "auto" or sizes["step"][0] > 2 * sizes["layer"][0]
