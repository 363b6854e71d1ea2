"""What a folder or file contains, from names of files, settings and headers; no tensor is read.

Loading, conversion and inspection all decide by ``look``, and say the same of what cannot be used.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.storage.gguf import SUFFIX
from mlx_mtp.storage.gguf.parts import gguf_files, is_gguf
from mlx_mtp.storage.safetensors import check_safetensors, is_plain_name, read_json_object, shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapters.safetensors"
MODEL_CONFIG = "config.json"
ADAPTER_FOLDER = "adapter"
_OWN_ADAPTERS = ("mtp", "mtp-heads")  # values of fine_tune_type in an adapter's configuration
LATEST_FILE = "latest.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TENSOR_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# Names of tensors by which layouts are recognised.
LORA = re.compile(r"(.+)\.lora_([ABab])(?:\.default)?(?:\.weight)?")
PEFT_ROWS = re.compile(r"(?:.+\.)?(embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta")
PEFT_TABLE = re.compile(
    r"(?:.+\.)?(embed_tokens|lm_head)\.(?:token_adapter\.base_layer\.)?"
    r"(?:modules_to_save\.|(original_module)\.)?weight"
)
GLORA_LORA = re.compile(r"(.+)\.lora_(A|B)\.weight")
GLORA_SAMPLER = re.compile(r"(?:.+\.)?sampler_head\.layers\.([01])\.(linear|norm)\.weight")

_READABLE = r"model.*\.safetensors"  # the files that mlx-lm loads
_MODEL_FILE = re.compile(r"(model|pytorch_model).*")
_TRAINING_STATE = re.compile(
    r"(optim|sched|lr_sched|rng_state|random_states|training_args|scaler|grad_scaler)|.*optim_states"
)
_MAYBE_STATE = re.compile(r"((train(ing|er)?_)?state|global_step\d*)\.(pt|pth|bin|ckpt)")
_BASE_KEYS = ("base_model_name_or_path", "model_path", "base_model")
_LONGEST_NAME = 512  # names are matched by patterns whose time grows with the square of this


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder or file contains.

    Attributes:
        path: the folder or file; the subfolder of a checkpoint in a subfolder, and the folder of a
            file that is only a part of a PEFT checkpoint.
        kind: ``"model"``, ``"adapter"`` (of mlx-mtp), ``"checkpoint"`` (another project's adapter)
            or ``"unknown"``.
        layout: layout of a checkpoint, as far as it can be known without its tensors.
        base: base model that an adapter or checkpoint names.
        weights: name of a file of its weights, None if it has none.
        adapter: what a model's folder contains next to the model, in itself or in ``adapter/``.
    """

    path: Path
    kind: str = "unknown"
    layout: str | None = None
    base: str | None = None
    weights: str | None = None
    adapter: Contents | None = None

    @property
    def is_pickled(self) -> bool:
        """Whether the weights are in a PyTorch file, which only ``--allow-pickle`` reads."""
        return self.weights is not None and self.weights.endswith(TORCH_SUFFIXES)

    @property
    def is_readable(self) -> bool:
        """Whether ``load`` can read a model's weights without a conversion."""
        return bool(self.weights and re.fullmatch(_READABLE, self.weights)) or self.is_gguf

    @property
    def is_gguf(self) -> bool:
        """Whether this is a GGUF file, which ``load`` converts into the cache."""
        return self.kind == "model" and self.weights == self.path.name


def look(path: Path) -> Contents:
    """Return what a folder or file contains; anything that cannot be read is unknown."""
    try:
        return _of_folder(path) if path.is_dir() else _of_file(path)
    except OSError:
        return Contents(path=path)


def layout_of(configs: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str | None:
    """Return the layout of an adapter checkpoint, None if it has no known one.

    Args:
        configs: JSON objects next to its tensors, by file name.
        names: names of its tensors, none of them very long.
    """
    names = list(names)
    peft = configs.get(ADAPTER_CONFIG, {})
    if "peft_type" in peft:
        tables = (match[1] for name in names if (match := PEFT_TABLE.fullmatch(name)))
        has_masks = bool(
            peft.get("trainable_token_indices")
            or peft.get("alora_invocation_tokens")
            or any("sampler." in name or PEFT_ROWS.fullmatch(name) for name in names)
            or "embed_tokens" in tables
        )
        return "peft-mtp" if has_masks else "peft-lora"
    has_arguments = {"draft_length", "lora_rank"} <= set(configs.get(MODEL_CONFIG, {}))
    if any(map(GLORA_LORA.fullmatch, names)) and (
        has_arguments or any(map(GLORA_SAMPLER.fullmatch, names))
    ):
        return "mtp-glora"
    return "state-dict" if any(map(LORA.fullmatch, names)) else None


def checkpoint_folder(folder: Path) -> Path:
    """Return the folder with a checkpoint's files, to which ``latest.json`` may point.

    Raises:
        ValueError: ``latest.json`` names no folder next to it.
    """
    if (folder / LATEST_FILE).is_file():
        name = read_json_object(folder / LATEST_FILE).get("latest")
        if not is_plain_name(name) or not (folder / str(name)).is_dir():
            raise ValueError(f"{folder / LATEST_FILE} names no folder next to it: {shown(name)}")
        return folder / str(name)
    inner = folder / ADAPTER_FOLDER
    if not (folder / ADAPTER_CONFIG).is_file() and (inner / ADAPTER_CONFIG).is_file():
        return inner
    return folder


def tensor_files(folder: Path) -> list[str]:
    """Name the files of a folder that hold tensors of a checkpoint.

    States of training are not among them, nor PyTorch copies of safetensors files, nor a base model
    in the same folder.
    """
    all_names = sorted(
        path.name for path in folder.iterdir() if path.suffix in TENSOR_SUFFIXES and path.is_file()
    )
    names = [name for name in all_names if not _TRAINING_STATE.match(name)]
    safe = {Path(name).stem for name in names if name.endswith(".safetensors")}
    whole_model = any(stem == "model" or stem.startswith("model-") for stem in safe)
    kept = []
    for name in names:
        twice = Path(name).stem in safe or (whole_model and name.startswith("pytorch_model"))
        if "sampler_model" in safe:  # PEFT's example once wrote both
            twice |= name == "sampler.pt"
        state = bool(safe) and _MAYBE_STATE.fullmatch(name) is not None
        if name.endswith(".safetensors") or not (twice or state):
            kept.append(name)
    own = [name for name in kept if not _MODEL_FILE.match(name)]
    is_peft = "peft_type" in _json(folder / ADAPTER_CONFIG)
    separate = is_peft or any(map(LORA.fullmatch, _tensor_names(folder, own)))
    return own if own and separate and "model_type" in _json(folder / MODEL_CONFIG) else kept


def model_problem(contents: Contents, name: str | None = None, *, mtp: bool = True) -> str | None:
    """Return why ``--model`` cannot use this, with what to do about it, or None if it can.

    Args:
        contents: what ``look`` found.
        name: how the user calls it; by default its path.
        mtp: whether drafts are to be proposed, so that an unconverted adapter matters.
    """
    name, inner = name or str(contents.path), contents.adapter
    unconverted = inner if inner is not None and inner.kind == "checkpoint" else None
    if contents.kind == "adapter":
        flags = ["--model", contents.base or "MODEL", "--adapter-path", name]
        return f"{name} is an MTP adapter, not a model: use {shlex.join(flags)}"
    if contents.kind == "checkpoint":
        source = _source(contents, name)
        command = _command(checkpoint=contents, name=source, model=contents.base or "MODEL")
        return f"{name} is {_described(contents)}, not a model: convert it with {command}"
    if contents.kind == "model" and not contents.weights:
        why = "it has no weights, neither model*.safetensors nor a PyTorch file"
        return f"cannot load the model in {name}: {why}"
    if contents.kind == "model" and not contents.is_readable:
        command = _command(checkpoint=unconverted, name=name, model=name, base=contents)
        return f"{name} has its weights in {contents.weights}: convert it with {command}"
    if mtp and (unused := unconverted_adapter(contents, name)):
        return f"{unused}, or use --no-mtp"
    return None if contents.kind == "model" else _unknown(contents, name, kind="model")


def unconverted_adapter(contents: Contents, name: str) -> str | None:
    """Return which checkpoint a model's folder contains and how to convert it, if it has one."""
    inner = contents.adapter
    if contents.kind != "model" or inner is None or inner.kind != "checkpoint":
        return None
    where = "in it" if inner.path == contents.path else f"in {inner.path.name}/"
    command = _command(checkpoint=inner, name=name, model=name)
    return f"{name} has {_described(inner)} {where}: convert it with {command}"


def adapter_problem(
    contents: Contents, name: str | None = None, *, model: str | None
) -> str | None:
    """Return why ``--adapter-path`` cannot use this, with what to do about it, or None if it can.

    Args:
        contents: what ``look`` found.
        name: how the user calls it; by default its path.
        model: the model that it is used with, None for the default model.
    """
    name = name or str(contents.path)
    if contents.kind == "adapter":
        return None
    if contents.kind == "checkpoint":
        source = _source(contents, name)
        command = _command(checkpoint=contents, name=source, base_model=model)
        return f"{name} is {_described(contents)}, not an adapter: convert it with {command}"
    if contents.is_gguf:
        return f"{name} is a GGUF file, not an adapter: adapters in GGUF are not supported"
    if contents.kind == "model":
        inner = contents.adapter
        if inner is not None and inner.kind == "adapter":
            hint = f"use --model {shlex.quote(name)}, which includes an adapter"
        else:
            hint = model_problem(contents, name) or f"use --model {shlex.quote(name)}"
        return f"{name} is a model, not an adapter: {hint}"
    return _unknown(contents, name, kind="adapter")


def _of_folder(folder: Path) -> Contents:
    config = _json(folder / MODEL_CONFIG)
    is_model = (folder / MODEL_CONFIG).is_file() and ("model_type" in config or not config)
    here = _adapter_in(folder, is_model=is_model)
    if not is_model:
        if here is None:
            with contextlib.suppress(ValueError):
                inner = checkpoint_folder(folder)
                here = None if inner == folder else _adapter_in(inner, is_model=False)
        pickled = next((n for n in tensor_files(folder) if n.endswith(TORCH_SUFFIXES)), None)
        return here or Contents(path=folder, base=_base_in([config]), weights=pickled)
    weights = _model_weights(folder)
    if here is not None and (weights is None or weights == here.weights):
        return here  # a checkpoint next to the settings of its base model, or inside its tensors
    if here is None and (folder / ADAPTER_FOLDER).is_dir():
        here = _adapter_in(folder / ADAPTER_FOLDER, is_model=False)
    return Contents(path=folder, kind="model", weights=weights, adapter=here)


def _of_file(path: Path) -> Contents:
    if is_gguf(path):
        return Contents(path=path, kind="model", weights=path.name)
    if path.suffix not in TENSOR_SUFFIXES:
        return Contents(path=path)
    configs = {
        name: _json(path.parent / name)
        for name in (f"{path.stem}.json", ADAPTER_CONFIG, MODEL_CONFIG)
        if (path.parent / name).is_file()
    }
    if "peft_type" in configs.get(ADAPTER_CONFIG, {}) and not _MODEL_FILE.match(path.name):
        found = _adapter_in(path.parent, is_model="model_type" in configs.get(MODEL_CONFIG, {}))
        if found is not None:
            return found
    layout = layout_of(configs, _tensor_names(path.parent, [path.name]))
    kind = "unknown" if layout is None or path.name == ADAPTER_WEIGHTS else "checkpoint"
    return Contents(
        path=path, kind=kind, layout=layout, base=_base_in(configs.values()), weights=path.name
    )


def _adapter_in(folder: Path, *, is_model: bool) -> Contents | None:
    """Return the adapter or checkpoint whose files are directly in a folder, if there is one."""
    configs = {
        path.name: _json(path)
        for path in (folder / ADAPTER_CONFIG, folder / MODEL_CONFIG)
        if path.is_file() and not (is_model and path.name == MODEL_CONFIG)
    }
    adapter = configs.get(ADAPTER_CONFIG, {})
    base = _base_in(configs.values())
    if adapter.get("fine_tune_type") in _OWN_ADAPTERS:
        weights = ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).is_file() else None
        return Contents(path=folder, kind="adapter", base=base, weights=weights)
    files = tensor_files(folder)
    layout = layout_of(configs, _tensor_names(folder, files))
    if layout is None or not files:
        return None
    weights = next((name for name in files if name.endswith(TORCH_SUFFIXES)), files[0])
    return Contents(path=folder, kind="checkpoint", layout=layout, base=base, weights=weights)


def _model_weights(folder: Path) -> str | None:
    """Name a file of a model's weights, one that needs no conversion if there is such a file."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in TENSOR_SUFFIXES and path.is_file()
    )
    names = [name for name in names if not _TRAINING_STATE.match(name)]
    for pattern in (_READABLE, r"pytorch_model.*\.bin"):
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return found[0]
    others = [name for name in names if not name.startswith(("adapter", "sampler"))]
    return others[0] if others else None


def _tensor_names(folder: Path, files: Iterable[str]) -> list[str]:
    """Return the names of the tensors in safetensors files, as far as their headers are valid."""
    names: list[str] = []
    for file in files:
        if file.endswith(".safetensors"):
            with contextlib.suppress(ValueError):
                names += check_safetensors(folder / file)
    return [name for name in names if len(name) <= _LONGEST_NAME]


def _base_in(configs: Iterable[Mapping[str, Any]]) -> str | None:
    names = (config.get(key) for config in configs for key in _BASE_KEYS)
    usable = (name for name in names if isinstance(name, str) and name.isprintable())
    return next(filter(None, usable), None)


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one if the file cannot be read."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _source(contents: Contents, name: str) -> str:
    """Return what to convert if the user calls it ``name``."""
    return str(contents.path) if Path(name).is_file() else name


def _described(checkpoint: Contents) -> str:
    # The names in a PyTorch file are unknown, and only they may tell peft-mtp from peft-lora.
    is_open = checkpoint.is_pickled and checkpoint.layout == "peft-lora"
    return f"an unconverted {'PEFT' if is_open else checkpoint.layout} checkpoint"


def _command(
    *,
    checkpoint: Contents | None,
    name: str,
    model: str | None = None,
    base_model: str | None = None,
    base: Contents | None = None,
) -> str:
    """Return the conversion of a model, of a checkpoint, or of both."""
    parts = ["mlx-mtp", "convert"]
    parts += [] if model is None else ["--hf-path", model]
    parts += [] if checkpoint is None else ["--mtp-path", name]
    parts += [] if base_model is None else ["--base-model", base_model]
    pickled = any(part is not None and part.is_pickled for part in (checkpoint, base))
    parts += ["--allow-pickle"] if pickled else []
    out = Path(name).resolve()
    out_name = out.stem if out.suffix in TENSOR_SUFFIXES else out.name
    return shlex.join([*parts, "--mlx-path", f"{out_name}-mlx"])


def _unknown(contents: Contents, name: str, *, kind: str) -> str:
    """Return what to do about a folder or file that is neither model nor adapter."""
    path, needed = contents.path, "an adapter" if kind == "adapter" else "a model"
    if path.suffix == SUFFIX and path.is_file():
        return f"{kind} {name} is not a GGUF file, in spite of its name"
    if path.is_dir():
        lacks = f"it has no {ADAPTER_CONFIG if kind == 'adapter' else MODEL_CONFIG}"
        if kind == "model" and (path / MODEL_CONFIG).is_file():
            lacks = f"its {MODEL_CONFIG} has no model_type"
        what = f"{name} is not {needed} folder ({lacks})"
    else:
        what = f"{kind} {name} is a file, not a folder"
    if kind == "model" and (files := gguf_files(path)):
        return f"{what}: use --model {shlex.quote(str(files[0]))}"
    is_part = path.is_file() and path.suffix in TENSOR_SUFFIXES
    folder = look(path.parent) if is_part else Contents(path=path)
    is_whole = path.name == folder.weights or _MODEL_FILE.match(path.name)
    if is_whole and folder.kind in ("model", "adapter"):
        flag = "--model" if folder.kind == "model" else "--adapter-path"
        return f"{what}: use its folder, {flag} {shlex.quote(str(path.parent))}"
    if contents.is_pickled:
        model = str(path.parent) if folder.kind == "model" else contents.base or "MODEL"
        command = _command(checkpoint=contents, name=name, model=model)
        return f"{what}: if it is an MTP checkpoint, convert it with {command}"
    return what
