"""Train an adapter on one NVIDIA GPU within some minutes: ``make gpu-train``.

``--pack`` writes a tar file with all that must travel to the machine with the GPU: the files of the
repository, the model and the training text.  Unpack it there and run the same command on it.  The
run is an ordinary one of ``mlx-mtp train`` with the back-end ``torch``; the number of steps follows
from the time of a few steps on that machine.  Bring the adapter's folder back and evaluate it:
``mlx-mtp benchmark --adapter-path FOLDER``.  ``--device cpu`` tries everything without a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import click

from mlx_mtp.cli.options import MODEL, option
from mlx_mtp.lab.commands import command, evaluations
from mlx_mtp.lab.train_step import sample_sequences
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.settings import TORCH, TrainSettings

SETTINGS = TrainSettings(
    backend=TORCH,
    batch_size=8,
    num_anchors=48,
    drop_late=0.2,
    teacher="sample",
    candidates=8192,
    rows_per_forward=512,
    min_learning_rate=0.02,
)
FOLDER = "gpu-train"  # of the model and the text in the tar file
_SHARE_OF_STEPS = 0.7  # of the time; loading and evaluations in MLX take the rest
_LENGTH = 400  # ids of the sequences that are timed


def pack(target: Path, *, repository: Path, model: Path, data: Path) -> list[str]:
    """Write a tar file of the repository's tracked files, a model's folder and training text.

    Args:
        target: the tar file, written under another name and renamed.
        repository: a git work tree.
        model: the model's folder.
        data: the JSONL file.

    Returns:
        The names in it.

    Raises:
        OSError: a file cannot be read or written.
    """
    listed = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-z"], check=True, capture_output=True
    )
    draft = target.with_name(target.name + ".new")
    try:
        with tarfile.open(draft, "w") as tar:
            for name in filter(None, listed.stdout.decode().split("\0")):
                if (repository / name).exists() or (repository / name).is_symlink():
                    tar.add(repository / name, name)
            tar.dereference = True  # caches have links to the files of a model
            for path in sorted(path for path in model.iterdir() if path.is_file()):
                tar.add(path, f"{FOLDER}/model/{path.name}")
            tar.add(data, f"{FOLDER}/data.jsonl")
            names = tar.getnames()
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return names


def steps_within(minutes: float, seconds_per_step: float) -> int:
    """Number of training steps that fit into a run of some minutes, at least 1."""
    return max(1, int(_SHARE_OF_STEPS * 60 * minutes / seconds_per_step))


def seconds_per_step(model: str | None, settings: TrainSettings) -> float:
    """Time gradients of a few steps on this machine, which are most of the steps."""
    from mlx_mtp.loading import load
    from mlx_mtp.train.gradient.adapter import new_adapter, trainable
    from mlx_mtp.train.gradient.backend import make_gradient

    loaded, tokenizer = load(model, mtp=False, kernels=False)
    adapted = new_adapter(loaded, settings)
    gradient, *_ = make_gradient(adapted, settings)
    parameters = trainable(adapted)
    data = sample_sequences(tokenizer, count=settings.batch_size, length=_LENGTH)
    seconds = []
    for step in range(3):  # the first one warms up
        start = time.perf_counter()
        gradient(parameters, data, range(len(data)), step=step)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def choose_device(name: str) -> None:
    """Let PyTorch use the GPU, or hide it; before PyTorch starts.

    Raises:
        ValueError: there is no such GPU.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    from mlx_mtp.backends.pytorch.model import torch_device

    torch_device(name)


def train(
    *, model: str | None, data: Path, minutes: float, output: Path, settings: TrainSettings
) -> dict[str, Any]:
    """Train an adapter and return what the run achieved.

    Raises:
        ValueError: see ``train.command.run``.
    """
    from mlx_mtp.train.command import run

    start = time.monotonic()
    duration = seconds_per_step(model, settings)
    left = minutes - (time.monotonic() - start) / 60
    iters = steps_within(max(left, 0), duration)
    values = dataclasses.asdict(settings) | {"iters": iters, "warmup": min(100, iters // 10)}
    values |= {"steps_per_eval": max(1, iters // 2), "save_every": max(1, iters // 10)}
    default = dataclasses.asdict(TrainSettings())
    options = {name: value for name, value in values.items() if value != default[name]}
    options |= {"data": str(data), "data_as_is": True, "adapter_path": str(output)}
    finished = run(options | ({} if model is None else {"model": model}))
    found = evaluations(RunFolder(output))
    return {
        "finished": finished,
        "iters": iters,
        "seconds_per_step": round(duration, 3),
        "minutes": round((time.monotonic() - start) / 60, 2),
        "tokens_per_step": [round(x["tokens_per_step"], 3) for x in found],
        "adapter_path": str(output),
    }


@command
@MODEL
@option("--data", required=True, type=click.Path(path_type=Path), help="JSONL file of texts.")
@option("--minutes", default=30.0, type=click.FloatRange(min=0, min_open=True), help="Time limit.")
@option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), help="Where to train.")
@option("--adapter-path", type=click.Path(path_type=Path), help="Folder of the new adapter.")
@option("--batch-size", default=SETTINGS.batch_size, help="Number of texts per training step.")
@option("--num-anchors", default=SETTINGS.num_anchors, help="Number of mask blocks per text.")
@option("--pack", "target", type=click.Path(path_type=Path), help="Only write this tar file.")
def main(
    *,
    model: str | None,
    data: Path,
    minutes: float,
    device: str,
    adapter_path: Path | None,
    batch_size: int,
    num_anchors: int,
    target: Path | None,
) -> dict[str, Any]:
    """Train an adapter through PyTorch within some minutes and print one JSON line."""
    from mlx_mtp.loading import locate

    if not data.is_file():
        raise ValueError(f"{data} is not a file")
    if target is not None:
        folder = locate(model, None)[0]
        repository = Path(__file__).resolve().parents[2]
        names = pack(target, repository=repository, model=folder, data=data)
        return {"packed": str(target), "files": len(names), "bytes": target.stat().st_size}
    if adapter_path is None:
        raise ValueError("--adapter-path is missing")
    choose_device(device)
    settings = dataclasses.replace(SETTINGS, batch_size=batch_size, num_anchors=num_anchors)
    return train(model=model, data=data, minutes=minutes, output=adapter_path, settings=settings)


if __name__ == "__main__":
    main()
