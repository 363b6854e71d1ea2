"""The command ``mlx-mtp benchmark``.

The report goes to stdout.  Exit codes: 0 complete, 2 bad input, 130 interrupted; the report then
covers what was measured until then, and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from mlx_mtp.bench.settings import Settings
from mlx_mtp.cli.options import (
    ADAPTER,
    DRAFT_MODEL,
    JSON_HELP,
    KINDS_OPTION,
    PROMPTS,
    ListOf,
    field_option,
    model_options,
    num_prompts,
    option,
)
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.terminal import INTERRUPTED, Interrupt, Status, show

if TYPE_CHECKING:
    from mlx_mtp.bench.benchmark import BenchmarkConfig

FORMATS = ("md", "csv", "json", "jsonl")
PLOTS = (".png", ".svg")
FILE = click.Path(path_type=Path, dir_okay=False)
OPTIONS = (
    "max_tokens",
    "model",
    "adapter_path",
    "adapter",
    "draft_model",
    "trust_remote_code",
    "num_draft_tokens",
    "lookup",
    "seed",
)


@cloup.command()
@model_options(ADAPTER, DRAFT_MODEL)
@cloup.option_group(
    "Prompts",
    PROMPTS,
    KINDS_OPTION,
    num_prompts("all"),
    option(
        "--contexts",
        type=ListOf(int, min=0),
        default=(0,),
        metavar="INTEGER,...",
        help="Numbers of tokens of text before the prompts, such as 0,2048,8192.",
    ),
    field_option(
        GenerationConfig,
        "max_tokens",
        "-m",
        type=click.IntRange(2),
        default=96,
        help="Maximum number of tokens to generate per prompt.",
    ),
)
@cloup.option_group(
    "Decoding",
    option(
        "--modes",
        type=ListOf(str),
        default=("plain", "auto"),
        metavar="MODE,...",
        help="Ways to decode; speed-ups are relative to the first: plain, auto, linear, quadratic, "
        "tree, a drafter alone (mask, native, heads, draft-model, lookup), stock (mlx-lm with the "
        "same model), draft (mlx-lm with the draft model). linear:2 or lookup:2 verifies 2 draft "
        "tokens in each step.",
    ),
    field_option(GenerationConfig, "num_draft_tokens", type=click.IntRange(1)),
    field_option(GenerationConfig, "lookup"),
)
@cloup.option_group(
    "Schedule",
    field_option(Settings, "repeats"),
    field_option(Settings, "warmup", former_names=("--warmup",)),
    field_option(Settings, "cooldown_s", metavar="SECONDS"),
    option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        help="Random seed of the bootstrap for confidence intervals.",
    ),
)
@cloup.option_group(
    "Output",
    option(
        "--format",
        "-o",
        "output_format",
        former_names=("--output",),
        type=click.Choice(FORMATS),
        default="md",
        help="Format of the report on stdout.",
    ),
    option(
        "--json",
        "output_format",
        flag_value="json",
        help=JSON_HELP,
    ),
    option(
        "--output-file",
        type=FILE,
        help="Also write the report to this file, in the format of its extension: .md, .csv, .json "
        "or .jsonl.",
    ),
    option(
        "--plot",
        former_names=("--picture",),
        type=FILE,
        help="Write a plot of the report to this file, as PNG and SVG.",
    ),
    option(
        "--compare",
        nargs=2,
        type=FILE,
        metavar="A.json B.json",
        help="Compare two reports and measure nothing.",
    ),
)
def benchmark(
    output_format: str,
    output_file: Path | None,
    plot: Path | None,
    compare: tuple[Path, Path] | None,
    **options: Any,
) -> None:
    """Measure the speed of decoding on real prompts.

    Every prompt is answered in each mode before the next prompt begins, and speeds are compared
    with the first mode. docs/benchmark.md explains the figures.
    """
    _check_outputs(output_file, plot)
    if compare:
        if plot:
            raise ValueError("--plot cannot be combined with --compare")
        _compare(*compare, output_format=output_format, output_file=output_file)
        return
    report = _measure(_config(options))
    if report is None:
        print("interrupted before the first measurement", file=sys.stderr)
        sys.exit(INTERRUPTED)
    from mlx_mtp.bench.tables import render

    _write(
        lambda extension: render(report, extension),
        output_format=output_format,
        output_file=output_file,
    )
    if plot:
        from mlx_mtp.bench.benchmark_figures import draw_report

        draw_report(report, plot.expanduser())
    if report["outputs"]["different"]:
        print("answers differ from plain decoding; see mlx-mtp verify", file=sys.stderr)
    if report["status"] != "complete":
        sys.exit(INTERRUPTED)


def _check_outputs(output_file: Path | None, plot: Path | None) -> None:
    """Refuse files that could not be written, before the measurement."""
    if output_file is not None and output_file.suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"--output-file {output_file} must end in .md, .csv, .json or .jsonl")
    if plot is not None:
        if plot.suffix not in PLOTS:
            raise ValueError(f"--plot {plot} must end in .png or .svg")
        from mlx_mtp.storage.figures import figure_class

        figure_class()
    for path in (output_file, plot):
        folder = path and path.expanduser().absolute().parent
        if folder and folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")


def _config(options: dict[str, Any]) -> BenchmarkConfig:
    """Check the options and read the prompts.

    Raises:
        ValueError: a mode, a kind or a line of the prompts file is bad.
    """
    from mlx_mtp.bench.benchmark import BenchmarkConfig
    from mlx_mtp.evaluation.prompt_sets import prompts_of, spread

    modes = options["modes"]
    kinds = {name.partition(":")[0] for name in modes}
    if options["draft_model"] is not None and kinds.isdisjoint(("draft", "draft-model")):
        modes = (*modes, "draft")
    contexts = tuple(sorted(set(options["contexts"])))
    if not contexts:
        raise ValueError("--contexts is empty")
    prompts = prompts_of(options["prompts"], kinds=options["kinds"])
    return BenchmarkConfig(
        prompts=spread(prompts, options["num_prompts"]),
        source=options["prompts"],
        modes=modes,
        settings=Settings(
            repeats=options["repeats"],
            warmup=options["num_warmups"],
            cooldown_s=options["cooldown"],
        ),
        contexts=contexts,
        **{name: options[name] for name in OPTIONS},
    )


def _measure(config: BenchmarkConfig) -> dict[str, Any] | None:
    from mlx_mtp.bench.benchmark import prepare, run
    from mlx_mtp.calibration.stored_costs import SPECULATIONS

    with Status("Loading the model ...") as status:
        prepared = prepare(config, on_status=status.update)
    known = SPECULATIONS.get(prepared.model)
    if known is not None and known.costs.curve.source.startswith("measured"):
        show(f"Layout auto plans with costs {known.costs.curve.source}", file=sys.stderr)
    with Interrupt() as interrupt:
        return run(prepared, check=interrupt.check)


def _compare(one: Path, other: Path, *, output_format: str, output_file: Path | None) -> None:
    from mlx_mtp.bench.compare import compare, read_report, render, warnings

    reports = [read_report(path.expanduser()) for path in (one, other)]
    rows, notes = compare(*reports), warnings(*reports)
    for note in notes:
        show(f"warning: {note}", file=sys.stderr)
    _write(
        lambda extension: render(rows, notes, extension),
        output_format=output_format,
        output_file=output_file,
    )


def _write(render: Callable[[str], str], *, output_format: str, output_file: Path | None) -> None:
    """Print a report, and write it to a file in the format of its extension."""
    from mlx_mtp.storage.files import write_atomically

    try:
        if output_file is not None:
            extension = output_file.suffix.removeprefix(".")
            write_atomically(output_file.expanduser(), render(extension) + "\n")
    finally:  # a full disk must not lose the measurement
        show(render(output_format))
