"""The command ``mlx-mtp verify``.

A table on stdout (or JSON), progress on stderr if that is a terminal.  Exit codes: 0 passed,
1 a mismatch that is not a near-tie, or biased sampling, 2 bad input.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from click.core import ParameterSource

from mlx_mtp.cli.options import (
    AS_JSON,
    KINDS_OPTION,
    PROMPTS,
    ListOf,
    all_prompts,
    field_option,
    model_options,
    num_prompts,
    option,
)
from mlx_mtp.evaluation.prompt_sets import BUILTIN
from mlx_mtp.terminal import Status, progress, show
from mlx_mtp.verify.settings import QUICK_PROMPTS, VerifySettings

if TYPE_CHECKING:
    from tqdm import tqdm

    from mlx_mtp.evaluation.prompts import Prompt
    from mlx_mtp.verify.report import RunResult, Tally, VerifyReport
    from mlx_mtp.verify.rows import RowTally

DEFAULT_PROMPTS = 12
MISMATCH = 1
_SHOWN = 10


@cloup.command()
@model_options()
@cloup.option_group(
    "Prompts",
    PROMPTS,
    KINDS_OPTION,
    num_prompts(f"{DEFAULT_PROMPTS} built-in prompts, or all of another set; 2 with --quick"),
    field_option(VerifySettings, "max_tokens", "-m"),
    field_option(VerifySettings, "num_tokens"),
)
@cloup.option_group(
    "Comparisons",
    option(
        "--quick",
        is_flag=True,
        help="Verify a few tokens of two prompts, within a minute; other options still apply.",
    ),
    field_option(VerifySettings, "layouts", type=ListOf(str), metavar="LAYOUT,..."),
    field_option(
        VerifySettings,
        "depths",
        type=ListOf(int),
        metavar="INTEGER,...",
        former_names=("--depths",),
        show_default="1, 2 and the adapter's maximum",
    ),
    field_option(VerifySettings, "against_stock"),
    option(
        "--against-pytorch",
        is_flag=True,
        help="Only compare the base model's logits with those of transformers (needs the extra "
        "'convert').",
    ),
    option("--sampling/--no-sampling", default=True, help="Also test sampled tokens."),
    field_option(VerifySettings, "num_draws", former_names=("--draws",)),
    field_option(VerifySettings, "seed"),
)
@cloup.option_group(
    "Output",
    option(
        "--output-file",
        former_names=("--receipt",),
        metavar="FILE",
        help="Write a receipt with all details to this file, as JSON.",
    ),
    AS_JSON,
)
def verify(**options: Any) -> None:
    """Verify that the output equals that of plain decoding."""
    from mlx_mtp.verify.receipt import check_writable, receipt_json, write_receipt

    target = None if options["output_file"] is None else Path(options["output_file"]).expanduser()
    if target is not None:
        check_writable(target)
    if options["against_pytorch"]:
        _verify_logits(options, target)
        return
    settings = _settings(options)
    prompts = choose_prompts(
        options["prompts"], options["kinds"], options["num_prompts"], quick=options["quick"]
    )
    report, receipt = _run(options, prompts, settings)
    show(receipt_json(receipt) if options["as_json"] else "\n".join(table(report)))
    if target is not None:
        write_receipt(receipt, target)
    if not report.passed:
        sys.exit(MISMATCH)


def _verify_logits(options: dict[str, Any], target: Path | None) -> None:
    """Compare the base model with transformers; print and write the outcome."""
    from mlx_mtp.converters.reference.folder import compare_with_pytorch
    from mlx_mtp.loading import locate
    from mlx_mtp.verify.receipt import receipt_json, write_receipt

    if importlib.util.find_spec("torch") is None:
        raise ValueError('--against-pytorch needs torch: pip install "mlx-mtp[convert]"')
    report = compare_with_pytorch(locate(options["model"], None)[0])
    values = {"passed": report.passed, "against_pytorch": report.to_dict()}
    show(receipt_json(values) if options["as_json"] else "\n".join(report.lines()))
    if target is not None:
        write_receipt(values, target)
    if not report.passed:
        sys.exit(MISMATCH)


def _settings(options: dict[str, Any]) -> VerifySettings:
    """The settings; with ``--quick`` only what the user set replaces those of the quick check."""
    names = ("layouts", "max_tokens", "num_tokens", "against_stock", "num_draws", "seed")
    values = {name: options[name] for name in names} | {"depths": options["num_draft_tokens"]}
    if not options["sampling"]:
        values["sampling"] = ()
    if not options["quick"]:
        return VerifySettings(**values)
    source = click.get_current_context().get_parameter_source
    given = {name for name in options if source(name) != ParameterSource.DEFAULT}
    given |= {"depths"} if "num_draft_tokens" in given else set()
    return VerifySettings.quick(**{name: values[name] for name in values if name in given})


def _run(
    options: dict[str, Any], prompts: Sequence[Prompt], settings: VerifySettings
) -> tuple[VerifyReport, dict[str, Any]]:
    """Load the model, verify it, and make the receipt."""
    from mlx_mtp.loading import load
    from mlx_mtp.verify.receipt import build_receipt
    from mlx_mtp.verify.run import verify as run_verify

    with Status("Loading the model ...") as status:
        model, tokenizer = load(
            options["model"],
            adapter_path=options["adapter_path"],
            trust_remote_code=options["trust_remote_code"],
            progress=status.update,
        )
    with _Bar() as bar:
        report = run_verify(model, tokenizer, prompts, settings=settings, progress=bar.update)
    with Status("Hashing files ..."):
        folder, adapter = _folders(options["model"], options["adapter_path"])
        receipt = build_receipt(
            report,
            model,
            model_folder=folder,
            adapter_folder=adapter,
            prompts_from="built-in" if options["prompts"] == BUILTIN else options["prompts"],
        )
    return report, receipt


def choose_prompts(
    source: str, kinds: Collection[str], number: int | None, *, quick: bool = False
) -> list[Prompt]:
    """Read prompts and choose a number of them, spread over the kinds.

    Args:
        source: value of ``--prompts``.
        kinds: kinds to choose from; empty means all.
        number: of prompts; None means ``DEFAULT_PROMPTS`` built-in ones, or all of another set.
        quick: whether None means two instead.

    Raises:
        ValueError: the file or a kind does not exist, or there are fewer prompts.
    """
    prompts = all_prompts(source, tuple(kinds))
    if number is None and quick:
        number = min(QUICK_PROMPTS, len(prompts))
    elif number is None:
        number = min(DEFAULT_PROMPTS, len(prompts)) if source == BUILTIN else len(prompts)
    if number > len(prompts):
        raise ValueError(f"--num-prompts is {number}, but there are {len(prompts)} prompts")
    return _spread(prompts, number)


def _spread(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """Choose prompts from each kind in turn; their order is kept."""
    places: dict[str, int] = {}
    rounds = []
    for index, prompt in enumerate(prompts):
        places[prompt.kind] = places.get(prompt.kind, -1) + 1
        rounds.append((places[prompt.kind], index))
    return [prompts[index] for index in sorted(index for _, index in sorted(rounds)[:number])]


def _folders(model: str | None, adapter_path: str | None) -> tuple[Path, Path | None]:
    """The folders that ``load`` reads."""
    from mlx_mtp.loading import locate

    return locate(model, adapter_path)


class _Bar:
    """A progress bar with the time left, made when the first progress is reported."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, phase: str, done: int, total: int) -> None:
        """Show how much of the work is done."""
        if self._bar is None:
            self._bar = progress(total=total, unit="token", smoothing=0.1)
        self._bar.set_description(f"Verifying ({phase})", refresh=False)
        self._bar.update(done - self._bar.n)


def table(report: VerifyReport) -> list[str]:
    """The report as lines of text."""
    references = [name for name in ("plain", "stock") if name in report.runs[-1].against]
    head = ["layout", "drafts", "tokens/step", "accepted", *(f"vs {name}" for name in references)]
    rows = [head, *(_row(run, references) for run in report.runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    requested = report.settings.num_tokens
    short = requested is not None and report.num_tokens < requested
    lines = [
        *(["Quick check: a few tokens of a few prompts."] if report.settings.is_quick else []),
        f"Greedy: {report.num_tokens} tokens over {len(report.prompts)} prompts, {report.dtype}"
        + (f" (fewer than the requested {requested}: the answers ended)" if short else ""),
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
        *_divergence_lines(report),
        *_rows_lines(report),
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
    """The divergences, mismatches first; omitted ones are counted."""
    divergences = [
        (divergence.near_tie, f"{run.layout} {run.num_draft_tokens} vs {name}: {divergence}")
        for run in report.runs
        for name, tally in run.against.items()
        for divergence in tally.divergences
    ]
    lines = [line for _, line in sorted(divergences, key=lambda item: item[0])]
    more = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"... and {more} more in the receipt"] if more > 0 else [])


def _rows_lines(report: VerifyReport) -> list[str]:
    """Whether rows of several have the bits of rows alone, and how near the ties were."""
    lines = []
    if report.steps.verdict is not None:
        what = "have the same bits as rows computed alone"
        lines = [f"Steps: {_rows_text(report.steps, what)}."]
    rows, tie = report.rows_against("plain"), report.nearest_tie
    if rows.verdict is None or tie is None:
        return lines
    diverges = any(run.against["plain"].divergences for run in report.runs[1:])
    effect = "tokens differ, see above" if diverges else "no token differs"
    text = _rows_text(rows, "have the same bits as plain decoding")
    lines.append(f"Answers: {text}; {effect}.")
    change = max(rows.largest_change, report.steps.largest_change)
    lines.append(
        f"Nearest tie: {tie.prompt_id}, token {tie.position + 1}: the best two logits are "
        f"{tie.margin:.3g} apart"
        + (f", {tie.relative_margin / change:.3g} times the largest change" if change else "")
        + "."
    )
    return lines


def _rows_text(rows: RowTally, same: str) -> str:
    if rows.verdict == "exact":
        return f"exact: all {rows.compared} rows {same}"
    text = f"{rows.verdict}: {rows.differing} of {rows.compared} rows differ in their last bits"
    if rows.beyond_rounding:
        text = (
            f"{rows.verdict}: {rows.differing} of {rows.compared} rows differ, "
            f"{rows.beyond_rounding} of them by more than rounding explains"
        )
    return f"{text}, by up to {rows.largest_change:.2g} of the largest logit"


def _sampling_lines(report: VerifyReport) -> list[str]:
    """The tests of sampled tokens: a summary, then the failed ones."""
    tests = [test for test in report.sampling if test.adjusted_p_value is not None]
    if not tests:
        return ["Sampling: not checked" + (": too few draws" if report.sampling else "")]
    lowest = min((test.adjusted_p_value or 0.0 for test in tests), default=1.0)
    failed = [test for test in tests if not test.passed]
    num_skipped = len(report.sampling) - len(tests)
    return [
        f"Sampling: {len(tests)} chi-square tests of tokens 1 to 3 against the exact distribution, "
        f"{report.settings.num_draws} draws each, prompt {report.sampling_prompt}: "
        f"{len(failed)} failed, lowest Holm-adjusted p {lowest:.3g}"
        + (f" ({num_skipped} skipped: too few or too certain draws)" if num_skipped else ""),
        *(
            f"FAILED: {test.sampling}; {test.layout} {test.num_draft_tokens}, token {test.token} "
            f"by {test.bins_by}: p {test.adjusted_p_value:.3g}"
            + (f", {test.num_impossible} impossible draws" if test.num_impossible else "")
            for test in failed
        ),
    ]
