"""The training forward is the decode-time forward, and its losses have the right gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_mtp.evaluation.forward import mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.lab.tiny_models import tiny_model, with_adapter
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.anchors import choose_anchors, chunks, count_masks
from mlx_mtp.train.gradient.losses import (
    _head,
    is_plain_head,
    loss_terms,
    make_targets,
    total_loss,
)
from mlx_mtp.train.settings import LossWeights
from tests.helpers.tiny import KINDS, tiny_mtp

LENGTH, K = 20, 4
ROWS = MaskRows((3, 7, 8, 14), K)
STEP = 2e-3  # MLX's float64 exp and matmul round to 1e-7 or so, which smaller steps would show


def sequence(seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 60, LENGTH))


def number(x: Any) -> float:
    return float(x.item())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_blocks_are_the_steps_of_decoding(kind: str, quantised: bool) -> None:
    if quantised and kind == "qwen3_moe":
        pytest.skip("experts of that width cannot be quantised in groups of 32")
    model, ids = tiny_mtp(kind, quantised=quantised), sequence()
    packed = mask_rows(model, ordinary_rows(model, ids), ROWS).reshape(-1, K, model.hidden_size)
    for block, anchor in zip(packed, ROWS.anchors, strict=True):  # type: ignore[call-overload]
        layout = StepLayout(anchor + 1, 0, (K,))
        step = mx.concatenate([ids[: anchor + 1], mx.arange(K)])[None]
        single = model(step, cache=model.make_cache(), layout=layout)[0, anchor + 1 :]
        # BLAS rounds the low-rank product of all rows of a step and of mask rows alone differently.
        assert mx.allclose(single, block, rtol=0, atol=1e-4 * number(mx.abs(single).max()))


RECURRENT = ("qwen3_5", "kimi_linear", "nemotron_h", "falcon_h1", "bailing_moe_linear", "lfm2")
ROW_BY_ROW = ("jamba",)
RAGGED = MaskRows((3, 7, 8, 14), (3, 1, 4, 2))


def steps_of(model: MTPModel, ids: mx.array, rows: MaskRows) -> mx.array:
    """The blocks as steps of decoding, each after a prompt up to its anchor, ``[R, D]``."""
    blocks, counts = [], np.bincount(rows.row_anchors)
    for anchor in rows.anchors:
        count = int(counts[anchor])
        step = mx.concatenate([ids[: anchor + 1], mx.arange(count)])[None]
        layout = StepLayout(anchor + 1, 0, (count,))
        blocks.append(model(step, cache=model.make_cache(), layout=layout)[0, anchor + 1 :])
    return mx.concatenate(blocks)


class TestRecurrentLayers:
    @pytest.mark.parametrize("bits", [None, 4])
    @pytest.mark.parametrize("family", [*RECURRENT, *ROW_BY_ROW])
    def test_blocks_are_the_steps_of_decoding(self, family: str, bits: int | None) -> None:
        model, ids = with_adapter(tiny_model(family, bits=bits)), sequence()
        packed = mask_rows(model, ordinary_rows(model, ids), RAGGED)
        steps = steps_of(model, ids, RAGGED)
        assert mx.allclose(steps, packed, rtol=0, atol=1e-4 * number(mx.abs(steps).max()))

    def test_a_chunk_of_blocks_may_come_before_another(self) -> None:
        model, ids = with_adapter(tiny_model("qwen3_5")), sequence()
        ordinary = ordinary_rows(model, ids)
        for anchors in ((9, 11), (2, 10), (12, 13)):
            rows = MaskRows(anchors, 2)
            packed, steps = mask_rows(model, ordinary, rows), steps_of(model, ids, rows)
            assert mx.allclose(steps, packed, rtol=0, atol=1e-4 * number(mx.abs(steps).max()))

    @pytest.mark.parametrize("family", [*RECURRENT, *ROW_BY_ROW])
    def test_gradients_are_those_of_the_steps(self, family: str) -> None:
        model, ids = with_adapter(tiny_model(family)), sequence()
        factors = mx.random.normal((RAGGED.num_rows, model.hidden_size), key=mx.random.key(1))
        ordinary = ordinary_rows(model, ids)

        def gradient(hidden: Callable[[], mx.array]) -> dict[str, mx.array]:
            def value(parameters: dict[str, mx.array]) -> mx.array:
                model.update(tree_unflatten(list(parameters.items())))
                return (hidden() * factors).sum()

            parameters: Any = dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]
            return mx.grad(value)(parameters)

        packed = gradient(lambda: mask_rows(model, ordinary, RAGGED))
        steps = gradient(lambda: steps_of(model, ids, RAGGED))
        assert packed.keys() == steps.keys()
        for name, expected in steps.items():
            error = mx.abs(packed[name] - expected).max()
            assert number(error) <= 1e-3 * (1e-3 + number(mx.abs(expected).max())), name
        assert any(number(mx.abs(x).max()) > 0 for n, x in packed.items() if "lora_a" in n)


def test_ordinary_rows_are_the_base_models_own() -> None:
    model, ids = tiny_mtp(), sequence()
    plain = model(ids[None], cache=model.make_cache())[0]
    assert mx.array_equal(ordinary_rows(model, ids).hidden, plain)


def test_no_row_sees_what_it_must_not() -> None:
    sees = np.array(ROWS.attention(LENGTH))
    window = np.array(ROWS.attention(LENGTH, 5))
    for row, (anchor, offset) in enumerate((a, j) for a in ROWS.anchors for j in range(K)):
        assert np.flatnonzero(sees[row, :LENGTH]).tolist() == list(range(anchor + 1))
        own = ROWS.anchors.index(anchor) * K
        wanted = list(range(own, own + offset + 1))
        assert np.flatnonzero(sees[row, LENGTH:]).tolist() == wanted
        near = [p for p in range(anchor + 1) if anchor + 1 + offset - p < 5]
        assert np.flatnonzero(window[row, :LENGTH]).tolist() == near


def test_anchors_stand_before_answers_only() -> None:
    answer = [False] * 6 + [True] * 9 + [False] * 5
    rng = np.random.default_rng(0)
    everywhere = choose_anchors(answer, count=100, rng=rng)
    # behind anchor i come token i + 1, which the model predicts, and i + 2, which the mask does
    assert everywhere == tuple(i for i in range(18) if answer[i + 1] and answer[i + 2])
    some = choose_anchors(answer, count=4, rng=rng)
    assert len(set(some)) == 4 and sorted(some) == list(some) and set(some) <= set(everywhere)
    assert choose_anchors([True, True], count=4, rng=rng) == ()


class TestTargets:
    def test_of_the_text(self) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        targets = make_targets(model, ordinary, ids, ROWS, teacher="sample")
        text: Any = ids.tolist()
        for row, (anchor, j) in enumerate((a, j) for a in ROWS.anchors for j in range(K)):
            position = anchor + 1 + j
            assert targets.tokens[row].item() == text[position + 1]
            assert targets.previous[row].item() == text[position]
            assert targets.twins[row].item() == position

    def test_of_the_model(self) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        logits = model.logits(ordinary.hidden[None])[0]
        best = make_targets(model, ordinary, ids, ROWS, teacher="argmax")
        assert mx.array_equal(best.tokens, mx.argmax(logits, axis=-1)[best.twins])
        whole = make_targets(model, ordinary, ids, ROWS, teacher="dist")
        assert whole.probs is not None
        assert mx.allclose(whole.probs, mx.softmax(logits, axis=-1)[best.twins], atol=1e-6)

    def test_an_unknown_teacher(self) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        with pytest.raises(ValueError, match="teacher must be one of .*, got 'me'"):
            make_targets(model, ordinary, ids, ROWS, teacher="me")

    @pytest.mark.parametrize("teacher", ["argmax", "sample"])
    def test_a_mask_behind_the_last_token(self, teacher: str) -> None:
        model, ids = tiny_mtp(), sequence()
        rows = MaskRows((3, LENGTH - 1 - K), K)
        with pytest.raises(ValueError, match="position 19 has no token to predict: 20 ids"):
            make_targets(model, ordinary_rows(model, ids), ids, rows, teacher=teacher)
        rows = MaskRows((3, LENGTH - 2 - K), K)
        make_targets(model, ordinary_rows(model, ids), ids, rows, teacher=teacher)


def trainable(model: MTPModel) -> None:
    """Leave only the adapter trainable."""
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b", "mask_embeddings"], strict=False)
    if model.sampler_head is not None:
        model.sampler_head.unfreeze()


class Norm(nn.Module):
    """RMSNorm or LayerNorm in the type of its input; MLX's own round to float32 inside."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        if "bias" in norm:
            self.bias = norm.bias
        self.eps = norm.eps

    def __call__(self, x: mx.array) -> mx.array:
        if "bias" in self:
            x = x - x.mean(axis=-1, keepdims=True)
        y = x * mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + self.eps) * self.weight
        return y + self.bias if "bias" in self else y


def double(model: MTPModel) -> MTPModel:
    norms = [
        (path, Norm(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.RMSNorm | nn.LayerNorm)
    ]
    model.update_modules(tree_unflatten(norms))
    model.apply(lambda x: x.astype(mx.float64) if mx.issubdtype(x.dtype, mx.floating) else x)
    return model


def checked_loss(model: MTPModel, term: str, teacher: str) -> Callable[[], mx.array]:
    """One term of the loss, in float64."""
    ids = sequence()
    ordinary = ordinary_rows(model, ids)
    targets = make_targets(model, ordinary, ids, ROWS, teacher=teacher)
    weights = LossWeights(**{name: float(name == term) for name in ("base", "sampler", "lcm")})
    return lambda: total_loss(loss_terms(model, ordinary, ROWS, targets), weights)


@pytest.mark.parametrize("teacher", ["sample", "dist"])
@pytest.mark.parametrize("term", ["base", "sampler", "lcm"])
def test_gradients_are_those_of_finite_differences(term: str, teacher: str) -> None:
    if term == "lcm" and teacher == "dist":
        pytest.skip("the consistency term has no teacher")
    model = double(tiny_mtp())
    trainable(model)
    loss = checked_loss(model, term, teacher)
    value, gradients = nn.value_and_grad(model, loss)()
    assert value.dtype == mx.float64 and value.item() > 0
    rng = np.random.default_rng(1)
    gradients: Any = dict(tree_flatten(gradients))
    parameters: Any = dict(tree_flatten(model.trainable_parameters()))
    assert gradients.keys() == parameters.keys()
    largest = max(number(mx.abs(gradient).max()) for gradient in gradients.values())
    moved = 0
    for name in rng.permutation(sorted(parameters))[:12].tolist() + ["base.model.embed_tokens"]:
        name = name if name in parameters else next(n for n in parameters if "mask_emb" in n)
        array = np.array(parameters[name])
        index = tuple(rng.integers(0, size) for size in array.shape)
        difference = 0.0
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # of the fourth order
            shifted = array.copy()
            shifted[index] += steps * STEP
            model.load_weights([(name, mx.array(shifted, mx.float64))], strict=False)
            difference += weight * number(loss()) / (12 * STEP)
        model.load_weights([(name, mx.array(array, mx.float64))], strict=False)
        gradient = float(np.array(gradients[name])[index])
        assert abs(gradient - difference) < 1e-5 * largest, name
        moved += gradient != 0
    assert moved > 5


def test_the_means_of_a_few_blocks_make_up_the_mean_of_all() -> None:
    model, ids = tiny_mtp(), sequence()
    rows = MaskRows((2, 5, 9, 12, 16), (4, 1, 3, 4, 2))
    ordinary = ordinary_rows(model, ids)
    whole = loss_terms(
        model, ordinary, rows, make_targets(model, ordinary, ids, rows, teacher="sample")
    )
    assert whole.keys() == {"base", "sampler", "lcm"}
    parts = chunks(rows, max_rows=5)
    assert [part.anchors for part in parts] == [(2, 5), (9,), (12,), (16,)]
    for name, value in whole.items():
        total = 0.0
        for part in parts:
            targets = make_targets(model, ordinary, ids, part, teacher="sample")
            share = part.num_rows / rows.num_rows
            total += share * number(loss_terms(model, ordinary, part, targets)[name])
        assert total == pytest.approx(number(value), rel=1e-5)


@given(
    counts=st.lists(st.integers(1, 8), max_size=40),
    max_rows=st.integers(8, 64),
)
def test_chunks_are_few_and_of_about_one_size(counts: list[int], max_rows: int) -> None:
    anchors = tuple(range(1, len(counts) + 1))
    parts = chunks(MaskRows(anchors, tuple(counts)), max_rows=max_rows)
    assert tuple(at for part in parts for at in part.anchors) == anchors
    sizes = [part.num_rows for part in parts]
    assert sum(sizes) == sum(counts)
    assert all(0 < size <= max_rows for size in sizes)
    if sum(counts) <= max_rows:
        assert len(parts) == bool(counts)
    if len(parts) == -(-sum(counts) // max_rows):  # no block had to be put off
        assert all(size >= sum(counts) / len(parts) - 7 * len(parts) for size in sizes)


def test_blocks_of_several_lengths_are_beginnings_of_whole_ones() -> None:
    model, ids = tiny_mtp(), sequence()
    ordinary = ordinary_rows(model, ids)
    whole = mask_rows(model, ordinary, MaskRows((3, 7, 12), 4)).reshape(3, 4, -1)
    some = mask_rows(model, ordinary, MaskRows((3, 7, 12), (2, 4, 1)))
    wanted = mx.concatenate([whole[0, :2], whole[1], whole[2, :1]])
    assert mx.allclose(some, wanted, rtol=0, atol=1e-5)


class TestCandidates:
    @pytest.mark.parametrize("teacher", ["sample", "dist"])
    def test_all_tokens_give_the_whole_loss(self, teacher: str) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        targets = make_targets(model, ordinary, ids, ROWS, teacher=teacher)
        whole = loss_terms(model, ordinary, ROWS, targets)
        some = loss_terms(model, ordinary, ROWS, targets, candidates=model.vocab_size - 1)
        few = loss_terms(model, ordinary, ROWS, targets, candidates=20)
        for name in ("base", "sampler"):
            assert number(some[name]) == pytest.approx(number(whole[name]), abs=0.1)
            assert 0 < number(few[name]) <= number(whole[name]) + 1e-4
        assert mx.array_equal(some["lcm"], whole["lcm"])

    def test_targets_are_always_among_them(self) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        targets = make_targets(model, ordinary, ids, ROWS, teacher="sample")
        hidden = mask_rows(model, ordinary, ROWS)
        logits = model.logits(hidden[None])[0]
        for count in (1, 16, 40):
            head = _head(model, hidden, targets, count)
            assert head.chosen is not None
            chosen: Any = head.chosen.tolist()
            assert chosen == sorted(set(chosen)) and len(chosen) == max(count, ROWS.num_rows)
            assert set(targets.tokens.tolist()) <= set(chosen)  # type: ignore[arg-type]
            assert mx.allclose(head.logits(hidden), logits[:, head.chosen], atol=1e-4)

    def test_a_head_that_scales_is_found_out(self) -> None:
        assert is_plain_head(tiny_mtp()) and is_plain_head(tiny_mtp("qwen2", quantised=True))
        assert not is_plain_head(tiny_mtp("granite"))


class TestCounts:
    def test_masks_predict_tokens_of_the_answer_alone(self) -> None:
        answer = [False] * 3 + [True] * 6 + [False] * 2 + [True] * 4
        rng = np.random.default_rng(0)
        anchors = choose_anchors(answer, count=99, rng=rng)
        counts = count_masks(answer, anchors, max_masks=3, drop_late=0.0, rng=rng)
        for anchor, count in zip(anchors, counts, strict=True):
            assert count >= 1 and all(answer[anchor + 1 : anchor + 2 + count])
            further = anchor + 2 + count
            assert count == 3 or further >= len(answer) or not answer[further]

    def test_late_masks_are_dropped_at_the_wanted_rate(self) -> None:
        answer, rng = [True] * 20_000, np.random.default_rng(0)
        anchors = choose_anchors(answer, count=15_000, rng=rng)
        counts = np.array(count_masks(answer, anchors, max_masks=8, drop_late=0.25, rng=rng))
        for length in range(1, 8):
            goes_on = (counts > length).sum() / (counts >= length).sum()
            assert goes_on == pytest.approx(0.75, abs=0.03)
