"""Adapter checkpoints in, adapter folders out: every tensor exact, everything strange refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from safetensors.numpy import save_file

from mlx_mtp.config import WEIGHTS_FILE, read_config
from mlx_mtp.converters import adapters
from mlx_mtp.converters.convert import convert_adapter, model_card
from mlx_mtp.default_model import DEFAULT_MODEL_NAME
from mlx_mtp.loading import read_adapter
from mlx_mtp.model import MTPModel, fingerprint

DIMS, LAYERS, MLP, KV, VOCAB, RANK, MASKS = 16, 2, 24, 8, 40, 4, 3
WIDTHS = {  # (in, out) of the adapted layers
    "self_attn.q_proj": (DIMS, DIMS),
    "self_attn.v_proj": (DIMS, KV),
    "mlp.down_proj": (MLP, DIMS),
}
MASK_KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
BASE_ARGS = {
    "model_type": "llama",
    "hidden_size": DIMS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": MLP,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
}
Tensors = dict[str, np.ndarray]


def base_model() -> nn.Module:
    mx.random.seed(0)
    return llama.Model(llama.ModelArgs.from_dict(BASE_ARGS))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mlx-lm model folder."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(BASE_ARGS))
    weights: Any = dict(tree_flatten(base_model().parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def peft_config(**changes: Any) -> dict[str, Any]:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/tiny",
        "r": RANK,
        "lora_alpha": 10,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "trainable_token_indices": {"embed_tokens": [40, 41, 42]},
        "alora_invocation_tokens": [40, 41, 42],
    }
    return config | changes


def peft_tensors(dtype: Any = np.float16) -> tuple[Tensors, Tensors]:
    """Random tensors of an adapter and of its sampler."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    adapter = {MASK_KEY: random(MASKS, DIMS)}
    for layer in range(LAYERS):
        for module, (width, out) in WIDTHS.items():
            path = f"base_model.model.model.layers.{layer}.{module}"
            adapter[f"{path}.lora_A.weight"] = random(RANK, width)
            adapter[f"{path}.lora_B.weight"] = random(out, RANK)
    sampler = {
        "sampler.mlp.0.weight": random(DIMS, 2 * DIMS),
        "sampler.mlp.3.weight": random(DIMS, DIMS),
        "sampler.mlp.2.weight": random(DIMS),
        "sampler.mlp.5.weight": random(DIMS),
    }
    sampler |= {f"sampler.mlp.{index}.bias": random(DIMS) for index in (0, 2, 3, 5)}
    return adapter, sampler


def write_checkpoint(
    folder: Path, config: dict[str, Any], adapter: Tensors, sampler: Tensors | None
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    if sampler is not None:
        save_file(sampler, folder / "sampler_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", peft_config(), *peft_tensors())


class TestConversion:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_every_tensor_is_exact(self, tmp_path: Path, base: Path, dtype: Any) -> None:
        source, sampler = peft_tensors(dtype)
        checkpoint = write_checkpoint(tmp_path / "checkpoint", peft_config(), source, sampler)
        convert_adapter(checkpoint, tmp_path / "out", base_model=base)
        expected = {"mask_embeddings": source[MASK_KEY]}
        for layer in range(LAYERS):
            for module in WIDTHS:
                ours = f"model.layers.{layer}.{module}"
                expected[f"{ours}.lora_a"] = source[f"base_model.model.{ours}.lora_A.weight"].T
                expected[f"{ours}.lora_b"] = source[f"base_model.model.{ours}.lora_B.weight"].T
        for index, name in ((0, "linear_1"), (2, "norm_1"), (3, "linear_2"), (5, "norm_2")):
            for leaf in ("weight", "bias"):
                expected[f"sampler_head.{name}.{leaf}"] = sampler[f"sampler.mlp.{index}.{leaf}"]
        path = str(tmp_path / "out" / WEIGHTS_FILE)
        loaded: Any = mx.load(path, return_metadata=True)
        found, metadata = loaded
        assert metadata == {"format": "mlx"}
        assert set(found) == set(expected)
        for name, value in expected.items():
            array = np.array(found[name])
            assert array.dtype == dtype
            assert np.array_equal(array, value), name

    def test_configuration(self, checkpoint: Path, tmp_path: Path, base: Path) -> None:
        config = convert_adapter(checkpoint, tmp_path / "out", base_model=str(base))
        assert read_config(tmp_path / "out") == config
        assert (config.num_draft_tokens, config.rank, config.scale) == (MASKS, RANK, 2.5)
        assert config.target_modules == ("down_proj", "q_proj", "v_proj")
        assert config.sampler == "mlp"
        assert config.base_model == "someone/tiny"
        assert config.base_model_type == "llama"
        sizes = (config.base_hidden_size, config.base_num_layers, config.base_vocab_size)
        assert sizes == (DIMS, LAYERS, VOCAB)
        assert config.base_fingerprint == fingerprint(base_model())
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert not {"num_layers", "lora_parameters"} & set(written)

    def test_the_model_takes_the_result(self, checkpoint: Path, tmp_path: Path, base: Path) -> None:
        convert_adapter(checkpoint, tmp_path / "out", base_model=base)
        config, weights = read_adapter(tmp_path / "out")
        model = MTPModel(base_model(), config=config, weights=weights)
        assert model.num_draft_tokens == MASKS
        assert model.sampler_head is not None

    def test_quantised_base(self, checkpoint: Path, tmp_path: Path) -> None:
        # 32-wide layers, the narrowest that MLX quantises
        widths = {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 2}
        model = llama.Model(llama.ModelArgs.from_dict(BASE_ARGS | widths))
        nn.quantize(model, group_size=32, bits=4)
        folder = tmp_path / "base"
        folder.mkdir()
        quantization = {"quantization": {"group_size": 32, "bits": 4}}
        (folder / "config.json").write_text(json.dumps(BASE_ARGS | widths | quantization))
        weights: Any = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        rng = np.random.default_rng(0)
        path = "base_model.model.model.layers.1.mlp.up_proj"
        adapter = {
            MASK_KEY: rng.standard_normal((MASKS, 32)),
            f"{path}.lora_A.weight": rng.standard_normal((RANK, 32)),
            f"{path}.lora_B.weight": rng.standard_normal((32, RANK)),
        }
        adapter = {name: value.astype(np.float16) for name, value in adapter.items()}
        checkpoint = write_checkpoint(tmp_path / "second", peft_config(), adapter, None)
        config = convert_adapter(checkpoint, tmp_path / "out", base_model=folder)
        assert config.target_modules == ("up_proj",)
        assert config.sampler is None

    def test_rslora_scale(self) -> None:
        settings = adapters.read_peft_settings(peft_config(use_rslora=True))
        assert settings.scale == 10 / math.sqrt(RANK)

    def test_masks_follow_the_invocation_order(self) -> None:
        config = peft_config(
            trainable_token_indices=[41, 40, 42], alora_invocation_tokens=[42, 41, 40]
        )
        settings = adapters.read_peft_settings(config)
        source, _ = peft_tensors()
        tensors = {name: mx.array(value) for name, value in source.items()}
        masks = adapters.convert_peft(tensors, settings=settings)["mask_embeddings"]
        assert np.array_equal(np.array(masks), source[MASK_KEY][[2, 0, 1]])

    def test_masks_without_invocation_tokens_keep_their_order(self) -> None:
        settings = adapters.read_peft_settings(peft_config(alora_invocation_tokens=None))
        assert settings.mask_rows == (0, 1, 2)

    def test_card(self, checkpoint: Path, tmp_path: Path, base: Path) -> None:
        config = convert_adapter(
            checkpoint, tmp_path / "out", base_model=base, licence="apache-2.0"
        )
        card = (tmp_path / "out" / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        lines = front.splitlines()
        assert {"library_name: mlx", "base_model: someone/tiny", "license: apache-2.0"} <= set(
            lines
        )
        assert "3 mask tokens, gated LoRA of rank 4 on down_proj, q_proj, v_proj" in body
        assert "license" not in model_card(config, licence=None)


class TestOutput:
    def test_refuses_an_existing_folder(self, checkpoint: Path, tmp_path: Path, base: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="out already exists"):
            convert_adapter(checkpoint, tmp_path / "out", base_model=base)

    def test_force_replaces_an_adapter(self, checkpoint: Path, tmp_path: Path, base: Path) -> None:
        out = tmp_path / "out"
        convert_adapter(checkpoint, out, base_model=base)
        (out / "old").write_text("")
        convert_adapter(checkpoint, out, base_model=base, force=True)
        assert not (out / "old").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}

    @pytest.mark.parametrize("kind", ["folder", "file", "link"])
    def test_force_replaces_nothing_else(
        self, checkpoint: Path, tmp_path: Path, base: Path, kind: str
    ) -> None:
        out, precious = tmp_path / "out", tmp_path / "precious"
        precious.mkdir()
        (precious / "thesis.txt").write_text("")
        if kind == "folder":
            precious.rename(out)
        elif kind == "file":
            out.write_text("")
        else:
            out.symlink_to(precious)
        with pytest.raises(ValueError, match="not an adapter folder"):
            convert_adapter(checkpoint, out, base_model=base, force=True)
        assert out.exists()

    def test_a_failed_write_leaves_nothing(
        self, checkpoint: Path, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: str, *args: Any) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 9 bytes to file.")

        monkeypatch.setattr(mx, "save_safetensors", full)
        with pytest.raises(ValueError, match="cannot write .*out: .*Unable to write"):
            convert_adapter(checkpoint, tmp_path / "out", base_model=base)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


class TestBaseModel:
    def test_unknown_base(self, tmp_path: Path) -> None:
        config = peft_config(base_model_name_or_path=None)
        checkpoint = write_checkpoint(tmp_path / "checkpoint", config, *peft_tensors())
        with pytest.raises(ValueError, match="does not name its base model"):
            convert_adapter(checkpoint, tmp_path / "out", base_model=None)

    def test_the_default_model_is_the_embedded_one(
        self, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = peft_config(base_model_name_or_path=DEFAULT_MODEL_NAME)
        checkpoint = write_checkpoint(tmp_path / "checkpoint", config, *peft_tensors())
        monkeypatch.setattr("mlx_mtp.converters.convert.default_model_path", lambda: base)
        assert convert_adapter(checkpoint, tmp_path / "out").base_model == DEFAULT_MODEL_NAME

    def test_a_missing_base(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="base model /no/such does not exist"):
            convert_adapter(checkpoint, tmp_path / "out", base_model="/no/such")

    def test_a_foreign_folder(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot load the base model in"):
            convert_adapter(checkpoint, tmp_path / "out", base_model=checkpoint)


Change = Callable[[dict[str, Any], Tensors, Tensors], Any]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSALS: dict[str, tuple[Change, str]] = {
    "peft type": (lambda c, a, s: c.update(peft_type="LOHA"), "peft_type must be 'LORA'"),
    "dora": (lambda c, a, s: c.update(use_dora=True), "use_dora is not supported"),
    "bias": (lambda c, a, s: c.update(bias="all"), "bias must be 'none', got 'all'"),
    "rank pattern": (lambda c, a, s: c.update(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "alpha pattern": (lambda c, a, s: c.update(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
    "no rank": (lambda c, a, s: c.pop("r"), "r must be a whole number of at least 1, got None"),
    "no alpha": (lambda c, a, s: c.update(lora_alpha="x"), "lora_alpha must be a number, got 'x'"),
    "no masks": (
        lambda c, a, s: c.pop("trainable_token_indices"),
        "trainable_token_indices must list the mask tokens' ids",
    ),
    "other tokens": (
        lambda c, a, s: c.update(alora_invocation_tokens=[40, 41, 43]),
        "must be the same tokens",
    ),
    "repeated tokens": (
        lambda c, a, s: c.update(alora_invocation_tokens=[40, 41, 41]),
        "each once",
    ),
    "two embeddings": (
        lambda c, a, s: c.update(trainable_token_indices={"embed_tokens": [40], "lm_head": [40]}),
        "must name embed_tokens alone",
    ),
    "unknown tensor": (
        lambda c, a, s: a.update({f"{Q_PROJ}.lora_magnitude_vector": a[MASK_KEY]}),
        f"unknown tensor {Q_PROJ}.lora_magnitude_vector",
    ),
    "half a pair": (
        lambda c, a, s: a.pop(f"{Q_PROJ}.lora_B.weight"),
        "model.layers.0.self_attn.q_proj has only one of lora_A and lora_B",
    ),
    "other rank": (lambda c, a, s: c.update(r=RANK + 1), "not of rank 5"),
    "no LoRA": (
        lambda c, a, s: [a.pop(name) for name in list(a) if "lora" in name],
        "no LoRA weights",
    ),
    "no mask rows": (lambda c, a, s: a.pop(MASK_KEY), "no tensor ends in embed_tokens"),
    "too few mask rows": (
        lambda c, a, s: a.update({MASK_KEY: a[MASK_KEY][:2].copy()}),
        "must have 3 rows",
    ),
    "half a sampler": (
        lambda c, a, s: s.pop("sampler.mlp.5.bias"),
        "the sampler lacks norm_2.bias",
    ),
    "larger sampler": (
        lambda c, a, s: s.update({"sampler.mlp.6.weight": s["sampler.mlp.3.weight"]}),
        "unknown tensor sampler.mlp.6.weight",
    ),
    "NaN": (
        lambda c, a, s: s["sampler.mlp.0.weight"].fill(np.nan),
        "sampler_head.linear_1.weight holds NaN",
    ),
    "whole numbers": (
        lambda c, a, s: a.update({MASK_KEY: a[MASK_KEY].astype(np.int32)}),
        "mask_embeddings must be floating point",
    ),
    "other width": (
        lambda c, a, s: a.update({MASK_KEY: np.zeros((MASKS, 8), np.float16)}),
        "mask_embeddings is 8 wide, but someone/tiny needs 16",
    ),
    "other layer width": (
        lambda c, a, s: a.update({f"{Q_PROJ}.lora_B.weight": np.zeros((8, RANK), np.float16)}),
        "q_proj.lora_b is 8 wide, but someone/tiny needs 16",
    ),
    "other layer": (
        lambda c, a, s: a.update(
            {name.replace("layers.0", "layers.9"): a.pop(name) for name in list(a)}
        ),
        "model.layers.9.mlp.down_proj is no linear layer of someone/tiny",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSALS)
    def test_refused_in_one_line(self, tmp_path: Path, base: Path, case: str) -> None:
        change, message = REFUSALS[case]
        config, (adapter, sampler) = peft_config(), peft_tensors()
        change(config, adapter, sampler)
        checkpoint = write_checkpoint(tmp_path / "checkpoint", config, adapter, sampler)
        with pytest.raises(ValueError) as caught:
            convert_adapter(checkpoint, tmp_path / "out", base_model=base)
        text = str(caught.value)
        assert message in text
        assert str(checkpoint) in text
        assert "\n" not in text
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("adapter_config.json", None, "is not an adapter checkpoint: no adapter_config.json"),
            ("adapter_config.json", b"{", "cannot read .*adapter_config.json"),
            ("adapter_config.json", b"\xff\xfe", "cannot read .*adapter_config.json"),
            ("adapter_config.json", b"[]", "must hold a JSON object"),
            ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
            ("adapter_model.safetensors", b"\x08", "is truncated or corrupt"),
            ("sampler_model.safetensors", b"\x08", "is truncated or corrupt"),
        ],
    )
    def test_broken_files(
        self,
        checkpoint: Path,
        tmp_path: Path,
        base: Path,
        file: str,
        content: bytes | None,
        message: str,
    ) -> None:
        if content is None:
            (checkpoint / file).unlink()
        else:
            (checkpoint / file).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert_adapter(checkpoint, tmp_path / "out", base_model=base)
        assert not (tmp_path / "out").exists()

    def test_a_missing_folder(self, tmp_path: Path, base: Path) -> None:
        with pytest.raises(ValueError, match="no/such is not an adapter checkpoint"):
            convert_adapter(Path("/no/such"), tmp_path / "out", base_model=base)
