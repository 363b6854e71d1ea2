"""The command ``mlx-mtp verify``.

A table on stdout (or JSON), progress on stderr where that is a terminal.  Exit codes: 0 all well,
1 a mismatch that no near-tie explains or biased sampling, 2 bad input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.terminal import Progress

if TYPE_CHECKING:
    from mlx_mtp.evaluation.prompts import Prompt
    from mlx_mtp.verify import RunResult, Tally, VerifyReport, VerifySettings

DEFAULT_PROMPTS = 12
MISMATCH = 1
_SHOWN = 10


def _words(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...]:
    del context, parameter
    return tuple(word.strip() for word in (value or "").split(",") if word.strip())


def _numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...]:
    words = _words(context, parameter, value)
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,2,4") from None


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", help="Adapter folder or hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer run its code.")
@click.option(
    "--prompts", "prompts_file", metavar="FILE.jsonl", help="Your own prompts, one object a line."
)
@click.option("--kinds", callback=_words, help="Kinds of prompts, such as chat,code; all of them.")
@click.option(
    "--num-prompts",
    type=click.IntRange(1),
    help=f"Prompts, taken evenly from the kinds; {DEFAULT_PROMPTS} built-in ones, or the file.",
)
@click.option("--max-tokens", "-m", type=int, help="Most tokens per prompt; 48.")
@click.option("--num-tokens", type=int, help="Tokens to compare in all, shared among the prompts.")
@click.option(
    "--layouts",
    callback=_words,
    default="linear,quadratic,auto",
    show_default=True,
    help="Layouts to run.",
)
@click.option("--depths", callback=_numbers, help="Drafts per step; 1, 2 and the adapter's own.")
@click.option("--against-stock/--no-against-stock", default=True, help="Compare with mlx-lm too.")
@click.option("--sampling/--no-sampling", default=True, help="Test sampled tokens too.")
@click.option(
    "--draws",
    type=int,
    default=100,
    show_default=True,
    help="Draws per setting, layout and depth.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the draws."
)
@click.option("--receipt", metavar="FILE", help="Write all details there, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt instead of the table.")
def verify(**options: Any) -> None:
    """Show that speculative output equals plain output."""
    from mlx_mtp.verify.receipt import check_writable, receipt_json, write_receipt

    settings = _settings(options)
    target = None if options["receipt"] is None else Path(options["receipt"]).expanduser()
    if target is not None:
        check_writable(target)
    prompts = choose_prompts(options["prompts_file"], options["kinds"], options["num_prompts"])
    report, receipt = _run(options, prompts, settings)
    click.echo(receipt_json(receipt) if options["as_json"] else "\n".join(table(report)))
    if target is not None:
        write_receipt(receipt, target)
    if not report.passed:
        sys.exit(MISMATCH)


def _settings(options: dict[str, Any]) -> VerifySettings:
    from mlx_mtp.verify import VerifySettings
    from mlx_mtp.verify.sampling import DEFAULT_SETTINGS

    return VerifySettings(
        layouts=options["layouts"],
        depths=options["depths"],
        max_tokens=options["max_tokens"],
        num_tokens=options["num_tokens"],
        against_stock=options["against_stock"],
        sampling=DEFAULT_SETTINGS if options["sampling"] else (),
        num_draws=options["draws"],
        seed=options["seed"],
    )


def _run(
    options: dict[str, Any], prompts: Sequence[Prompt], settings: VerifySettings
) -> tuple[VerifyReport, dict[str, Any]]:
    """Load the model, verify it, and make the receipt."""
    from mlx_mtp import verify
    from mlx_mtp.loading import load

    with Progress("Loading the model ...") as progress:
        model, tokenizer = load(
            options["model"],
            adapter_path=options["adapter_path"],
            trust_remote_code=options["trust_remote_code"],
            progress=progress.say,
        )
        clock = _Clock()
        report = verify.verify(
            model,
            tokenizer,
            prompts,
            settings=settings,
            progress=lambda phase, done, total: progress.say(clock.line(phase, done, total)),
        )
        progress.say("Hashing files ...")
        folder, adapter = _folders(options["model"], options["adapter_path"])
        receipt = verify.build_receipt(
            report,
            model,
            model_folder=folder,
            adapter_folder=adapter,
            prompts_from=options["prompts_file"] or "built-in",
        )
    return report, receipt


def choose_prompts(path: str | None, kinds: Collection[str], number: int | None) -> list[Prompt]:
    """Read the prompts, keep the wanted kinds, and take a number of them evenly.

    Raises:
        ValueError: no such file or kind, or fewer prompts than wanted.
    """
    from mlx_mtp.evaluation.prompts import builtin_prompts, read_prompts

    if path is None:
        prompts = builtin_prompts(kinds or None)
        number = number or min(DEFAULT_PROMPTS, len(prompts))
    else:
        prompts = read_prompts(path)
        known = {prompt.kind for prompt in prompts}
        if unknown := sorted(set(kinds) - known):
            raise ValueError(
                f"{path} has no prompts of kind {', '.join(unknown)}, "
                f"only of {', '.join(sorted(known))}"
            )
        prompts = [prompt for prompt in prompts if not kinds or prompt.kind in kinds]
    if number is None:
        return prompts
    if number > len(prompts):
        raise ValueError(f"--num-prompts is {number}, but there are {len(prompts)} prompts")
    return _spread(prompts, number)


def _spread(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """Take prompts from every kind in turn; they keep their order."""
    places: dict[str, int] = {}
    rounds = []
    for index, prompt in enumerate(prompts):
        places[prompt.kind] = places.get(prompt.kind, -1) + 1
        rounds.append((places[prompt.kind], index))
    return [prompts[index] for index in sorted(index for _, index in sorted(rounds)[:number])]


def _folders(model: str | None, adapter_path: str | None) -> tuple[Path, Path]:
    """The folders that ``load`` has read."""
    from mlx_mtp.loading import locate

    folder, adapter = locate(model, adapter_path)
    assert adapter is not None  # verify has refused a model without one
    return folder, adapter


class _Clock:
    """Tells how far a phase is and how long it will still take."""

    def __init__(self) -> None:
        self._phase = ""
        self._started = 0.0

    def line(self, phase: str, done: int, total: int) -> str:
        """One line of progress."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._started = phase, now
        what = "runs" if phase == "greedy" else "draws"
        left = (now - self._started) / done * (total - done) if done else 0.0
        text = f"Verifying ({phase}): {done}/{total} {what}"
        return text + (f", {_duration(left)} left" if done > 1 else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(report: VerifyReport) -> list[str]:
    """The report as lines of text."""
    references = [name for name in ("plain", "stock") if name in report.runs[-1].against]
    head = ["layout", "drafts", "tokens/step", "accepted", *(f"vs {name}" for name in references)]
    rows = [head, *(_row(run, references) for run in report.runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    wanted = report.settings.num_tokens
    short = wanted is not None and report.num_tokens < wanted
    lines = [
        f"Greedy: {report.num_tokens} tokens over {len(report.prompts)} prompts, {report.dtype}"
        + (f" (fewer than the {wanted} wanted: the answers ended)" if short else ""),
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
        *_divergence_lines(report),
        *_sampling_lines(report),
    ]
    if report.passed:
        ties = report.num_near_ties
        return [*lines, f"Verdict: identical{f' but for {ties} near-ties' if ties else ''}."]
    failed = f"{report.num_mismatches} mismatches, {report.num_failed_tests} failed sampling tests"
    return [*lines, f"Verdict: NOT identical: {failed}."]


def _row(run: RunResult, references: Sequence[str]) -> list[str]:
    accepted = f"{run.num_accepted}/{run.num_drafts}" if run.num_drafts else "-"
    cells = [run.layout, str(run.num_draft_tokens or "-"), f"{run.tokens_per_step:.2f}", accepted]
    return [*cells, *(_outcome(run.against.get(name)) for name in references)]


def _outcome(tally: Tally | None) -> str:
    if tally is None:
        return "-"
    return (
        f"{tally.identical} identical, {tally.near_ties} near-ties, {tally.mismatches} mismatches"
    )


def _divergence_lines(report: VerifyReport) -> list[str]:
    """The divergences, mismatches first; what is left out is counted."""
    found = [
        (divergence.near_tie, f"{run.layout} {run.num_draft_tokens} vs {name}: {divergence}")
        for run in report.runs
        for name, tally in run.against.items()
        for divergence in tally.divergences
    ]
    lines = [line for _, line in sorted(found, key=lambda item: item[0])]
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"... and {more} more, see the receipt"] if more > 0 else [])


def _sampling_lines(report: VerifyReport) -> list[str]:
    """The tests of sampled tokens: a summary, then what failed."""
    tests = [test for test in report.sampling if test.adjusted_p_value is not None]
    if not tests:
        return ["Sampling: not checked" + (": too few draws" if report.sampling else "")]
    lowest = min((test.adjusted_p_value or 0.0 for test in tests), default=1.0)
    failed = [test for test in tests if not test.passed]
    left_out = len(report.sampling) - len(tests)
    return [
        f"Sampling: {len(tests)} chi-square tests of tokens 1 to 3 against the exact distribution, "
        f"{report.settings.num_draws} draws each, prompt {report.sampling_prompt}: "
        f"{len(failed)} failed, lowest Holm-adjusted p {lowest:.3g}"
        + (f" ({left_out} left out: too few or too certain draws)" if left_out else ""),
        *(
            f"FAILED: {test.sampling}; {test.layout} {test.num_draft_tokens}, token {test.token} "
            f"by {test.bins_by}: p {test.adjusted_p_value:.3g}"
            + (f", {test.num_impossible} impossible draws" if test.num_impossible else "")
            for test in failed
        ),
    ]
