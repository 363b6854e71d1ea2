"""The vocabulary in a GGUF file's metadata, with every value checked once.

Defaults are llama.cpp's: where a key is missing, a sentencepiece vocabulary begins texts with a
space and with the first token of a text, and has ids 0 to 2 for unknown, begin and end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = (CONTROL, UNKNOWN)

# Keys of special tokens by our names for them: tokenizer.ggml.<key>_token_id.
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "mask": "mask",
}
_MISSPELT = {"sep": "separator"}  # the specification's key is misspelt; some writers correct it
_BEGINS_TEXTS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0")
_BEGINS_TEXTS += ("lfm2", "tekken")
_MAX_TEMPLATE = 1 << 20  # characters


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens and the rules that texts are split by.

    Attributes:
        model: kind of tokenizer, ``gpt2`` or ``llama``.
        pre: name of the split before byte-level BPE.
        tokens: by id.
        kinds: GGUF token types by id, e.g. ``NORMAL``.
        scores: by id; the highest is merged first.  Empty for byte-level BPE.
        merges: of byte-level BPE, first one first.
        ids: ids of special tokens: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad``, ``sep``,
            ``mask``, as far as there are any.
        adds_bos: whether every text begins with the token ``bos``.
        adds_eos: whether every text ends with the token ``eos``.
        adds_space: whether a space is put before a text.
        context_length: of the model; None if unknown.
        templates: chat templates by name; ``default`` is the usual one.
        name: the model's name, lower case.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    context_length: int | None
    templates: dict[str, str]
    name: str

    @property
    def special(self) -> list[int]:
        """Ids of the tokens that are never parts of a text."""
        return [index for index, kind in enumerate(self.kinds) if kind in SPECIAL]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read the vocabulary.

    Args:
        metadata: values by key: Python values, lists, or arrays of MLX or NumPy.

    Raises:
        ValueError: the tokenizer is of a kind that is not supported, or a key is missing or
            broken; the message names it.
    """
    model = _text(metadata, "tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise ValueError(
            f"tokenizer.ggml.model is {model[:60]!r}: only byte-level BPE ('gpt2') and "
            "sentencepiece-style BPE ('llama') are supported"
        )
    is_bpe = model == BYTE_LEVEL
    pre = _text(metadata, "tokenizer.ggml.pre", "default")
    tokens = _tokens(metadata)
    ids = _special_ids(metadata, len(tokens), defaults={} if is_bpe else _sentencepiece_ids(tokens))
    kinds = _kinds(metadata, len(tokens))
    if "unk" in ids and not is_bpe:
        kinds[ids["unk"]] = UNKNOWN
    vocabulary = Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        scores=[] if is_bpe else _scores(metadata, len(tokens)),
        merges=_merges(metadata) if is_bpe else [],
        ids=ids,
        adds_bos=_flag(metadata, "add_bos_token", default=not is_bpe or pre in _BEGINS_TEXTS),
        adds_eos=_flag(metadata, "add_eos_token", default=False),
        adds_space=_flag(metadata, "add_space_prefix", default=not is_bpe),
        context_length=_context_length(metadata),
        templates=_templates(metadata),
        name=_text(metadata, "general.name", "").lower(),
    )
    _refuse(vocabulary, metadata)
    return vocabulary


def _refuse(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
    """Refuse settings that are not honoured."""
    for role, is_added in (("bos", vocabulary.adds_bos), ("eos", vocabulary.adds_eos)):
        if is_added and role not in vocabulary.ids:
            raise ValueError(
                f"tokenizer.ggml.add_{role}_token is true without tokenizer.ggml.{role}_token_id"
            )
    if _flag(metadata, "add_sep_token", default=False):
        raise ValueError("tokenizer.ggml.add_sep_token is true, which is not supported")
    if _flag(metadata, "remove_extra_whitespaces", default=False):
        raise ValueError("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
    if metadata.get("tokenizer.ggml.precompiled_charsmap") is not None:
        raise ValueError("tokenizer.ggml.precompiled_charsmap is set, which is not supported")
    if vocabulary.model == BYTE_LEVEL and vocabulary.adds_space:
        raise ValueError(
            "tokenizer.ggml.add_space_prefix is true for byte-level BPE, which is not supported"
        )


def _value(metadata: Mapping[str, Any], key: str) -> Any:
    """Return a value without its array library; None if the key is missing."""
    value: Any = metadata.get(key)
    return value.tolist() if hasattr(value, "tolist") else value


def _text(metadata: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = _value(metadata, key)
    value = default if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"{key} is missing" if value is None else f"{key} is not text")
    return value


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = _value(metadata, f"tokenizer.ggml.{name}")
    if value is None:
        return default
    if value not in (True, False):  # some writers use the numbers 0 and 1
        raise ValueError(f"tokenizer.ggml.{name} is neither true nor false")
    return bool(value)


def _list(metadata: Mapping[str, Any], key: str, count: int | None, *types: type) -> list[Any]:
    """Return a list of ``count`` values of a type; an empty one if the key is missing."""
    values = _value(metadata, key)
    if values is None:
        return []
    if not isinstance(values, list) or not all(type(value) in types for value in values):
        names = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{key} is not a list of {names}")
    if count is not None and len(values) != count:
        raise ValueError(f"{key} has {len(values)} values for {count} tokens")
    return values


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    key = "tokenizer.ggml.tokens"
    listed: list[str] = _list(metadata, key, None, str)
    if not listed:
        raise ValueError(f"{key} is missing")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(listed)]
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if first.setdefault(token, index) != index:
                raise ValueError(f"{key} has {token[:60]!r} twice: {first[token]} and {index}")
    return tokens


def _kinds(metadata: Mapping[str, Any], count: int) -> list[int]:
    kinds = _list(metadata, "tokenizer.ggml.token_type", count, int)
    return list(kinds) if kinds else [NORMAL] * count


def _scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    scores = [float(score) for score in _list(metadata, key, count, float, int)]
    if not scores:
        raise ValueError(f"{key} is missing")
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"{key} has a value that is not a number")
    return scores


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges; the space between two tokens is never the first character."""
    key = "tokenizer.ggml.merges"
    lines: list[str] = _list(metadata, key, None, str)
    if metadata.get(key) is None:
        raise ValueError(f"{key} is missing")
    cuts = [line.find(" ", 1) for line in lines]
    for line, cut in zip(lines, cuts, strict=True):
        if cut < 0 or cut == len(line) - 1:
            raise ValueError(f"{key} has {line[:60]!r}, which is not two tokens")
    return [(line[:cut], line[cut + 1 :]) for line, cut in zip(lines, cuts, strict=True)]


def _sentencepiece_ids(tokens: list[str]) -> dict[str, int]:
    return {role: index for index, role in enumerate(("unk", "bos", "eos")) if index < len(tokens)}


def _special_ids(
    metadata: Mapping[str, Any], count: int, *, defaults: dict[str, int]
) -> dict[str, int]:
    ids = dict(defaults)
    for role, name in _ROLES.items():
        key = f"tokenizer.ggml.{name}_token_id"
        value = _value(metadata, key)
        if value is None and role in _MISSPELT:
            key = f"tokenizer.ggml.{_MISSPELT[role]}_token_id"
            value = _value(metadata, key)
        if value is None or value == 2**32 - 1:  # -1, which means none
            continue
        if type(value) is not int or not 0 <= value < count:
            raise ValueError(f"{key} is {str(value)[:60]}, which is not the id of a token")
        ids[role] = value
    return ids


def _context_length(metadata: Mapping[str, Any]) -> int | None:
    key = f"{_text(metadata, 'general.architecture', '')}.context_length"
    value = _value(metadata, key)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{key} is {str(value)[:60]}, which is not a length")
    return value


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates; the names of further ones are listed under ``_templates``."""
    key = "tokenizer.chat_template"
    names = _list(metadata, f"{key}s", None, str)
    keys = {"default": key} | {name: f"{key}.{name}" for name in names}
    templates = {}
    for name, full_key in keys.items():
        text = _text(metadata, full_key, "")
        if len(text) > _MAX_TEMPLATE:
            raise ValueError(f"{full_key} has {len(text)} characters, more than {_MAX_TEMPLATE}")
        if not name.replace("_", "").replace("-", "").isalnum():  # becomes the name of a file
            raise ValueError(f"{key}s has {name[:60]!r}, which cannot be the name of a file")
        if text:
            templates[name] = text
    return templates
