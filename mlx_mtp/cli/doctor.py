"""The command ``mlx-mtp doctor``.

A table on stdout (or JSON) and a file to attach to a report.  Exit codes: 0 all well, 1 a kernel of
ours is wrong on this machine (it is not used then), 2 bad input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mlx_mtp.terminal import Progress

WRONG = 1


def _rows(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    del context, parameter
    try:
        rows = sorted({1, *(int(each) for each in value.split(","))})
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,2,4") from None
    if rows[0] < 1:
        raise click.BadParameter(f"{rows[0]} rows cannot be multiplied")
    return tuple(rows)


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer run its code.")
@click.option(
    "--rows",
    callback=_rows,
    default="1,2,3,4,5,6,8,9,12,16,24,32",
    show_default=True,
    help="Numbers of rows to time.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("mlx-mtp-doctor.json"),
    show_default=True,
    help="File for the report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report instead of the table.")
def doctor(
    model: str | None,
    trust_remote_code: bool,
    rows: tuple[int, ...],
    output: Path,
    as_json: bool,
) -> None:
    """Check the Metal kernels here and measure what rows cost."""
    from mlx_mtp.loading import load
    from mlx_mtp.storage.files import write_atomically
    from mlx_mtp.verify.doctor import examine, table

    with Progress("Loading the model ...") as progress:
        loaded, _ = load(
            model,
            trust_remote_code=trust_remote_code,
            mtp=False,
            kernels=False,
            progress=progress.say,
        )
        report = examine(loaded.base, name=loaded.name, rows=rows, say=progress.say)
    text = json.dumps(report, indent=2)
    write_atomically(output.expanduser(), text + "\n")
    click.echo(text if as_json else "\n".join([*table(report), "", f"wrote {output}"]))
    if not report["passed"]:
        sys.exit(WRONG)
