"""Every model file of mlx-lm on tiny random models: a sample here, all of them in soak tests."""

from __future__ import annotations

import re
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.lab import models
from mlx_mtp.lab.model_checks import check_family
from mlx_mtp.lab.models_page import row
from mlx_mtp.lab.tiny_models import families, tiny_config, tiny_model, with_adapter
from tests.helpers.tiny import KINDS

NUM_SAMPLED = 20


def sampled() -> list[str]:
    """Families that no other test runs come first, spread evenly over the list."""
    others = [name for name in families() if name not in KINDS]
    step = len(others) / NUM_SAMPLED
    return [others[int(i * step)] for i in range(NUM_SAMPLED)]


def documented() -> dict[str, list[str]]:
    """Cells of the lines of docs/models.md by family."""
    text = models.PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| ([\w-]+) \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in lines}


def test_the_page_lists_every_family_once() -> None:
    text = models.PAGE.read_text(encoding="utf-8")
    names = re.findall(r"^\| ([\w-]+) \|", text, re.MULTILINE)
    assert sorted(set(names) - {"Family"}) == families()
    assert len(names) == len(set(names)) + names.count("Family") - 1


@pytest.mark.parametrize("family", sampled())
def test_a_family_does_what_the_page_says(family: str) -> None:
    report = check_family(family, num_tokens=12, quick=True)
    assert report.status != "failed", report.reason
    _check_line(family, report)


@pytest.mark.soak
@pytest.mark.parametrize("family", families())
def test_every_family_does_what_the_page_says(family: str) -> None:
    report = check_family(family, num_tokens=60, num_long=500)
    assert report.status != "failed", report.reason
    _check_line(family, report)


def _check_line(family: str, report: Any) -> None:
    """Compare with the page what does not depend on the machine."""
    cells = documented()[family]
    found = [cell.strip() for cell in row(report.to_dict()).strip("| ").split(" | ")[1:]]
    assert len(found) == len(cells), report.reason
    if len(cells) > 3:  # it decodes
        assert found[1] == cells[1]  # kinds of layers
        assert (found[3] == "no") == (cells[3] == "no")  # drafts
        assert found[6:] == cells[6:]  # training, batches, kernels


def test_configurations_follow_from_the_fields() -> None:
    config = tiny_config("qwen3_moe", num_hidden_layers=2)
    assert config["model_type"] == "qwen3_moe" and config["num_hidden_layers"] == 2
    assert config["num_experts"] == 4 and config["head_dim"] == 32
    nested = tiny_config("gemma3", sliding_window=5)
    assert nested["text_config"]["sliding_window"] == 5


def test_a_random_adapter_is_the_same_in_every_process() -> None:
    first, second = (with_adapter(tiny_model("llama")) for _ in range(2))
    assert first.config is not None and first.config == second.config
    assert "k_proj" in first.config.target_modules and "lm_head" not in first.config.target_modules


def test_a_result_is_kept_and_not_run_again(tmp_path: Any, monkeypatch: Any) -> None:
    file, runs = tmp_path / "results.jsonl", []

    def check(names: list[str], **_: Any) -> Any:
        runs.extend(names)
        for name in names:
            yield {"family": name, "status": "exact", "reason": "", "checks": {}, "layers": {}}

    monkeypatch.setattr(models, "run_families", check)
    arguments = ["--only", "llama", "--json", str(file)]
    for _ in range(2):
        result = CliRunner().invoke(models.main, arguments)
        assert result.exit_code == 0, result.output
    assert runs == ["llama"]


@pytest.mark.slow
def test_a_crash_and_a_hang_are_failures(monkeypatch: Any) -> None:
    reports = list(models.run_families(["llama"], time_limit=0.0))
    assert reports[0]["status"] == "failed" and reports[0]["reason"] == "no result in time"
