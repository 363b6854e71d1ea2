"""What a user sees of a run, on stderr: a progress bar at a terminal, plain lines elsewhere.

At a terminal only evaluations and notices remain.  Elsewhere every report is a line, and the
generation of text logs its progress every half minute.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.terminal import progress, visible
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.run.checkpoint import EMA
from mlx_mtp.train.run.events import (
    Evaluated,
    Event,
    Noticed,
    Planned,
    Reported,
    Saved,
    Stepped,
)

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL_S = 30.0
_SMOOTHING = 0.9  # weight of earlier steps in the mean from which the remaining time is estimated


class Display:
    """Shows a run; use it as a context.

    Args:
        stream: output, by default stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._task = ""
        self._data_began: float | None = None
        self._first_records = 0
        self._last_log = time.monotonic()
        self._report: Reported | None = None
        self._step_s: float | None = None
        self._iters = 0
        self._done_at = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.clear()

    def status(self, text: str) -> None:
        """Show a line until the next one; at a terminal only."""
        self._show("status", bar_format="{desc}").set_description_str(visible(text))

    def clear(self) -> None:
        """Remove the bar or the status line."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._task = None, ""

    def log(self, text: str) -> None:
        """Print a line that remains."""
        if self._is_terminal:
            from tqdm import tqdm

            tqdm.write(visible(text), file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def data(self, state: DistilProgress) -> None:
        """Show the progress of text generation."""
        now = time.monotonic()
        if self._data_began is None:
            self._first_records, self._data_began = state.num_records, now
        line = data_line(
            state, seconds=now - self._data_began, new=state.num_records - self._first_records
        )
        bar = self._show(
            "writing text",
            total=state.total,
            initial=state.num_records,
            unit=" records",
            miniters=0,
        )
        counts = f"{state.num_tokens} tokens, {state.dropped.total()} dropped"
        bar.set_postfix_str(counts, refresh=False)
        bar.update(state.num_records - bar.n)
        is_done = state.num_records >= state.total
        if not self._is_terminal and (now - self._last_log >= LOG_INTERVAL_S or is_done):
            self._last_log = now
            self.log(line)

    def event(self, event: Event) -> None:
        """Show an event of the training loop."""
        match event:
            case Stepped():
                self._stepped(event)
            case Reported():
                self._report = event
                if not self._is_terminal and self._iters:
                    left_s = (self._iters - event.step) * (self._step_s or 0.0)
                    self.log(step_line(event.step, self._iters, report=event, left_s=left_s))
            case Evaluated():
                self.log(evaluation_line(event))
            case Noticed():
                self.log(event.text)
            case Planned():
                self._planned(event)
            case Saved():
                pass

    def _planned(self, event: Planned) -> None:
        """Show the end of a run that has a time; elsewhere than at a terminal, if it moved."""
        self._done_at = clock_time(event.left_s)
        line = f"step {event.step}: planned {event.iters} steps, done at about {self._done_at}"
        if not self._is_terminal and event.iters != self._iters:
            self.log(line)
        self._iters = event.iters

    def _stepped(self, event: Stepped) -> None:
        mean = event.seconds if self._step_s is None else self._step_s
        self._step_s = _SMOOTHING * mean + (1 - _SMOOTHING) * event.seconds
        self._iters = event.iters
        bar = self._show("training", total=event.iters, initial=event.step - 1, unit=" steps")
        bar.total = event.iters
        texts = [report_text(self._report)] if self._report is not None else []
        texts += [f"done at {self._done_at}"] if self._done_at else []
        bar.set_postfix_str("  ".join(texts), refresh=False)
        bar.update(event.step - bar.n)

    def _show(self, task: str, **options: Any) -> tqdm[Any]:
        """Return the bar of a task, which replaces the one of another task."""
        if self._bar is None or self._task != task:
            self.clear()
            self._task = task
            self._bar = progress(desc=task, file=self._stream, delay=0.0, **options)
        return self._bar


def data_line(progress: DistilProgress, *, seconds: float, new: int) -> str:
    """Return the progress of text generation.

    Args:
        progress: from ``distil``.
        seconds: since the first record of this process.
        new: records since then.
    """
    text = f"writing text: {progress.num_records}/{progress.total} records"
    if seconds > 0:
        text += f"  {progress.num_tokens / seconds:.0f} tok/s"
    if new and progress.num_records < progress.total:
        text += f"  ETA {duration((progress.total - progress.num_records) * seconds / new)}"
    dropped = progress.dropped.total()
    return text + (f"  ({dropped} dropped)" if dropped else "")


def step_line(step: int, iters: int, *, report: Reported | None, left_s: float) -> str:
    """Return the progress of training, with the figures of the last report."""
    text = f"step {step}/{iters}" + (f"  {report_text(report)}" if report is not None else "")
    return text + (f"  ETA {duration(left_s)}" if step < iters else "")


def report_text(report: Reported) -> str:
    """Return the figures of a report."""
    terms = " ".join(f"{name} {value:.2f}" for name, value in report.terms.items())
    text = f"loss {report.loss:.3f}" + (f" ({terms})" if terms else "")
    return f"{text}  {report.tokens_per_s:.0f} tok/s"


def evaluation_line(event: Evaluated) -> str:
    """Return the result of an evaluation."""
    best = "  (best)" if event.is_best else ""
    return (
        f"step {event.step}: {event.evaluation.tokens_per_step:.3f} tokens per step"
        f"{_weights_text(event)}, {acceptance_text(event.evaluation)}{best}"
    )


def _weights_text(event: Evaluated) -> str:
    """Which weights were better, and the result of the others: `` (EMA; raw 2.481)``."""
    others = [name for name in event.results if name != event.weights]
    if not others:
        return ""
    texts = (f"{short_name(name)} {event.results[name].tokens_per_step:.3f}" for name in others)
    return f" ({short_name(event.weights)}; {', '.join(texts)})"


def short_name(weights: str) -> str:
    """Name of ``raw`` or ``ema`` weights in a line."""
    return weights.upper() if weights == EMA else weights


def acceptance_text(evaluation: Evaluation) -> str:
    """Return the acceptance of each position of a draft."""
    return "drafts accepted " + " ".join(f"{share:.0%}" for share in evaluation.acceptance)


def duration(seconds: float) -> str:
    """Return a time in a suitable unit: 40 s, 14 min, 2 h 05 min."""
    if seconds < 59.5:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock_time(seconds: float) -> str:
    """Return the time of day in so many seconds, with the day if it is not within 12 hours."""
    shape = "%H:%M" if seconds < 12 * 3600 else "%a %H:%M"
    return time.strftime(shape, time.localtime(time.time() + seconds))
