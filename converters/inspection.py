"""Description of a folder or file, without running anything in it.

A whole model is never loaded: headers, configurations and hashes of files are read, of large files
only on request, and for an adapter checkpoint the names and shapes of its tensors.  PyTorch files
are only read if the caller allows it; otherwise the globals that their pickles name are listed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_mtp.converters.base.facts import open_base_lazily
from mlx_mtp.converters.base.files import weight_files
from mlx_mtp.converters.base.summary import summarise
from mlx_mtp.converters.checkpoint import read_checkpoint
from mlx_mtp.converters.drafters import DrafterFacts, describe_drafters
from mlx_mtp.converters.gguf import describe_gguf
from mlx_mtp.converters.layouts import describe
from mlx_mtp.converters.pytorch.file_format import pickle_globals
from mlx_mtp.model.aliases import as_known
from mlx_mtp.model.config import HeadsConfig, MTPConfig, read_any_config
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.native.names import belongs_to_modules
from mlx_mtp.model.native.stored import find_native, read_native
from mlx_mtp.model.statistics import read_statistics, summary_lines
from mlx_mtp.storage.contents import Contents, look, model_problem
from mlx_mtp.storage.safetensors import check_safetensors, read_json_object, shown
from mlx_mtp.terminal import human_bytes

MODEL_CONFIG_FILE = "config.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
HASHED_BYTES = 1 << 27  # larger files are hashed on request only
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One file: its name, size and SHA-256, and the number of tensors by type if it has any.

    The hash of a large file is None unless it was asked for.
    """

    name: str
    num_bytes: int
    sha256: str | None
    tensors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The description of a folder or file.

    Attributes:
        path: the folder or file.
        kind: ``"model"``, ``"adapter"`` (of mlx-mtp), ``"bundle"`` of these two, ``"checkpoint"``
            (another project's adapter) or ``"unknown"``.
        facts: labels and JSON-ready values, in the order of printing.
        files: the files in it.
        problems: what would be refused and why, one line per item.
        adapter: the adapter of a bundle.
        use: what other commands say if this is their model; None if they can use it.
        drafters: what a model has to propose tokens with, and what it would need.
        statistics: what evaluations have shown of an adapter's drafts, see
            ``AdapterStatistics.summary``.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    files: tuple[FileFacts, ...]
    problems: tuple[str, ...] = ()
    adapter: Inspection | None = None
    use: str | None = None
    drafters: tuple[DrafterFacts, ...] = ()
    statistics: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)

    def text(self) -> str:
        """Return everything as lines for a terminal."""
        rows = [(label, _shown(value, label)) for label, value in self.facts.items()]
        width = max((len(label) for label, _ in rows), default=0)
        lines = [f"{shown(self.path, limit=1000)}: {self.kind}"]
        lines += [f"  {label:<{width}}  {value}" for label, value in rows if value]
        lines += ["  drafters"] if self.drafters else []
        lines += [
            f"    {drafter.source:<11}  {'yes' if drafter.is_available else 'no':<3}  "
            f"{shown(drafter.detail, limit=1000)}"
            for drafter in self.drafters
        ]
        lines += ["  files"]
        name_width = max((len(file.name) for file in self.files), default=0)
        lines += [
            f"    {shown(file.name):<{name_width}}  {human_bytes(file.num_bytes):>9}  "
            f"{_hash_text(file)}{_tensor_text(file.tensors)}".rstrip()
            for file in self.files
        ]
        if self.statistics is not None:
            lines += [f"  {line}" for line in summary_lines(self.statistics)]
        lines += [f"  refused: {shown(problem, limit=1000)}" for problem in self.problems]
        lines += [f"  as a model: {shown(self.use, limit=1000)}"] if self.use else []
        return "\n".join(lines + ([self.adapter.text()] if self.adapter else []))


def inspect_path(
    path: Path,
    *,
    adapter: Path | None = None,
    allow_pickle: bool = False,
    hash_all: bool = False,
    say: Callable[[str], None] | None = None,
) -> Inspection:
    """Describe a model, an adapter or a checkpoint.

    Args:
        path: a folder or a file.
        adapter: folder of a model's adapter, if it is not in the model's own folder.
        allow_pickle: whether PyTorch files may be read, in a sandbox.
        hash_all: whether large files are hashed too, which reads them whole.
        say: called with a line of text before slow work.

    Raises:
        ValueError: ``path`` does not exist or is not a folder or file.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path} is neither a folder nor a file")
    contents = look(path)
    if adapter is not None:
        contents = replace(contents, adapter=look(adapter))
    limit = None if hash_all else HASHED_BYTES
    found = _describe(contents, path, allow_pickle=allow_pickle, limit=limit, say=say)
    use = None if contents.is_gguf else model_problem(contents, str(path))
    return replace(found, use=use)


def _describe(
    contents: Contents,
    path: Path,
    *,
    allow_pickle: bool,
    limit: int | None,
    say: Callable[[str], None] | None,
) -> Inspection:
    """Describe a folder or file, whose own files are listed.

    Each kind of contents has its function; ``storage.contents`` tells the kinds apart.
    """
    files = tuple(_file_facts(file, limit, say) for file in _files(path))
    if contents.kind == "adapter":
        return _adapter(contents.path, files)
    if contents.is_gguf:
        kind, facts, problems = describe_gguf(path)
        return Inspection(path=str(path), kind=kind, facts=facts, files=files, problems=problems)
    if contents.kind == "model":
        adapter, inner = None, contents.adapter
        if inner is not None:
            adapter = _describe(inner, inner.path, allow_pickle=allow_pickle, limit=limit, say=say)
        return _model(path, files, adapter, allow_pickle)
    return _checkpoint(path, files, allow_pickle, kind=contents.kind)


def _adapter(path: Path, files: tuple[FileFacts, ...]) -> Inspection:
    """Describe an adapter folder of mlx-mtp."""
    try:
        config = read_any_config(path)
    except ValueError as error:
        return Inspection(
            path=str(path), kind="adapter", facts={}, files=files, problems=(str(error),)
        )
    facts, statistics = _adapter_facts(config), None
    try:
        statistics = read_statistics(path, config)
    except ValueError as error:
        facts["statistics"] = f"not used: {error}"
    return Inspection(
        path=str(path),
        kind="adapter",
        facts=facts,
        files=files,
        problems=tuple(_weights_problems(path)),
        statistics=None if statistics is None else statistics.summary(),
    )


def _adapter_facts(config: MTPConfig | HeadsConfig) -> dict[str, Any]:
    if isinstance(config, HeadsConfig):
        return {
            "layout": "mlx-mtp heads",
            "base": config.base_model,
            "base_type": config.base_model_type,
            "k": config.num_draft_tokens,
            "head": config.head,
            "acceptance": list(config.acceptance),
            "base_fingerprint": config.base_fingerprint,
        }
    kind = config.sampler_kind
    return {
        "layout": "mlx-mtp",
        "base": config.base_model,
        "base_type": config.base_model_type,
        "k": config.num_draft_tokens,
        "noise_ids": list(config.noise_ids),
        "rank": config.rank,
        "scale": config.scale,
        "weights": config.storage_words(),
        "layers_that_differ": len(config.rank_pattern | config.scale_pattern),
        "targets": list(config.target_modules),
        "sampler": None if kind is None else f"mlp, {kind.norm} norm, residual {kind.residual}",
        "acceptance": list(config.acceptance),
        "base_fingerprint": config.base_fingerprint,
    }


def _model(
    path: Path, files: tuple[FileFacts, ...], adapter: Inspection | None, allow_pickle: bool
) -> Inspection:
    """Describe a model folder of Hugging Face or mlx-lm."""
    config = _json(path / MODEL_CONFIG_FILE)
    quantisation = config.get("quantization") or config.get("quantization_config") or {}
    facts = {
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "context": config.get("max_position_embeddings"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "quantisation": {
            key: value for key, value in quantisation.items() if not isinstance(value, dict)
        },
        "tokenizer": _tokenizer_kind(path),
        "num_bytes": sum(file.num_bytes for file in files if _is_weights(file)),
    }
    problems = [*_shard_problems(path, config, allow_pickle), *_code_problems(path, config)]
    own, drafters = None if adapter is None else adapter.facts, ()
    if not problems and any(path.glob("*.safetensors")):
        model_facts, problems = _usable(path, own)
        facts |= model_facts
        with contextlib.suppress(ValueError):  # listed among the problems
            drafters = describe_drafters(path, config, own)
    return Inspection(
        path=str(path),
        kind="model" if adapter is None else "bundle",
        facts=facts,
        files=files,
        problems=tuple(problems),
        adapter=adapter,
        drafters=drafters,
    )


def _checkpoint(
    path: Path, files: tuple[FileFacts, ...], allow_pickle: bool, *, kind: str
) -> Inspection:
    """Describe a checkpoint of another project, or something unknown."""
    try:
        summary = describe(read_checkpoint(path, allow_pickle=allow_pickle))
    except ValueError as error:
        facts = {"pickle_globals": _globals(path)}
        return Inspection(
            path=str(path), kind=kind, facts=facts, files=files, problems=(str(error),)
        )
    return Inspection(
        path=str(path),
        kind="unknown" if summary.layout is None else "checkpoint",
        facts={
            "layout": summary.layout,
            "base": summary.base_model,
            "k": summary.num_draft_tokens,
            "rank": summary.rank,
            "scale": summary.scale,
            "targets": list(summary.targets),
            "sampler": summary.sampler,
        },
        files=files,
        problems=summary.problems,
    )


def _files(path: Path) -> list[Path]:
    """Return the files of a folder, without subfolders and hidden files."""
    if path.is_file():
        return [path]
    return sorted(
        file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")
    )


def _file_facts(file: Path, limit: int | None, say: Callable[[str], None] | None) -> FileFacts:
    """Describe a file; one of more bytes than ``limit`` is not hashed."""
    tensors: Counter[str] = Counter()
    if file.suffix == ".safetensors":
        with contextlib.suppress(ValueError):  # listed among the problems
            tensors.update(info.dtype for info in check_safetensors(file).values())
    num_bytes, digest = file.stat().st_size, None
    if limit is None or num_bytes <= limit:
        if say is not None:
            say(f"Hashing {file.name} ...")
        digest = _sha256(file)
    return FileFacts(name=file.name, num_bytes=num_bytes, sha256=digest, tensors=dict(tensors))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one if the file cannot be read."""
    try:
        return read_json_object(path)
    except ValueError:
        return {}


def _weights_problems(path: Path) -> Iterator[str]:
    for file in sorted(path.glob("*.safetensors")):
        try:
            check_safetensors(file)
        except ValueError as error:
            yield str(error)
    if not any(path.glob("*.safetensors")):
        pickles = [file.name for file in _files(path) if file.suffix in TORCH_SUFFIXES]
        if pickles:
            yield f"{pickles[0]} is a PyTorch pickle file: --allow-pickle reads it, in a sandbox"
        else:
            yield f"{path} contains no weights"


def _shard_problems(path: Path, config: Mapping[str, Any], allow_pickle: bool) -> Iterator[str]:
    """Yield the problems of a model's weights files."""
    try:
        weights = weight_files(path, dropped=functools.partial(belongs_to_modules, config=config))
    except ValueError as error:
        yield str(error)
        return
    if weights[0].suffix == ".safetensors":
        yield from _weights_problems(path)
    elif not allow_pickle:
        yield f"{weights[0].name} is a PyTorch pickle file: --allow-pickle reads it, in a sandbox"


def _is_weights(file: FileFacts) -> bool:
    return bool(file.tensors) or Path(file.name).suffix in TORCH_SUFFIXES


def _code_problems(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    tokenizer = _json(path / "tokenizer_config.json")
    with contextlib.suppress(ValueError):  # reported when the model is opened
        config = as_known(config)
    for name, values in ((MODEL_CONFIG_FILE, config), ("tokenizer_config.json", tokenizer)):
        for key in ("auto_map", "model_file"):
            if values.get(key):
                yield f"{name} requires custom code ({key}): --trust-remote-code allows it to run"


def _usable(path: Path, adapter: dict[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Return facts about a model's layers, and why it or its adapter cannot be used, if so.

    Args:
        path: the model's folder, whose weights are not read.
        adapter: facts about the adapter in it, if it has one.
    """
    try:
        base, config = open_base_lazily(path)
    except ValueError as error:
        return {"usable": "no, see below"}, [str(error)]
    facts, problems = summarise(base), _native_problems(path, base, config)
    try:
        model = MTPModel(base, name=path.name)
    except ValueError as error:
        return {"usable": "no, see below", **facts}, [str(error)]
    facts = {
        "usable": "with --no-mtp, see below" if problems else "yes",
        **facts,
        "layers": len(model.base.layers),
        "hidden_size": model.hidden_size,
        "vocabulary": model.vocab_size,
        "context": model.max_context,
    }
    if adapter is None:
        facts["adapter"] = "none: mlx-mtp verify --quick checks the model without one"
        return facts, problems
    missing = [name for name in adapter.get("targets", ()) if name not in facts["linear_layers"]]
    facts["adapter"] = "yes, see below"
    problems += [f"the model has no linear layer {name}, the adapter's target" for name in missing]
    return facts, problems


def _native_problems(path: Path, base: Any, config: Mapping[str, Any]) -> list[str]:
    """Return why a folder's native modules are refused, if so; only norms are read."""
    try:
        found = find_native(path, config)
        if found is not None and (found.missing or found.has_own_files):
            read_native(path, base, config)
    except ValueError as error:
        return [str(error)]
    return []


def _tokenizer_kind(path: Path) -> str | None:
    if (path / "tokenizer.json").is_file():
        return "fast"
    if (path / "tokenizer.model").is_file():
        return "sentencepiece (convert writes a fast one)"
    return None


def _globals(path: Path) -> list[str]:
    """Return the globals that the pickles of PyTorch files name; nothing is run."""
    names: set[str] = set()
    for file in _files(path):
        if file.suffix in TORCH_SUFFIXES:
            try:
                names.update(pickle_globals(file))
            except ValueError as error:
                names.add(f"({error})")
    return sorted(names)


def _shown(value: Any, label: str) -> str:
    """Return a value as one line, without escape codes from a file."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    elif label == "layer_kinds":  # a name may end in a number
        value = ", ".join(f"{count} x {kind}" for kind, count in value.items())
    elif isinstance(value, dict):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    return "" if value in (None, "") else shown(value, limit=1000)


def _hash_text(file: FileFacts) -> str:
    return "" if file.sha256 is None else f"sha256 {file.sha256[:16]}"


def _tensor_text(tensors: Mapping[str, int]) -> str:
    if not tensors:
        return ""
    return "  " + ", ".join(f"{count} {dtype}" for dtype, count in sorted(tensors.items()))
