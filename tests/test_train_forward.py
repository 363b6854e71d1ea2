"""The training forward is the decode-time forward, and its losses have the right gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from tiny import KINDS, tiny_mtp

from mlx_mtp.layout import StepLayout
from mlx_mtp.model import MTPModel
from mlx_mtp.train.forward import mask_rows, ordinary_rows
from mlx_mtp.train.losses import LossWeights, loss_terms, make_targets, total_loss
from mlx_mtp.train.packing import MaskRows, choose_anchors

LENGTH, K = 20, 4
ROWS = MaskRows((3, 7, 8, 15), K)
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
        assert mx.allclose(single, block, rtol=0, atol=1e-5 * number(mx.abs(single).max()))


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
        keep = mx.ones(ROWS.num_rows)
        targets = make_targets(model, ordinary, ids, ROWS, keep=keep, teacher="sample")
        text: Any = ids.tolist()
        for row, (anchor, j) in enumerate((a, j) for a in ROWS.anchors for j in range(K)):
            position = anchor + 1 + j
            if position + 1 < LENGTH:
                assert targets.tokens[row].item() == text[position + 1]
            assert targets.previous[row].item() == text[position]
            assert targets.twins[row].item() == position

    def test_of_the_model(self) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        keep = mx.ones(ROWS.num_rows)
        logits = model.logits(ordinary.hidden[None])[0]
        best = make_targets(model, ordinary, ids, ROWS, keep=keep, teacher="argmax")
        assert mx.array_equal(best.tokens, mx.argmax(logits, axis=-1)[best.twins])
        whole = make_targets(model, ordinary, ids, ROWS, keep=keep, teacher="dist")
        assert whole.probs is not None
        assert mx.allclose(whole.probs, mx.softmax(logits, axis=-1)[best.twins], atol=1e-6)

    def test_an_unknown_teacher(self) -> None:
        model, ids = tiny_mtp(), sequence()
        ordinary = ordinary_rows(model, ids)
        with pytest.raises(ValueError, match="teacher must be one of .*, got 'me'"):
            make_targets(model, ordinary, ids, ROWS, keep=mx.ones(16), teacher="me")


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
    """One term of the loss, in float64; some rows weigh nothing, some half."""
    ids = sequence()
    ordinary = ordinary_rows(model, ids)
    keep = mx.array(np.tile([1.0, 0.5, 0.0, 1.0], 4), mx.float64)
    targets = make_targets(model, ordinary, ids, ROWS, keep=keep, teacher=teacher)
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


def test_rows_of_no_weight_do_not_count() -> None:
    model, ids = tiny_mtp(), sequence()
    ordinary = ordinary_rows(model, ids)
    half = mx.array(np.repeat([1.0, 0.0], 8), mx.float32)
    both = make_targets(model, ordinary, ids, ROWS, keep=half, teacher="sample")
    first = MaskRows(ROWS.anchors[:2], K)
    alone = make_targets(model, ordinary, ids, first, keep=mx.ones(8), teacher="sample")
    left = loss_terms(model, ordinary, ROWS, both)
    right = loss_terms(model, ordinary, first, alone)
    assert left.keys() == right.keys() == {"base", "sampler", "lcm"}
    for name in left:
        assert mx.allclose(left[name], right[name], rtol=1e-5)
