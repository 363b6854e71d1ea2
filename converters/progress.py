"""A progress bar for work that is counted in bytes."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from mlx_mtp.terminal import SLOW_S

_REDRAW_S = 0.1
_ERASE_LINE = "\r\x1b[K"


class ByteProgress:
    """One line on stderr: what is done, a bar, bytes, rate, time left; gone when the work ends.

    It appears once the work has taken over two seconds, and never where stderr is no terminal.
    """

    def __init__(
        self,
        total_bytes: int = 0,
        *,
        text: str = "Converting",
        stream: TextIO | None = None,
        delay_s: float = SLOW_S,
    ) -> None:
        self._total = total_bytes
        self._done = 0
        self._text = text
        self._stream = stream or sys.stderr
        self._delay_s = delay_s
        self._start = time.monotonic()
        self._drawn: float | None = None

    def __enter__(self) -> ByteProgress:
        self._start = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def expect(self, num_bytes: int) -> None:
        """Add work that turned up."""
        self._total += num_bytes

    def say(self, text: str) -> None:
        """Change what the line says is being done."""
        self._text = text
        self._draw()

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done."""
        self._done += num_bytes
        self._draw()

    def stop(self) -> None:
        """Take the line away; may be called twice."""
        if self._drawn is not None:
            self._write("")
            self._drawn = None

    def _draw(self) -> None:
        """Show the line if it is time for that."""
        now = time.monotonic()
        waited = now - self._start >= self._delay_s
        fresh = self._drawn is not None and now - self._drawn < _REDRAW_S
        if waited and not fresh and self._stream.isatty():
            self._drawn = now
            self._write(self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        """The line as wide as the terminal allows."""
        done, total = self._done, max(self._total, self._done)
        rate = done / max(seconds, 1e-9)
        numbers = f"{_size(done)}/{_size(total)} {_size(rate)}/s"
        if done:
            numbers += f" ETA {_clock((total - done) / rate)}"
        width = shutil.get_terminal_size().columns - 1
        room = min(30, width - len(self._text) - len(numbers) - 4)
        share = done / total if total else 0.0
        bar = f"[{'#' * int(share * room):-<{room}}] " if room >= 5 else ""
        return f"{self._text} {bar}{numbers}"[:width]

    def _write(self, text: str) -> None:
        self._stream.write(_ERASE_LINE + text)
        self._stream.flush()


def _size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
