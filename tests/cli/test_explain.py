"""``--explain``: whole lines on stderr that never run into the answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mtp.terminal import AnswerWriter, Status

FAKE_CLI = [sys.executable, str(Path(__file__).with_name("fake_cli.py")), "1"]
LINE = re.compile(r"step: \d+ tokens")


def read_all(terminal: int) -> str:
    """What a program wrote to a pseudo-terminal until it closed it."""
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's way of saying that the other end is closed
            piece = b""
        if not piece:
            return b"".join(pieces).decode().replace("\r\n", "\n")
        pieces.append(piece)


def test_lines_are_whole_where_both_streams_are_one_terminal(monkeypatch):
    pty = pytest.importorskip("pty")
    terminal, inner = pty.openpty()
    with os.fdopen(inner, "w") as out, os.fdopen(os.dup(inner), "w") as err:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        writer = AnswerWriter(Status("Prompt ..."))
        for action, text in [
            (writer.log, "one"),
            (writer.write, "The answer"),
            (writer.log, "two"),
            (writer.log, "three"),
            (writer.write, ""),
            (writer.log, "four"),
            (writer.write, " goes on\n"),
            (writer.log, "five"),
        ]:
            action(text)
    assert read_all(terminal) == "one\nThe answer\ntwo\nthree\nfour\n goes on\nfive\n"
    os.close(terminal)


def test_streams_that_are_apart_are_written_unchanged(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        writer = AnswerWriter(Status("Prompt ..."))
        for text in ("The ", "answer"):
            writer.write(text)
            writer.log("a step")
    assert (tmp_path / "out").read_text() == "The answer"
    assert (tmp_path / "err").read_text() == "a step\na step\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_each_step_has_a_line_of_its_own_at_a_terminal():
    import pty

    terminal, inner = pty.openpty()
    words = [*FAKE_CLI, "generate", "-m", "25", "--explain"]
    process = subprocess.Popen(words, stdout=inner, stderr=inner)
    os.close(inner)
    lines = read_all(terminal).splitlines()
    assert process.wait(60) == 0
    steps = [line for line in lines if "step:" in line]
    assert len(steps) == 9 and all(LINE.fullmatch(line) for line in steps)
    pieces = [line for line in lines if re.fullmatch(r"[\d ]+", line)]
    assert "".join(pieces) == "0 1 2 3 4 5 6 7 8 9 10 11"[:25]
