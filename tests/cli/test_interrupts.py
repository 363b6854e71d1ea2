"""The command line in processes of its own: Ctrl-C and closed pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_mtp.terminal import CLOSED_PIPE, INTERRUPTED

FAKE_CLI = [sys.executable, str(Path(__file__).with_name("fake_cli.py"))]


SIGNALS = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def start(*args: str, step_ms: int = 20) -> subprocess.Popen[str]:
    """Run the fake program until its loop has begun."""
    process = subprocess.Popen(
        [*FAKE_CLI, str(step_ms), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    if "--json" not in args:
        assert process.stderr.readline() == "Drafting with mask tokens and lookup\n"
    assert process.stderr.readline() == "begun\n"
    return process


@SIGNALS
@pytest.mark.slow
def test_ctrl_c_prints_the_stats_so_far():
    process = start("generate", "-m", "-1")
    assert process.stdout
    seen = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (INTERRUPTED, "")
    match = re.fullmatch(r"={10}\n(.*)\n={10}\n(.*)", seen + out, re.DOTALL)
    assert match and match[1].startswith("0 1 2 3")
    assert re.fullmatch(
        r"Prompt: .*\nGeneration: .*\nPeak memory: .*\nMTP \(mask\): .*\n", match[2]
    )


@SIGNALS
@pytest.mark.slow
def test_ctrl_c_leaves_whole_json():
    process = start("generate", "-m", "-1", "--json")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (INTERRUPTED, "")
    answer = json.loads(out)
    assert answer["finish_reason"] == "interrupted" and answer["text"].startswith("0 1 2")


@SIGNALS
@pytest.mark.slow
def test_a_closed_pipe_is_quiet():
    process = start("generate", "-m", "-1", step_ms=1)
    assert process.stdout and process.stderr
    process.stdout.read(30)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == CLOSED_PIPE


@SIGNALS
@pytest.mark.slow
def test_ctrl_c_before_the_first_token_is_quiet():
    process = start("generate", step_ms=120_000)
    for _ in range(2):  # the second one does not wait for the step
        process.send_signal(signal.SIGINT)
        time.sleep(2)  # two signals that wait together, as on a busy machine, are one
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (INTERRUPTED, "==========\n\n==========\n", "")
