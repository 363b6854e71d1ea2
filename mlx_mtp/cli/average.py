"""The command ``mlx-mtp average``: the mean of adapters, as an adapter."""

from __future__ import annotations

from pathlib import Path

import cloup

from mlx_mtp.cli.options import option
from mlx_mtp.terminal import Status, show


@cloup.command()
@cloup.argument(
    "adapters",
    nargs=-1,
    metavar="ADAPTER ADAPTER ...",
    help="Folder, Hugging Face id, or saved state of a run, such as RUN/training/state-0000100.",
)
@option("--adapter-path", required=True, metavar="OUT", help="Folder to write the adapter to.")
def average(adapters: tuple[str, ...], adapter_path: str) -> None:
    """Average the weights of adapters.

    The adapters must be trained from one another. The mean often has a higher acceptance rate than
    any of them. The adapter of a saved state need not be the best of its run.
    """
    from mlx_mtp.loading import resolve_adapter
    from mlx_mtp.train.average import save_mean

    with Status("Reading the adapters ..."):
        folders = [resolve_adapter(adapter) for adapter in adapters]
        config = save_mean(folders, Path(adapter_path).expanduser(), names=adapters)
    show(f"wrote {adapter_path}: the mean of {len(adapters)} adapters for {config.base_model}")
