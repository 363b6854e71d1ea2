"""The summary, card and curves at the end of a run, and the values that a tracker gets."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.storage.package import package_version
from mlx_mtp.terminal import human_bytes, one_line, show
from mlx_mtp.train.run.card import training_card
from mlx_mtp.train.run.checkpoint import EMA, RAW, README_FILE
from mlx_mtp.train.run.curves import draw_curves, terminal_curves
from mlx_mtp.train.run.display import acceptance_text, duration, short_name
from mlx_mtp.train.run.events import Evaluated, Event, Reported
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.run.history import read_history

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel
    from mlx_mtp.train.loop import TrainResult

CURVES_SIZE = (72, 16)
_NAMES = {RAW: "raw", EMA: "exponential moving average"}


def finish(
    folder: RunFolder,
    model: MTPModel,
    result: TrainResult,
    *,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Draw the curves, write the adapter's card, and print the summary.

    Args:
        folder: of the run.
        model: with its adapter.
        result: from the loop.
        seed: of the run.
        log: called with a line for the user.

    Raises:
        OSError: a file cannot be written.
    """
    if not result.finished:  # first, because a user may press Ctrl-C again
        log(f"Stopped and saved at step {result.step}. Resume with: {folder.resume_command()}")
    records = read_history(folder.history)
    command = folder.read_command()
    if records:
        try:
            draw_curves(records, folder.curves)
        except ValueError as error:  # the training is complete without the picture
            log(f"No {folder.curves.name}: {one_line(error)}")
    if result.best is not None and model.adapter_config is not None:
        recipe = recipe_of(command, seed=seed, seconds=_seconds(records), result=result)
        weights = folder.path / WEIGHTS_FILE
        recipe["size"] = human_bytes(weights.stat().st_size) if weights.exists() else ""
        card = training_card(model.adapter_config, recipe=recipe, best=result.best)
        write_atomically(folder.path / README_FILE, card)
    if not result.finished:
        return
    width, height = CURVES_SIZE
    show("\n".join(summary_lines(folder, records, result, model=command_model(command))))
    if records and sys.stdout.isatty():
        with contextlib.suppress(ValueError):  # without plotext there is still the PNG file
            print(terminal_curves(records, width=width, height=height))


def summary_lines(
    folder: RunFolder, records: list[dict[str, Any]], result: TrainResult, *, model: str | None
) -> list[str]:
    """Lines to print at the end.

    Args:
        folder: of the run.
        records: its history.
        result: from the loop.
        model: value of ``--model``, or None.
    """
    lines = []
    best = result.best
    if best is not None:
        first = next((item for item in records if item.get("kind") == "evaluation"), None)
        before = ""
        if first is not None and first["step"] < result.best_step:
            before = f"{first['tokens_per_step']:.2f} at step {first['step']}, "
        lines.append(
            f"tokens per step: {before}{best.tokens_per_step:.2f} at step {result.best_step} "
            f"(best, {short_name(result.best_weights)} weights), over {best.num_tokens} held-out "
            "tokens"
        )
        lines.append(acceptance_text(best))
    if (folder.path / CONFIG_FILE).exists():
        option = "" if model is None else f" --model {shlex.quote(model)}"
        path = shlex.quote(str(folder.path))
        lines.append(f"wrote {folder.path}: the adapter of step {result.best_step}")
        lines.append(f'use it: mlx-mtp generate{option} --adapter-path {path} --prompt "hello"')
    if folder.curves.exists():
        lines.append(f"curves: {folder.curves}")
    return lines


def recipe_of(
    command: Mapping[str, Any], *, seed: int, seconds: float, result: TrainResult
) -> dict[str, Any]:
    """How an adapter was trained, for its card."""
    return {
        "command": command.get("command", ""),
        "seed": seed,
        "data hash": command.get("data_hash", ""),
        "benchmarks": command.get("contamination", ""),
        "steps": result.step,
        "weights": f"{_NAMES[result.best_weights]} of step {result.best_step}",
        "hardware": hardware(),
        "time": duration(seconds),
        "versions": versions_text(),
    }


def hardware() -> str:
    """Name of the device that computes."""
    device = mx.default_device()
    if device.type == mx.DeviceType.gpu:
        return str(mx.device_info().get("device_name", "GPU"))
    return f"{_processor()}, CPU"


def versions_text() -> str:
    """Versions of the libraries."""
    others = (f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    return ", ".join([f"mlx-mtp {package_version()}", *others])


def command_model(command: Mapping[str, Any]) -> str | None:
    """The ``--model`` of a run, or None."""
    return command.get("options", {}).get("model")


def tracked_values(event: Event) -> dict[str, float]:
    """Values of an event for a tracker."""
    match event:
        case Reported():
            terms = {f"loss/{name}": value for name, value in event.terms.items()}
            return {
                "loss": event.loss,
                **terms,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "tokens_per_s": event.tokens_per_s,
            }
        case Evaluated():
            each = {
                f"tokens_per_step/{name}": result.tokens_per_step
                for name, result in event.results.items()
            }
            values = _evaluated(event.evaluation) | each
            return values | {"next_token_loss": event.next_token_loss}
        case _:
            return {}


def _evaluated(evaluation: Evaluation) -> dict[str, float]:
    rates = {f"acceptance/{i}": rate for i, rate in enumerate(evaluation.acceptance, start=1)}
    return {"tokens_per_step": evaluation.tokens_per_step, **rates}


def _seconds(records: list[dict[str, Any]]) -> float:
    """Duration of all training steps, those before a resume included."""
    return sum(float(item.get("seconds", 0.0)) for item in records if item["kind"] == "report")


def _processor() -> str:
    """Name of the processor, if the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
