"""Checkpoints with something changed at random, read one after the other in a worker process.

Run as ``python mutations.py FOLDER START STOP`` it reads the mutations of these numbers and prints
one JSON line each, so that the process above sees which one a crash or a hang belongs to.  The
same number always gives the same mutation.  What is read is also described and converted, for a
layout must refuse what it does not understand as politely as a reader.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("safetensors", "zip", "old", "config", "index", "weapon")
# Out of twenty mutations, how many are of which kind.
_SHARES = (6, 5, 4, 2, 2, 1)
_TURNS = tuple(kind for kind, share in zip(KINDS, _SHARES, strict=True) for _ in range(share))
_DIMS, _RANK, _MASKS = 8, 2, 2
_WORDS = (0, 1, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**40, 2**64, 1e300, float("nan"), float("inf"), "", "\0", "a\nb"),
    *("../../etc/passwd", "/etc/passwd", "x" * 5000, [], {}, [[[[]]]], ["a"], {"a": None}),
)


def kind_of(number: int) -> str:
    """The kind of a mutation."""
    return _TURNS[number % len(_TURNS)]


def prepare(folder: Path) -> None:
    """Write the checkpoints that are mutated."""
    import mlx.core as mx
    import torch

    from tests.converters import hostile

    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors = {
        f"{layer}.lora_A.weight": (_RANK, _DIMS),
        f"{layer}.lora_B.weight": (_DIMS, _RANK),
        rows: (_MASKS, _DIMS),
    }
    config = {
        **{"peft_type": "LORA", "r": _RANK, "lora_alpha": 4, "bias": "none", "use_rslora": True},
        **{"target_modules": ["q_proj"], "trainable_token_indices": [30, 31]},
        **{"alora_invocation_tokens": [30, 31], "rank_pattern": {}, "alpha_pattern": {}},
        "base_model_name_or_path": "some/base",
    }
    peft, sharded = folder / "peft", folder / "sharded"
    for place in (peft, sharded):
        place.mkdir()
    arrays = {
        name: mx.random.normal(shape, key=mx.random.key(1)) for name, shape in tensors.items()
    }
    mx.save_safetensors(str(peft / "adapter_model.safetensors"), arrays, {"format": "pt"})
    (peft / "adapter_config.json").write_text(json.dumps(config, indent=2))
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(arrays)}
    for name, file in weight_map.items():
        mx.save_safetensors(str(sharded / file), {name: arrays[name]})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    layer = "layers.0.self_attn.q_proj"
    bare = {
        f"{layer}.lora_A": torch.ones(_RANK, _DIMS),
        f"{layer}.lora_B": torch.ones(_DIMS, _RANK),
    }
    state = {"model": bare | {"mask_embeddings": torch.ones(_MASKS, _DIMS)}, "alpha": 4.0}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    needs = folder / "needs"
    needs.mkdir()
    weapon = hostile.weapons(folder / "canary", needs)["posix.system"]
    (folder / "weapon.pt").write_bytes(hostile.zipped(weapon))


def mutate(folder: Path, number: int, room: Path) -> Path:
    """Write one mutation into ``room``; returns the checkpoint."""
    kind, chance = kind_of(number), random.Random(f"mutation {number}")
    if kind in ("zip", "old", "weapon"):
        path = room / "checkpoint.pt"
        path.write_bytes(_mutate_bytes((folder / f"{kind}.pt").read_bytes(), chance))
        return path
    shutil.copytree(folder / ("sharded" if kind == "index" else "peft"), room / "checkpoint")
    name = {
        "safetensors": "adapter_model.safetensors",
        "config": "adapter_config.json",
        "index": "model.safetensors.index.json",
    }[kind]
    path = room / "checkpoint" / name
    content = path.read_bytes()
    if chance.random() < 0.5:
        content = _mutate_bytes(content, chance)
    elif kind == "safetensors":
        content = _mutate_header(content, chance)
    else:
        content = _mutate_json(content, chance)
    path.write_bytes(content)
    return room / "checkpoint"


def _mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut, repeat, blank out, insert, or write a striking number somewhere."""
    text = bytearray(content)
    # Where the format is, rather than the numbers: at the start, and at the end of a zip.
    place: Callable[[], int] = lambda: (  # noqa: E731
        chance.randrange(min(len(text), 1500))
        if chance.random() < 0.6
        else chance.randrange(max(0, len(text) - 800), len(text))
    )
    for _ in range(chance.choice((1, 1, 1, 1, 3))):
        at, length = place(), chance.choice((1, 2, 4, 8, 30, 200))
        act = chance.randrange(10) - 3
        if act <= 1:
            for _ in range(chance.choice((1, 1, 1, 3))):
                text[place()] ^= 1 << chance.randrange(8)
        elif act == 2:
            del text[at if chance.random() < 0.3 else chance.randrange(len(text)) :]
        elif act == 3:
            text[at : at + length] = text[at : at + length] * 2
        elif act == 4:
            text[at : at + length] = bytes(length)
        elif act == 5:
            text[at:at] = chance.randbytes(length)
        else:
            width = chance.choice(("<H", "<I", "<Q"))
            word = struct.pack("<Q", chance.choice(_WORDS))[: struct.calcsize(width)]
            text[at : at + len(word)] = word
        if not text:
            break
    return bytes(text)


def _mutate_header(content: bytes, chance: random.Random) -> bytes:
    """Change what the header of a safetensors file says, or how long it says that it is."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)]
    act = chance.randrange(8)
    if act == 0:
        entry["dtype"] = chance.choice(
            ("F64", "F8_E4M3", "F16", "I64", "BOOL", "C64", "X", 5, None)
        )
    elif act == 1:
        entry["shape"] = chance.choice(
            ([], [0], [-1, 4], [2**31, 2**31], [2**63], [1] * 100, [2.5], ["2"], None, 4, [True])
        )
    elif act == 2:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(_WORDS + _VALUES)
    elif act == 3:
        other = header[chance.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif act == 4:
        entry[chance.choice(("shape", "dtype", "data_offsets", "extra"))] = chance.choice(_VALUES)
    elif act == 5:
        header[chance.choice(("", "a\nb", "x" * 9999, "__metadata__", "\ud800"))] = dict(entry)
    elif act == 6:
        del entry[chance.choice(("dtype", "shape", "data_offsets"))]
    text = json.dumps(header).encode()
    if act == 7:
        twice = f'"{names[0]}": {json.dumps(entry)}, '.encode()
        text = chance.choice((b"{" + twice + text[1:], b"[" * 90_000, text * 2, b"", b"{}"))
    claimed = len(text) if chance.random() < 0.8 else chance.choice(_WORDS)
    return struct.pack("<Q", claimed) + text + data


def _mutate_json(content: bytes, chance: random.Random) -> bytes:
    """Replace, remove or add a value somewhere in a JSON object."""
    value = json.loads(content)
    act = chance.randrange(10)
    if act == 0:
        return chance.choice((b"", b"[]", b"null", b"[" * 90_000, b"{" * 50, b'{"a":' * 50_000))
    if act == 1:
        return content.replace(b"{", b'{"r": 1, "r": 2, ', 1)
    target = value
    while isinstance(target, dict) and target and chance.random() < 0.8:
        key = chance.choice(list(target))
        if isinstance(target[key], dict) and target[key] and chance.random() < 0.7:
            target = target[key]
            continue
        if act < 4:
            del target[key]
        elif act == 4:
            target[chance.choice(("", "../x", "use_dora", "a\n"))] = target.pop(key)
        else:
            target[key] = chance.choice(_VALUES)
        break
    return json.dumps(value).encode()


def _read(path: Path) -> str:
    """Read and convert one checkpoint; returns how that ended."""
    import mlx.core as mx

    from mlx_mtp.converters.checkpoint import read_checkpoint
    from mlx_mtp.converters.layouts import BaseFacts, convert_layout, describe

    base = BaseFacts(
        **{"name": "some/base", "model_type": "llama", "hidden_size": _DIMS, "num_layers": 1},
        **{"vocab_size": 30, "norm_eps": 1e-5, "num_tokens": 30},
        linears={"model.layers.0.self_attn.q_proj": (_DIMS, _DIMS)},
        embed=lambda ids: mx.ones((len(ids), _DIMS)),
    )
    try:
        checkpoint = read_checkpoint(path, allow_pickle=True)
        for tensors in checkpoint.files.values():
            mx.eval(tensors)
        outcome = "read"
        describe(checkpoint)
        mx.eval(convert_layout(checkpoint, base, options={}).tensors)
    except ValueError as error:
        return "bad message" if "\n" in str(error) else (locals().get("outcome") or "refused")
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "converted"


def main(folder: Path, start: int, stop: int) -> None:
    """Read the mutations from ``start`` to before ``stop``."""
    from mlx_mtp.converters.pytorch import checkpoint as torch_checkpoint
    from tests import conftest  # noqa: F401  (few threads, before MLX is imported)
    from tests.converters.torch_zygote import Zygote

    zygote = Zygote()
    torch_checkpoint.run_child = zygote
    _read(folder / "peft")  # what is imported late is imported now, outside the clock
    for number in range(start, stop):
        room = folder / f"room{number}"
        room.mkdir()
        path = mutate(folder, number, room)
        began = time.monotonic()
        outcome = _read(path)
        line = {"number": number, "outcome": outcome, "s": time.monotonic() - began}
        print(json.dumps(line), flush=True)
        shutil.rmtree(room)
    zygote.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
