"""PyTorch files by way of the sandbox: what comes out, what is missing, what is not believed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_mtp.converters.checkpoint import read_checkpoint
from mlx_mtp.converters.pytorch import checkpoint as torch_checkpoint
from mlx_mtp.converters.pytorch import sandbox
from mlx_mtp.converters.pytorch.checkpoint import Request, torch_to_safetensors
from mlx_mtp.storage.safetensors import read_safetensors

sandboxed = pytest.mark.skipif(
    sandbox.why_unavailable() is not None, reason="there is no sandbox here"
)


def _state() -> dict[str, Any]:
    shared = torch.randn(3, 4)
    kinds = {
        **{str(d).removeprefix("torch."): torch.randn(5).to(d) for d in _FLOATS},
        **{str(d).removeprefix("torch."): torch.arange(5).to(d) for d in _WHOLE},
    }
    return {
        "model": {
            **{"kinds": kinds, "shared": shared, "turned": shared.T, "part": shared[1:, ::2]},
            **{"parameter": torch.nn.Parameter(torch.randn(2, 2)), "empty": torch.zeros(0, 3)},
            **{"scalar": torch.tensor(2.5), "conj": torch.randn(3, dtype=torch.complex64).conj()},
        },
        "layers": [{"a": torch.ones(1)}, {"a": torch.zeros(1)}],
        "config": {"lora_rank": 8, "name": "x", "none": None, "ids": [1, 2], "kind": torch.float16},
        **{"alpha": 32.0, "yes": True, "epoch": 3, "size": torch.Size([1])},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "rng_state": torch.get_rng_state(),
        "lr_scheduler": {"last": 1},
    }


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)


@sandboxed
@pytest.mark.parametrize("new_form", [True, False])
def test_a_pytorch_file_is_read_exactly(tmp_path: Path, forked: None, new_form: bool) -> None:
    state = _state()
    if not new_form:
        del state["model"]["kinds"]["uint16"]  # torch writes it so, but cannot read it
    path = tmp_path / "lora.pt"
    torch.save(state, path, _use_new_zipfile_serialization=new_form)
    checkpoint = read_checkpoint(path, allow_pickle=True)
    model = state["model"]
    expected = {f"model.kinds.{name}": tensor for name, tensor in model.pop("kinds").items()}
    expected |= {f"model.{name}": tensor for name, tensor in model.items()}
    expected |= {f"layers.{i}.a": layer["a"] for i, layer in enumerate(state["layers"])}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        wide = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        got, tensor = checkpoint.tensors[name], tensor.detach().to(wide).resolve_conj()
        assert str(got.dtype).rpartition(".")[2].removesuffix("_") == str(wide).rpartition(".")[2]
        if got.dtype == mx.bfloat16:
            got, tensor = got.view(mx.uint16), tensor.view(torch.uint16)
        np.testing.assert_array_equal(np.array(got), tensor.numpy(), err_msg=name)
    assert checkpoint.values == {
        **{"config.lora_rank": 8, "config.name": "x", "config.none": None, "config.ids": [1, 2]},
        **{"alpha": 32.0, "yes": True, "epoch": 3, "size": [1]},
    }


@sandboxed
def test_a_module_s_own_state_dict_is_read(tmp_path: Path, forked: None) -> None:
    """It is an OrderedDict that carries versions as an attribute."""
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "x.bin")
    tensors = read_checkpoint(tmp_path, allow_pickle=True).tensors
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {"weight": (2, 3), "bias": (2,)}


@sandboxed
def test_values_that_two_files_give_differently_are_left_open(tmp_path: Path, forked: None) -> None:
    torch.save({"a": torch.ones(1), "alpha": 8, "epoch": 1}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(1), "alpha": 8, "epoch": 2}, tmp_path / "b.pt")
    assert read_checkpoint(tmp_path, allow_pickle=True).values == {"alpha": 8}


@sandboxed
def test_a_fresh_interpreter_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the surroundings scrubbed and nothing left behind."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    weights = torch.randn(100, 50)
    torch.save({"w": weights}, tmp_path / "x.pt")
    (tmp_path / "scratch").mkdir()
    path, values = torch_to_safetensors(tmp_path / "x.pt", tmp_path / "scratch", allow_pickle=True)
    assert (path, values) == (tmp_path / "scratch" / "x.safetensors", {})
    np.testing.assert_array_equal(np.array(read_safetensors(path)["w"]), weights.numpy())
    assert os.listdir(tmp_path / "scratch") == ["x.safetensors"]
    assert "HF_TOKEN" not in torch_checkpoint._environment(tmp_path)


@sandboxed
def test_two_files_of_one_stem_do_not_meet(tmp_path: Path, forked: None) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    torch.save({"b": torch.ones(1)}, tmp_path / "x.bin")
    assert sorted(read_checkpoint(tmp_path, allow_pickle=True).tensors) == ["a", "b"]
    (tmp_path / "s").mkdir()
    written = [
        torch_to_safetensors(tmp_path / name, tmp_path / "s", allow_pickle=True)[0].name
        for name in ("x.pt", "x.bin")
    ]
    assert written == ["x.safetensors", "x.bin.safetensors"]


@sandboxed
@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "a has type float8_e4m3fn, which cannot"),
        ({"a": torch.zeros(2).to(torch.float8_e5m2)}, "a has type float8_e5m2, which cannot"),
        ({"a": torch.ones(1).expand(5)}, "exceeds its storage"),
        ([torch.ones(1)], "it contains a list, not a dict of tensors"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two of its tensors are named a.b"),
        ({"__metadata__": torch.ones(1)}, "__metadata__ is not a valid tensor name"),
        ({"a\nb": torch.ones(1)}, "is not a valid name"),
        ({(1, 2): torch.ones(1)}, "a key of type tuple, which is not a valid name"),
    ],
)
def test_tensors_that_cannot_be_carried_over_are_refused(
    tmp_path: Path, forked: None, state: Any, said: str
) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt cannot be read: .*{said}"):
        read_checkpoint(tmp_path / "x.pt", allow_pickle=True)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")

    def read() -> str:
        refusal = pytest.raises(
            ValueError, torch_to_safetensors, tmp_path / "x.pt", tmp_path, allow_pickle=True
        )
        return str(refusal.value)

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "why_unavailable", lambda: "this Linux kernel has no Landlock")
        assert read().endswith("in a sandbox and is refused: this Linux kernel has no Landlock")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "why_unavailable", lambda: None)
        patch.setattr(torch_checkpoint.importlib.util, "find_spec", lambda name: None)
        assert read().endswith('needs PyTorch to be read: pip install "mlx-mtp[convert]"')
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "why_unavailable", lambda: None)
        patch.setattr(torch_checkpoint, "_MIN_FREE_BYTES", 1 << 60)
        assert "has no room for the" in read()


# A child that lies, for it may have been taken over


def _header(num_bytes: int) -> bytes:
    """A safetensors file of one tensor of two numbers, with this many bytes behind its header."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def _link(request: Request) -> None:
    (request.scratch / "tensors.safetensors").symlink_to("/etc/passwd")
    (request.scratch / "result.json").write_text('{"error": null, "values": {}}')


def _link_result(request: Request) -> None:
    (request.scratch / "result.json").symlink_to("/dev/zero")


def _corrupt(request: Request) -> None:
    (request.scratch / "tensors.safetensors").write_bytes(_header(7))
    (request.scratch / "result.json").write_text('{"error": null, "values": {}}')


def _no_tensors(request: Request) -> None:
    (request.scratch / "result.json").write_text('{"error": null, "values": {}}')


def _odd_result(request: Request) -> None:
    (request.scratch / "result.json").write_text('{"error": null, "values": [1]}')


def _many_lines(request: Request) -> None:
    error = "no\x1b[31m\nError: all is well\n" * 1000
    (request.scratch / "result.json").write_text(json.dumps({"error": error}))


def _long_result(request: Request) -> None:
    (request.scratch / "result.json").write_bytes(b" " * (17 << 20))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (_link, "is not a separate file"),
        (_link_result, "its reader returned no result"),
        (_corrupt, "its tensors end at byte"),
        (_no_tensors, "is not a separate file"),
        (_odd_result, "its reader returned no result"),
        (_many_lines, r"no\?\[31m Error: all is well"),
        (_long_result, "its reader returned no result"),
        (lambda request: None, "its reader returned no result"),
        (lambda request: -11, "its reader was ended by SIGSEGV"),
        (lambda request: -24, "reading it takes too long or too much memory"),
        (lambda request: 86, "it needs too much memory"),
        (lambda request: 1, "its reader ended with code 1"),
    ],
)
def test_a_lying_child_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Request], Any], said: str
) -> None:
    monkeypatch.setattr(sandbox, "why_unavailable", lambda: None)
    monkeypatch.setattr(torch_checkpoint, "run_child", lambda request: act(request) or 0)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt cannot be read: .*{said}") as refusal:
        torch_to_safetensors(tmp_path / "x.pt", tmp_path, allow_pickle=True)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    assert os.listdir(tmp_path) == ["x.pt"]


def test_odd_values_of_a_child_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(request: Request) -> int:
        (request.scratch / "tensors.safetensors").write_bytes(_header(8))
        values = {"good": 1, "list": [1, "a"], "deep": {"a": 1}, "nested": [[1]], "x" * 5000: 1}
        (request.scratch / "result.json").write_text(json.dumps({"error": None, "values": values}))
        return 0

    monkeypatch.setattr(sandbox, "why_unavailable", lambda: None)
    monkeypatch.setattr(torch_checkpoint, "run_child", act)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt", allow_pickle=True).values == {
        **{"good": 1, "list": [1, "a"]}
    }


@sandboxed
def test_a_child_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs from the moment that the child is ready."""
    boot = "import json, os, sys, time\nos.write(json.loads(sys.argv[1])['ready'], b'R')\n"
    monkeypatch.setattr(torch_checkpoint, "_BOOT", boot + "time.sleep(60)")
    limits = sandbox.Limits(memory_bytes=1, cpu_s=1, wall_s=0.2, file_bytes=1)
    request = Request(path=tmp_path / "x", scratch=tmp_path, is_zip=True, limits=limits)
    with pytest.raises(TimeoutError):
        torch_checkpoint.run_child(request)
    monkeypatch.setattr(torch_checkpoint, "_BOOT", "import time\ntime.sleep(60)")
    monkeypatch.setattr(torch_checkpoint, "_START_S", 0.2)
    with pytest.raises(TimeoutError):
        torch_checkpoint.run_child(request)
