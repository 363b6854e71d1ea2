"""A user's data: a JSONL file, a folder of them, a folder of text files, or a hub data set.

Of a folder with ``.jsonl`` files only those are read, of any other folder all text files, whatever
their names.  Texts are split at paragraph borders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_mtp.terminal import first_line
from mlx_mtp.train.data.records import Record, read_json, read_jsonl

PIECE_CHARS = 4000  # about a thousand tokens of English
_SKIPPED_FOLDERS = {"node_modules", "__pycache__", "site-packages"}
_HUB_PATTERNS = ("*.jsonl", "*.json", "*.txt")
_HUB_INFOS = {"dataset_infos.json", "dataset_info.json", "config.json"}
_TABLES = (".parquet", ".arrow", ".csv", ".tsv")
_REMEDY = (
    "write it as JSONL first, for example: python -c \"import pandas; pandas.read_{kind}('{name}')"
    ".to_json('data.jsonl', orient='records', lines=True)\""
)


def read_data(
    path_or_hub_id: str | Path, *, log: Callable[[str], None] | None = None
) -> list[Record]:
    """Read the records of a user's data.

    Args:
        path_or_hub_id: a file, a folder, or the id of a data set on the hub.
        log: called with a line about skipped files.

    Raises:
        ValueError: the data do not exist, a line is bad, or there is no text; one line.
    """
    path = Path(path_or_hub_id).expanduser()
    try:
        if path.is_dir():
            records = _read_folder(path, log)
        elif path.exists():
            records = _read_file(path)
        else:
            records = _read_hub(str(path_or_hub_id))
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ValueError(f"cannot read {error.filename or path_or_hub_id}: {reason}") from None
    if not records:
        raise ValueError(f"{path_or_hub_id} contains no text to train on")
    return records


def split_text(text: str, *, piece_chars: int = PIECE_CHARS) -> list[str]:
    """Split a text at paragraph borders into pieces of at most ``piece_chars`` characters.

    A longer paragraph is split at line borders, and a longer line anywhere.  Joined, the pieces are
    the text without the blank lines at the ends of each.
    """
    pieces, current = [], ""
    for part in _parts(text, piece_chars):
        if current and len(current) + len(part) > piece_chars:
            pieces.append(current)
            current = ""
        current += part
    stripped = (piece.strip("\n") for piece in [*pieces, current])
    return [piece for piece in stripped if piece.strip()]


def _parts(text: str, limit: int) -> Iterator[str]:
    """Paragraphs with the blank lines after them, or smaller parts of those over the limit."""
    for paragraph in re.split(r"(?<=\n)(?=\n*[^\n])(?<=\n\n)", text):
        if len(paragraph) <= limit:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            yield from (line[start : start + limit] for start in range(0, len(line), limit))


def _read_file(path: Path) -> list[Record]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix == ".json":
        return read_json(path)
    if suffix in _TABLES:
        raise ValueError(_table_refusal(path))
    text = _text_of(path)
    if text is None:
        raise ValueError(f"{path} is neither JSONL nor UTF-8 text")
    return _text_records(text, source=path.name)


def _read_folder(folder: Path, log: Callable[[str], None] | None) -> list[Record]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(folder, path))
    lines = [path for path in paths if path.suffix.lower() == ".jsonl"]
    if lines:
        return [record for path in lines for record in read_jsonl(path)]
    records, skipped = [], []
    for path in paths:
        text = None if path.suffix.lower() in _TABLES else _text_of(path)
        if text is None:
            skipped.append(path)
        else:
            records += _text_records(text, source=str(path.relative_to(folder)))
    if not records and skipped:
        tables = [path for path in skipped if path.suffix.lower() in _TABLES]
        if tables:
            raise ValueError(_table_refusal(tables[0]))
        raise ValueError(f"{folder} contains no JSONL and no UTF-8 text, only {skipped[0].name}")
    if skipped and log:
        names = ", ".join(path.name for path in skipped[:3]) + (", ..." if skipped[3:] else "")
        log(f"Skipped {len(skipped)} files that are not UTF-8 text: {names}")
    return records


def _is_data(folder: Path, path: Path) -> bool:
    """Whether a file belongs to the data; hidden files and installed packages do not."""
    names = path.relative_to(folder).parts
    return not any(name.startswith(".") or name in _SKIPPED_FOLDERS for name in names)


def _text_of(path: Path) -> str | None:
    data = path.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _text_records(text: str, *, source: str) -> list[Record]:
    return [Record(text=piece, source=source) for piece in split_text(text)]


def _table_refusal(path: Path) -> str:
    kind = {".arrow": "feather", ".tsv": "csv"}.get(path.suffix.lower(), path.suffix.lower()[1:])
    return f"{path} is a table: " + _REMEDY.format(kind=kind, name=path)


def _read_hub(name: str) -> list[Record]:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"data {name} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, repo_type="dataset", allow_patterns=list(_HUB_PATTERNS))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot find data {name} locally or on the Hugging Face Hub: {first_line(error)}"
        ) from None
    for suffix in (".jsonl", ".json", ".txt"):
        paths = sorted(path for path in folder.rglob(f"*{suffix}") if path.name not in _HUB_INFOS)
        if paths:
            return [record for path in paths for record in _read_file(path)]
    raise ValueError(
        f"the data set {name} has no JSONL, JSON or text files; Parquet is not read: download a "
        "file of it and " + _REMEDY.format(kind="parquet", name="FILE.parquet")
    )
