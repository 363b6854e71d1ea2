"""Conversions of live projects by the command, and what MLX makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from mlx_mtp.loading import load
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from tests.converters.torch_project import Project, Rows

ADAPTER = "adapter"


def run(*arguments: str) -> str:
    """Run the command in this process; return its stdout."""
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def convert(project: Project, output: Path, *flags: str) -> str:
    """Convert a project's base model and checkpoint into a bundle."""
    options = [f"--checkpoint-option={key}={value}" for key, value in project.options.items()]
    options += ["--allow-pickle"] if project.pickled else []
    paths = ["--hf-path", str(project.base), "--mtp-path", str(project.checkpoint)]
    return run("convert", *paths, "--mlx-path", str(output), *options, *flags)


@dataclass
class Conversion:
    """A live project, the bundle that its checkpoint became, and what was printed."""

    project: Project
    bundle: Path
    printed: str

    @cached_property
    def model(self) -> MTPModel:
        """The bundle, loaded."""
        return load(str(self.bundle))[0]

    def rows(self, prompt: list[int]) -> Rows:
        """What MLX computes for a prompt with the mask rows behind it, in one step."""
        model, split, k = self.model, len(prompt), self.project.k
        layout = StepLayout(split, 0, (k,))
        ids = mx.array([[*prompt, *range(k)]])
        hidden = model(ids, cache=model.make_cache(), layout=layout)
        logits = np.array(model.logits(hidden)[0])[:, self.project.columns]
        states = np.array(hidden[0, split:])
        return Rows(ordinary=logits[:split], masks=logits[split:], hidden=states)

    def sampler_logits(self, hidden: np.ndarray, previous: list[int]) -> np.ndarray:
        """Logits of the sampler head."""
        model = self.model
        assert model.sampler_head is not None
        states = model.sampler_head(model.embed(mx.array(previous)), mx.array(hidden))
        return np.array(model.logits(states[None])[0])[:, self.project.columns]
