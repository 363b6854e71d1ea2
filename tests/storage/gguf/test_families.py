"""GGUF files of each family give PyTorch's logits; settings are honoured or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as Type

from mlx_mtp.model.base import open_base
from mlx_mtp.storage.gguf.convert import write_model
from mlx_mtp.storage.gguf.file import read_gguf
from tests.helpers import native_models
from tests.helpers import transformers_models as theirs
from tests.helpers.gguf_models import add_tensor, write_gguf
from tests.helpers.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.skipif(not theirs.is_available(), reason="needs torch")

_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
_LONG = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.5]},
}
_GEMMA_LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, **more}}


_GLM = native_models.KINDS["glm4_moe"].settings | {"num_nextn_predict_layers": 0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("llama", {"rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama, linear": ("llama", _rope("linear")),
    "llama, yarn": ("llama", _rope("yarn", original_max_position_embeddings=64)),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "glm4_moe": ("glm4_moe", _GLM),
    "glm4_moe, plain": ("glm4_moe", _GLM | {"use_qk_norm": False, "attention_bias": True}),
    "gemma3": ("gemma3_text", {}),
    "gemma3, linear": ("gemma3_text", {"rope_parameters": _GEMMA_LINEAR}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3, partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 64},
    ),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 9}),
}


def converted(gguf: Path, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    write_model(read_gguf(gguf), folder, **options)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pytorchs(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = CASES[case]
    monkeypatch.setitem(theirs.ARCHITECTURES, kind, theirs.ARCHITECTURES.get(kind, {}))
    logits = theirs.build(kind, tmp_path / "hf", **settings)
    gguf = write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    assert theirs.error_of_logits(converted(gguf, tmp_path / "out"), logits) < 1e-5


def test_logits_of_float16(tmp_path: Path) -> None:
    logits = theirs.build("qwen3", tmp_path / "hf")
    gguf = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", choose=lambda name, value: Type.F16)
    folder = converted(gguf, tmp_path / "out", floats="float32", keep=False)
    assert theirs.error_of_logits(folder, logits) < 2e-3


def test_packed_weights_compute_what_unpacked_ones_do(tmp_path: Path) -> None:
    kinds = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.F16)
    gguf = write_tiny_gguf(tmp_path / "model.gguf", kinds)
    logits = []
    for keep in (True, False):
        folder = converted(gguf, tmp_path / f"out {keep}", floats="float32", keep=keep)
        model: Any = open_base(folder)[0]
        values = model(theirs.mx.array([theirs.PROMPT]))[0].astype(theirs.mx.float32)
        logits.append(np.array(values))
    assert np.abs(logits[0] - logits[1]).max() < 1e-3 * np.abs(logits[1]).max()


def test_older_shared_experts_gate_has_one_dimension(tmp_path: Path) -> None:
    kind, settings = CASES["qwen2_moe"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(theirs.ARCHITECTURES, kind, {})
        logits = theirs.build(kind, tmp_path / "hf", **settings)
    gguf = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", squeeze=True)
    assert theirs.error_of_logits(converted(gguf, tmp_path / "out"), logits) < 1e-5


KEYS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope.dimension_count": 4}, "rope.dimension_count is 4"),
    ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "is 'longrope'"),
    ("llama", {"logit_scale": 2.0}, "llama.logit_scale is 2.0"),
    ("llama", {"attention.scale": 0.5}, "llama.attention.scale is 0.5"),
    ("llama", {"attention.causal": False}, "llama.attention.causal is False"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("llama", {"attention.head_count": [4, 2]}, "layers that differ"),
    ("llama", {"attention.head_count_kv": 3}, "head_count_kv is 3"),
    ("llama", {"attention.head_count": 0}, "head_count is 0"),
    ("llama", {"attention.value_length": 4}, "value_length is 4"),
    ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    ("llama", {"attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm"),
    ("llama", {"block_count": 3}, "blk.2.attn_norm.weight is missing"),
    ("llama", {"block_count": 1}, "blk.1.attn_norm.weight is not known"),
    ("llama", {"block_count": 10**8}, "block_count is 100000000, more than there are tensors"),
    ("llama", {"context_length": np.int32(-5)}, "context_length is -5"),
    ("llama", {"vocab_size": 65}, "vocab_size is 65"),
    ("llama", {"expert_count": 2**31 - 1, "expert_used_count": 2}, "is missing"),
    ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0,
               "rope.scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor is 1.5"),
    ("qwen3", {"expert_count": 4}, "qwen3.expert_count is 4"),
    ("qwen3", {"rope.freq_base": 0.0}, "rope.freq_base is 0.0"),
    ("qwen2", {"attention.sliding_window": 16}, "sliding_window is 16"),
    ("qwen3_moe", {"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
    ("qwen3_moe", {"expert_gating_func": 2}, "expert_gating_func is 2"),
    ("gemma3_text", {"attention.scale": 0.3}, "attention.scale is 0.3"),
    ("gemma3_text", {"attention.sliding_window_pattern": [True, True, False, True, False, True]},
     "sliding_window_pattern is"),
    ("phi3", {"rope.scaling.attn_factor": 1.2}, "attn_factor is 1.2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("theirs")
    kinds = {kind for kind, _, _ in KEYS}
    for kind in kinds:
        more = {"mlp_only_layers": []} if kind == "qwen3_moe" else {}
        theirs.build(kind, place / kind, **more)
    return {kind: place / kind for kind in kinds}


@pytest.mark.parametrize(("kind", "keys", "message"), KEYS, ids=[text for _, _, text in KEYS])
def test_keys_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, kind: str, keys: dict[str, Any], message: str
) -> None:
    gguf = write_gguf(folders[kind], tmp_path / "model.gguf", changed=keys)
    with pytest.raises(ValueError) as caught:
        converted(gguf, tmp_path / "out")
    assert str(gguf) in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "keys", "setting"),
    [
        ("llama", {"attention.head_count_kv": [2, 2]}, {"num_key_value_heads": 2}),
        ("llama", {"rope.scaling.factor": 2.0}, {"rope_scaling": {"factor": 2.0}}),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {}),
        ("llama", {"rope.freq_base": None}, {"rope_theta": 10000.0}),
        ("llama", {"expert_count": 0, "rope.scaling.finetuned": False}, {"model_type": "llama"}),
        ("gemma3_text", {"attention.scale": 0.25}, {"query_pre_attn_scalar": 16}),
        ("gemma3_text", {"rope.freq_base_swa": 500.0}, {"rope_local_base_freq": 500.0}),
        ("gemma3_text", {"attention.sliding_window_pattern": 3}, {"sliding_window_pattern": 3}),
        (
            "gemma3_text",
            {"attention.sliding_window_pattern": [True, False] * 3},
            {"sliding_window_pattern": 2},
        ),
        ("qwen3_moe", {"expert_weights_norm": False}, {"norm_topk_prob": False}),
    ],
)
def test_keys_are_honoured(
    folders: dict[str, Path],
    tmp_path: Path,
    kind: str,
    keys: dict[str, Any],
    setting: dict[str, Any],
) -> None:
    gguf = write_gguf(folders[kind], tmp_path / "model.gguf", changed=keys)
    config = json.loads((converted(gguf, tmp_path / "out") / "config.json").read_text())
    for key, value in setting.items():
        assert (
            (value.items() <= config[key].items())
            if isinstance(value, dict)
            else (config[key] == value)
        )
    open_base(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.attn_rot.weight", (4,), "blk.0.attn_rot.weight is not known"),
        ("rope_freqs.weight", (4,), "rope_freqs.weight is not Llama 3's"),
        ("rope_freqs.weight", (5,), "expected 4 numbers"),
        ("rope_factors_long.weight", (4,), "rope_factors_long.weight is not known"),
    ],
)
def test_additional_tensors_are_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    def add(writer: GGUFWriter) -> None:
        add_tensor(writer, name, np.arange(3, 3 + shape[0]), Type.F32)

    gguf = write_gguf(folders["llama"], tmp_path / "model.gguf", prepare=add)
    with pytest.raises(ValueError, match=message):
        converted(gguf, tmp_path / "out")


def test_llama3s_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    for low, high, length in ((1.0, 4.0, 8192), (2.0, 5.0, 4096), (1.0, 8.0, 16384)):
        rope = _LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high, "rope_theta": 5e5}
        rope |= {"original_max_position_embeddings": length, "factor": 32.0}
        place = tmp_path / f"{low}-{high}-{length}"
        place.mkdir()
        theirs.build("llama", place / "hf", rope_parameters=rope, head_dim=64)
        gguf = write_gguf(place / "hf", place / "model.gguf")
        config = json.loads((converted(gguf, place / "out") / "config.json").read_text())
        scaling = config["rope_scaling"]
        ratio = length / scaling["original_max_position_embeddings"]
        assert scaling["factor"] == 32
        assert scaling["low_freq_factor"] * ratio == pytest.approx(low, rel=1e-2)
        assert scaling["high_freq_factor"] * ratio == pytest.approx(high, rel=1e-2)
