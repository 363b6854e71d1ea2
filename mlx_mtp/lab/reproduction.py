"""The paper's figures on a model of one's own: ``python -m mlx_mtp.lab.reproduction``.

- ``masks``: tokens per step against the number of masks, linear and quadratic, with and without
  the sampler head, from one adapter.
- ``losses``: the same, quadratic, for the runs with all loss terms, without LCM, without sampler.
- ``ranks``: tokens per step with all masks against the rank, for the runs that differ in it.
- ``gate``: next-token cross-entropy of the base model's rows during training, with and without the
  gate.

Runs are folders of ``mlx_mtp.lab.ablations`` or of ``mlx-mtp train``; what a run is, its own
``training/settings.json`` says.  ``figures.json`` holds every number that is drawn and what it was
measured on; the last line printed is that file's contents without the curves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.evaluation.acceptance import LAYOUTS, checked_num_masks, count_answers, summarise
from mlx_mtp.evaluation.greedy_texts import GreedyText, greedy_texts, texts_hash
from mlx_mtp.evaluation.prompt_sets import prompts_of
from mlx_mtp.evaluation.prompts import KINDS
from mlx_mtp.lab.figures import draw_lines
from mlx_mtp.lab.tokens_per_step import stamp
from mlx_mtp.model.config import WEIGHTS_FILE
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.terminal import BadInput, Status, one_line
from mlx_mtp.train.run.folder import SETTINGS_FILE, RunFolder
from mlx_mtp.train.run.history import read_history

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MASKS, SPEED = "mask tokens", "tokens per step"
_SHOWN = ("rank", "lcm_weight", "sampler", "gate", "num_draft_tokens", "batch_size", "num_anchors")


@dataclass(frozen=True)
class TrainedRun:
    """A training run that has been read.

    Attributes:
        name: as the option gave it.
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
            ValueError: it holds no run, or none that was evaluated.
        """
        run = RunFolder(folder)
        try:
            settings = json.loads((run.training / SETTINGS_FILE).read_text(encoding="utf-8"))
            records = read_history(run.history)
        except OSError as error:
            raise ValueError(f"{folder} holds no training run: {error}") from None
        history = [each for each in records if each.get("kind") == "evaluation"]
        if not history:
            raise ValueError(f"{folder} holds a training run without any evaluation")
        return cls(name, folder, settings, history)

    @property
    def is_gated(self) -> bool:
        """Whether the gate was on."""
        return bool(self.settings.get("gate", True))

    @property
    def missing(self) -> list[str]:
        """What of the method was left out."""
        left_out = {
            "gate": not self.is_gated,
            "sampler": not self.settings.get("sampler", True),
            "LCM": self.settings.get("lcm_weight", 1.0) == 0,
        }
        return [part for part, is_out in left_out.items() if is_out]

    @property
    def label(self) -> str:
        """What a figure calls it."""
        return " and ".join(f"without {part}" for part in self.missing) or "all"

    def next_token_curve(self) -> list[tuple[float, float]]:
        """Step and next-token cross-entropy of each evaluation."""
        return [(each["step"], each["next_token_loss"]) for each in self.history]

    def to_dict(self) -> dict[str, Any]:
        """What ``figures.json`` says of it."""
        shown = {key: self.settings[key] for key in _SHOWN if key in self.settings}
        keys = ("step", "tokens_per_step", "next_token_loss", "acceptance")
        curve = [{key: each[key] for key in keys if key in each} for each in self.history]
        return {"settings": shown, "steps": self.history[-1]["step"], "evaluations": curve}


def mask_curves(
    model: MTPModel,
    texts: Sequence[GreedyText],
    *,
    max_tokens: int = 64,
    samplers: Sequence[bool] = (True, False),
    layouts: Sequence[str] = LAYOUTS,
    say: Any = None,
) -> dict[str, list[tuple[float, float]]]:
    """Tokens per step against the number of masks, from one evaluation for each line's drafts.

    Returns:
        Points (masks, tokens per step) by the name of the line.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for use_sampler in samplers:
        if use_sampler and model.sampler_head is None:
            continue
        answers = list(
            count_answers(
                model,
                [each.sequence for each in texts],
                max_tokens=max_tokens,
                use_sampler=use_sampler,
                progress=say,
            )
        )
        for layout in layouts:
            name = f"{layout}, {'with' if use_sampler else 'without'} sampler"
            curves[name] = [
                (k, summarise(answers, num_draft_tokens=k, layout=layout).tokens_per_step)
                for k in range(1, model.num_draft_tokens + 1)
            ]
    return curves


def run_curves(
    runs: Sequence[TrainedRun], model: str | None, texts: Sequence[GreedyText], *, max_tokens: int
) -> dict[str, list[tuple[float, float]]]:
    """Tokens per step against masks for the adapter of each gated run, by the run's name."""
    from mlx_mtp.loading import load

    curves = {}
    for run in runs:
        if not run.is_gated or not (run.folder / WEIGHTS_FILE).is_file():
            continue  # an adapter without a gate cannot decode
        loaded, _ = load(model, adapter_path=str(run.folder))
        has_sampler = loaded.sampler_head is not None
        with Status(f"Evaluating {run.name} ...") as line:
            found = mask_curves(
                loaded,
                texts,
                max_tokens=max_tokens,
                samplers=(has_sampler,),
                layouts=("quadratic",),
                say=lambda done, all_, line=line, run=run: line.update(
                    f"Evaluated {run.name} {done}/{all_}"
                ),
            )
        curves[run.name] = next(iter(found.values()))
    return curves


def draw_runs(
    runs: Sequence[TrainedRun], curves: Mapping[str, Sequence[tuple[float, float]]], output: Path
) -> list[Path]:
    """Draw ``losses``, ``ranks`` and ``gate`` as far as there are runs for them."""
    files: list[Path] = []
    rank = _compared_rank(runs)
    alike = [run for run in runs if run.settings.get("rank") == rank]
    lines = {run.label: curves[run.name] for run in alike if run.name in curves}
    if len(lines) > 1:
        files += draw_lines(lines, output / "losses", x=MASKS, y=SPEED, title=f"rank {rank}")
    whole = [run for run in runs if not run.missing and run.name in curves]
    points = sorted((run.settings["rank"], curves[run.name][-1][1]) for run in whole)
    if len(points) > 1:
        k = len(curves[whole[0].name])
        name = f"{k} mask tokens, quadratic"
        files += draw_lines({name: points}, output / "ranks", x="rank", y=SPEED, log_x=True)
    gates = {
        "with gate" if run.is_gated else "without gate": run.next_token_curve()
        for run in alike
        if not run.missing or run.missing == ["gate"]
    }
    if len(gates) > 1:
        y = "next-token cross-entropy"
        files += draw_lines(gates, output / "gate", x="step", y=y, marks=False)
    return files


def _compared_rank(runs: Sequence[TrainedRun]) -> Any:
    """The rank of the runs that leave something out, which are compared with a whole one."""
    ranks = [run.settings.get("rank") for run in runs if run.missing]
    ranks += [run.settings.get("rank") for run in runs]
    return ranks[0] if ranks else None


def _texts(
    model: MTPModel, tokenizer: TokenizerWrapper, options: Mapping[str, Any]
) -> list[GreedyText]:
    with Status("Answering the prompts ...") as line:
        return greedy_texts(
            model,
            tokenizer,
            prompts_of(options["prompts"], builtin_kinds=KINDS)[:: options["every"]],
            encode=prompt_ids,
            max_tokens=options["max_tokens"],
            path=options["texts"],
            progress=lambda done, all_: line.update(f"Answered {done}/{all_}"),
        )


def _named_runs(named: Sequence[str]) -> list[TrainedRun]:
    pairs = [each.partition("=") for each in named]
    if bad := next((each for each, pair in zip(named, pairs, strict=True) if not pair[2]), None):
        raise ValueError(f"--run takes NAME=FOLDER, got {bad!r}")
    names = [pair[0] for pair in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have one name: {', '.join(names)}")
    return [TrainedRun.read(name, Path(folder).expanduser()) for name, _, folder in pairs]


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", help="Adapter folder or hub id; the shipped one by default.")
@click.option("--run", "runs", multiple=True, metavar="NAME=FOLDER", help="Repeatable.")
@click.option("--prompts", default="builtin", show_default=True, help="Or human-eval, or a JSONL.")
@click.option("--every", default=1, show_default=True, help="Take every n-th prompt.")
@click.option("--max-tokens", default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--texts", type=click.Path(path_type=Path), help="File to keep the answers in.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/reproduction"))
def main(**options: Any) -> None:
    """Measure and draw the figures of docs/reproduction.md."""
    try:
        summary = reproduce(**options)
    except ValueError as error:
        raise BadInput(one_line(error)) from None
    for run in summary["runs"].values():
        run.pop("evaluations")
    print(json.dumps(summary))


def reproduce(**options: Any) -> dict[str, Any]:
    """Do what the options of ``main`` say; return what ``figures.json`` holds."""
    from mlx_mtp.loading import load

    output, max_tokens = options["output"], options["max_tokens"]
    runs = _named_runs(options["runs"])
    model, tokenizer = load(options["model"], adapter_path=options["adapter_path"])
    checked_num_masks(model, None)  # before the slow part
    texts = _texts(model, tokenizer, options)
    with Status("Evaluating ...") as line:
        masks = mask_curves(
            model,
            texts,
            max_tokens=max_tokens,
            say=lambda done, all_: line.update(f"Evaluated {done}/{all_}"),
        )
    by_run = run_curves(runs, options["model"], texts, max_tokens=max_tokens)
    files = draw_lines(masks, output / "masks", x=MASKS, y=SPEED)
    files += draw_runs(runs, by_run, output)
    summary = {
        "prompts": options["prompts"],
        "num_prompts": len(texts),
        "max_tokens": max_tokens,
        "texts": texts_hash(texts),
        "masks": {name: _rounded(points) for name, points in masks.items()},
        "runs": {
            run.name: run.to_dict() | {"tokens_per_step": _rounded(by_run.get(run.name, ()))}
            for run in runs
        },
        "files": [file.name for file in files],
    } | stamp()
    write_atomically(output / "figures.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _rounded(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Tokens per step by the number of masks."""
    return {str(int(k)): round(speed, 4) for k, speed in points}


if __name__ == "__main__":
    main()
