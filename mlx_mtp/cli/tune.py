"""The command ``mlx-mtp tune``: measure what a step costs on this machine, and show it."""

from __future__ import annotations

import json

import cloup

from mlx_mtp.cli.options import AS_JSON, model_options
from mlx_mtp.terminal import Status, show


@cloup.command()
@model_options()
@cloup.option_group("Output", AS_JSON)
def tune(
    model: str | None, adapter_path: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Measure the cost of a step on this machine by its number of rows.

    Layout auto plans with these costs. They are stored in the cache folder by machine, model and
    versions. Without them auto starts from a safe estimate and learns from the steps that run.
    """
    from mlx_mtp.calibration.stored_costs import calibrate, curve_lines
    from mlx_mtp.loading import load

    with Status("Loading the model ...") as status:
        loaded, _ = load(
            model,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            progress=status.update,
        )
        costs = calibrate(loaded, again=True, on_status=status.update)
    if as_json:
        show(json.dumps({"model": loaded.name} | costs.to_dict()))
    else:
        show("\n".join([f"{loaded.name}, {costs.source}", "", *curve_lines(costs)]))
