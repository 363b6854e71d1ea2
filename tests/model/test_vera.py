"""VeRA: low-rank weights from a seed and vectors, and gradients of these."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.vera import SharedMatrices, materialised, vectors
from tests.helpers.tiny import random_adapter, tiny_base

PATHS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
IN_DIMS = {"down_proj": 64, "q_proj": 32}
OUT_DIMS = {PATHS[0]: 32, PATHS[1]: 48}


def config(**changes: object) -> MTPConfig:
    plain, _ = random_adapter(tiny_base("llama"))
    values = {"rank": 8, "target_modules": tuple(IN_DIMS), "adapter_kind": "vera"}
    return dataclasses.replace(plain, **values | {"vera_dims": IN_DIMS, "vera_seed": 3} | changes)


def random_vectors(seed: int = 0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    made = {"mask_embeddings": rng.standard_normal((4, 32))}
    for path in PATHS:
        made[f"{path}.vera_lambda_d"] = rng.standard_normal(8)
        made[f"{path}.vera_lambda_b"] = rng.standard_normal(OUT_DIMS[path])
    return {name: mx.array(value.astype(np.float32)) for name, value in made.items()}


def test_a_layer_computes_diag_b_times_shared_b_times_diag_d_times_shared_a():
    made, shared = random_vectors(), SharedMatrices(config())
    weights = materialised(made, config())
    assert mx.array_equal(weights["mask_embeddings"], made["mask_embeddings"])
    for path in PATHS:
        a, b = shared.of(path, out_dims=OUT_DIMS[path])
        x = np.random.default_rng(1).standard_normal(a.shape[0])
        d, scale = (np.array(made[f"{path}.vera_lambda_{key}"]) for key in "db")
        expected = scale * (np.array(b).T @ (d * (np.array(a).T @ x)))
        found = x @ np.array(weights[f"{path}.lora_a"]) @ np.array(weights[f"{path}.lora_b"])
        assert found == pytest.approx(expected, abs=1e-5)


def test_random_matrices_are_those_of_the_stream_of_philox():
    a, b = SharedMatrices(config()).of(PATHS[0], out_dims=32)
    for index, matrix, bound in ((0, np.array(a), 64**-0.5), (1, np.array(b).T, 8**-0.5)):
        raw = np.random.Philox(key=np.array([3, index], np.uint64)).random_raw(matrix.size)
        exact = (raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1
        assert matrix.ravel() == pytest.approx(exact * bound, rel=1e-6)
        assert np.abs(matrix).max() <= bound and abs(matrix.mean()) < 0.1 * bound
    first = SharedMatrices(config()).of(PATHS[1], out_dims=16)
    wider = SharedMatrices(config()).of(PATHS[1], out_dims=48)
    assert mx.array_equal(first[1], wider[1][:, :16])  # layers share their rows
    other = SharedMatrices(config(vera_seed=4)).of(PATHS[1], out_dims=16)
    assert not mx.array_equal(first[0], other[0])


def test_vectors_are_found_again_in_the_weights():
    made = random_vectors()
    found = vectors(materialised(made, config()), config())
    assert set(found) == set(made)
    for name, value in made.items():
        assert np.array(found[name]) == pytest.approx(np.array(value), abs=1e-5)


def test_gradients_are_those_of_automatic_differentiation_and_of_differences():
    made, targets = random_vectors(1), random_vectors(2)
    goal = materialised(targets, config())

    def of_weights(weights: dict[str, mx.array]) -> mx.array:
        terms = [mx.sin(value - goal[name]).sum() for name, value in weights.items()]
        return mx.stack(terms).sum()

    weights = materialised(made, config())
    found = vectors(mx.grad(of_weights)(weights), config(), pull_back=True)
    exact = mx.grad(lambda values: of_weights(materialised(values, config())))(made)
    assert set(found) == set(exact) == set(made)
    for name, value in exact.items():
        assert np.array(found[name]) == pytest.approx(np.array(value), rel=1e-4, abs=1e-5)
        step = mx.random.normal(value.shape, key=mx.random.key(5)) * 1e-2
        both = [
            of_weights(materialised(made | {name: made[name] + sign * step}, config()))
            for sign in (1, -1)
        ]
        slope = float(both[0] - both[1]) / 2
        assert slope == pytest.approx(float((found[name] * step).sum()), rel=2e-2, abs=1e-3)


def test_vectors_that_do_not_fit_are_refused():
    made = random_vectors()
    name = f"{PATHS[0]}.vera_lambda_d"
    for broken in ({name: made[name][:4]}, {}):
        tensors = {key: value for key, value in made.items() if key != name} | broken
        with pytest.raises(ValueError, match=r"down_proj must have vera_lambda_d \[8\]"):
            materialised(tensors, config())
    with pytest.raises(ValueError, match="vera_dims has no up_proj"):
        unknown = {f"model.up_proj.vera_lambda_{key}": mx.zeros((8,)) for key in "db"}
        materialised(unknown, config())


def test_bits_and_vectors_exclude_each_other():
    with pytest.raises(ValueError, match="bits is 4, but adapter_kind vera has no low-rank"):
        config(bits=4)
