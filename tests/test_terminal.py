"""Progress and status lines, errors as one line, and control characters at a terminal."""

from __future__ import annotations

import io
import json
import time
import unicodedata

import pytest

from mlx_mtp.terminal import BadInput, Status, first_line, one_line, progress, show, visible


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
        (ValueError("no \x1b[2K\rmodel\x07"), "no \\x1b[2K model\\x07", "no \\x1b[2K"),
        (
            OSError(2, "No such file", "a\x9bb"),
            "a\\u009bb: No such file",
            "[Errno 2] No such file: 'a\\x9bb'",
        ),
        (OSError("plain"), "plain", "plain"),
        (RuntimeError("  \n "), "RuntimeError", "RuntimeError"),
        (OSError(2, "No such file", "x"), "x: No such file", "[Errno 2] No such file: 'x'"),
    ],
)
def test_errors_as_one_line(error: Exception, whole: str, first: str) -> None:
    assert one_line(error) == whole
    assert first_line(error) == first
    assert BadInput(str(error)).format_message() == visible(str(error))


CONTROLS = [
    ("\x1b]52;c;eA==\x07", r"\x1b]52;c;eA==\x07"),
    ("\x1b[2K\rPassword: ", r"\x1b[2K\x0dPassword: "),
    ("a\x08\x7f\x00b", r"a\x08\u007f\x00b"),
    ("\x9b1m\x85\x90", r"\u009b1m\u0085\u0090"),
    ("if \u202eadmin\u2066", r"if \u202eadmin\u2066"),
    ("\x1bP\x1bX\x1b_\x1bc", r"\x1bP\x1bX\x1b_\x1bc"),
    ("one\n\ttwo é 👩‍👧 שלום \\x1b", "one\n\ttwo é 👩‍👧 שלום \\x1b"),
]


@pytest.mark.parametrize(("text", "escaped"), CONTROLS)
def test_a_terminal_shows_control_characters_and_a_pipe_gets_them(text: str, escaped: str) -> None:
    for stream, shown in ((Terminal(), escaped), (io.StringIO(), text)):
        for piece in text:
            show(piece, end="", file=stream)
        assert stream.getvalue() == shown


def test_no_control_character_is_left_out() -> None:
    shown = visible("".join(map(chr, range(0x110000))))
    assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    reordering = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not reordering & set(map(unicodedata.bidirectional, shown))
    line = json.dumps("\x1b\x7f\x9b\u202e", ensure_ascii=False)
    assert json.loads(visible(line)) == json.loads(line)


def test_bars_and_status_lines_show_control_characters() -> None:
    stream = Terminal()
    with Status("Loading a\x1b]0;x\x07", stream=stream, delay_s=0.01):
        time.sleep(0.1)
    for _ in progress(range(2), desc="a\x1b]0;x\x07", delay=0, mininterval=0, file=stream):
        pass
    assert "\x1b]0;x" not in stream.getvalue() and stream.getvalue().count(r"a\x1b]0;x\x07") >= 2
