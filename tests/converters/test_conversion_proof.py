"""Every kind of checkpoint, converted, against the live PyTorch modules that wrote it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlx_mtp.converters.pytorch import checkpoint as torch_checkpoint
from mlx_mtp.converters.reference.verify import BOUND, relative_error
from mlx_mtp.loading import load
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE
from tests.converters import torch_modules as parts
from tests.converters.conversions import ADAPTER, Conversion, convert, run
from tests.converters.torch_project import Project, greedy_answer
from tests.converters.torch_projects import PROJECTS, make_project
from tests.converters.torch_zygote import Zygote
from tests.helpers.fixtures_generate import EOS

NUM_TOKENS, NUM_DECODED = 200, 80  # of PyTorch's answer, and decoded for each project
PROMPTS = ("Es war einmal", "To be, or not to be", "hello world", "1 2 3 5 8 13", "def f(x):")
STOCK_GENERATE = ("mlx_lm", "generate", "--max-tokens", "8", "--prompt", "hi")


@pytest.fixture(scope="module", params=PROJECTS)
def conversion(
    request: pytest.FixtureRequest, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Each project of ``PROJECTS``, converted once, with ``--verify``.

    One of the pickles is read as a user's, in a fresh interpreter.
    """
    root = tmp_path_factory.mktemp(request.param)
    project = make_project(request.param, root)
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "peft-mtp-bin":
            patch.setattr(torch_checkpoint, "run_child", zygote)
        printed = convert(project, root / "bundle", "--verify")
    return Conversion(project, root / "bundle", printed)


def prompt_and_answer(base: Path) -> tuple[str, list[int]]:
    """A prompt and PyTorch's greedy answer to it, which is no dull loop and has no near-tie."""
    for prompt in PROMPTS:
        ids, margin = greedy_answer(base, list(prompt.encode()), NUM_TOKENS)
        assert max(ids) < EOS  # an end token would cut the answer short
        if len(set(ids)) > 10 and margin > BOUND:
            return prompt, ids
    raise AssertionError("no prompt has an answer that proves anything")


@pytest.fixture(scope="module")
def answers() -> Callable[[Path], tuple[str, list[int]]]:
    """``prompt_and_answer``, once for the many projects that share a base model."""
    known: dict[str, tuple[str, list[int]]] = {}

    def find(base: Path) -> tuple[str, list[int]]:
        files = [(base / name).read_bytes() for name in ("config.json", "model.safetensors")]
        key = hashlib.sha256(b"".join(files)).hexdigest()
        if key not in known:
            known[key] = prompt_and_answer(base)
        return known[key]

    return find


def to_pytorch_files(base: Path, num_shards: int) -> None:
    """Replace a model's safetensors by PyTorch files."""
    safe = base / "model.safetensors"
    tensors = load_file(safe)
    safe.unlink()
    if num_shards == 1:
        torch.save(tensors, base / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(num_shards):
        name = f"pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.bin"
        part = dict(list(tensors.items())[shard::num_shards])
        torch.save(part, base / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))


class TestAgainstLiveModules:
    def test_rows(self, conversion: Conversion) -> None:
        prompt = list(b"the live modules")
        found, wanted = conversion.rows(prompt), conversion.project.rows(prompt)
        assert relative_error(found.ordinary, wanted.ordinary) < BOUND
        assert relative_error(found.masks, wanted.masks) < BOUND
        assert relative_error(found.hidden, wanted.hidden) < BOUND

    def test_sampler(self, conversion: Conversion) -> None:
        project, previous = conversion.project, [7, 101, 33, 250, 64][: conversion.project.k]
        if project.sampler is None:
            assert conversion.model.sampler_head is None
            return
        hidden = project.rows(list(b"sampler")).hidden
        found = conversion.sampler_logits(hidden, previous)
        assert relative_error(found, project.sampler_logits(hidden, previous)) < BOUND

    def test_every_row_differs(self, conversion: Conversion) -> None:
        """Else the comparisons above would prove little."""
        rows = conversion.project.rows(list(b"the live modules"))
        for one, other in zip(rows.masks[:-1], rows.masks[1:], strict=True):
            assert np.abs(one - other).max() > 0.05 * np.abs(one).max()
        assert relative_error(rows.masks[:1], rows.ordinary[-1:]) > 0.05

    def test_verify_says_so(self, conversion: Conversion) -> None:
        assert "the same as PyTorch" in conversion.printed
        assert "mask rows" in conversion.printed
        has_sampler = conversion.project.sampler is not None
        assert ("sampler rows" in conversion.printed) == has_sampler

    def test_layout_is_named(self, conversion: Conversion) -> None:
        assert f"{conversion.project.layout}, k {conversion.project.k}" in conversion.printed


class TestGreedyIds:
    def test_generate(
        self, conversion: Conversion, answers: Callable[[Path], tuple[str, list[int]]]
    ) -> None:
        prompt, wanted = answers(conversion.project.base)
        wanted = wanted[:NUM_DECODED]
        plain = ("generate", "--json", "-m", str(NUM_DECODED), "--ignore-chat-template")
        plain += ("--layout", "quadratic")  # auto begins with plain steps
        arguments = (*plain, "--model", str(conversion.bundle), "--prompt", prompt)
        with_mtp = json.loads(run(*arguments))
        assert with_mtp["tokens"] == wanted
        assert with_mtp["stats"]["num_draft_tokens"] > 0
        without = json.loads(run(*arguments, "--no-mtp"))
        assert without["tokens"] == wanted
        assert without["stats"]["num_draft_tokens"] == 0

    @pytest.mark.slow
    def test_from_the_shell(self, tmp_path: Path) -> None:
        """The same through processes of their own, as a user runs them."""
        project = make_project("peft-mtp", tmp_path)
        prompt, wanted = prompt_and_answer(project.base)
        bundle = str(tmp_path / "bundle")
        paths = ["--hf-path", str(project.base), "--mtp-path", str(project.checkpoint)]
        converted = _process("mlx_mtp", "convert", *paths, "--mlx-path", bundle, "--verify")
        assert converted.returncode == 0, converted.stderr
        assert "the same as PyTorch" in converted.stdout
        arguments = ["--model", bundle, "--json", "-m", "200", "--ignore-chat-template"]
        arguments += ["--layout", "quadratic"]
        generated = _process("mlx_mtp", "generate", *arguments, "--prompt", prompt)
        answer = json.loads(generated.stdout)
        assert answer["tokens"] == wanted
        assert answer["stats"]["num_draft_tokens"] > 0


class TestOtherBases:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Project:
        return make_project("peft-mtp", tmp_path)

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            (("-q", "--q-group-size", "32"), "is quantised"),
            (("--dtype", "float16"), "is float16, which its original is not"),
        ],
    )
    def test_lossy_output_is_verified_without_the_loss(
        self, project: Project, tmp_path: Path, flags: tuple[str, ...], reason: str
    ) -> None:
        printed = convert(project, tmp_path / "bundle", "--verify", *flags)
        assert reason in printed
        assert "the same as PyTorch" in printed
        assert load(str(tmp_path / "bundle"))[0].num_draft_tokens == project.k

    def test_half_precision_original(self, project: Project, tmp_path: Path) -> None:
        """A float16 original stays float16, and both sides widen the same values."""
        model = parts.load_model(project.base).half()
        model.save_pretrained(project.base)
        printed = convert(project, tmp_path / "bundle", "--verify")
        assert "the same as PyTorch" in printed
        assert "which its original is not" not in printed

    @pytest.mark.parametrize("num_shards", [1, 2])
    def test_pytorch_original(
        self, project: Project, tmp_path: Path, forked: None, num_shards: int
    ) -> None:
        to_pytorch_files(project.base, num_shards)
        printed = convert(project, tmp_path / "bundle", "--verify", "--allow-pickle")
        assert "the same as PyTorch" in printed

    def test_base_alone(self, project: Project, tmp_path: Path) -> None:
        output = str(tmp_path / "model")
        printed = run("convert", "--hf-path", str(project.base), "--mlx-path", output, "--verify")
        assert "the same as PyTorch" in printed
        assert "mask rows" not in printed

    @pytest.mark.parametrize("kind", ["mistral", "granite", "olmo2", "phi3", "smollm3", "cohere"])
    def test_other_architectures(self, tmp_path: Path, kind: str) -> None:
        factors = ("logits_scaling", "embedding_multiplier", "residual_multiplier")
        settings = dict.fromkeys(factors, 1.5) if kind == "granite" else {}
        rope = {"rope_type": "default", "rope_theta": 50000.0}
        tied = kind == "cohere"  # its head always is
        model = parts.tiny_causal_lm(kind, rope=rope, tied=tied, **settings)
        base, output = parts.save_model(model, tmp_path / "base"), str(tmp_path / "model")
        printed = run("convert", "--hf-path", str(base), "--mlx-path", output, "--verify")
        assert "the same as PyTorch" in printed


class TestStockMlxLm:
    """mlx-lm knows nothing of gates; it must not run an adapter of ours as ordinary LoRA."""

    @pytest.mark.slow
    def test_refuses_the_adapter(self, tmp_path: Path) -> None:
        project = make_project("peft-mtp", tmp_path)
        convert(project, tmp_path / "bundle")
        adapter = tmp_path / "bundle" / ADAPTER
        assert {CONFIG_FILE, WEIGHTS_FILE} <= {file.name for file in adapter.iterdir()}
        model = ["--model", str(tmp_path / "bundle")]
        refused = _process(*STOCK_GENERATE, *model, "--adapter-path", str(adapter))
        assert refused.returncode != 0
        assert "=====" not in refused.stdout  # the rule before generated text
        assert "Traceback" in refused.stderr or "rror" in refused.stderr
        works = _process(*STOCK_GENERATE, *model)  # the same command without the adapter
        assert works.returncode == 0, works.stderr
        assert "=====" in works.stdout


def _process(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
