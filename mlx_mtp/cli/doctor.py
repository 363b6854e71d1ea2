"""The command ``mlx-mtp doctor``.

A table on stdout (or JSON) and a file to attach to a bug report.  Exit codes: 0 all checks passed,
1 a kernel gives wrong results on this machine (it is not used then), 2 bad input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import cloup

from mlx_mtp.cli.options import AS_JSON, ListOf, model_options, option
from mlx_mtp.terminal import Status, show

FAILED = 1
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32)


@cloup.command()
@model_options(has_adapter=False)
@cloup.option_group(
    "Measurement",
    option(
        "--rows",
        type=ListOf(int, min=1),
        default=ROWS,
        metavar="INTEGER,...",
        help="Numbers of rows to measure, separated by commas.",
    ),
)
@cloup.option_group(
    "Output",
    option(
        "--output-file",
        former_names=("--output",),
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("mlx-mtp-doctor.json"),
        help="File to write the report to, as JSON.",
    ),
    AS_JSON,
)
def doctor(
    model: str | None,
    trust_remote_code: bool,
    rows: tuple[int, ...],
    output_file: Path,
    as_json: bool,
) -> None:
    """Check the Metal kernels on this machine and measure their speed."""
    from mlx_mtp.loading import load
    from mlx_mtp.storage.files import write_atomically
    from mlx_mtp.verify.doctor import examine, table

    with Status("Loading the model ...") as status:
        loaded, _ = load(
            model,
            trust_remote_code=trust_remote_code,
            mtp=False,
            kernels=False,
            progress=status.update,
        )
        rows = tuple(sorted({1, *rows}))
        report = examine(loaded.base, name=loaded.name, rows=rows, say=status.update)
    text = json.dumps(report, indent=2)
    write_atomically(output_file.expanduser(), text + "\n")
    show(text if as_json else "\n".join([*table(report), "", f"wrote {output_file}"]))
    if not report["passed"]:
        sys.exit(FAILED)
