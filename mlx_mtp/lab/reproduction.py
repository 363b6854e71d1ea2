"""The paper's figures for any model: ``python -m mlx_mtp.lab.reproduction``.

- ``masks``: tokens per step by number of masks, linear and quadratic, with and without the sampler
  head, from one adapter.
- ``losses``: the same, quadratic, for the runs with all loss terms, without LCM, without sampler.
- ``ranks``: tokens per step with all masks by rank, for the runs that differ in it.
- ``gate``: next-token cross-entropy of the base model's rows during training, with and without the
  gate.

Runs are folders of ``mlx_mtp.lab.ablations`` or of ``mlx-mtp train``, whose settings are read from
``training/settings.json``.  Runs of one name are the same with other seeds: figures show their mean
with a 95% interval over texts.  ``figures.json`` has all numbers that are drawn and what they were
measured with; the last line printed is that file's contents without the training curves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from mlx_mtp.cli.options import ADAPTER_PATH, option
from mlx_mtp.evaluation.acceptance import LAYOUTS, checked_num_masks, count_answers
from mlx_mtp.evaluation.greedy_texts import GreedyText, texts_hash
from mlx_mtp.lab.commands import (
    answer_prompts,
    command,
    counting,
    evaluations,
    machine_info,
    text_options,
)
from mlx_mtp.lab.figures import Points, draw_lines
from mlx_mtp.lab.paired import TextSteps, interval, steps_of
from mlx_mtp.model.config import WEIGHTS_FILE
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.train.run.folder import SETTINGS_FILE, RunFolder

MASKS, SPEED = "mask tokens", "tokens per step"
_FREE = {"seed", "data_hash"}  # settings in which runs of one name may differ
KEYS = ("rank", "lcm_weight", "sampler", "gate", "num_draft_tokens", "batch_size", "num_anchors")


@dataclass(frozen=True)
class TrainedRun:
    """Training runs that differ in their seed only, read from their folders.

    Attributes:
        name: from the option.
        folders: output folder of each.
        settings: ``training/settings.json`` of the first.
        histories: evaluations of each.
    """

    name: str
    folders: tuple[Path, ...]
    settings: dict[str, Any]
    histories: tuple[list[dict[str, Any]], ...]

    @classmethod
    def read(cls, name: str, folders: Sequence[Path]) -> TrainedRun:
        """Read the folders of runs.

        Raises:
            ValueError: a folder has no run, a run has no evaluation, or two runs differ in more
                than their seed, or not in that.
        """
        settings, histories = [], []
        for folder in folders:
            run = RunFolder(folder)
            try:
                text = (run.training / SETTINGS_FILE).read_text(encoding="utf-8")
            except OSError as error:
                raise ValueError(f"{folder} has no training run: {error}") from None
            settings.append(json.loads(text))
            histories.append(evaluations(run))
            if not histories[-1]:
                raise ValueError(f"the training run in {folder} has no evaluation")
        first = settings[0]
        for folder, other in zip(folders[1:], settings[1:], strict=True):
            changed = {
                key for key in first.keys() | other.keys() if first.get(key) != other.get(key)
            }
            if changed - _FREE:
                raise ValueError(f"{folder} differs from {folders[0]} in {min(changed - _FREE)}")
        seeds = [each.get("seed") for each in settings]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"two runs named {name} have the same seed")
        return cls(name, tuple(folders), first, tuple(histories))

    @property
    def is_gated(self) -> bool:
        """Whether the gate was on."""
        return bool(self.settings.get("gate", True))

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can decode, which has a gate."""
        return self.is_gated and all((folder / WEIGHTS_FILE).is_file() for folder in self.folders)

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

    @cached_property
    def losses(self) -> Points:
        """Next-token cross-entropy by step, the mean of the seeds."""
        curves = [{row["step"]: row["next_token_loss"] for row in rows} for rows in self.histories]
        steps = sorted(set.intersection(*map(set, curves)))
        return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]

    def to_dict(self) -> dict[str, Any]:
        """Its entry in ``figures.json``."""
        shown = {key: self.settings[key] for key in KEYS if key in self.settings}
        keys = ("step", "tokens_per_step", "next_token_loss", "acceptance")
        curves = [
            [{key: record[key] for key in keys if key in record} for record in history]
            for history in self.histories
        ]
        steps = min(history[-1]["step"] for history in self.histories)
        return {"settings": shown, "seeds": len(curves), "steps": steps, "evaluations": curves}


def mask_steps(
    model: MTPModel,
    texts: Sequence[GreedyText],
    *,
    name: str,
    max_tokens: int,
    samplers: Sequence[bool] = (True, False),
    layouts: Sequence[str] = LAYOUTS,
) -> dict[str, list[TextSteps]]:
    """Tokens and steps of texts with 1 to k masks; one evaluation for each value of ``samplers``.

    Returns:
        A list of k by the name of the line.
    """
    lines: dict[str, list[TextSteps]] = {}
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
            lines[f"{layout}, {'with' if use_sampler else 'without'} sampler"] = [
                steps_of(answers, num_texts=len(texts), num_draft_tokens=k, layout=layout)
                for k in range(1, model.num_draft_tokens + 1)
            ]
    return lines


def mean_points(seeds: Sequence[Sequence[TextSteps]]) -> Points:
    """Tokens per step by number of masks, from the steps of each seed, with intervals."""
    return [(k, *interval(steps)) for k, steps in enumerate(zip(*seeds, strict=True), 1)]


def run_curves(
    runs: Sequence[TrainedRun], model: str | None, texts: Sequence[GreedyText], *, max_tokens: int
) -> dict[str, Points]:
    """Tokens per step by number of masks for the adapters of each gated run, by its name."""
    from mlx_mtp.loading import load

    curves = {}
    for run in runs:
        if not run.has_adapter:
            continue
        seeds = []
        for folder in run.folders:
            loaded, _ = load(model, adapter_path=str(folder))
            lines = mask_steps(
                loaded,
                texts,
                name=run.name,
                max_tokens=max_tokens,
                samplers=(loaded.sampler_head is not None,),
                layouts=("quadratic",),
            )
            seeds += lines.values()
        curves[run.name] = mean_points(seeds)
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
    points = sorted((run.settings["rank"], *curves[run.name][-1][1:]) for run in whole)
    if len(points) > 1:
        k = len(curves[whole[0].name])
        name = f"{k} mask tokens, quadratic"
        files += draw_lines({name: points}, output / "ranks", x="rank", y=SPEED, log_x=True)
    gates = {
        "with gate" if run.is_gated else "without gate": run.losses
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
    folders: dict[str, list[Path]] = {}
    for text in options:
        name, separator, folder = text.partition("=")
        if not separator:
            raise ValueError(f"--run takes NAME=FOLDER, got {text!r}")
        folders.setdefault(name, []).append(Path(folder).expanduser())
    return [TrainedRun.read(name, paths) for name, paths in folders.items()]


@command
@text_options
@ADAPTER_PATH
@option(
    "--run",
    "runs",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Training run; repeatable, also with one name for several seeds.",
)
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
    lines = mask_steps(loaded, texts, name="the adapter", max_tokens=max_tokens)
    masks = {name: mean_points([steps]) for name, steps in lines.items()}
    by_run = run_curves(trained, model, texts, max_tokens=max_tokens)
    files = draw_lines(masks, output / "masks", x=MASKS, y=SPEED)
    files += draw_runs(trained, by_run, output)
    entries = {run.name: run.to_dict() | _rounded(by_run.get(run.name, ())) for run in trained}
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


def _rounded(points: Points) -> dict[str, dict[str, float]]:
    """Tokens per step by number of masks, and half the widths of their intervals."""
    return {
        "tokens_per_step": {str(int(k)): round(speed, 4) for k, speed, _ in points},
        "half_width": {str(int(k)): round(half, 4) for k, _, half in points},
    }


if __name__ == "__main__":
    main()
