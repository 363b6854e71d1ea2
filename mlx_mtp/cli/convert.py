"""The commands that turn checkpoints of other projects into ours and back, and look into them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.terminal import Progress

if TYPE_CHECKING:
    from mlx_mtp.converters.convert import AdapterOptions, Converted

DTYPES = ("float16", "bfloat16", "float32")
TORCH_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@click.command()
@click.option("--hf-path", "--model", metavar="MODEL", help="Base model: a folder or hub id.")
@click.option("--mtp-path", metavar="CHECKPOINT", help="MTP checkpoint: a folder, file or hub id.")
@click.option(
    "--mlx-path", default="mlx_model", show_default=True, metavar="OUT", help="Folder to write."
)
@click.option("--quantize", "-q", is_flag=True, help="Quantise the base model.")
@click.option("--q-bits", type=int, help="Bits per weight with -q.  [default: 4]")
@click.option("--q-group-size", type=int, help="Weights per scale with -q.  [default: 64]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Float type.  [default: the model's]")
@click.option(
    "--base-model",
    metavar="MODEL",
    help="MLX model that a checkpoint alone is for.  [default: named in it]",
)
@click.option("--layout", help="Layout of the checkpoint.  [default: found out]")
@click.option(
    "--layout-option",
    multiple=True,
    metavar="KEY=VALUE",
    help="What the checkpoint does not say, such as alpha=32; repeatable.",
)
@click.option("--verify", is_flag=True, help="Compare with PyTorch before the folder appears.")
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch files, in a sandbox.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's folder run its code.")
@click.option("--licence", "--license", help="Licence of the adapter, for its model card.")
@click.option("--upload-repo", metavar="REPO", help="Hub repository to push the folder to.")
@click.option("--force", is_flag=True, help="Replace the folder if it is there.")
def convert(**options: Any) -> None:
    """Turn PyTorch and Hugging Face checkpoints into MLX folders.

    --hf-path alone writes a model, --mtp-path alone an adapter, both together a model with its
    adapter in OUT/adapter, which `mlx-mtp generate --model OUT` finds by itself.
    """
    from mlx_mtp.converters.convert import convert_adapter, convert_model

    _check_flags(options)
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
    print("\n".join(_summary(output, result, bundle=hf_path is not None) + report))
    if options["upload_repo"] is not None:
        _upload(output, options["upload_repo"])


@click.command()
@click.option("--adapter-path", required=True, help="Adapter folder or hub id.")
@click.option("--peft-path", required=True, metavar="OUT", help="PEFT checkpoint folder to write.")
@click.option("--model", help="Base model, for its tokenizer.  [default: named in it]")
@click.option("--force", is_flag=True, help="Replace the folder if it is there.")
def export(adapter_path: str, peft_path: str, model: str | None, force: bool) -> None:
    """Write an adapter as a PEFT checkpoint, for PyTorch."""
    from mlx_mtp.converters.export import export_adapter

    with Progress("Exporting ..."):
        output = Path(peft_path).expanduser()
        settings = export_adapter(adapter_path, output, base_model=model, force=force)
    masks = settings["alora_invocation_tokens"]
    print(
        f"wrote {peft_path}: PEFT LoRA of rank {settings['r']} for "
        f"{settings['base_model_name_or_path']}, mask tokens {masks[0]} to {masks[-1]}"
    )


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch files, in a sandbox.")
def inspect(path: str, as_json: bool, allow_pickle: bool) -> None:
    """Say what a checkpoint is and what would be refused."""
    from mlx_mtp.converters.inspection import inspect_path

    with Progress("Looking ...") as progress:
        found = _checkpoint_path(path, allow_pickle=allow_pickle)
        report = inspect_path(found, allow_pickle=allow_pickle, say=progress.say)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if as_json else report.text())


def _check_flags(options: dict[str, Any]) -> None:
    """Refuse flags that do not go together."""
    if options["hf_path"] is None and options["mtp_path"] is None:
        raise ValueError("give --hf-path, --mtp-path or both")
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
        raise ValueError("--base-model is for --mtp-path alone; --hf-path is the base model here")
    for name in ("quantize", "q_bits", "q_group_size", "dtype", "verify"):
        if options["hf_path"] is None and options[name]:
            raise ValueError(f"--{name.replace('_', '-')} needs --hf-path")
    for name in ("layout", "layout_option", "licence"):
        if options["mtp_path"] is None and options[name]:
            raise ValueError(f"--{name.replace('_', '-')} needs --mtp-path")
    for name in ("q_bits", "q_group_size"):
        if options[name] is not None and not options["quantize"]:
            raise ValueError(f"--{name.replace('_', '-')} needs -q")


def _checkpoint_path(text: str, *, allow_pickle: bool) -> Path:
    """A folder or file as it is, or a hub repository downloaded."""
    from mlx_mtp.loading import HUB_FILES, resolve

    path = Path(text).expanduser()
    files = (*HUB_FILES, "*.md", *(TORCH_FILES if allow_pickle else ()))
    return path if path.exists() else resolve(text, kind="checkpoint", patterns=lambda: files)


def _adapter_options(options: dict[str, Any]) -> AdapterOptions:
    from mlx_mtp.converters.convert import AdapterOptions

    pairs = {}
    for text in options["layout_option"]:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--layout-option must be KEY=VALUE, got {text!r}")
        pairs[key.strip().replace("-", "_")] = value.strip()
    return AdapterOptions(
        layout=options["layout"],
        layout_options=pairs,
        allow_pickle=options["allow_pickle"],
        licence=options["licence"],
    )


def _base_options(options: dict[str, Any]) -> Any:
    from mlx_mtp.converters.convert import BaseOptions

    names = ("q_bits", "q_group_size", "dtype", "allow_pickle", "trust_remote_code")
    return BaseOptions(quantise=options["quantize"], **{name: options[name] for name in names})


def _verifier(
    options: dict[str, Any], checkpoint: Path | None, report: list[str]
) -> Callable[[Path], None]:
    """A check of the finished folder against PyTorch; its table goes into ``report``."""

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
    """Say what was written, and how to use it."""
    from mlx_mtp.model.config import BUNDLED_ADAPTER

    lines = []
    if result.base is not None:
        lines.append(f"wrote {output}: {result.base.summary}")
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
    """Refuse a name that the hub would refuse, before the work."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--upload-repo {repo!r} is no name for a repository: {error}") from None


def _upload(folder: Path, repo: str) -> None:
    from mlx_mtp.converters.upload import upload

    with Progress(f"Uploading to {repo} ..."):
        try:
            address = upload(folder, repo)
        except ValueError as error:
            hint = f"{folder} is written, upload it with: hf upload {repo} {folder}"
            raise ValueError(f"{error}; {hint}") from None
    print(f"uploaded to {address}")
