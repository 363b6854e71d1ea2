"""The mean of adapters: what training runs over the same base model have in common.

Runs that begin at one adapter and see other texts, or the same ones in another order, end at
different places of one valley; its middle often drafts better than any of them ("model soups",
Wortsman et al. 2022, arXiv 2203.05482).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_mtp.loading import read_adapter
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.train.gradient.adapter import read_state_adapter
from mlx_mtp.train.run.card import training_card
from mlx_mtp.train.run.checkpoint import is_state, save_adapter

Tensors = dict[str, mx.array]


def mean_adapter(folders: Sequence[Path]) -> tuple[MTPConfig, Tensors]:
    """The mean of adapters.

    Args:
        folders: two or more; adapter folders, or states of training runs, see
            ``adapter.read_state_adapter``.

    Returns:
        Their configuration, without the acceptance that one of them was measured to have, and the
        mean of their tensors by name, float32.

    Raises:
        ValueError: there are fewer than two, one cannot be read, or one differs in more than its
            values.
    """
    if len(folders) < 2:
        raise ValueError(f"a mean takes two adapters or more, got {len(folders)}")
    first, sums = _read(folders[0])
    first, sums = _bare(first), {name: value.astype(mx.float32) for name, value in sums.items()}
    for folder in folders[1:]:
        config, weights = _read(folder)
        _check_alike(folders[0], first, sums, folder, _bare(config), weights)
        sums = {name: value + weights[name].astype(mx.float32) for name, value in sums.items()}
        mx.eval(sums)
    return first, {name: value / len(folders) for name, value in sums.items()}


def save_mean(folders: Sequence[Path], output: Path, *, named: Sequence[str] = ()) -> MTPConfig:
    """Write the mean of adapters as an adapter folder.

    Args:
        folders: as ``mean_adapter``.
        output: a folder that is not there yet, or empty.
        named: what the card calls them; their paths by default.

    Raises:
        ValueError: see ``mean_adapter``, or something stands in ``output``.
        OSError: a file cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already")
    config, weights = mean_adapter(folders)
    recipe = {"mean of": ", ".join(named or [str(folder) for folder in folders])}
    save_adapter(output, config, weights, readme=training_card(config, recipe=recipe, best=None))
    return config


def _read(folder: Path) -> tuple[MTPConfig, Tensors]:
    return read_state_adapter(folder) if is_state(folder) else read_adapter(folder)


def _bare(config: MTPConfig) -> MTPConfig:
    return dataclasses.replace(config, acceptance=())


def _check_alike(
    one: Path, config: MTPConfig, sums: Tensors, other: Path, its: MTPConfig, weights: Tensors
) -> None:
    """Refuse an adapter of another shape, or for another model."""
    for field in dataclasses.fields(MTPConfig):
        wanted, found = getattr(config, field.name), getattr(its, field.name)
        if wanted != found:
            raise ValueError(f"{other} has {field.name} {found}, but {one} has {wanted}")
    if odd := sorted(set(sums) ^ set(weights)):
        raise ValueError(f"{odd[0]} is in only one of {one} and {other}")
    for name, value in sums.items():
        if value.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(value.shape)} as in {one}"
            raise ValueError(f"{name} in {other} has the shape {shapes}")
