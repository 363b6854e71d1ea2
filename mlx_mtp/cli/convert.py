"""The commands ``mlx-mtp convert``, ``export`` and ``inspect``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from mlx_mtp.cli.options import AS_JSON, TRUST_REMOTE_CODE, option
from mlx_mtp.terminal import Status, show

if TYPE_CHECKING:
    from mlx_mtp.converters.convert import AdapterOptions, Converted

DTYPES = ("float16", "bfloat16", "float32")
TORCH_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


ALLOW_PICKLE = option(
    "--allow-pickle",
    is_flag=True,
    help="Read PyTorch pickle files, in a sandbox.",
)
FORCE = option("--force", is_flag=True, help="Replace an existing folder.")


@cloup.command()
@cloup.option_group(
    "Input",
    option(
        "--hf-path",
        "--model",
        metavar="MODEL",
        help="Folder or Hugging Face id of the base model.",
    ),
    option(
        "--gguf",
        metavar="FILE",
        help="GGUF file of the base model, in place of --hf-path.",
    ),
    option(
        "--mtp-path",
        metavar="CHECKPOINT",
        help="Folder, file, Hugging Face id or ID/SUBFOLDER of the MTP checkpoint.",
    ),
    option(
        "--base-model",
        metavar="MODEL",
        help="MLX model that the checkpoint belongs to, for --mtp-path without --hf-path.",
        show_default="named in the checkpoint",
    ),
    option(
        "--checkpoint-layout",
        former_names=("--layout",),
        metavar="NAME",
        help="Layout of the checkpoint.",
        show_default="detected",
    ),
    option(
        "--checkpoint-option",
        former_names=("--layout-option",),
        multiple=True,
        metavar="KEY=VALUE",
        help="Value that the checkpoint does not contain, such as alpha=32; repeatable.",
    ),
    ALLOW_PICKLE,
    TRUST_REMOTE_CODE,
)
@cloup.option_group(
    "Output",
    option("--mlx-path", default="mlx_model", metavar="OUT", help="Folder to write the result to."),
    option("--quantize", "-q", is_flag=True, help="Quantize the base model."),
    option(
        "--q-bits",
        type=int,
        help="Bits per weight for -q.",
        show_default="4",
    ),
    option(
        "--q-group-size",
        type=int,
        help="Group size for -q.",
        show_default="64",
    ),
    option(
        "--q-native-bits",
        type=int,
        help="Bits per weight of native MTP modules for -q.",
        show_default="8",
    ),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Floating-point type of the weights; unpacks those of a GGUF file.",
        show_default="the model's",
    ),
    option(
        "--license",
        "--licence",
        "licence",
        metavar="NAME",
        help="License of the adapter, for its model card.",
        show_default="the checkpoint's",
    ),
    option("--upload-repo", metavar="REPO", help="Upload the folder to this repository."),
    option(
        "--verify",
        is_flag=True,
        help="Compare the result with PyTorch before the folder is created.",
    ),
    FORCE,
)
def convert(**options: Any) -> None:
    """Convert PyTorch and Hugging Face checkpoints and GGUF files to MLX folders.

    --hf-path or --gguf writes a model and --mtp-path an adapter. Both together write a model with
    its adapter in OUT/adapter, which is used by `mlx-mtp generate --model OUT`.
    """
    _take_gguf(options)
    _check_flags(options)
    with Status("Starting ..."):
        from mlx_mtp.converters.convert import convert_adapter, convert_model

    output, hf_path = Path(options["mlx_path"]).expanduser(), options["hf_path"]
    checkpoint = None
    if options["mtp_path"] is not None:
        checkpoint = _checkpoint_path(options["mtp_path"], allow_pickle=options["allow_pickle"])
    report: list[str] = []
    check = _verifier(options, checkpoint, report) if options["verify"] else None
    settings = {"adapter": _adapter_options(options), "force": options["force"], "check": check}
    if hf_path is not None:
        base = _base_options(options)
        result = convert_model(hf_path, output, checkpoint=checkpoint, base=base, **settings)
    else:
        assert checkpoint is not None
        base_model = options["base_model"]
        result = convert_adapter(checkpoint, output, base_model=base_model, **settings)
    if report and result.notes:
        report[-1] += ", if the assumptions above hold"
    show("\n".join(_summary(output, result, bundle=hf_path is not None) + report))
    if options["upload_repo"] is not None:
        _upload(output, options["upload_repo"])


@cloup.command()
@option(
    "--adapter-path",
    required=True,
    metavar="ADAPTER",
    help="Folder or Hugging Face id of the MTP adapter.",
)
@option("--peft-path", required=True, metavar="OUT", help="Folder to write the PEFT checkpoint to.")
@option(
    "--model",
    metavar="MODEL",
    help="Base model, for its tokenizer.",
    show_default="named in the adapter",
)
@FORCE
def export(adapter_path: str, peft_path: str, model: str | None, force: bool) -> None:
    """Export an adapter as a PEFT checkpoint for PyTorch."""
    with Status("Exporting ..."):
        from mlx_mtp.converters.export import export_adapter

        output = Path(peft_path).expanduser()
        settings = export_adapter(adapter_path, output, base_model=model, force=force)
    masks = settings["alora_invocation_tokens"]
    show(
        f"wrote {peft_path}: PEFT LoRA of rank {settings['r']} for "
        f"{settings['base_model_name_or_path']}, mask tokens {masks[0]} to {masks[-1]}"
    )


@cloup.command()
@cloup.argument(
    "path",
    metavar="[CHECKPOINT]",
    required=False,
    help="Folder, file, Hugging Face id or name (gemma-3-270m); the default model if left out.",
)
@AS_JSON
@ALLOW_PICKLE
@option("--hash", "hash_all", is_flag=True, help="Hash large files too, which reads them whole.")
def inspect(path: str | None, as_json: bool, allow_pickle: bool, hash_all: bool) -> None:
    """Describe a model, an adapter or a checkpoint, and report whether it can be used.

    The weights are not read.
    """
    with Status("Inspecting ...") as status:
        from mlx_mtp.converters.inspection import inspect_path
        from mlx_mtp.loading import locate
        from mlx_mtp.storage.data_wheels import ON_REQUEST

        adapter = None
        if path is None or (path in ON_REQUEST and not Path(path).exists()):
            checkpoint, adapter = locate(path, None, progress=status.update)
        else:
            checkpoint = _checkpoint_path(path, allow_pickle=allow_pickle)
        report = inspect_path(
            checkpoint,
            adapter=adapter,
            allow_pickle=allow_pickle,
            hash_all=hash_all,
            say=status.update,
        )
    show(json.dumps(report.to_dict(), ensure_ascii=False) if as_json else report.text())


def _take_gguf(options: dict[str, Any]) -> None:
    """Make a GGUF file the base model, and refuse what is not possible with one."""
    from mlx_mtp.storage.gguf.parts import is_gguf

    path = options.pop("gguf")
    if path is not None:
        if options["hf_path"] is not None:
            raise ValueError("--gguf cannot be combined with --hf-path")
        if not Path(path).expanduser().exists():
            raise ValueError(f"--gguf {path} does not exist")
        if not is_gguf(Path(path).expanduser()):
            raise ValueError(f"--gguf {path} is not a GGUF file")
        options["hf_path"] = path
    elif options["hf_path"] is not None and is_gguf(Path(options["hf_path"]).expanduser()):
        path = options["hf_path"]
    if path is not None and options["verify"]:
        raise ValueError(f"--verify needs a PyTorch model, which {path} is not")


def _check_flags(options: dict[str, Any]) -> None:
    """Refuse options that cannot be combined."""
    if options["hf_path"] is None and options["mtp_path"] is None:
        raise ValueError("--hf-path or --gguf, --mtp-path, or both are required")
    for name in ("hf_path", "mtp_path", "mlx_path", "base_model"):
        if options[name] == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    if options["verify"]:
        for module in ("torch", "peft") if options["mtp_path"] else ("torch",):
            if importlib.util.find_spec(module) is None:
                raise ValueError(f'--verify needs {module}: pip install "mlx-mtp[convert]"')
    if options["upload_repo"] is not None:
        _check_repo(options["upload_repo"])
    if options["hf_path"] is not None and options["base_model"] is not None:
        raise ValueError("--base-model cannot be combined with --hf-path, which is the base model")
    for name in ("quantize", "q_bits", "q_group_size", "q_native_bits", "dtype", "verify"):
        if options["hf_path"] is None and options[name]:
            raise ValueError(f"--{name.replace('_', '-')} needs --hf-path")
    for name in ("checkpoint_layout", "checkpoint_option", "licence"):
        if options["mtp_path"] is None and options[name]:
            flag = "license" if name == "licence" else name.replace("_", "-")
            raise ValueError(f"--{flag} needs --mtp-path")
    for name in ("q_bits", "q_group_size", "q_native_bits"):
        if options[name] is not None and not options["quantize"]:
            raise ValueError(f"--{name.replace('_', '-')} needs -q")


def _checkpoint_path(text: str, *, allow_pickle: bool) -> Path:
    """The path of a local folder or file, or of a downloaded hub repository."""
    from mlx_mtp.loading import HUB_FILES, resolve

    path = Path(text).expanduser()
    files = (*HUB_FILES, "*.md", *(TORCH_FILES if allow_pickle else ()))
    return path if path.exists() else resolve(text, kind="checkpoint", patterns=lambda: files)


def _adapter_options(options: dict[str, Any]) -> AdapterOptions:
    from mlx_mtp.converters.convert import AdapterOptions

    pairs = {}
    for text in options["checkpoint_option"]:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--checkpoint-option must be KEY=VALUE, got {text!r}")
        pairs[key.strip().replace("-", "_")] = value.strip()
    return AdapterOptions(
        layout=options["checkpoint_layout"],
        layout_options=pairs,
        allow_pickle=options["allow_pickle"],
        licence=options["licence"],
    )


def _base_options(options: dict[str, Any]) -> Any:
    from mlx_mtp.converters.convert import BaseOptions

    names = (
        "q_bits",
        "q_group_size",
        "q_native_bits",
        "dtype",
        "allow_pickle",
        "trust_remote_code",
    )
    return BaseOptions(quantise=options["quantize"], **{name: options[name] for name in names})


def _verifier(
    options: dict[str, Any], checkpoint: Path | None, report: list[str]
) -> Callable[[Path], None]:
    """A comparison of the finished folder with PyTorch that appends its table to ``report``."""

    def check(folder: Path) -> None:
        from mlx_mtp.converters.base.model import resolve_base
        from mlx_mtp.converters.reference.verify import verify_conversion
        from mlx_mtp.model.config import BUNDLED_ADAPTER

        adapter = _adapter_options(options)
        result = verify_conversion(
            hf_path=resolve_base(
                options["hf_path"], trust_remote_code=options["trust_remote_code"]
            ),
            checkpoint=checkpoint,
            mlx_model=folder,
            adapter=None if checkpoint is None else folder / BUNDLED_ADAPTER,
            allow_pickle=adapter.allow_pickle,
            trust_remote_code=options["trust_remote_code"],
            layout=adapter.layout,
            options=adapter.layout_options,
        )
        report.extend(result.lines())
        if not result.passed:
            raise ValueError(f"the conversion differs from PyTorch: {'; '.join(result.lines())}")

    return check


def _summary(output: Path, result: Converted, *, bundle: bool) -> list[str]:
    """Lines about what was written."""
    from mlx_mtp.model.config import BUNDLED_ADAPTER

    lines = []
    if result.base is not None:
        lines.append(f"wrote {output}: {result.base.summary}")
        lines += [f"  {line}" for line in result.types]
        native = result.base.native
        lines += [] if native is None else [f"  {line}" for line in native.lines()]
    if result.adapter is not None:
        folder = output / BUNDLED_ADAPTER if bundle else output
        config = result.adapter
        sampler = "no sampler" if config.sampler is None else "sampler"
        lines.append(
            f"wrote {folder}: {result.layout}, k {config.num_draft_tokens}, "
            f"rank {config.rank}, {sampler}"
        )
        lines += [f"  {note}" for note in result.notes]
    return lines


def _check_repo(repo: str) -> None:
    """Refuse a name that the hub would refuse, before any work."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--upload-repo {repo!r} is not a repository name: {error}") from None


def _upload(folder: Path, repo: str) -> None:
    from mlx_mtp.converters.upload import upload

    with Status(f"Uploading to {repo} ..."):
        try:
            address = upload(folder, repo)
        except ValueError as error:
            hint = f"{folder} was written; upload it with: hf upload {repo} {folder}"
            raise ValueError(f"{error}; {hint}") from None
    show(f"uploaded to {address}")
