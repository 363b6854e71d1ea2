"""The command ``mlx-mtp compress``: a smaller adapter from a trained one."""

from __future__ import annotations

from pathlib import Path

import cloup

from mlx_mtp.cli.options import field_option, option
from mlx_mtp.terminal import Status, human_bytes, show
from mlx_mtp.train.settings import TrainSettings


@cloup.command()
@cloup.argument("adapter", help="Folder or Hugging Face id.")
@option("--adapter-path", required=True, metavar="OUT", help="Folder to write the adapter to.")
@field_option(TrainSettings, "adapter_bits")
@field_option(TrainSettings, "sampler_bits")
@field_option(TrainSettings, "adapter_group_size")
@option("--max-rank", type=int, help="Maximum rank of a layer.", show_default="the adapter's own")
@option(
    "--energy",
    default=1.0,
    help="Share of each layer's squared singular values that its rank keeps, such as 0.95.",
)
def compress(
    adapter: str,
    adapter_path: str,
    adapter_bits: int,
    sampler_bits: int | None,
    adapter_group_size: int,
    max_rank: int | None,
    energy: float,
) -> None:
    """Make an adapter smaller by quantizing its weights or lowering its ranks.

    No training is needed. `mlx-mtp train --adapter-bits` trains an adapter for its quantized form.
    """
    from mlx_mtp.loading import resolve_adapter
    from mlx_mtp.train.compress import Compression, save_compressed, weights_bytes

    how = Compression(
        bits=adapter_bits,
        sampler_bits=sampler_bits,
        group_size=adapter_group_size,
        max_rank=max_rank,
        energy=energy,
    )
    with Status("Compressing the adapter ..."):
        folder, output = resolve_adapter(adapter), Path(adapter_path).expanduser()
        save_compressed(folder, output, how, name=adapter)
    before, after = (human_bytes(weights_bytes(path)) for path in (folder, output))
    show(f"wrote {adapter_path}: {after}, from {before}")
