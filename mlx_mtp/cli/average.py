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
    help="Folder, Hugging Face id, or state of a run: RUN/training/state-0000100 names its newest "
    "weights, RUN/training/state-0000100/ema their moving average.",
)
@option("--adapter-path", required=True, metavar="OUT", help="Folder to write the adapter to.")
def average(adapters: tuple[str, ...], adapter_path: str) -> None:
    """Average the weights of adapters.

    The adapters must be trained from one another. The mean often has a higher acceptance rate than
    any of them. The adapter of a saved state need not be the best of its run; a single one is
    written as it is.
    """
    from mlx_mtp.train.average import find_adapter, save_mean

    with Status("Reading the adapters ..."):
        folders = [find_adapter(adapter) for adapter in adapters]
        config = save_mean(folders, Path(adapter_path).expanduser(), names=adapters)
    several = len(adapters) > 1
    source = f"the mean of {len(adapters)} adapters" if several else "".join(adapters)
    show(f"wrote {adapter_path}: {source} for {config.base_model}")
