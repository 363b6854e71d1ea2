"""What a user sees of a run: one changing line at a terminal, plain lines elsewhere; all on stderr.

At a terminal the line changes with every step, and only evaluations stay.  Elsewhere every report
is a line, and the writing of text says every half minute how far it is.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.terminal import Progress
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.run.events import Evaluated, Event, Noticed, Reported, Saved, Stepped

BAR_WIDTH = 16
PLAIN_LINES_S = 30.0
START_DELAY_S = 0.0
_ERASE_LINE = "\r\x1b[K"
_MEMORY = 0.9  # of what earlier steps took, in the mean that the ETA comes from


class Display:
    """Shows a run; to be entered as a context.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._progress = Progress("", stream=self._stream, delay_s=START_DELAY_S)
        self._line = ""
        self._began = time.monotonic()
        self._first_records: int | None = None
        self._last_plain = time.monotonic()
        self._report: Reported | None = None
        self._step_s: float | None = None
        self._iters = 0

    def __enter__(self) -> Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Change the line; nothing where stderr is no terminal."""
        self._line = text
        self._progress.say(text)

    def tell(self, text: str) -> None:
        """Write a line that stays."""
        if not self._is_terminal:
            print(text, file=self._stream, flush=True)
            return
        self._stream.write(f"{_ERASE_LINE}{text}\n")
        self.say(self._line)

    def data(self, progress: DistilProgress) -> None:
        """Show how far the writing of text is."""
        now = time.monotonic()
        if self._first_records is None:
            self._first_records, self._began = progress.num_records, now
        text = data_line(
            progress, seconds=now - self._began, new=progress.num_records - self._first_records
        )
        self.say(text)
        done = progress.num_records >= progress.total
        if not self._is_terminal and (now - self._last_plain >= PLAIN_LINES_S or done):
            self._last_plain = now
            self.tell(text)

    def event(self, event: Event) -> None:
        """Show what the loop tells."""
        match event:
            case Stepped():
                self._stepped(event)
            case Reported():
                self._report = event
                if not self._is_terminal and self._iters:
                    self.tell(self._step_line(event.step))
            case Evaluated():
                self.tell(evaluation_line(event))
            case Noticed():
                self.tell(event.text)
            case Saved():
                pass

    def _stepped(self, event: Stepped) -> None:
        known = event.seconds if self._step_s is None else self._step_s
        self._step_s = _MEMORY * known + (1 - _MEMORY) * event.seconds
        self._iters = event.iters
        self.say(f"{bar_text(event.step, event.iters)} {self._step_line(event.step)}")

    def _step_line(self, step: int) -> str:
        left = (self._iters - step) * (self._step_s or 0.0)
        return step_line(step, self._iters, report=self._report, left_s=left)


def data_line(progress: DistilProgress, *, seconds: float, new: int) -> str:
    """How far the writing of text is.

    Args:
        progress: from ``distil``.
        seconds: since this run's first record.
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
    """How far the training is, with the last report's figures."""
    text = f"step {step}/{iters}"
    if report is not None:
        terms = " ".join(f"{name} {value:.2f}" for name, value in report.terms.items())
        text += f"  loss {report.loss:.3f}" + (f" ({terms})" if terms else "")
        text += f"  {report.tokens_per_s:.0f} tok/s"
    return text + (f"  ETA {duration(left_s)}" if step < iters else "")


def evaluation_line(event: Evaluated) -> str:
    """What an evaluation found."""
    best = "  (best)" if event.is_best else ""
    return (
        f"step {event.step}: {event.evaluation.tokens_per_step:.3f} tokens per step, "
        f"{acceptance_text(event.evaluation)}{best}"
    )


def acceptance_text(evaluation: Evaluation) -> str:
    """How often each draft holds."""
    return "drafts accepted " + " ".join(f"{share:.0%}" for share in evaluation.acceptance)


def bar_text(done: int, total: int) -> str:
    """A bar of characters that every terminal has."""
    filled = BAR_WIDTH * min(done, total) // max(1, total)
    return "[" + "=" * filled + " " * (BAR_WIDTH - filled) + "]"


def duration(seconds: float) -> str:
    """A time in the unit that a reader wants: 40 s, 14 min, 2 h 05 min."""
    if seconds < 59.5:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
