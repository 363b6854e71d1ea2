"""The verification itself: it must see every mistake that a conversion can make."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.converters.layouts import ConvertedAdapter
from mlx_mtp.converters.reference.verify import (
    BOUND,
    ConversionReport,
    RowGroup,
    relative_error,
    verify_conversion,
)
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE
from tests.converters.conversions import ADAPTER, Conversion, convert
from tests.converters.torch_projects import make_project

Config = dict[str, Any]
Tensors = dict[str, mx.array]
Fault = Callable[[Config, Tensors], None]
Q, K, V = (f"model.layers.0.self_attn.{name}_proj.lora_b" for name in "qkv")
FIRST = "sampler_head.linear_1.weight"


def flip_sign(config: Config, tensors: Tensors) -> None:
    tensors[V] = -tensors[V]


def flip_one_element(config: Config, tensors: Tensors) -> None:
    values = np.array(tensors[V])
    values[np.unravel_index(np.abs(values).argmax(), values.shape)] *= -1
    tensors[V] = mx.array(values)


def swap_concat_halves(config: Config, tensors: Tensors) -> None:
    embedding, hidden = mx.split(tensors[FIRST], 2, axis=1)
    tensors[FIRST] = mx.concatenate([hidden, embedding], axis=1)


def scale_by_rank(config: Config, tensors: Tensors) -> None:
    config["scale"] *= config["rank"]


def scale_slightly_off(config: Config, tensors: Tensors) -> None:
    config["scale"] *= 1.01


def forget_scale_pattern(config: Config, tensors: Tensors) -> None:
    del config["scale_pattern"]


def wrong_mask_row(config: Config, tensors: Tensors) -> None:
    rows = tensors["mask_embeddings"]
    tensors["mask_embeddings"] = mx.concatenate([rows[:-1], rows[:1]])


def swap_mask_rows(config: Config, tensors: Tensors) -> None:
    tensors["mask_embeddings"] = tensors["mask_embeddings"][::-1]


def split_qkv_in_wrong_order(config: Config, tensors: Tensors) -> None:
    whole = mx.concatenate([tensors[Q], tensors[K], tensors[V]], axis=1)
    width = tensors[K].shape[1]
    tensors[K], tensors[V], tensors[Q] = mx.split(whole, [width, 2 * width], axis=1)


def swap_gate_and_up(config: Config, tensors: Tensors) -> None:
    gate, up = (f"model.layers.1.mlp.{name}_proj.lora_b" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def swap_layers(config: Config, tensors: Tensors) -> None:
    other = V.replace("layers.0", "layers.1")
    tensors[V], tensors[other] = tensors[other], tensors[V]


def other_residual(config: Config, tensors: Tensors) -> None:
    config["sampler_residual"] = "none"


def other_epsilon(config: Config, tensors: Tensors) -> None:
    config["sampler_norm_eps"] = 1e-3


def swap_norms(config: Config, tensors: Tensors) -> None:
    one, two = "sampler_head.norm_1.weight", "sampler_head.norm_2.weight"
    tensors[one], tensors[two] = tensors[two], tensors[one]


def drop_sampler(config: Config, tensors: Tensors) -> None:
    config["sampler"] = None
    for name in [name for name in tensors if name.startswith("sampler_head.")]:
        del tensors[name]


FAULTS: list[tuple[str, Fault, str]] = [
    ("peft-mtp", flip_sign, "mask rows"),
    ("peft-mtp", flip_one_element, "mask rows"),
    ("peft-mtp", swap_concat_halves, "sampler rows"),
    ("peft-mtp", scale_by_rank, "mask rows"),
    ("peft-mtp", scale_slightly_off, "mask rows"),
    ("peft-mtp-patterns", forget_scale_pattern, "mask rows"),
    ("peft-mtp", wrong_mask_row, "mask rows"),
    ("peft-mtp", swap_mask_rows, "mask rows"),
    ("peft-lora", wrong_mask_row, "mask rows"),
    ("peft-lora-noise", flip_sign, "mask rows"),
    ("mtp-glora-fused", split_qkv_in_wrong_order, "mask rows"),
    ("mtp-glora-fused", swap_gate_and_up, "mask rows"),
    ("peft-mtp", swap_layers, "mask rows"),
    ("mtp-glora-fused", other_residual, "sampler rows"),
    ("mtp-glora-fused", other_epsilon, "sampler rows"),
    ("amateur-hidden-first", swap_concat_halves, "sampler rows"),
    ("amateur-hidden-first", swap_norms, "sampler rows"),
    ("peft-mtp", drop_sampler, "sampler rows"),
]


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Conversion]:
    """Converts each project once."""
    made: dict[str, Conversion] = {}

    def get(name: str) -> Conversion:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            project = make_project(name, root)
            made[name] = Conversion(project, root / "bundle", convert(project, root / "bundle"))
        return made[name]

    return get


def verify(conversion: Conversion, bundle: Path) -> ConversionReport:
    project = conversion.project
    return verify_conversion(
        hf_path=project.base,
        checkpoint=project.checkpoint,
        mlx_model=bundle,
        adapter=bundle / ADAPTER,
        allow_pickle=project.pickled,
        options=project.options,
    )


def plant(fault: Fault, bundle: Path) -> None:
    """Change the written adapter."""
    config_path, weights_path = bundle / ADAPTER / CONFIG_FILE, bundle / ADAPTER / WEIGHTS_FILE
    config, tensors = json.loads(config_path.read_text()), mx.load(str(weights_path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    fault(config, tensors)
    config_path.write_text(json.dumps(config))
    mx.save_safetensors(str(weights_path), tensors)


@pytest.mark.parametrize(
    ("project", "fault", "group"), FAULTS, ids=[f"{p}-{fault.__name__}" for p, fault, _ in FAULTS]
)
def test_fault_in_the_adapter_is_found(
    conversions: Callable[[str], Conversion], tmp_path: Path, project: str, fault: Fault, group: str
) -> None:
    conversion = conversions(project)
    bundle = shutil.copytree(conversion.bundle, tmp_path / "bundle")
    plant(fault, bundle)
    report = verify(conversion, bundle)
    assert not report.passed
    assert "NOT the same as PyTorch" in report.lines()[-1]
    errors = {found.name: found.error for found in report.groups}
    assert errors[group] > BOUND
    assert errors["ordinary rows"] < BOUND  # an adapter cannot change them


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 500.0), ("rms_norm_eps", 1e-2), ("num_attention_heads", 8)]
)
def test_fault_in_the_configuration_of_the_base_is_found(
    conversions: Callable[[str], Conversion], tmp_path: Path, key: str, value: float
) -> None:
    conversion = conversions("peft-mtp")
    bundle = shutil.copytree(conversion.bundle, tmp_path / "bundle")
    config = json.loads((bundle / "config.json").read_text())
    if key == "num_attention_heads":
        config |= {"head_dim": 4, "num_key_value_heads": 4}
    (bundle / "config.json").write_text(json.dumps(config | {key: value}))
    report = verify(conversion, bundle)
    assert report.groups[0].name == "ordinary rows"
    assert report.groups[0].error > BOUND


def test_fault_in_a_weight_of_the_base_is_found(
    conversions: Callable[[str], Conversion], tmp_path: Path
) -> None:
    conversion = conversions("peft-mtp")
    bundle = shutil.copytree(conversion.bundle, tmp_path / "bundle")
    path = bundle / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = mx.concatenate([tensors[name][16:], tensors[name][:16]])
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    assert verify(conversion, bundle).groups[0].error > BOUND


def test_failed_verification_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_mtp.converters import convert as flow

    right = flow.convert_layout

    def wrong(*arguments: Any, **options: Any) -> ConvertedAdapter:
        converted = right(*arguments, **options)
        flip_sign({}, converted.tensors)
        return converted

    monkeypatch.setattr(flow, "convert_layout", wrong)
    project = make_project("peft-mtp", tmp_path / "project")
    output = tmp_path / "out" / "bundle"
    output.parent.mkdir()
    paths = ["--hf-path", str(project.base), "--mtp-path", str(project.checkpoint)]
    arguments = ["convert", *paths, "--mlx-path", str(output), "--verify"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "differs from PyTorch" in result.stderr
    assert not list(output.parent.iterdir())


class TestRefusals:
    @pytest.fixture
    def bundle(self, conversions: Callable[[str], Conversion]) -> Conversion:
        return conversions("peft-mtp")

    def test_checkpoint_without_adapter(self, bundle: Conversion) -> None:
        project = bundle.project
        with pytest.raises(ValueError, match="verified together"):
            verify_conversion(
                hf_path=project.base, checkpoint=project.checkpoint, mlx_model=None, adapter=None
            )

    def test_folder_without_weights(self, bundle: Conversion, tmp_path: Path) -> None:
        shutil.copy(bundle.project.base / "config.json", tmp_path)
        with pytest.raises(ValueError, match="has no weights"):
            verify_conversion(hf_path=tmp_path, checkpoint=None, mlx_model=None, adapter=None)

    def test_broken_weights(self, bundle: Conversion, tmp_path: Path) -> None:
        shutil.copy(bundle.project.base / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="transformers cannot load") as failure:
            verify_conversion(hf_path=tmp_path, checkpoint=None, mlx_model=None, adapter=None)
        assert "\n" not in str(failure.value)

    def test_missing_extra(self, bundle: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ValueError, match=r"mlx-mtp\[convert\]"):
            verify(bundle, bundle.bundle)

    def test_missing_peft(self, bundle: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=r"mlx-mtp\[convert\]"):
            verify(bundle, bundle.bundle)


class TestReport:
    def test_bound(self) -> None:
        good = RowGroup(name="ordinary rows", num_rows=3, error=BOUND)
        assert ConversionReport(groups=(good,)).passed
        for error in (BOUND * 1.01, float("nan"), float("inf")):
            bad = RowGroup(name="mask rows", num_rows=3, error=error)
            assert not ConversionReport(groups=(good, bad)).passed

    def test_nothing_compared_is_no_proof(self) -> None:
        assert not ConversionReport(groups=()).passed

    def test_lines(self) -> None:
        group = RowGroup(name="mask rows", num_rows=12, error=2.5e-6)
        report = ConversionReport(groups=(group,), notes=("a note",))
        assert report.lines()[1].split() == ["mask", "rows", "12", "2.5e-06"]
        assert report.lines()[2] == "a note"
        assert json.loads(json.dumps(report.to_dict()))["passed"] is True

    def test_relative_error_is_by_row(self) -> None:
        wanted = np.array([[1000.0, 0.0], [0.0, 1.0]])
        found = wanted + np.array([[0.0, 0.0], [0.1, 0.0]])
        assert relative_error(found, wanted) == pytest.approx(0.1)

    def test_relative_error_of_odd_arrays(self) -> None:
        wanted = np.ones((2, 3))
        assert relative_error(wanted[:1], wanted) == float("inf")
        assert np.isnan(relative_error(np.full((2, 3), np.nan), wanted))
        assert relative_error(wanted[:0], wanted[:0]) == 0.0
