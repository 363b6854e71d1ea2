"""What a training run keeps survives kills, damage and full disks, bit by bit."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_mtp.evaluation.acceptance import Evaluation
from mlx_mtp.loading import read_adapter
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, MTPConfig
from mlx_mtp.train.run import checkpoint
from mlx_mtp.train.run.card import training_card
from mlx_mtp.train.run.checkpoint import (
    TrainState,
    newest_state,
    remove_old_states,
    save_adapter,
    save_state,
    state_name,
    write_json,
)
from mlx_mtp.train.run.history import History, read_history
from tests.helpers.processes import ForkServer
from tests.helpers.tiny import random_adapter, tiny_base

DTYPES = (
    mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.uint64, mx.int64,
    mx.float16, mx.bfloat16, mx.float32, mx.float64, mx.complex64,
)  # fmt: skip


def state(step: int, **tensors: mx.array) -> TrainState:
    return TrainState(step=step, tensors=tensors or {"x": mx.full((3,), step)}, values={"at": step})


def bits(value: mx.array) -> bytes:
    with mx.stream(mx.cpu):
        return np.array(mx.contiguous(value).reshape(-1).view(mx.uint8)).tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> TrainState:
    found = newest_state(folder)
    assert found is not None
    return found


def test_every_type_comes_back_bit_by_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    with mx.stream(mx.cpu):
        for dtype in DTYPES:
            raw = rng.integers(0, 2 if dtype == mx.bool_ else 256, (6, dtype.size), dtype=np.uint8)
            tensors[str(dtype)] = mx.array(raw).reshape(-1).view(dtype).reshape(2, 3)
    tensors["nan"] = mx.array([0x7FC00001, 0xFFFFFFFF], dtype=mx.uint32).view(mx.float32)
    tensors["-0"] = mx.array(-0.0)
    tensors["empty"] = mx.zeros((0, 4), dtype=mx.bfloat16)
    tensors["transposed"] = mx.arange(12).reshape(3, 4).T
    save_state(tmp_path, state(1, **tensors))
    found = newest(tmp_path).tensors
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert bits(found[name]) == bits(value), name


def test_values_come_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    values = {
        "generator": generator.bit_generator.state,
        "best": 0.1 + 0.2,
        "none": None,
        "bound": math.inf,
        "order": [3, 1, 2],
        "of numpy": np.float64(1 / 3),
        "text": "naïve \u2028 ✓",
    }
    save_state(tmp_path, TrainState(step=7, tensors={}, values=values))
    found = newest(tmp_path)
    assert (found.step, found.values) == (7, values)
    again = np.random.default_rng()
    again.bit_generator.state = found.values["generator"]
    assert again.random() == generator.random()


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "nowhere") is None
    for step in (100, 200, 10_000_000, 300_000_000):
        path = save_state(tmp_path / "training", state(step))
    assert path == tmp_path / "training" / "state-300000000"
    assert names(tmp_path / "training") == ["state-10000000", "state-300000000"]
    assert newest(tmp_path / "training").step == 300_000_000
    save_state(tmp_path / "training", state(300_000_100), keep=1)
    assert names(tmp_path / "training") == ["state-300000100"]


def test_what_a_kill_left_of_old_states_goes(tmp_path: Path) -> None:
    for step in (3, 5, 7):
        save_state(tmp_path, state(step), keep=9)
    (tmp_path / state_name(3) / checkpoint.VALUES_FILE).unlink()  # killed while it was removed
    kept = [state_name(5), state_name(7)]
    remove_old_states(tmp_path, 7)
    assert [name for name in names(tmp_path) if name.startswith("state")] == kept
    save_state(tmp_path, state(9), keep=9)
    remove_old_states(tmp_path, 7)  # of what lies beyond, nothing is said
    assert names(tmp_path)[-1] == state_name(9)


def test_a_step_can_be_saved_again_and_ends_a_past(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, state(step), keep=3)
    save_state(tmp_path, state(2, x=mx.array([9])), keep=3)
    assert names(tmp_path) == ["state-0000001", "state-0000002"]
    assert newest(tmp_path).tensors["x"].item() == 9


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["torn", "changed", "missing"])
def test_a_damaged_state_is_told_and_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    for step in (1, 2):
        path = save_state(tmp_path, state(step)) / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if damage == "torn" else data[:-9] + b"7" + data[-8:])
    told: list[str] = []
    found = newest_state(tmp_path, log=told.append)
    assert found is not None and found.step == 1
    assert len(told) == 1 and "state-0000002 is damaged" in told[0] and "\n" not in told[0]


def test_what_is_no_json_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    with pytest.raises(ValueError, match="values cannot be written as JSON"):
        save_state(tmp_path, TrainState(step=2, tensors={}, values={"x": object()}))
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save_state(tmp_path, state(2), keep=0)
    assert names(tmp_path) == ["state-0000001"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, small_disk: None) -> None:
    save_state(tmp_path, state(1))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            save_state(tmp_path, state(2, x=mx.zeros((100_000,))))
        assert caught.value.errno == errno.EFBIG
        assert Path(str(caught.value.filename)).name == "state.safetensors"
        assert names(tmp_path) == ["state-0000001"]
    assert newest(tmp_path).step == 1


def test_a_failed_rename_keeps_the_state_of_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, state(1, x=mx.array([5])))
    rename = os.rename

    def fails(source: Any, target: Any) -> None:
        if Path(source).name == checkpoint._DRAFT:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError):
        save_state(tmp_path, state(1, x=mx.array([6])))
    assert newest(tmp_path).tensors["x"].item() == 5
    assert names(tmp_path) == ["state-0000001"]


# Saves states, counting up from the number in the task, until it is killed.
_SAVER = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_mtp.train.run.checkpoint import TrainState, save_state

def work(task):
    step = int(task)
    while True:
        step += 1
        x = mx.full((20_000,), step)
        values = {"x": [step] * 200}
        save_state(Path(sys.argv[1]), TrainState(step=step, tensors={"x": x}, values=values))
"""


@pytest.mark.parametrize(
    ("kills", "min_moved"), [(8, 2), pytest.param(60, 20, marks=pytest.mark.soak)]
)
def test_kills_leave_whole_states_only(
    tmp_path: Path, seed: int, kills: int, min_moved: int
) -> None:
    rng, step, moved = random.Random(seed), 0, 0
    with ForkServer(_SAVER, [str(tmp_path)]) as saver:
        for _ in range(kills):
            assert saver.run(str(step), kill_after_s=rng.uniform(0.05, 0.15)) == -signal.SIGKILL
            told: list[str] = []
            found = newest_state(tmp_path, log=told.append)
            assert not told
            if found is not None:
                assert found.step >= step
                assert found.values == {"x": [found.step] * 200}
                assert mx.all(found.tensors["x"] == found.step).item()
                moved += found.step > step
                step = found.step
    assert moved > min_moved
    save_state(tmp_path, state(step + 1))
    left = [name for name in names(tmp_path) if not name.startswith("state-")]
    assert not left and len(names(tmp_path)) == 2


@pytest.fixture(scope="module")
def adapter() -> tuple[MTPConfig, dict[str, mx.array]]:
    return random_adapter(tiny_base())


def test_an_adapter_is_written_and_replaced(
    tmp_path: Path, adapter: tuple[MTPConfig, dict[str, mx.array]]
) -> None:
    config, weights = adapter
    save_adapter(tmp_path / "out", config, weights, readme="# One\n")
    save_adapter(tmp_path / "out", config, {name: 2 * value for name, value in weights.items()})
    found, tensors = read_adapter(tmp_path / "out")
    assert found == config and set(tensors) == set(weights)
    for name, value in weights.items():
        assert tensors[name].dtype == mx.float16
        assert mx.array_equal(tensors[name], (2 * value).astype(mx.float16)).item()
    assert names(tmp_path / "out") == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    assert (tmp_path / "out" / "README.md").read_text() == "# One\n"


def test_a_loader_never_finds_files_that_are_at_odds(
    tmp_path: Path,
    adapter: tuple[MTPConfig, dict[str, mx.array]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every rename, what lies there is the old adapter, none at all, or the new one."""
    config, weights = adapter
    wider, wider_weights = random_adapter(tiny_base(), k=6)
    save_adapter(tmp_path, config, weights)
    seen = []
    replace = os.replace

    def look(source: Any, target: Any) -> None:
        for happen in (lambda: None, lambda: replace(source, target)):
            happen()
            try:
                found, tensors = read_adapter(tmp_path)
            except ValueError:
                seen.append(None)
            else:
                assert tensors["mask_embeddings"].shape[0] == found.num_draft_tokens
                seen.append(found.num_draft_tokens)

    monkeypatch.setattr(os, "replace", look)
    save_adapter(tmp_path, wider, wider_weights)
    assert seen == [None, None, None, 6]
    seen.clear()
    save_adapter(tmp_path, wider, wider_weights)
    assert seen == [6, 6]


def test_values_that_the_type_cannot_hold_are_refused(
    tmp_path: Path, adapter: tuple[MTPConfig, dict[str, mx.array]]
) -> None:
    config, weights = adapter
    save_adapter(tmp_path, config, weights)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    for value in (1e6, math.nan):
        with pytest.raises(ValueError, match="mask_embeddings contains values that F16 cannot"):
            save_adapter(tmp_path, config, weights | {"mask_embeddings": mx.full((4, 32), value)})
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


def test_a_full_disk_keeps_the_adapter(
    tmp_path: Path, adapter: tuple[MTPConfig, dict[str, mx.array]], small_disk: None
) -> None:
    config, weights = adapter
    save_adapter(tmp_path, config, weights)
    before = names(tmp_path)
    with pytest.raises(OSError):
        save_adapter(tmp_path, config, weights | {"mask_embeddings": mx.zeros((4, 32_000))})
    assert names(tmp_path) == before and read_adapter(tmp_path)[0] == config


def test_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "settings.json", {"rank": 32, "seed": np.int64(3)})
    assert json.loads((tmp_path / "new" / "settings.json").read_text()) == {"rank": 32, "seed": 3}
    with pytest.raises(ValueError, match=r"settings\.json cannot be written"):
        write_json(tmp_path / "new" / "settings.json", {"x": Path()})
    assert names(tmp_path / "new") == ["settings.json"]


def record(step: int) -> dict[str, Any]:
    return {"kind": "report", "step": step, "loss": 1 / step}


def test_a_history_grows_and_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "training" / "history.jsonl"
    with History(path, keep=None) as history:
        for step in (1, 2, 3):
            history.append(record(step))
        assert len(history) == 3
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"kind": "rep')
    assert read_history(path) == [record(1), record(2), record(3)]
    with History(path) as history:
        assert history.records == [record(1), record(2), record(3)]
    assert path.read_bytes() == whole
    with History(path, keep=1) as history:
        history.append(record(2))
        history.append(record(3))
    assert path.read_bytes() == whole
    with History(path, keep=0) as history:
        assert not history.records
    assert path.read_bytes() == b""


def test_a_history_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with History(path) as history:
        with pytest.raises(ValueError, match="is being written by another process"):
            History(path)
        history.append(record(1))
    with History(path) as history:
        assert len(history) == 1


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2: expected a JSON object"):
        History(path)
    with History(path, keep=1) as history:  # what is cut off may be anything
        assert len(history) == 1


def test_a_full_disk_keeps_the_history(tmp_path: Path, small_disk: None) -> None:
    path = tmp_path / "history.jsonl"
    with History(path) as history:
        history.append(record(1))
        whole = path.read_bytes()
        with pytest.raises(OSError, match=r"history\.jsonl"):
            history.append({"text": "x" * 100_000})
        assert path.read_bytes() == whole and len(history) == 1
        history.append(record(2))
    assert len(read_history(path)) == 2


def test_a_card_tells_how_it_was_trained(adapter: tuple[MTPConfig, dict[str, mx.array]]) -> None:
    best = Evaluation(
        tokens_per_step=2.5, acceptance=(0.8, 0.5), num_tokens=100, num_steps=40, num_sequences=3
    )
    recipe = {"command": "mlx-mtp train\n --seed 3", "seed": 3, "data hash": "a|b", "time": None}
    card = training_card(adapter[0], recipe=recipe | {"licence": "apache-2.0"}, best=best)
    _, head, body = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "apache-2.0" and "lora" in front["tags"]
    assert "\nmlx-mtp train --seed 3\n" in body and "| seed | 3 |" in body
    assert "a\\|b" in body and "time" not in body
    assert "**2.50 tokens per step**" in body and "| accepted | 80% | 50% |" in body
    assert "tokens per step**" not in training_card(adapter[0], recipe={}, best=None)
