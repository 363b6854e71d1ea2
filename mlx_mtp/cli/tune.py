"""The command ``mlx-mtp tune``: measure what rows cost here, again, and show it."""

from __future__ import annotations

import json

import click

from mlx_mtp.terminal import Progress


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", help="Adapter folder or hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer run its code.")
@click.option("--json", "as_json", is_flag=True, help="Print the curve as JSON.")
def tune(
    model: str | None, adapter_path: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Measure again what a step costs here by its rows.

    Layout auto plans by this curve. It is measured at first use and kept in the cache folder by
    machine, model and versions.
    """
    from mlx_mtp.calibration.stored_costs import kept_costs
    from mlx_mtp.loading import load

    with Progress("Loading the model ...") as progress:
        loaded, _ = load(
            model, adapter_path=adapter_path, trust_remote_code=trust_remote_code,
            progress=progress.say,
        )  # fmt: skip
        curve = kept_costs(loaded, again=True, say=progress.say)
    assert curve is not None
    if as_json:
        click.echo(json.dumps({"model": loaded.name} | curve.to_dict()))
        return
    from mlx_mtp.calibration.stored_costs import curve_lines

    click.echo("\n".join([f"{loaded.name}, {curve.source}", "", *curve_lines(curve)]))
