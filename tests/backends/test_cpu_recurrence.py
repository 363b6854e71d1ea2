"""The CPU back-end's gated delta rule and short convolution: mlx-lm's values, bits per row."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_update

from mlx_mtp.backends.cpu.float32 import ShortConv
from mlx_mtp.backends.cpu.recurrence import outputs, update, use_fast_recurrences
from mlx_mtp.backends.metal.operation import same_bits
from mlx_mtp.lab.hybrid_step import random_model
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.recurrence import RecurrenceSeam
from mlx_mtp.model.wrappers import Wrapper, replace
from tests.helpers.tiny import step_ids

ROWS = ("q", "k", "v", "a", "b")


def arguments(*, by_key: bool = False, batch: int = 2, rows: int = 5) -> dict[str, Any]:
    """Random arguments of ``gated_delta_update``."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    k = draw(batch, rows, 2, 32)
    heads = (4, 32) if by_key else (4,)
    return {
        "q": 0.1 * draw(batch, rows, 2, 32),
        "k": k / mx.linalg.norm(k, axis=-1, keepdims=True),
        "v": draw(batch, rows, 4, 16),
        "a": draw(batch, rows, *heads),
        "b": draw(batch, rows, 4),
        "A_log": draw(4, 1) if by_key else draw(4),
        "dt_bias": draw(*heads),
        "state": draw(batch, 4, 16, 32),
    }


class RowLinear(Wrapper):
    """A linear layer that multiplies row by row, as BLAS may sum several rows in another order."""

    def __call__(self, x: mx.array) -> mx.array:
        rows = [self.wrapped(x[:, row : row + 1]) for row in range(x.shape[1])]
        return mx.concatenate(rows, axis=1)


def largest(x: mx.array) -> float:
    return float(np.abs(np.array(x)).max())


def near(a: mx.array, b: mx.array) -> bool:
    return bool(mx.allclose(a, b, rtol=0, atol=2e-6 * largest(b)))


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("options", [{}, {"lower_bound": -5.0}, {"allow_neg_eigval": True}])
class TestUpdate:
    def test_gives_what_mlx_lm_gives(self, by_key, options):
        given = arguments(by_key=by_key) | options
        for wanted, found in zip(gated_delta_update(**given), update(**given), strict=True):
            assert near(found, wanted)

    def test_starts_from_zeros_without_a_state(self, by_key, options):
        given = arguments(by_key=by_key) | options | {"state": None}
        assert near(update(**given)[1], gated_delta_update(**given)[1])

    def test_several_rows_have_the_bits_of_one_at_a_time(self, by_key, options):
        given = arguments(by_key=by_key) | options
        y, state = update(**given)
        for row in range(5):
            one = {name: given[name][:, row : row + 1] for name in ROWS}
            z, given["state"] = update(**(given | one))
            assert same_bits(z, mx.contiguous(y[:, row : row + 1]))
        assert same_bits(given["state"], state)

    def test_outputs_alone_are_the_same_but_for_rounding(self, by_key, options):
        for rows in (1, 2, 5):
            given = arguments(by_key=by_key, rows=rows) | options
            wanted, _ = update(**given)
            state = given.pop("state")
            for states in (state, [state[:1], state[1:]]):
                assert near(outputs(**given, states=states), wanted)

    def test_outputs_are_finite_where_a_gate_closes(self, by_key, options):
        given = arguments(by_key=by_key) | options
        given["a"] = given["a"] + 1e4
        given["states"] = [given["state"][:1], given.pop("state")[1:]]
        assert mx.all(mx.isfinite(outputs(**given)))


class TestShortConv:
    @pytest.mark.parametrize("bias", [False, True])
    def test_gives_what_mlx_gives_and_keeps_its_parameters(self, bias):
        conv = nn.Conv1d(12, 12, 4, groups=12, bias=bias)
        x = mx.random.normal((2, 9, 12), key=mx.random.key(0))
        short = ShortConv(conv)
        assert ShortConv.takes(conv) and near(short(x), conv(x))
        assert list(short.parameters()) == list(conv.parameters())

    def test_takes_depthwise_convolutions_alone(self):
        for other in (
            nn.Conv1d(12, 12, 4),
            nn.Conv1d(12, 12, 4, groups=12, padding=3),
            nn.Conv1d(12, 12, 4, groups=12, stride=2),
            nn.Linear(4, 4),
        ):
            assert not ShortConv.takes(other)


class TestModel:
    def test_rows_of_a_step_have_the_bits_of_plain_decoding(self):
        model = random_model(hidden=128, layers=2, interval=2, fast=False)
        use_fast_recurrences(model.base)
        linears = {
            path: RowLinear(layer)
            for path, layer in model.base.named_modules()
            if isinstance(layer, nn.Linear)
        }
        replace(model.base, linears)
        prompt, ids = mx.array([[3, 17, 42]]), [8, 29, 5, 11]
        plain, states = model.make_cache(), []
        mx.eval(model(prompt, cache=plain))
        for token in ids:
            model(mx.array([[token]]), cache=plain)
            states.append(plain.recurrent_layers[0].slots()[-1])
        for counts in ((0, 0, 0, 2), (1, 2, 0, 2)):
            layout = StepLayout(1, 3, counts)
            for kept in range(1, 5):
                cache = model.make_cache()
                mx.eval(model(prompt, cache=cache))
                mx.eval(model(step_ids(layout, ids), cache=cache, layout=layout))
                cache.rewind(layout.num_rows - kept)
                cache.begin_step()
                assert same_bits(_state(cache), states[kept - 1]), (counts, kept)

    def test_hidden_states_are_those_of_mlx_lm(self):
        layout = StepLayout(1, 2, (2, 1, 2))
        found = []
        for fast in (False, True):
            model = random_model(hidden=128, layers=2, interval=2, fast=fast)
            cache = model.make_cache()
            model(mx.array([[3, 17, 42]]), cache=cache)
            found.append(model(step_ids(layout, [8, 29, 5]), cache=cache, layout=layout))
        assert mx.allclose(*found, rtol=0, atol=1e-4 * largest(found[0]))

    def test_reaches_the_seams_of_the_model(self):
        model = random_model(hidden=128, layers=2, interval=2, fast=False)
        use_fast_recurrences(model.base)
        seams = [each for _, each in model.base.named_modules() if isinstance(each, RecurrenceSeam)]
        assert [seam.functions["gated_delta_update"].update for seam in seams] == [update]


def _state(cache: Any) -> mx.array:
    (layer,) = cache.recurrent_layers
    return layer.copied().to_mlx_lm().cache[-1]
