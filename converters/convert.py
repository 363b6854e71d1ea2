"""Convert a base model, an adapter checkpoint, or both; the output appears complete or not at all.

A base model becomes an mlx-lm model folder, a checkpoint an adapter folder, and both together a
bundle: the model at the root and its adapter in ``adapter/``, where ``loading`` finds it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.converters.base.facts import base_name, find_base, load_base, read_facts
from mlx_mtp.converters.base.model import BaseResult, convert_base
from mlx_mtp.converters.card import adapter_card, base_card
from mlx_mtp.converters.checkpoint import Checkpoint, read_checkpoint
from mlx_mtp.converters.gguf import opened_gguf
from mlx_mtp.converters.layouts import (
    BaseFacts,
    ConvertedAdapter,
    convert_layout,
    describe,
    recognise,
)
from mlx_mtp.model.config import BUNDLED_ADAPTER, CONFIG_FILE, WEIGHTS_FILE, MTPConfig, SamplerKind
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from mlx_mtp.storage.cards import CARD_FILE, read_licence
from mlx_mtp.storage.contents import look
from mlx_mtp.storage.folders import new_folder
from mlx_mtp.storage.gguf.parts import is_gguf
from mlx_mtp.storage.safetensors import read_json_object, shown
from mlx_mtp.terminal import Status

MODEL_CONFIG_FILE = "config.json"
Check = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How to read an adapter checkpoint.

    Attributes:
        layout: name of its layout; detected if None.
        layout_options: what the checkpoint does not contain (``layouts`` lists the keys).
        allow_pickle: whether PyTorch files may be read, in a sandbox.
        licence: hub identifier of the adapter's licence; by default the checkpoint's.
    """

    layout: str | None = None
    layout_options: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """How to write the base model; see ``convert_base``."""

    quantise: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_native_bits: int | None = None
    dtype: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The result of a conversion.

    Attributes:
        base: result for the base model, if one was converted.
        adapter: configuration of the adapter, if one was converted.
        layout: the layout of its checkpoint.
        notes: assumptions about the checkpoint, one line per item.
        types: what happened to each type of a GGUF file's tensors, one line per type.
    """

    base: BaseResult | None = None
    adapter: MTPConfig | None = None
    layout: str | None = None
    notes: tuple[str, ...] = ()
    types: tuple[str, ...] = ()


def convert_model(
    hf_path: str,
    output: Path,
    *,
    checkpoint: Path | None = None,
    base: BaseOptions | None = None,
    adapter: AdapterOptions | None = None,
    force: bool = False,
    check: Check | None = None,
) -> Converted:
    """Convert a base model and, optionally, an adapter checkpoint for it.

    Args:
        hf_path: folder, hub id or GGUF file of the base model.
        output: new folder; the adapter is written to ``adapter/`` in it.
        checkpoint: folder or file of the adapter checkpoint.
        base: how to write the model.
        adapter: how to read the checkpoint.
        force: replace ``output`` if it is a model or adapter folder, or empty.
        check: called with the finished folder before it is renamed; may raise to prevent that.

    Raises:
        ValueError: something cannot be read, converted or written; the message names it.
    """
    check_output(output, force=force, inputs=[hf_path, checkpoint])
    options = adapter or AdapterOptions()
    read = None if checkpoint is None else _read(checkpoint, options)
    named = None if read is None else describe(read).base_model
    base = base or BaseOptions()
    result, name, facts = Converted(), base_name(hf_path, named=named), ()

    def add_adapter(base_model: Any, base_config: dict[str, Any]) -> None:
        """Write the adapter before the model, so that an incomplete folder does not load."""
        nonlocal result
        if read is not None:
            with Status("Converting the adapter ..."):
                model = MTPModel(base_model, name=name)
                converted = _convert(read, read_facts(model, draft, base_config), options)
                licence = options.licence or read_licence(read.path)
                config = _write_adapter(draft / BUNDLED_ADAPTER, converted, model, licence)
            result = replace(result, adapter=config, layout=converted.layout, notes=converted.notes)

    def add_card(written: BaseResult) -> None:
        nonlocal result
        result = replace(result, base=written)
        card = base_card(
            name, written, adapter=result.adapter, licence=written.licence, facts=facts
        )
        (draft / CARD_FILE).write_text(card, encoding="utf-8")

    with output_folder(output, force=force) as draft, contextlib.ExitStack() as stack:
        source, gguf = hf_path, Path(hf_path).expanduser()
        from_gguf = is_gguf(gguf)
        if from_gguf:
            keep = not base.quantise and base.dtype is None
            opened = stack.enter_context(
                opened_gguf(gguf, draft.parent, keep=keep, floats=base.dtype)
            )
            source, name, facts = str(opened.folder), opened.name, opened.facts
            result = replace(result, types=opened.types)
        convert_base(
            source,
            draft,
            copy_tokenizer=from_gguf,
            on_model=add_adapter,
            on_written=add_card,
            **vars(base),
        )
        if check is not None:
            check(draft)
    return result


def convert_adapter(
    checkpoint: Path,
    output: Path,
    *,
    base_model: Path | str | None = None,
    adapter: AdapterOptions | None = None,
    force: bool = False,
    check: Check | None = None,
) -> Converted:
    """Convert an adapter checkpoint into an adapter folder.

    Args:
        checkpoint: a folder or a file in one of the layouts of ``layouts``.
        output: new folder with ``adapter_config.json``, ``adapters.safetensors``, a model card.
        base_model: folder or hub id of the mlx-lm model that the adapter is for; by default the
            one that the checkpoint names (for the default model, the embedded copy).
        adapter: how to read the checkpoint.
        force: replace ``output`` if it is an adapter folder or empty.
        check: called with the finished folder before it is renamed; may raise to prevent that.

    Raises:
        ValueError: the checkpoint cannot be converted or does not fit the base model, or the
            output exists or cannot be written.  The message names the file or tensor.
    """
    check_output(output, force=force, inputs=[checkpoint, base_model])
    options = adapter or AdapterOptions()
    read = _read(checkpoint, options)
    chosen = None if base_model is None else str(base_model)
    name, folder = find_base(chosen, named=describe(read).base_model, checkpoint=checkpoint)
    with Status("Converting the adapter ..."):
        model = load_base(folder, name=name)
        base_config = read_json_object(folder / MODEL_CONFIG_FILE)
        converted = _convert(read, read_facts(model, folder, base_config), options)
    licence = options.licence or read_licence(checkpoint)
    with output_folder(output, force=force) as draft:
        config = _write_adapter(draft, converted, model, licence)
        if check is not None:
            check(draft)
    return Converted(adapter=config, layout=converted.layout, notes=converted.notes)


def check_output(output: Path, *, force: bool, inputs: Sequence[Path | str | None]) -> None:
    """Refuse to overwrite a folder; with ``force``, allow only a model or adapter folder.

    Args:
        output: folder to write.
        force: whether it may be replaced.
        inputs: folders, files or hub ids that are read; they must not be inside ``output``.

    Raises:
        ValueError: the message names ``output``.
    """
    if not output.exists() and not output.is_symlink():
        return
    place = output.resolve()
    for source in [Path.cwd(), *inputs]:
        path = None if source is None else Path(source).expanduser().resolve()
        if path is not None and path.exists() and (path == place or place in path.parents):
            what = "the working directory" if source == Path.cwd() else f"{source}, which is read"
            raise ValueError(f"{output} would replace {what}: choose another folder")
    if not force:
        raise ValueError(f"{output} already exists (--force replaces it)")
    if output.is_symlink():
        raise ValueError(f"{output} is a link, which is not replaced")
    if not output.is_dir() or (any(output.iterdir()) and not _is_replaceable(output)):
        raise ValueError(f"{output} exists and is neither a model nor an adapter folder")


def _is_replaceable(folder: Path) -> bool:
    """Return whether a folder is a model or an adapter, and not a git repository."""
    if (folder / ".git").exists():
        return False
    model, adapter = (_json_keys(folder / name) for name in (MODEL_CONFIG_FILE, CONFIG_FILE))
    return "model_type" in model or bool({"fine_tune_type", "peft_type"} & adapter)


def _json_keys(path: Path) -> set[str]:
    try:
        return set(read_json_object(path))
    except ValueError:
        return set()


@contextlib.contextmanager
def output_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """``new_folder``, with its failures as ``ValueError``."""
    try:
        with new_folder(output, replace=force) as draft:
            yield draft
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as RuntimeError
        raise ValueError(f"cannot write {output}: {error}") from None


def _read(checkpoint: Path, options: AdapterOptions) -> Checkpoint:
    """Read a checkpoint and check that its layout is known, before any slow work.

    In published bundles the adapter is in a subfolder of the model.
    """
    contents = look(checkpoint)
    if contents.kind == "model" and contents.adapter is not None:
        checkpoint = contents.adapter.path
    with Status(f"Reading {checkpoint} ..."):
        read = read_checkpoint(checkpoint, allow_pickle=options.allow_pickle)
    recognise(read, layout=options.layout)
    return read


def _convert(read: Checkpoint, facts: BaseFacts, options: AdapterOptions) -> ConvertedAdapter:
    try:
        converted = convert_layout(
            read, facts, layout=options.layout, options=options.layout_options
        )
    except ValueError as error:
        raise ValueError(f"{read.path}: {error}") from None
    if converted.base_model in (None, facts.name):
        return converted
    note = f"the checkpoint names base {shown(converted.base_model)}, {facts.name} was used"
    return replace(converted, notes=(*converted.notes, note))


def _write_adapter(
    folder: Path, converted: ConvertedAdapter, model: MTPModel, licence: str | None
) -> MTPConfig:
    """Write an adapter's files into ``folder``, the configuration last."""
    folder.mkdir(exist_ok=True)
    config = adapter_config(converted, model)
    mx.save_safetensors(str(folder / WEIGHTS_FILE), converted.tensors, {"format": "mlx"})
    card = adapter_card(config, licence=licence, notes=converted.notes)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return config


def adapter_config(converted: ConvertedAdapter, model: MTPModel) -> MTPConfig:
    """Return the configuration of a converted adapter for this base model."""
    kind = converted.sampler or SamplerKind()
    paths = [name.removesuffix(".lora_a") for name in converted.tensors if name.endswith(".lora_a")]
    return MTPConfig(
        num_draft_tokens=converted.num_draft_tokens,
        rank=converted.rank,
        scale=converted.scale,
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in paths})),
        sampler=None if converted.sampler is None else "mlp",
        base_model=model.name,
        base_model_type=model.base.model_type,
        base_hidden_size=model.hidden_size,
        base_num_layers=len(model.base.layers),
        base_vocab_size=model.vocab_size,
        base_fingerprint=fingerprint(model.base),
        sampler_norm=kind.norm,
        sampler_norm_eps=kind.norm_eps,
        sampler_bias=kind.bias,
        sampler_residual=kind.residual,
        rank_pattern=dict(converted.rank_pattern),
        scale_pattern=dict(converted.scale_pattern),
        noise_ids=converted.noise_ids,
    )
