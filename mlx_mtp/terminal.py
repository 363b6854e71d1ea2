"""Manners at a terminal: one-line errors, Ctrl-C, closed pipes, progress on stderr.

Bad input ends in one line ``Error: ...`` on stderr and exit code 2, Ctrl-C in exit code 130, a
closed pipe in silence and exit code 141, as for programs that the signal kills.  Any other
exception is a bug and shows its traceback.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO

import click

INTERRUPTED = 130
CLOSED_PIPE = 141
SLOW_S = 2.0
_ERASE_LINE = "\r\x1b[K"


class BadInput(click.ClickException):
    """Something the user can mend; prints ``Error: ...`` in one line."""

    exit_code = 2


class PoliteGroup(click.Group):
    """A group of commands that all end the way the module says."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the arguments name."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows what it can
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else ctx.command_path
            hint = f"{error.format_message().rstrip('.')} (see {where} --help)"
            raise BadInput(" ".join(hint.split())) from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                print(file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            _drop_stdout()
            sys.exit(CLOSED_PIPE)
        except (ValueError, OSError) as error:
            raise BadInput(one_line(error)) from error


def one_line(error: Exception) -> str:
    """Say what went wrong in one line that names the culprit."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class Interrupt:
    """Turns Ctrl-C into a request that the program looks at where it can stop cleanly.

    The second Ctrl-C raises KeyboardInterrupt at once.

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


class Progress:
    """One changing line on stderr for work that takes over two seconds; gone when it ends.

    Silent where stderr is no terminal.
    """

    def __init__(self, text: str, *, stream: TextIO | None = None, delay_s: float = SLOW_S) -> None:
        self._text = text
        self._stream = stream or sys.stderr
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._shown = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            self._timer = threading.Timer(self._delay_s, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """Change the line."""
        with self._lock:
            self._text = text
            if self._shown:
                self._write(text)

    def stop(self) -> None:
        """Take the line away; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            if self._shown:
                self._write("")
            self._timer, self._shown = None, False

    def _show(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._shown = True
                self._write(self._text)

    def _write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_ERASE_LINE + text[:width])
        self._stream.flush()


def dim(text: str) -> str:
    """Wrap a line for stdout in the escape codes for faint text, where a terminal shows them."""
    plain = not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, so that Python's own last flush is quiet."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, io.UnsupportedOperation):
        sys.stdout = io.StringIO()
