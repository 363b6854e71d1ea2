"""Progress bars and status lines on stderr, and errors as one line."""

from __future__ import annotations

import io
import time

import pytest

from mlx_mtp.terminal import Status, first_line, one_line, progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_shows_slow_work_at_a_terminal_only() -> None:
    for stream in (Terminal(), io.StringIO()):
        for _ in progress(range(3), desc="Reading", delay=0.01, mininterval=0, file=stream):
            time.sleep(0.02)
        written = stream.getvalue()
        assert ("Reading" in written and "2/3" in written) is stream.isatty()
        assert written == "" or written.endswith("\r")


def test_a_bar_is_silent_about_quick_work() -> None:
    stream = Terminal()
    with progress(total=2, mininterval=0, file=stream) as bar:
        bar.update()
        bar.update()
    assert stream.getvalue() == ""


def test_a_status_line_shows_slow_work_at_a_terminal_only() -> None:
    for stream in (Terminal(), io.StringIO()):
        with Status("Loading ...", stream=stream, delay_s=0.01) as status:
            time.sleep(0.2)
            status.update("Still loading ...")
        written = stream.getvalue()
        assert ("Loading ..." in written and "Still loading ..." in written) is stream.isatty()
        assert written == "" or written.endswith("\r\x1b[K")


def test_a_status_line_is_silent_about_quick_work() -> None:
    stream = Terminal()
    with Status("Loading ...", stream=stream, delay_s=60):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (ValueError("\n one\ntwo  three\n"), "one two three", "one"),
        (ValueError(""), "ValueError", "ValueError"),
        (OSError("plain"), "plain", "plain"),
        (RuntimeError("  \n "), "RuntimeError", "RuntimeError"),
        (OSError(2, "No such file", "x"), "x: No such file", "[Errno 2] No such file: 'x'"),
    ],
)
def test_errors_as_one_line(error: Exception, whole: str, first: str) -> None:
    assert one_line(error) == whole
    assert first_line(error) == first
