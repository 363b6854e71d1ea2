"""The paper's figures for any model: ``python -m mlx_mtp.lab.reproduction``.

- ``masks``: tokens per step by number of masks, linear and quadratic, with and without the sampler
  head, from one adapter.
- ``losses``: the same, quadratic, for the runs with all loss terms, without LCM, without sampler.
- ``ranks``: tokens per step with all masks by rank, for the runs that differ in it.
- ``gate``: next-token cross-entropy of the base model's rows during training, with and without the
  gate.

Runs are folders of ``mlx_mtp.lab.ablations`` or of ``mlx-mtp train``, whose settings are read from
``training/settings.json``.  ``figures.json`` has all numbers that are drawn and what they were
measured with; the last line printed is that file's contents without the training curves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_mtp.cli.options import ADAPTER_PATH, option
from mlx_mtp.evaluation.acceptance import LAYOUTS, checked_num_masks, count_answers, summarise
from mlx_mtp.evaluation.greedy_texts import GreedyText, texts_hash
from mlx_mtp.lab.commands import (
    answer_prompts,
    command,
    counting,
    evaluations,
    machine_info,
    text_options,
)
from mlx_mtp.lab.figures import draw_lines
from mlx_mtp.model.config import WEIGHTS_FILE
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.train.run.folder import SETTINGS_FILE, RunFolder

MASKS, SPEED = "mask tokens", "tokens per step"
KEYS = ("rank", "lcm_weight", "sampler", "gate", "num_draft_tokens", "batch_size", "num_anchors")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class TrainedRun:
    """A training run, read from its folder.

    Attributes:
        name: from the option.
        folder: its output folder.
        settings: its ``training/settings.json``.
        history: its evaluations.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, name: str, folder: Path) -> TrainedRun:
        """Read a run's folder.

        Raises:
            ValueError: the folder has no run, or the run has no evaluation.
        """
        run = RunFolder(folder)
        try:
            settings = json.loads((run.training / SETTINGS_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{folder} has no training run: {error}") from None
        history = evaluations(run)
        if not history:
            raise ValueError(f"the training run in {folder} has no evaluation")
        return cls(name, folder, settings, history)

    @property
    def is_gated(self) -> bool:
        """Whether the gate was on."""
        return bool(self.settings.get("gate", True))

    @property
    def missing(self) -> list[str]:
        """Parts of the method that were left out."""
        left_out = {
            "gate": not self.is_gated,
            "sampler": not self.settings.get("sampler", True),
            "LCM": self.settings.get("lcm_weight", 1.0) == 0,
        }
        return [part for part, is_out in left_out.items() if is_out]

    @property
    def label(self) -> str:
        """Name of its line in a figure."""
        return " and ".join(f"without {part}" for part in self.missing) or "all"

    def to_dict(self) -> dict[str, Any]:
        """Its entry in ``figures.json``."""
        shown = {key: self.settings[key] for key in KEYS if key in self.settings}
        keys = ("step", "tokens_per_step", "next_token_loss", "acceptance")
        curve = [{key: record[key] for key in keys if key in record} for record in self.history]
        return {"settings": shown, "steps": self.history[-1]["step"], "evaluations": curve}


def mask_curves(
    model: MTPModel,
    texts: Sequence[GreedyText],
    *,
    name: str,
    max_tokens: int,
    samplers: Sequence[bool] = (True, False),
    layouts: Sequence[str] = LAYOUTS,
) -> dict[str, Points]:
    """Tokens per step by number of masks, with one evaluation for each value of ``samplers``.

    Returns:
        Points (masks, tokens per step) by the name of the line.
    """
    curves: dict[str, Points] = {}
    for use_sampler in samplers:
        if use_sampler and model.sampler_head is None:
            continue
        with counting(f"Evaluating {name}") as progress:
            answers = list(
                count_answers(
                    model,
                    [text.sequence for text in texts],
                    max_tokens=max_tokens,
                    use_sampler=use_sampler,
                    progress=progress,
                )
            )
        for layout in layouts:
            curves[f"{layout}, {'with' if use_sampler else 'without'} sampler"] = [
                (k, summarise(answers, num_draft_tokens=k, layout=layout).tokens_per_step)
                for k in range(1, model.num_draft_tokens + 1)
            ]
    return curves


def run_curves(
    runs: Sequence[TrainedRun], model: str | None, texts: Sequence[GreedyText], *, max_tokens: int
) -> dict[str, Points]:
    """Tokens per step by number of masks for the adapter of each gated run, by the run's name."""
    from mlx_mtp.loading import load

    curves = {}
    for run in runs:
        if not run.is_gated or not (run.folder / WEIGHTS_FILE).is_file():
            continue  # an adapter without a gate cannot decode
        loaded, _ = load(model, adapter_path=str(run.folder))
        (curves[run.name],) = mask_curves(
            loaded,
            texts,
            name=run.name,
            max_tokens=max_tokens,
            samplers=(loaded.sampler_head is not None,),
            layouts=("quadratic",),
        ).values()
    return curves


def draw_runs(runs: Sequence[TrainedRun], curves: Mapping[str, Points], output: Path) -> list[Path]:
    """Draw those of ``losses``, ``ranks`` and ``gate`` that have at least two runs."""
    files: list[Path] = []
    rank = _compared_rank(runs)
    same_rank = [run for run in runs if run.settings.get("rank") == rank]
    lines = {run.label: curves[run.name] for run in same_rank if run.name in curves}
    if len(lines) > 1:
        files += draw_lines(lines, output / "losses", x=MASKS, y=SPEED, title=f"rank {rank}")
    whole = [run for run in runs if not run.missing and run.name in curves]
    points = sorted((run.settings["rank"], curves[run.name][-1][1]) for run in whole)
    if len(points) > 1:
        k = len(curves[whole[0].name])
        name = f"{k} mask tokens, quadratic"
        files += draw_lines({name: points}, output / "ranks", x="rank", y=SPEED, log_x=True)
    gates = {
        "with gate" if run.is_gated else "without gate": [
            (record["step"], record["next_token_loss"]) for record in run.history
        ]
        for run in same_rank
        if not run.missing or run.missing == ["gate"]
    }
    if len(gates) > 1:
        y = "next-token cross-entropy"
        files += draw_lines(gates, output / "gate", x="step", y=y, marks=False)
    return files


def _compared_rank(runs: Sequence[TrainedRun]) -> Any:
    """The rank of the runs that leave a part out, otherwise of the first run."""
    ranks = [run.settings.get("rank") for run in [*(r for r in runs if r.missing), *runs]]
    return ranks[0] if ranks else None


def _named_runs(options: Sequence[str]) -> list[TrainedRun]:
    runs: dict[str, TrainedRun] = {}
    for text in options:
        name, separator, folder = text.partition("=")
        if not separator:
            raise ValueError(f"--run takes NAME=FOLDER, got {text!r}")
        if name in runs:
            raise ValueError(f"two runs have the name {name}")
        runs[name] = TrainedRun.read(name, Path(folder).expanduser())
    return list(runs.values())


@command
@text_options
@ADAPTER_PATH
@option("--run", "runs", multiple=True, metavar="NAME=FOLDER", help="Training run; repeatable.")
@option("--output", type=click.Path(path_type=Path), default=Path("docs/reproduction"))
def main(
    *,
    model: str | None,
    adapter_path: str | None,
    runs: Sequence[str],
    output: Path,
    max_tokens: int,
    **options: Any,
) -> dict[str, Any]:
    """Measure and draw the figures of docs/reproduction.md."""
    from mlx_mtp.loading import load

    trained = _named_runs(runs)
    loaded, tokenizer = load(model, adapter_path=adapter_path)
    checked_num_masks(loaded, None)  # before the slow part
    texts = answer_prompts(loaded, tokenizer, max_tokens=max_tokens, **options)
    masks = mask_curves(loaded, texts, name="the adapter", max_tokens=max_tokens)
    by_run = run_curves(trained, model, texts, max_tokens=max_tokens)
    files = draw_lines(masks, output / "masks", x=MASKS, y=SPEED)
    files += draw_runs(trained, by_run, output)
    entries = {
        run.name: run.to_dict() | {"tokens_per_step": _rounded(by_run.get(run.name, ()))}
        for run in trained
    }
    summary = {
        "prompts": options["prompts"],
        "num_prompts": len(texts),
        "max_tokens": max_tokens,
        "texts": texts_hash(texts),
        "masks": {name: _rounded(points) for name, points in masks.items()},
        "runs": entries,
        "files": [file.name for file in files],
    } | machine_info()
    write_atomically(output / "figures.json", json.dumps(summary, indent=2) + "\n")
    for entry in entries.values():
        del entry["evaluations"]
    return summary


def _rounded(points: Points) -> dict[str, float]:
    """Tokens per step by number of masks."""
    return {str(int(k)): round(speed, 4) for k, speed in points}


if __name__ == "__main__":
    main()
