"""Tokenizers, saved as fast tokenizers, also from a sentencepiece model without other files.

A conversion is refused unless ids and decoded text are equal to sentencepiece's on every text of a
corpus.  Control tokens (``<s>``) are the only intended difference: they are recognised in a prompt,
as chat templates require, which sentencepiece never does.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.storage.safetensors import read_json_object, shown
from mlx_mtp.storage.sentencepiece import (
    SPACE,
    AddedPiece,
    build_tokenizer,
    normal_pieces,
    parse,
    user_defined,
)
from mlx_mtp.storage.sidecars import sidecar_template
from mlx_mtp.text.detokenizer import load_tokenizer

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_ENDS = ("bos", "eos")
_KEPT_SETTINGS = ("chat_template", "model_max_length", "padding_side", "truncation_side")

_DIFFICULT = (
    "", " ", "   ", "a", " a", "  a", "a ", "a  b", "   a   b    c ", "\n", "\n\n\n", "\t", "\r\n",
    "a\n\nb", "a\tb\t\tc", " \t \n ", "if x:\n        return\n\n\n\tpass", "12345 6789", "3.14159",
    "0x1F + 1e-9 == -.5", "\x00a", "\x07bell\x1b[0m", "\x7f\x80\x85", "\xa0x\xa0y\u3000z",
    "\u200b\u200d\ufeffx", "日本語テキスト。", "中文,混合 text", "한국어 문장", "Привет, мир!",
    "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดี", "Ελληνικά", "Tiếng Việt", "ქართული",
    "😀👍🏽", "👨\u200d👩\u200d👧 🇩🇪", "e\u0301 é", "Tie\u0302\u0301ng Vie\u0323\u0302t",
    "c\u0301\u0301", "\u1112\u1161\u11ab\u1100\u1173\u11af", "ハ\u309aー",
    "ﬁ ２３ ① ½ Å", "𝔘𝔫𝔦 𐍈", "\ud7ff\ue000\uffff",
    "a" * 37, "=" * 21 + "-" * 13, "." * 9, "!" * 8, "ー" * 9, "ababababab", SPACE + "a " + SPACE,
    "a" + SPACE + "b", "<|x|> [INST] {{y}}", "x" * 300, "snake_case camelCase",
    "https://example.org/a?b=c&d=%20", "\\n \\t \"quoted\" 'single' `code`", "don't I'm we'll",
)  # fmt: skip


def write_tokenizer(
    source: Path, output: Path, scratch: Path, *, model_type: str, trust_remote_code: bool
) -> int:
    """Write a model's tokenizer as fast tokenizer files that give the same ids.

    Args:
        source: folder of the model.
        output: existing folder.
        scratch: folder on the same disk.
        model_type: type of the model.
        trust_remote_code: whether a tokenizer's custom code may run.

    Returns:
        The number of texts on which the written tokenizer was compared with its source.

    Raises:
        ValueError: there is no tokenizer, or it is broken or cannot be converted exactly.
    """
    draft = scratch / "tokenizer"
    draft.mkdir()
    (draft / "config.json").symlink_to(
        (source / "config.json").resolve()
    )  # it determines the class
    if path := find_sentencepiece(source):
        convert_sentencepiece(path, draft, model_type=model_type)
        compared = check_sentencepiece(path, _load(draft, shown_as=path))
    else:
        original = _load(source, shown_as=source, trust_remote_code=trust_remote_code)
        try:
            original.save_pretrained(draft)
        except Exception as error:  # a broken tokenizer can raise anything
            raise ValueError(f"cannot save the tokenizer of {source}: {shown(error)}") from None
        written = _load(draft, shown_as=source, trust_remote_code=trust_remote_code)
        compared = _check_same(source, original, written)
    for path in draft.iterdir():
        if path.name != "config.json":
            shutil.move(path, output / path.name)
    return compared


def find_sentencepiece(folder: Path) -> Path | None:
    """Return the sentencepiece model of a folder without another form of its tokenizer.

    Raises:
        ValueError: a file with such a name is broken.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    for name in SENTENCEPIECE_FILES:
        path = folder / name
        if path.is_file() and parse(path) is not None:
            return path
        # Some projects also use the name tokenizer.model for lists of tokens with their ranks.
        if path.is_file() and not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", path.read_bytes()[:1000]):
            raise ValueError(f"{path} is not a sentencepiece model")
    return None


def convert_sentencepiece(path: Path, output: Path, *, model_type: str | None = None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for a sentencepiece model.

    Settings come from ``tokenizer_config.json``, ``special_tokens_map.json`` and
    ``added_tokens.json`` next to it, or from the model itself.

    Args:
        path: the sentencepiece model.
        output: existing folder.
        model_type: type of the model that uses it; determines whether texts begin with ``<s>``.

    Raises:
        ValueError: the file is broken or uses a feature that fast tokenizers lack.
    """
    proto = parse(path)
    if proto is None:
        raise ValueError(f"{path} is not a sentencepiece model")
    settings = _read_settings(path.parent)
    config = _config(proto, settings, model_type=model_type)
    around = [config[f"{role}_token"] if config[f"add_{role}_token"] else None for role in _ENDS]
    try:
        tokenizer = build_tokenizer(
            proto,
            added=_added_tokens(path.parent, settings),
            around=(around[0], around[1]),
            legacy=settings.get("legacy") is not False,
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path}: {shown(error)}") from None
    tokenizer.save(str(output / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (output / "tokenizer_config.json").write_text(text, encoding="utf-8")


def corpus(proto: Any = None) -> list[str]:
    """Return the texts on which tokenizers are compared.

    They are prompts of many kinds, difficult lines and, of a sentencepiece model, its user-defined
    symbols and up to 2,000 of its pieces.
    """
    texts = [*_DIFFICULT, *(prompt.text for prompt in builtin_prompts(None))]
    if proto is not None:
        symbols = user_defined(proto)[:50]
        texts += symbols + [f"a {symbol} b{symbol}{symbol}c" for symbol in symbols]
        pieces = normal_pieces(proto)
        texts += [piece.replace(SPACE, " ") for piece in pieces[:: len(pieces) // 2000 + 1]]
    return texts


def check_sentencepiece(path: Path, tokenizer: Any) -> int:
    """Compare a loaded tokenizer with the sentencepiece model that it was made from.

    Args:
        path: the sentencepiece model.
        tokenizer: tokenizer of transformers, or one wrapped by mlx-lm.

    Returns:
        The number of texts that were compared.

    Raises:
        ValueError: ids or decoded text differ; the message contains the first such text.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        reference: Any = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from None
    proto = parse(path)
    assert proto is not None
    unknown = reference.unk_id()
    own = list(tokenizer.get_added_vocab())
    texts = corpus(proto)
    texts = [text for text in texts if not any(token in text for token in own)]
    for text in texts:
        expected = reference.encode(text)
        actual = tokenizer.encode(text, add_special_tokens=False)
        if actual != expected:
            raise ValueError(_difference(path, text, actual, expected))
        known = [token for token in expected if token != unknown]
        decoded, expected = tokenizer.decode(known), reference.decode(known)
        if proto.normalizer_spec.remove_extra_whitespaces:  # then leading spaces have no meaning
            decoded, expected = decoded.lstrip(" "), expected.lstrip(" ")
        if decoded != expected:
            raise ValueError(_difference(path, text, decoded, expected))
    return len(texts)


def _load(folder: Path, *, shown_as: Path, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer like mlx-lm, without transformers' warnings about the model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_tokenizer(folder, {"trust_remote_code": trust_remote_code})
    except Exception as error:  # transformers raises many types for a broken folder
        raise ValueError(f"cannot load the tokenizer of {shown_as}: {shown(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def _check_same(source: Path, original: Any, written: Any) -> int:
    """Compare a tokenizer with its written form."""
    texts = corpus()
    for text in texts:
        expected, actual = original.encode(text), written.encode(text)
        if actual != expected:
            raise ValueError(_difference(source, text, actual, expected))
    return len(texts)


def _difference(path: Path, text: str, actual: Any, expected: Any) -> str:
    """Describe in one line where two tokenizers differ."""
    if isinstance(actual, list):
        pairs = zip([*actual, None], [*expected, None], strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
        actual, expected = actual[start : start + 4], expected[start : start + 4]
    return (
        f"{path}: its fast tokenizer would differ on the text {text[:60]!r}: "
        f"{str(actual)[:60]!r} instead of {str(expected)[:60]!r}"
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    """Merge ``special_tokens_map.json`` and ``tokenizer_config.json``, without null values."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _read_json(folder / name)
        settings |= {key: value for key, value in values.items() if value is not None}
    return settings | sidecar_template(folder)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file does not exist."""
    return read_json_object(path) if path.is_file() else {}


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> list[AddedPiece]:
    """Return the tokens with fixed ids in the tokenizer files."""
    special = {_content(settings.get(f"{role}_token")) for role in _ROLES}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or []
        special |= {_content(token) for token in (listed if isinstance(listed, list) else [])}
    tokens: dict[int, AddedPiece] = {}
    for content, index in _read_json(folder / "added_tokens.json").items():
        tokens[_token_id(index)] = AddedPiece(
            content=content,
            id=_token_id(index),
            special=content in special,
            options={},
            source="added_tokens.json",
        )
    decoder = settings.get("added_tokens_decoder", {})
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        values = entry if isinstance(entry, dict) else {"content": entry}
        content, index = _content(values), _token_id(key)
        is_special = bool(values.get("special", content in special))
        tokens[index] = AddedPiece(
            content=content,
            id=index,
            special=is_special,
            options={f: bool(values.get(f)) for f in ("lstrip", "rstrip", "single_word")},
            source="tokenizer_config.json",
        )
    return list(tokens.values())


def _token_id(value: Any) -> int:
    """Return a token id from its form in a JSON file."""
    try:
        index = int(value)
    except (TypeError, ValueError):
        index = -1
    if index < 0:
        raise ValueError(f"{value!r} is not a token id")
    return index


def _content(token: Any) -> str:
    """Return the text of a token that may be written as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _config(proto: Any, settings: Mapping[str, Any], *, model_type: str | None) -> dict[str, Any]:
    """Return ``tokenizer_config.json`` for the general class, which uses tokenizer.json as is."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {key: settings[key] for key in _KEPT_SETTINGS if key in settings}
    for role in _ROLES:
        index = getattr(proto.trainer_spec, f"{role}_id", -1)
        default = proto.pieces[index].piece if 0 <= index < len(proto.pieces) else ""
        if name := _content(settings.get(f"{role}_token")) or default:
            config[f"{role}_token"] = name
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    if isinstance(extra, list) and extra:
        config["additional_special_tokens"] = [_content(token) for token in extra]
    like_t5 = "T5" in str(settings.get("tokenizer_class", "")) or model_type in ("t5", "umt5")
    for role, default in zip(_ENDS, (not like_t5, like_t5), strict=True):
        is_added = bool(settings.get(f"add_{role}_token", default))
        config[f"add_{role}_token"] = is_added and f"{role}_token" in config
    config["clean_up_tokenization_spaces"] = False
    return config
