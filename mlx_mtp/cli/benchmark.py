"""The command ``mlx-mtp benchmark``.

The report goes to stdout.  Exit codes: 0 measured, 2 bad input, 130 interrupted; then the report is
of what was measured until then and says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.terminal import INTERRUPTED, Interrupt, Progress

if TYPE_CHECKING:
    from mlx_mtp.bench.benchmark import Wanted

FORMATS = ("md", "csv", "json", "jsonl")
PICTURES = (".png", ".svg")
_FILE = click.Path(path_type=Path, dir_okay=False)


def _words(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    del context, parameter
    return tuple(each for each in value.split(",") if each)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    del context, parameter
    try:
        numbers = tuple(sorted({int(each) for each in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,2048") from None
    if numbers[0] < 0:
        raise click.BadParameter(f"{numbers[0]} tokens of text are too few")
    return numbers


def _model_options() -> list[Callable[..., Any]]:
    return [
        click.option("--model", help="Model folder or hub id; the embedded model by default."),
        click.option("--adapter-path", help="Adapter folder or hub id."),
        click.option("--draft-model", help="Draft model for mlx-lm; adds the mode draft."),
        click.option("--trust-remote-code", is_flag=True, help="Let tokenizers run their code."),
        click.option(
            "--modes", callback=_words, default="plain,auto", show_default=True,
            help="Ways to decode; the first is the base of the speed-ups: plain, auto, linear, "
            "quadratic (linear:2 has 2 drafts a step), stock (mlx_lm on the same folder; "
            "plain,auto,stock adds it), draft.",
        ),
        click.option(
            "--num-draft-tokens", type=click.IntRange(1), help="Drafts per step; the adapter's."
        ),
        click.option(
            "--lookup/--no-lookup", default=True,
            help="Whether auto may take drafts from the text so far.",
        ),
    ]  # fmt: skip


def _text_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--prompts", default="builtin", show_default=True,
            help="builtin, human-eval, or a JSONL file.",
        ),
        click.option(
            "--kinds", callback=_words, default="",
            help="Kinds of prompts, by comma.  [default: all]",
        ),
        click.option(
            "--limit", type=click.IntRange(1),
            help="Most prompts, taken evenly from the kinds.  [default: all]",
        ),
        click.option(
            "--contexts", callback=_numbers, default="0", show_default=True,
            help="Tokens of text before the prompts, such as 0,2048,8192.",
        ),
        click.option(
            "--max-tokens", "-m", type=click.IntRange(2), default=96, show_default=True,
            help="Most tokens of an answer.",
        ),
    ]  # fmt: skip


def _schedule_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--repeats", type=click.IntRange(1), default=1, show_default=True,
            help="Passes over all prompts.",
        ),
        click.option(
            "--warmup", type=click.IntRange(0), default=1, show_default=True,
            help="Answers of each mode that do not count.",
        ),
        click.option(
            "--cooldown", type=click.FloatRange(0, 3600), default=0.0, show_default=True,
            help="Seconds of rest before each answer.",
        ),
        click.option(
            "--seed", type=click.IntRange(0), default=0, show_default=True,
            help="Of the resampling behind the intervals.",
        ),
    ]  # fmt: skip


def _output_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--output", "-o", type=click.Choice(FORMATS), default="md", show_default=True,
            help="What stdout gets.",
        ),
        click.option(
            "--output-file", type=_FILE,
            help="Write the report there too; the ending says how: .md, .csv, .json or .jsonl.",
        ),
        click.option("--picture", type=_FILE, help="Draw it, as FILE.png and FILE.svg."),
        click.option(
            "--compare", nargs=2, type=_FILE, metavar="A.json B.json",
            help="Compare two reports; nothing is measured.",
        ),
    ]  # fmt: skip


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    families = (_model_options(), _text_options(), _schedule_options(), _output_options())
    for option in reversed([each for family in families for each in family]):
        command = option(command)
    return command


@click.command()
@_options
def benchmark(
    output: str,
    output_file: Path | None,
    picture: Path | None,
    compare: tuple[Path, Path] | None,
    **options: Any,
) -> None:
    """Measure decoding on real text, as interleaved pairs.

    Every prompt is answered in each mode before the next one begins; what counts are ratios to the
    first mode. docs/benchmark.md tells what the figures mean.
    """
    _check_outputs(output_file, picture)
    if compare:
        if picture:
            raise ValueError("--picture is of one report, not of a comparison")
        _compare(*compare, output=output, output_file=output_file)
        return
    report = _measure(_wanted(options))
    if report is None:
        print("interrupted before anything was measured", file=sys.stderr)
        sys.exit(INTERRUPTED)
    from mlx_mtp.bench.tables import render

    _write(lambda shape: render(report, shape), output=output, output_file=output_file)
    if picture:
        from mlx_mtp.bench.benchmark_figures import draw_report

        draw_report(report, picture.expanduser())
    if report["outputs"]["different"]:
        print("answers differ from plain decoding: see mlx-mtp verify", file=sys.stderr)
    if report["status"] != "complete":
        sys.exit(INTERRUPTED)


def _check_outputs(output_file: Path | None, picture: Path | None) -> None:
    """Refuse before the measurement what could not be written after it."""
    if output_file is not None and output_file.suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"--output-file {output_file} must end in .md, .csv, .json or .jsonl")
    if picture is not None:
        if picture.suffix not in PICTURES:
            raise ValueError(f"--picture {picture} must end in .png or .svg")
        from mlx_mtp.bench.figures import figure_class

        figure_class()
    for path in (output_file, picture):
        folder = path and path.expanduser().absolute().parent
        if folder and folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")


def _wanted(options: dict[str, Any]) -> Wanted:
    """Check the options and read the prompts.

    Raises:
        ValueError: a mode, a kind or a line of the prompts file is bad.
    """
    from mlx_mtp.bench.benchmark import Wanted
    from mlx_mtp.bench.measure import Settings
    from mlx_mtp.evaluation.prompt_sets import prompts_of, spread

    modes = options["modes"]
    if options["draft_model"] is not None and "draft" not in modes:
        modes = (*modes, "draft")
    prompts = prompts_of(options["prompts"], kinds=options["kinds"])
    return Wanted(
        prompts=spread(prompts, options["limit"]),
        source=options["prompts"],
        modes=modes,
        settings=Settings(
            repeats=options["repeats"], warmup=options["warmup"], cooldown_s=options["cooldown"]
        ),
        **{
            name: options[name]
            for name in (
                "contexts", "max_tokens", "model", "adapter_path", "draft_model",
                "trust_remote_code", "num_draft_tokens", "lookup", "seed",
            )
        },
    )  # fmt: skip


def _measure(wanted: Wanted) -> dict[str, Any] | None:
    from mlx_mtp.bench.benchmark import prepare, run

    with Progress("Loading the model ...") as progress:
        prepared = prepare(wanted, say=progress.say)
        known = prepared.model.speculation
        if known is not None and not known.costs.curve.is_guess:
            progress.stop()
            print(f"Layout auto plans with costs {known.costs.curve.source}", file=sys.stderr)
        with Interrupt() as interrupt:
            return run(prepared, check=interrupt.check, say=progress.say)


def _compare(one: Path, other: Path, *, output: str, output_file: Path | None) -> None:
    from mlx_mtp.bench import compare as room

    reports = [room.read_report(path.expanduser()) for path in (one, other)]
    rows, told = room.compare(*reports), room.warnings(*reports)
    for line in told:
        print(f"warning: {line}", file=sys.stderr)
    _write(lambda shape: room.render(rows, told, shape), output=output, output_file=output_file)


def _write(render: Callable[[str], str], *, output: str, output_file: Path | None) -> None:
    """Print a result in one shape, and write it to a file in the shape that its ending says."""
    from mlx_mtp.storage.files import write_atomically

    try:
        if output_file is not None:
            shape = output_file.suffix.removeprefix(".")
            write_atomically(output_file.expanduser(), render(shape) + "\n")
    finally:  # a full disk must not cost an hour's figures
        click.echo(render(output))
