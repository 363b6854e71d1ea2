"""The command ``mlx-mtp average``: the mean of adapters, as an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_mtp.terminal import Progress


@click.command()
@click.argument("adapters", nargs=-1, metavar="ADAPTER ADAPTER ...")
@click.option("--adapter-path", required=True, metavar="OUT", help="Folder to write.")
def average(adapters: tuple[str, ...], adapter_path: str) -> None:
    """Write the mean of adapters that were trained from one another.

    It often drafts better than each of them.  An ADAPTER is a folder, a hub id, or a state that a
    run has kept, RUN/training/state-0000100: its adapter need not be the run's best.
    """
    from mlx_mtp.loading import resolve
    from mlx_mtp.train.average import save_mean

    with Progress("Reading the adapters ..."):
        folders = [resolve(each, kind="adapter") for each in adapters]
        config = save_mean(folders, Path(adapter_path).expanduser(), names=adapters)
    print(f"wrote {adapter_path}: the mean of {len(adapters)} adapters for {config.base_model}")
