"""What commands do at a terminal: exit codes, one-line errors, Ctrl-C, progress, answers.

Text from models and files may contain control characters that change a terminal's clipboard, title
or earlier lines.  Everything that is printed at a terminal goes through ``visible``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from tqdm import tqdm

INTERRUPTED = 130
CLOSED_PIPE = 141
SLOW_S = 2.0  # work that takes longer shows its progress
_ERASE_LINE = "\r\x1b[K"
# C0 but tabs and line ends, DEL, C1, and what reorders text (bidirectional embeddings, overrides,
# isolates).  Each character is replaced alone, so a sequence may be split over several pieces.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Replace control characters other than ``\n`` and ``\t`` by escapes such as ``\x1b``."""
    return _CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    # JSON escapes C0 itself and knows the second form, so a line of JSON remains valid.
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"


def show(text: str = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text on stdout or another stream: ``visible`` at a terminal, elsewhere unchanged."""
    stream: TextIO = sys.stdout if file is None else file
    print(visible(text) if stream.isatty() else text, end=end, file=stream, flush=True)


class BadInput(click.ClickException):
    """An error that the user can correct; printed as one line ``Error: ...``."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the text without control characters, which names of files may contain."""
        return visible(super().format_message())


def one_line(error: BaseException) -> str:
    """Return an error's whole text as one line, with the file that an OSError is about."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return visible(" ".join(text.split())) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return visible(lines[0]) if lines else type(error).__name__


class Interrupt:
    """Turns Ctrl-C into a request that the program checks where it can stop cleanly.

    The second Ctrl-C raises KeyboardInterrupt immediately.

    Attributes:
        requested: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.check()
        self.requested = True


def human_bytes(count: float) -> str:
    """Return a number of bytes with a unit, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    desc: str | None = None,
    unit: str = "it",
    delay: float = SLOW_S,
    **options: Any,
) -> tqdm[Any]:
    """Return a progress bar on stderr, which disappears when the work ends.

    Silent where stderr is not a terminal, and until the work has taken ``delay`` seconds.

    Args:
        iterable: to iterate over; without it call ``update(n)`` and ``close()``, or use a ``with``
            block.
        total: expected number of units; by default the length of ``iterable``.
        desc: text before the bar.
        unit: name of one unit; for bytes pass ``unit="B", unit_scale=True``.
        delay: seconds before the bar appears.
        options: more arguments of ``tqdm``.
    """
    from tqdm import tqdm  # 30 ms, which most commands do not need

    defaults: dict[str, Any] = {"leave": False, "disable": None, "dynamic_ncols": True}
    desc = desc and visible(desc)
    return tqdm(iterable, total=total, desc=desc, unit=unit, delay=delay, **defaults | options)


class Status:
    """One changing line of text on stderr for work without a countable total.

    It appears after ``delay_s`` seconds, even while the work blocks, and disappears when the work
    ends.  Silent where stderr is not a terminal.
    """

    def __init__(self, text: str, *, stream: TextIO | None = None, delay_s: float = SLOW_S) -> None:
        self._text = text
        self._stream = stream or sys.stderr
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._is_visible = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Status:
        if self._stream.isatty():
            self._timer = threading.Timer(self._delay_s, self._appear)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def update(self, text: str) -> None:
        """Change the text."""
        with self._lock:
            self._text = text
            if self._is_visible:
                self._write(text)

    def stop(self) -> None:
        """Remove the line; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            if self._is_visible:
                self._write("")
            self._timer, self._is_visible = None, False

    def _appear(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._is_visible = True
                self._write(self._text)

    def _write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_ERASE_LINE + visible(text)[:width])
        self._stream.flush()


class AnswerWriter:
    """Writes an answer to stdout and lines about it to stderr.

    Where both are one terminal or file, a line never runs into the answer: it begins on a line of
    its own, and the answer continues on the next.

    Args:
        status: progress that is removed before anything is written.
    """

    def __init__(self, status: Status) -> None:
        self._status = status
        self._is_shared = _is_same_file(sys.stdout, sys.stderr)
        self._is_mid_line = False

    def write(self, text: str, *, faint: bool = False) -> None:
        """Write text of the answer; ``faint`` where the terminal shows it."""
        self._status.stop()
        if faint and text:
            print(dim(text), end="", flush=True)
        else:
            show(text, end="")
        if text:
            self._is_mid_line = self._is_shared and not text.endswith("\n")

    def log(self, line: str) -> None:
        """Write a line to stderr."""
        self._status.stop()
        show(f"\n{line}" if self._is_mid_line else line, file=sys.stderr)
        self._is_mid_line = False


def _is_same_file(one: TextIO, other: TextIO) -> bool:
    """Whether two streams write to the same terminal or file."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError):  # a stream without a file
        return False


def dim(text: str) -> str:
    """Return text for stdout: at a terminal ``visible``, and faint where the terminal shows it."""
    if not sys.stdout.isatty():
        return text
    plain = os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ
    return visible(text) if plain else f"\x1b[2m{visible(text)}\x1b[0m"
