"""transformers' model of an MTPModel computes the same, or the model is refused by name."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.pytorch.model import torch_device, torch_model
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import ExactlyScaled, WindowLayer, replace
from tests.helpers.hybrid import hybrid_base
from tests.helpers.tiny import KINDS, tiny_base, tiny_mtp

torch = pytest.importorskip("torch")

EXPERTS = ("qwen3_moe", "deepseek_v3")
DENSE = [kind for kind in KINDS if kind not in (*EXPERTS, "ministral3")]
IDS = np.random.default_rng(5).integers(64, size=30)


def error(model: MTPModel, dtype) -> float:
    """Relative difference of the logits of a text that is longer than the windows."""
    hidden = model(mx.array(IDS[None]), cache=model.make_cache())
    expected = np.array(model.logits(hidden)[0])
    theirs = torch_model(model, dtype=dtype, device="cpu")
    with torch.no_grad():
        actual = theirs(torch.from_numpy(IDS[None])).logits[0].float().numpy()
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def exact_base(kind: str):
    """A tiny model as it is loaded: in float32 the embeddings of Gemma 3 have an exact factor."""
    base = tiny_base(kind)
    if kind == "gemma3_text":
        replace(base, {"model": ExactlyScaled(base.model)})
    return base


@pytest.mark.parametrize("kind", DENSE)
def test_it_computes_what_mlx_computes(kind):
    model = MTPModel(exact_base(kind))
    assert error(model, torch.float32) < 1e-5
    assert error(model, torch.bfloat16) < 0.04


@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_is_left_out_and_weights_are_dequantised(quantised):
    model = tiny_mtp("qwen3", quantised=quantised)
    assert error(model, torch.float32) < 1e-5


def test_nothing_is_trainable():
    model = torch_model(MTPModel(tiny_base()), dtype=torch.bfloat16, device="cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=rf"\({kind}\): it has experts$"):
        torch_model(MTPModel(tiny_base(kind)), device="cpu")


def test_recurrent_layers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\(qwen3_next\): it has recurrent layers$"):
        torch_model(MTPModel(hybrid_base("qwen3_next")), device="cpu")


def test_windows_that_mlx_lm_does_not_apply_are_applied():
    base = tiny_base("qwen2")
    replace(base, {"model.layers.1": WindowLayer(base.model.layers[1], 6)})
    assert error(MTPModel(base), torch.float32) < 1e-5


def test_layers_with_windows_that_transformers_ignores_are_refused():
    with pytest.raises(ValueError, match=r"\(ministral3\): transformers computes something else"):
        torch_model(MTPModel(tiny_base("ministral3")), device="cpu")


def test_another_computation_is_refused():
    model = MTPModel(tiny_base("llama"))
    for layer in model.base.layers:
        layer.self_attn.scale *= 3
    with pytest.raises(ValueError, match=r"\(llama\): transformers computes something else"):
        torch_model(model, dtype=torch.bfloat16, device="cpu")


def test_a_missing_pytorch_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r'pip install "mlx-mtp\[torch\]"'):
        torch_model(MTPModel(tiny_base()), device="cpu")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="PyTorch cannot use 'cuda:9'|PyTorch cannot use 'gpu'"):
        torch_device("gpu")
