"""The run on a GPU: what travels, how many steps fit, and the whole command on a CPU."""

from __future__ import annotations

import json
import subprocess
import tarfile

import pytest
from click.testing import CliRunner

from mlx_mtp.lab import gpu_train
from mlx_mtp.lab.gpu_train import FOLDER, pack, steps_within
from mlx_mtp.loading import load
from tests.helpers.tiny import save_tiny_model


def texts(path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    records = (
        {"prompt": f"Say {w}.", "completion": " ".join(words[i:] + words[:i])}
        for i, w in enumerate(words)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_must_travel_is_packed(tmp_path):
    repository, model = tmp_path / "repository", save_tiny_model(tmp_path / "model")
    repository.mkdir()
    (repository / "a.py").write_text("a")
    (repository / "ignored").write_text("b")
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    subprocess.run(["git", "-C", str(repository), "add", "a.py"], check=True)
    target, data = tmp_path / "all.tar", texts(tmp_path / "data.jsonl")
    names = pack(target, repository=repository, model=model, data=data)
    assert {"a.py", f"{FOLDER}/model/model.safetensors", f"{FOLDER}/data.jsonl"} <= set(names)
    assert "ignored" not in names and not list(tmp_path.glob("*.new"))
    with tarfile.open(target) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    assert (tmp_path / "there" / FOLDER / "data.jsonl").read_bytes() == data.read_bytes()
    assert load(str(tmp_path / "there" / FOLDER / "model"), mtp=False)[0].vocab_size == 260


def test_the_number_of_steps_follows_from_their_time():
    assert steps_within(10, 0.5) == 840
    assert steps_within(0.01, 60) == 1


def run(*arguments: str):
    return CliRunner().invoke(gpu_train.main, list(arguments))


@pytest.mark.slow
def test_the_command_trains_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    model, data = save_tiny_model(tmp_path / "model"), texts(tmp_path / "data.jsonl")
    arguments = ["--model", str(model), "--data", str(data), "--device", "cpu", "--minutes", "0.01"]
    arguments += ["--batch-size", "1", "--num-anchors", "2"]
    done = run(*arguments, "--adapter-path", str(tmp_path / "adapter"))
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["finished"] and line["iters"] >= 1 and line["tokens_per_step"]
    settings = json.loads((tmp_path / "adapter" / "training" / "settings.json").read_text())
    assert settings["backend"] == "torch"
    assert load(str(model), adapter_path=str(tmp_path / "adapter"))[0].num_draft_tokens == 8


def test_a_missing_file_is_one_line(tmp_path):
    done = run("--data", str(tmp_path / "none"), "--minutes", "1")
    assert done.exit_code == 2 and done.stderr == f"Error: {tmp_path / 'none'} is not a file\n"
