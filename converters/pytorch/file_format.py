"""The form of a PyTorch file and the globals that its pickles name, from its bytes alone.

There are two forms: the zip archive that ``torch.save`` writes, and the sequence of pickles that it
wrote before version 1.6.  Nothing here is unpickled.  Whether a file is harmless is not decided
here either: it is read by ``torch.load(weights_only=True)`` in the sandbox only.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.storage.safetensors import open_regular, shown

MAX_PICKLE_BYTES = 64 << 20
MAX_INSTRUCTIONS = 400_000  # enough for about 10,000 tensors

_ZIP_START = b"PK\x03\x04"
_OLD_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number
_OLD_PICKLES = 5  # magic number, protocol, machine, the object, keys of the storages


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """A PyTorch file as its first bytes describe it.

    Attributes:
        is_zip: whether it is a zip archive; otherwise it has the older form.
        num_bytes: size of the file.
    """

    is_zip: bool
    num_bytes: int


def recognise_torch_file(path: Path) -> TorchFile:
    """Return the form and the size of a PyTorch file.

    Raises:
        ValueError: the file cannot be read, is not a regular file, or has neither form; one line.
    """
    with _open(path) as file:
        start = file.read(len(_OLD_START))
        if not start.startswith((_ZIP_START, _OLD_START)):
            raise ValueError("it is neither a zip archive nor an old PyTorch file")
        is_zip = start.startswith(_ZIP_START)
        return TorchFile(is_zip=is_zip, num_bytes=os.fstat(file.fileno()).st_size)


def pickle_globals(path: Path) -> list[str]:
    """Return the globals that a PyTorch file's pickles name, sorted, without unpickling.

    Raises:
        ValueError: the file cannot be read or is not a PyTorch file; one line.
    """
    is_zip = recognise_torch_file(path).is_zip
    with _open(path) as file:
        pickles = _zip_pickles(file) if is_zip else [file.read(MAX_PICKLE_BYTES)]
        return sorted({name for text in pickles for name in _named_globals(io.BytesIO(text))})


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a file; errors while it is read become a ``ValueError`` that names it."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {shown(error)}") from None


def _zip_pickles(file: Any) -> list[bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
            pickles = [archive.open(name).read(MAX_PICKLE_BYTES) for name in names]
    except Exception as error:  # zipfile raises many types for a broken archive
        raise ValueError(f"it is a broken zip archive: {shown(error)}") from None
    if not pickles:
        raise ValueError("it is a zip archive without data.pkl")
    return pickles


def _named_globals(stream: io.BytesIO) -> Iterator[str]:
    """Yield the globals that consecutive pickles name; those on the stack as far as is visible."""
    texts = ["?", "?"]  # the last two strings that were pushed
    memo: dict[int, str] = {}
    for name, argument in _instructions(stream):
        if name == "PROTO":
            memo = {}
        elif name in ("GLOBAL", "INST"):
            yield shown(argument.replace(" ", ".", 1))
        elif name == "STACK_GLOBAL":
            yield shown(".".join(texts))
        elif name in ("EXT1", "EXT2", "EXT4"):
            yield f"extension {argument}"
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = texts[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            texts = [texts[-1], memo.get(argument, "?")]
        elif isinstance(argument, str):
            texts = [texts[-1], argument]


def _instructions(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each instruction, from the pickles at the start of a stream."""
    count = 0
    for _ in range(_OLD_PICKLES):
        if stream.tell() == len(stream.getbuffer()):
            return
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                count += 1
                if count > MAX_INSTRUCTIONS:
                    raise ValueError(f"it has over {MAX_INSTRUCTIONS} instructions")
                yield opcode.name, argument
        except Exception as error:  # pickletools raises many types for a broken pickle
            raise ValueError(f"its pickle is broken: {shown(error)}") from None
