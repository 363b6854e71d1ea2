"""The mean of adapters that were trained over the same base model.

Runs that start from one adapter and see different texts, or the same ones in another order, end in
different places of one basin of the loss; their mean often drafts better than any of them ("model
soups", Wortsman et al. 2022, arXiv 2203.05482).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_mtp.loading import read_any_adapter, resolve_adapter
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.train.gradient.adapter import AnyConfig, read_state_adapter
from mlx_mtp.train.run.card import training_card
from mlx_mtp.train.run.checkpoint import is_state, save_adapter, state_weights

Tensors = dict[str, mx.array]


def find_adapter(name: str) -> Path:
    """Find an adapter by folder or hub id, or weights of a state.

    Raises:
        ValueError: it does not exist or is not an adapter of mlx-mtp.
    """
    path = Path(name).expanduser()
    return path if is_state(path) and state_weights(path)[0].is_dir() else resolve_adapter(name)


def mean_adapter(folders: Sequence[Path]) -> tuple[AnyConfig, Tensors]:
    """The mean of adapters.

    Args:
        folders: two or more, or one state; adapter folders, or states of training runs, see
            ``adapter.read_state_adapter``.

    Returns:
        Their configuration without an acceptance, and the mean of their tensors by name, float32.

    Raises:
        ValueError: there are too few, one cannot be read, or their shapes differ.
    """
    if len(folders) < 2 and not any(map(is_state, folders)):
        raise ValueError(f"a mean needs at least two adapters, got {len(folders)}")
    first, sums = _read(folders[0])
    first, sums = (
        _without_acceptance(first),
        {name: value.astype(mx.float32) for name, value in sums.items()},
    )
    for folder in folders[1:]:
        config, weights = _read(folder)
        _check_same_shape(folders[0], first, sums, folder, _without_acceptance(config), weights)
        sums = {name: value + weights[name].astype(mx.float32) for name, value in sums.items()}
        mx.eval(sums)
    return first, {name: value / len(folders) for name, value in sums.items()}


def save_mean(folders: Sequence[Path], output: Path, *, names: Sequence[str] = ()) -> AnyConfig:
    """Write the mean of adapters as an adapter folder.

    Args:
        folders: see ``mean_adapter``.
        output: a new or empty folder.
        names: names of the adapters in the card; their paths by default.

    Raises:
        ValueError: see ``mean_adapter``, or ``output`` is not empty.
        OSError: a file cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists")
    config, weights = mean_adapter(folders)
    source = "mean of" if len(folders) > 1 else "copy of"
    recipe = {source: ", ".join(names or [str(folder) for folder in folders])}
    save_adapter(output, config, weights, readme=training_card(config, recipe=recipe, best=None))
    return config


def _read(folder: Path) -> tuple[AnyConfig, Tensors]:
    return read_state_adapter(folder) if is_state(folder) else read_any_adapter(folder)


def _without_acceptance(config: AnyConfig) -> AnyConfig:
    """The configuration of a mean, which is stored in float16 and was not evaluated."""
    plain = config.as_plain() if isinstance(config, MTPConfig) else config
    return dataclasses.replace(plain, acceptance=())


def _check_same_shape(
    one: Path,
    config: AnyConfig,
    sums: Tensors,
    other: Path,
    other_config: AnyConfig,
    weights: Tensors,
) -> None:
    """Refuse an adapter of another shape or for another model."""
    if type(config) is not type(other_config):
        raise ValueError(f"{one} and {other} are adapters of different kinds")
    for field in dataclasses.fields(config):
        first, second = getattr(config, field.name), getattr(other_config, field.name)
        if first != second:
            raise ValueError(f"{other} has {field.name} {second}, but {one} has {first}")
    if unmatched := sorted(set(sums) ^ set(weights)):
        raise ValueError(f"{unmatched[0]} is in only one of {one} and {other}")
    for name, value in sums.items():
        if value.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(value.shape)} as in {one}"
            raise ValueError(f"{name} in {other} has the shape {shapes}")
