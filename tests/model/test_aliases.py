"""Architectures that mlx-lm has under another name: equal to PyTorch, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mtp.converters.convert import convert_model
from mlx_mtp.loading import load
from mlx_mtp.model.aliases import as_known
from mlx_mtp.model.base import open_base
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import tiny_config
from tests.helpers.transformers_models import PROMPT, build, error_of_logits, is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="the extra convert is not installed")

BOUND = 1e-4
CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
K2: dict[str, Any] = {
    "num_experts": 0, "mova_num_experts": 0, "query_key_norm": False, "attention_gate_func": None,
    "rope_head_dim": 16, "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1,
    "mlp_only_layers": [0, 1], "num_shared_experts": 0, "attention_bias": False,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 128, "beta_slow": 4,
}  # fmt: skip


def publish(folder: Path, model_type: str, **settings: Any) -> None:
    """Rewrite a folder as its authors publish it: another name, code of their own."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["X"], "auto_map": CODE, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer()._tokenizer.save_pretrained(folder)


def grouped(folder: Path, groups: int) -> np.ndarray:
    """Logits of a Llama in PyTorch whose norms work on groups, as vLLM's K2-Horizon has them."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def norm(module: Any, args: Any, y: Any) -> Any:
        del y
        x = args[0].reshape(*args[0].shape[:-1], groups, -1)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * x.flatten(-2)

    for name, module in model.named_modules():
        if "norm" in name:
            module.register_forward_hook(norm)
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].numpy()


@pytest.mark.parametrize("conversion", [False, True])
def test_sdar_is_qwen3(tmp_path: Path, conversion: bool) -> None:
    folder = tmp_path / "in"
    expected = build("qwen3", folder)
    publish(folder, "sdar", block_size=4, mask_token_id=60, fuse_cross_entropy=True)
    if conversion:
        folder = tmp_path / "out"
        convert_model(str(tmp_path / "in"), folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "qwen3" and "auto_map" not in config
        assert config["mask_token_id"] == 60  # for an adapter that is converted later
    assert error_of_logits(folder, expected) < BOUND
    assert load(str(folder))[0].base.model_type == "qwen3"


@pytest.mark.parametrize("conversion", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_dense_k2_horizon_is_llama_with_grouped_norms(
    tmp_path: Path, groups: int, conversion: bool
) -> None:
    folder = tmp_path / "in"
    settings = {"head_dim": 16, "rope_parameters": YARN}
    expected = build("llama", folder, **settings)
    if groups > 1:
        ungrouped, expected = expected, grouped(folder, groups)
        assert np.abs(expected - ungrouped).max() > 0.1  # so the comparison below shows something
    publish(folder, "k2_horizon", layernorm_num_groups=groups, **K2)
    if conversion:
        folder = tmp_path / "out"
        convert_model(str(tmp_path / "in"), folder)
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        assert kind == ("llama" if groups == 1 else "k2_horizon")  # mlx-lm has no grouped norms
    assert error_of_logits(folder, expected) < BOUND
    assert load(str(folder))[0].base.model_type == "llama"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 8),
        ("mova_num_experts", 4),
        ("query_key_norm", True),
        ("attention_gate_func", "softplus"),
        ("use_sliding_window", True),
        ("rope_head_dim", 4),
    ],
)
def test_other_k2_horizon_models_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "in"
    build("llama", folder, head_dim=16)
    publish(folder, "k2_horizon", **K2 | {key: value})
    for use in (lambda: open_base(folder), lambda: convert_model(str(folder), tmp_path / "out")):
        with pytest.raises(ValueError, match=key) as failure:
            use()
        assert "\n" not in str(failure.value)


def test_other_models_keep_their_names() -> None:
    config = tiny_config("qwen3") | {"auto_map": CODE, "use_sliding_window": False}
    assert as_known(config) == config
