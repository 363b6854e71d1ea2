"""The command ``mlx-mtp tune``: measure the step costs of this machine and print them."""

from __future__ import annotations

import json

import click

from mlx_mtp.terminal import Status


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", help="Adapter folder or hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer run its code.")
@click.option("--json", "as_json", is_flag=True, help="Print the costs as JSON.")
def tune(
    model: str | None, adapter_path: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Measure the cost of a step by its number of rows on this machine.

    Layout auto plans with these costs. They are stored in the cache folder by machine, model and
    versions. Without them auto starts from a safe guess and learns from the steps that run.
    """
    from mlx_mtp.calibration.stored_costs import calibrate, curve_lines
    from mlx_mtp.loading import load

    with Status("Loading the model ...") as status:
        loaded, _ = load(
            model, adapter_path=adapter_path, trust_remote_code=trust_remote_code,
            progress=status.update,
        )  # fmt: skip
        curve = calibrate(loaded, again=True, on_status=status.update)
    if as_json:
        click.echo(json.dumps({"model": loaded.name} | curve.to_dict()))
        return
    click.echo("\n".join([f"{loaded.name}, {curve.source}", "", *curve_lines(curve)]))
