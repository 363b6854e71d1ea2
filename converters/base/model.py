"""Conversion of a base model from a Hugging Face folder to an mlx-lm model folder.

mlx-lm builds and quantises the model lazily.  This module adds checks of every file before MLX
reads it, PyTorch files and sentencepiece tokenizers as sources, and a writer that keeps one tensor
in memory at a time, so that peak memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm import utils as lm_utils

from mlx_mtp.converters.base.files import (
    CONFIG_FILE,
    copy_papers,
    read_config,
    resolve_base,
    stage,
)
from mlx_mtp.converters.base.native import ConvertedModules, read_modules, write_modules
from mlx_mtp.converters.tokenizer.write import write_tokenizer
from mlx_mtp.model.base import open_base
from mlx_mtp.storage.cards import read_licence
from mlx_mtp.storage.safetensors import shown
from mlx_mtp.storage.shards import MAX_SHARD_BYTES, write_shards
from mlx_mtp.terminal import Status, progress

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DTYPES = ("float16", "bfloat16", "float32")
BITS = (1, 2, 3, 4, 5, 6, 8)  # of mx.quantize in its affine mode
GROUP_SIZES = (32, 64, 128)
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 64
DEFAULT_NATIVE_BITS = 8  # a module is a layer or two, and each draft that it loses costs a step


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How weights are quantised: ``bits`` per weight, one scale per ``group_size`` weights.

    Native MTP modules have ``native_bits`` per weight.
    """

    bits: int = DEFAULT_BITS
    group_size: int = DEFAULT_GROUP_SIZE
    native_bits: int = DEFAULT_NATIVE_BITS


@dataclass(frozen=True, kw_only=True)
class BaseResult:
    """The result of converting a base model.

    Attributes:
        source: the folder that was converted.
        model_type: as in ``config.json``.
        licence: licence in the source's model card.
        dtype: the type that the weights were cast to; None if they were not cast.
        quantisation: None without ``quantise``.
        num_bytes: size of all written tensors.
        num_parameters: number of the model's parameters.
        compared_texts: number of texts on which the tokenizers were compared.
        native: what became of its native MTP modules; None if it has none.
    """

    source: Path
    model_type: str
    licence: str | None
    dtype: str | None
    quantisation: Quantisation | None
    num_bytes: int
    num_parameters: int
    compared_texts: int
    native: ConvertedModules | None = None

    @property
    def summary(self) -> str:
        """A short description."""
        mega = self.num_bytes >= 10**6
        size = f"{self.num_bytes / 1e6:.1f} MB" if mega else f"{self.num_bytes / 1e3:.1f} KB"
        numbers = f"{self.num_parameters / 1e6:.1f}M parameters, {size}"
        if self.quantisation is None:
            return f"{self.model_type}, {numbers}" + (f", {self.dtype}" if self.dtype else "")
        kind = f"{self.quantisation.bits}-bit in groups of {self.quantisation.group_size}"
        return f"{self.model_type}, {numbers}, {kind}"


def convert_base(
    hf_path: str,
    output: Path,
    *,
    quantise: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_native_bits: int | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    copy_tokenizer: bool = False,
    on_model: Callable[[Any, dict[str, Any]], None] | None = None,
    on_written: Callable[[BaseResult], None] | None = None,
) -> BaseResult:
    """Convert a base model into an mlx-lm model folder; ``config.json`` is written last.

    Args:
        hf_path: folder or hub id: safetensors or PyTorch weights, in one file or in shards.
        output: an empty folder; emptied again if the conversion fails.
        quantise: quantise the weights like ``mlx_lm.convert -q``.
        q_bits: bits per weight, 4 by default.
        q_group_size: weights per scale, 64 by default.
        q_native_bits: bits per weight of native MTP modules, 8 by default.
        dtype: ``float16``, ``bfloat16`` or ``float32``; the model's own by default.
        allow_pickle: whether PyTorch files may be read, in a sandbox.
        trust_remote_code: whether code in the model's folder may run.
        copy_tokenizer: copy the tokenizer, which is one that this program wrote.
        on_model: called with the lazy mlx-lm model, cast but not quantised, and its configuration
            when only the tokenizer has been written; may write more files to ``output``.
        on_written: called when only ``config.json`` is missing.

    Raises:
        ValueError: something is missing, broken or unsupported; one line that names it.
        OSError: the output cannot be written.
    """
    quantisation = _quantisation(quantise, q_bits, q_group_size, q_native_bits)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    source = resolve_base(hf_path, trust_remote_code=trust_remote_code)
    config = read_config(source, trust_remote_code=trust_remote_code)
    _check_supported(source, config)
    with _emptied_on_failure(output), _scratch(output) as scratch:
        if copy_tokenizer:
            texts = 0
            for name in TOKENIZER_FILES:
                shutil.copyfile(source / name, output / name)
        else:
            with Status("Converting the tokenizer ..."):
                texts = write_tokenizer(
                    source,
                    output,
                    scratch,
                    model_type=config["model_type"],
                    trust_remote_code=trust_remote_code,
                )
        staged = stage(source, config, scratch, allow_pickle=allow_pickle)
        with Status("Loading the model ..."):
            model, config = _load(source, staged, trust_remote_code=trust_remote_code)
        cast = _cast(model, config, dtype)
        modules = read_modules(staged, source, model, config)
        native = write_modules(
            modules,
            output,
            model,
            config,
            bits=None if quantisation is None else quantisation.native_bits,
            group_size=None if quantisation is None else quantisation.group_size,
        )
        if on_model is not None:
            on_model(model, config)
        if quantisation is not None:
            config = _quantise(source, model, config, quantisation)
        num_parameters = lm_utils.get_total_parameters(model)
        keep_vision = "vision_tower" in getattr(model, "model", {})  # as mlx-lm's own save
        num_bytes = _write_weights(model, output, num_parameters=num_parameters)
        copy_papers(source, output, code=trust_remote_code)
        result = BaseResult(
            source=source,
            model_type=config["model_type"],
            licence=read_licence(source),
            dtype=cast,
            quantisation=quantisation,
            num_bytes=num_bytes,
            num_parameters=num_parameters,
            compared_texts=texts,
            native=native,
        )
        if on_written is not None:
            on_written(result)
        lm_utils.save_config(config, output / CONFIG_FILE, keep_vision_config=keep_vision)
    return result


def _quantisation(
    quantise: bool, bits: int | None, group_size: int | None, native_bits: int | None
) -> Quantisation | None:
    """Check the options of quantisation."""
    if not quantise:
        if (bits, group_size, native_bits) != (None, None, None):
            raise ValueError("q_bits, q_group_size and q_native_bits need quantise (-q)")
        return None
    bits = DEFAULT_BITS if bits is None else bits
    native_bits = DEFAULT_NATIVE_BITS if native_bits is None else native_bits
    group_size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    for name, value in (("q_bits", bits), ("q_native_bits", native_bits)):
        if value not in BITS:
            raise ValueError(f"{name} must be one of {', '.join(map(str, BITS))}, got {value}")
    if group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"q_group_size must be one of {allowed}, got {group_size}")
    return Quantisation(bits=bits, group_size=group_size, native_bits=native_bits)


def _check_supported(source: Path, config: dict[str, Any]) -> None:
    """Refuse an architecture that mlx-lm does not support."""
    if config.get("model_file"):
        return
    try:
        lm_utils._get_classes(config)
    except (ValueError, AttributeError, ImportError, TypeError, SystemExit):  # the last: olmo
        raise ValueError(
            f"{source}: mlx-lm does not support model_type {shown(repr(config['model_type']))}"
        ) from None


@contextlib.contextmanager
def _emptied_on_failure(output: Path) -> Iterator[None]:
    """Remove the contents of a folder if the block fails."""
    try:
        yield
    except BaseException:
        for path in output.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


@contextlib.contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Create a private folder on the disk of the output, removed at the end."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.scratch.") as name:
        yield Path(name)


def _load(source: Path, staged: Path, *, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Build the model; its weights are not read until they are written."""
    try:
        model, config = open_base(staged, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file or setting can raise anything
        raise ValueError(f"cannot load the model in {source}: {shown(error)}") from None
    parameters: Any = dict(tree_flatten(model.parameters()))
    modules = {name.rpartition(".")[0] for name in parameters if "scale" in name}
    for name, value in parameters.items():
        packed = name.rpartition(".")[0] in modules
        if not (packed or mx.issubdtype(value.dtype, mx.floating)) and name.endswith("weight"):
            raise ValueError(
                f"{source}: {name} has type {value.dtype}, which mlx-lm does not unpack for "
                f"{config['model_type']}"
            )
    return model, config


def _cast(model: Any, config: dict[str, Any], dtype: str | None) -> str | None:
    """Cast the weights lazily, like mlx-lm; return the type, None if they are not cast."""
    inner = config.get("text_config")
    places = [config, *([inner] if isinstance(inner, dict) else [])]
    keys = ("torch_dtype", "dtype")  # transformers 5 writes the second one
    named = [place[key] for place in places for key in keys if place.get(key) is not None]
    chosen = dtype or next(iter(named), None)
    if chosen not in DTYPES:
        return None
    target = getattr(mx, chosen)
    may_cast = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(target) if floating and may_cast(name) else value

    model.update(tree_map_with_path(cast, model.parameters()))
    for place in places if dtype else []:
        place.update({key: dtype for key in keys if key in place})
    return chosen


def _quantise(
    source: Path, model: Any, config: dict[str, Any], quantisation: Quantisation
) -> dict[str, Any]:
    """Quantise the model in place, lazily; return its new configuration."""
    if config.get("quantization") or config.get("quantization_config"):
        raise ValueError(f"{source} is already quantised: -q would round its weights a second time")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, config = lm_utils.quantize_model(
                model, config, quantisation.group_size, quantisation.bits
            )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"cannot quantise {source}: {shown(error)}") from None
    parameters: Any = tree_flatten(model.parameters())
    if not any(name.endswith(".scales") for name, _ in parameters):
        raise ValueError(
            f"{source} has no layer whose width {quantisation.group_size} divides: "
            f"choose another q_group_size of {', '.join(map(str, GROUP_SIZES))}"
        )
    return config


def _write_weights(model: Any, output: Path, *, num_parameters: int) -> int:
    """Write the weights and remove them from the model; return their size in bytes."""
    tensors: Any = dict(tree_flatten(model.parameters()))
    # The model must not keep what has been written in memory.
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    num_bytes = sum(value.nbytes for value in tensors.values())
    try:
        with progress(total=num_bytes, desc="Writing", unit="B", unit_scale=True) as bar:
            return write_shards(
                output,
                tensors,
                max_bytes=MAX_SHARD_BYTES,
                num_parameters=num_parameters,
                written=bar.update,
            )
    except RuntimeError as error:  # MLX, when a file cannot be read or memory is short
        raise ValueError(f"cannot convert {output.name}: {shown(error)}") from None
