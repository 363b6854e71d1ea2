"""What can go wrong with ``mlx-mtp train``: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mtp.train.data.records import read_jsonl
from tests.helpers.tiny import random_adapter, save_adapter, save_tiny_model, tiny_base
from tests.train.kill_script import SMALL, ScriptedLoop, done, failure, invoke, loop, write_chats

__all__ = ["loop"]


def texts(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "contains no text to train on"),
        ([{"text": "just one text to learn from"}], "too little data: 1 usable sequences"),
        ([{"text": "a"}, {"text": "b"}], "2 dropped: fewer than 8 tokens of answer"),
        ([{"text": "enough words in here"}, {"txt": "b"}], "data.jsonl, line 2: expected one of"),
        ([{"prompt": "What is it?"}, {"prompt": "And that?"}], "(dropped: 2 no answer)"),
        ([{"text": "no no no no no " * 50}], "(dropped: 1 loop)"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, loop, lines, reason):
    data, out = texts(tmp_path / "data.jsonl", *lines), tmp_path / "out"
    assert reason in failure("--adapter-path", str(out), "--data", data, "--data-as-is")
    assert not out.exists() and not loop.calls


def test_data_that_are_not_there(tmp_path, loop):
    out = tmp_path / "out"
    assert "data ./no.jsonl does not exist" in failure(
        "--adapter-path", str(out), "--data", "./no.jsonl"
    )
    image = tmp_path / "cat.png"
    image.write_bytes(b"\x89PNG\0\0")
    assert "is neither JSONL nor UTF-8 text" in failure(
        "--adapter-path", str(out), "--data", str(image)
    )
    assert not loop.loaded and not out.exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((), "--adapter-path is missing"),
        (("--adapter-path", ""), "--adapter-path is empty"),
        (("--adapter-path", "OUT", "--data", ""), "--data is empty"),
        (("--adapter-path", "OUT", "--iters", "0"), "Invalid value for '--iters'"),
        (("--adapter-path", "OUT", "--held-out", "1"), "Invalid value for '--held-out'"),
        (("--adapter-path", "OUT", "--learning-rate", "nan"), "learning_rate must be above 0"),
        (("--adapter-path", "OUT", "--learning-rate", "0"), "0.0 is not in the range x>0"),
        (("--adapter-path", "OUT", "--target-modules", ","), "must name at least one layer"),
        (("--adapter-path", "OUT", "--val-batches", "0"), "val_batches must be at least 1"),
        (("--adapter-path", "OUT", "--teacher", "me"), "Invalid value for '--teacher'"),
        (("--adapter-path", "OUT", "--data-as-is"), "--data-as-is needs --data"),
        (("--adapter-path", "OUT", "--topics", "no.txt"), "no.txt: No such file"),
        (("--adapter-path", "OUT", "--resume"), "contains no training run to resume"),
        (("--adapter-path", "OUT", "--resume-adapter-file", "no"), "adapter no does not exist"),
        (("-c", "no.yaml"), "no.yaml: No such file"),
        (
            ("--adapter-path", "OUT", "--base-weight", "0", "--sampler-weight", "0",
             "--lcm-weight", "0"),
            "all weights of the loss are 0",
        ),
    ],
)  # fmt: skip
def test_options_that_cannot_be(tmp_path, monkeypatch, loop, args, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in failure(*args)
    assert not loop.loaded and not os.listdir(tmp_path)


def test_an_adapter_without_mask_tokens_is_refused_before_the_work(tmp_path, loop):
    config, weights = random_adapter(tiny_base(), sampler=False)
    config = dataclasses.replace(config, noise_ids=(1, 60))
    start = save_adapter(tmp_path / "start", config, weights)
    told = failure("--adapter-path", str(tmp_path / "out"), "--resume-adapter-file", str(start))
    assert "start has no mask tokens to train: its mask rows are random tokens" in told
    assert not loop.loaded and not (tmp_path / "out").exists()


def test_a_missing_tracker_is_told_before_the_work(tmp_path, loop, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = str(tmp_path / "out")
    assert "pip install trackio" in failure("--adapter-path", out, "--report-to", "trackio")
    assert not loop.loaded


def test_a_folder_in_the_way_is_refused_before_the_work(tmp_path, loop):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty (it contains notes.txt)" in failure("--adapter-path", str(tmp_path))
    assert not loop.loaded and os.listdir(tmp_path) == ["notes.txt"]


def test_a_model_without_a_chat_template_says_so(tmp_path, loop: ScriptedLoop):
    loop.template = False
    result = done("--adapter-path", str(tmp_path / "out"), "--iters", "1", *SMALL)
    assert "tiny has no chat template: it continues plain text instead" in result.stderr
    assert all(each.text for each in read_jsonl(tmp_path / "out" / "training" / "data.jsonl"))


def test_lines_over_the_context_are_cut_and_counted(tmp_path, loop):
    data = str(write_chats(tmp_path / "chats.jsonl"))
    result = done("--adapter-path", str(tmp_path / "out"), "--iters", "1", "--data", data,
                  "--data-as-is", "--max-seq-length", "70")  # fmt: skip
    assert "12 sequences were longer than the context and were truncated" in result.stderr
    sequences = loop.calls[0].data.train + loop.calls[0].data.held_out
    assert max(len(each.ids) for each in sequences) == 70


def test_a_loss_that_is_no_number_keeps_the_last_state(tmp_path, loop):
    def before(step: int) -> None:
        if step == 3:
            raise ValueError("the loss of step 3 is nan (sequences 4, 7)")

    loop.before = before
    data, out = str(write_chats(tmp_path / "chats.jsonl")), tmp_path / "out"
    told = failure("--adapter-path", str(out), "--iters", "5", "--data", data, "--data-as-is")
    assert told == (
        "Error: the loss of step 3 is nan (sequences 4, 7); the checkpoint of step 2 is saved"
    )
    assert (out / "training" / "state-0000002").is_dir()


def test_a_full_disk_keeps_what_was_written(tmp_path, loop):
    def before(step: int) -> None:
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "adapters.safetensors")

    loop.before = before
    data, out = str(write_chats(tmp_path / "chats.jsonl")), tmp_path / "out"
    told = failure("--adapter-path", str(out), "--iters", "5", "--data", data, "--data-as-is")
    assert (
        "adapters.safetensors: No space left on device; the checkpoint of step 2 is saved" in told
    )
    assert told.endswith(f"Resume with: mlx-mtp train --adapter-path {out} --resume")
    loop.before = lambda step: None
    done("--adapter-path", str(out), "--resume")


def test_a_full_disk_keeps_the_text(tmp_path, loop, monkeypatch):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        told = failure("--adapter-path", str(out), "--iters", "1", *SMALL)
    assert "data.jsonl: No space left on device; the text so far is saved. Resume with: " in told
    kept = len(read_jsonl(out / "training" / "data.jsonl"))
    assert 1 <= kept < 8
    result = invoke("--adapter-path", str(out), "--resume")
    assert result.exit_code == 0, result.output
    assert len(read_jsonl(out / "training" / "data.jsonl")) == 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_real_limit_on_files_ends_in_one_line(tmp_path):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    data = str(write_chats(tmp_path / "chats.jsonl"))
    words = [sys.executable, "-m", "mlx_mtp", "train", "--model", str(model), "--data", data]
    words += ["--data-as-is", "--adapter-path", str(out), "--iters", "30", "--save-every", "1"]
    words += ["--batch-size", "1", "--num-anchors", "2", "--num-draft-tokens", "2", "--rank", "2"]
    words += ["--held-out", "0.3", "--steps-per-report", "1", "--steps-per-eval", "100"]

    def limit() -> None:  # the history outgrows it; the model's own files are only read
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    result = subprocess.run(words, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ") and "File too large" in lines[-1], lines[-1]
    assert "Traceback" not in result.stderr


LIMIT = 2500
