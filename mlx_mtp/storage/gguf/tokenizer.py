"""The tokenizer in the metadata of a GGUF file, as Hugging Face tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mlx_mtp.storage.gguf.byte_level import build
from mlx_mtp.storage.gguf.pieces import added_pieces, sentencepiece_model
from mlx_mtp.storage.gguf.vocabulary import (
    BYTE_LEVEL,
    SPECIAL,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from mlx_mtp.storage.safetensors import shown
from mlx_mtp.storage.sentencepiece import build_tokenizer, tokens_around

_NAMED = ("bos", "eos", "unk", "pad", "sep", "mask")
# Texts of special tokens that end an answer, in whatever role the file lists them.
_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "[EOT]", "[EOS]", "<eos>",
    "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a GGUF file's tokenizer into a model folder.

    Writes ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` with the
    special ids, and, if there are chat templates, ``chat_template.jinja`` and
    ``additional_chat_templates``.

    Args:
        metadata: values by key: Python values, lists, or arrays of MLX or NumPy.
        folder: existing folder.

    Raises:
        ValueError: the tokenizer is of a kind that is not supported, or broken; one line.
    """
    vocabulary = read_vocabulary(metadata)
    try:
        tokenizer = _build(vocabulary)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"the tokenizer cannot be built: {shown(error)}") from None
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", _config(vocabulary))
    _write_json(folder / "generation_config.json", _generation_ids(vocabulary))
    for name, template in vocabulary.templates.items():
        path = folder / "chat_template.jinja"
        if name != "default":
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def generation_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special ids of ``config.json`` and ``generation_config.json``.

    Returns:
        ``bos_token_id`` and ``pad_token_id``, if there are any, and ``eos_token_id``: a list with
        the end of a text and whatever else ends an answer.

    Raises:
        ValueError: the vocabulary is of a kind that is not supported, or broken.
    """
    return _generation_ids(read_vocabulary(metadata))


def _build(vocabulary: Vocabulary) -> Tokenizer:
    """Build the fast tokenizer; its ids are the rows of the GGUF's embedding table."""
    roles = (("bos", vocabulary.adds_bos), ("eos", vocabulary.adds_eos))
    around = tuple(
        vocabulary.tokens[vocabulary.ids[role]] if is_added else None for role, is_added in roles
    )
    if vocabulary.model != BYTE_LEVEL:
        return build_tokenizer(
            sentencepiece_model(vocabulary),
            added=added_pieces(vocabulary),
            around=(around[0], around[1]),
        )
    tokenizer: Any = build(vocabulary)
    added = [
        AddedToken(token, special=kind in SPECIAL, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in SPECIAL or kind == USER_DEFINED
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    if any(around):
        tokenizer.post_processor = tokens_around(tokenizer, around[0], around[1])
    return tokenizer


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return ``tokenizer_config.json``: the general class, which uses tokenizer.json as it is."""
    named = {
        f"{role}_token": vocabulary.tokens[vocabulary.ids[role]]
        for role in _NAMED
        if role in vocabulary.ids
    }
    special = (vocabulary.tokens[index] for index in vocabulary.special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [token for token in special if token not in named.values()],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    if vocabulary.adds_bos or vocabulary.adds_eos:
        config |= {"add_bos_token": vocabulary.adds_bos, "add_eos_token": vocabulary.adds_eos}
    if vocabulary.context_length is not None:
        config["model_max_length"] = vocabulary.context_length
    return config


def _generation_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    special = {vocabulary.tokens[index]: index for index in vocabulary.special}
    ends = [vocabulary.ids[role] for role in ("eos", "eot", "eom") if role in vocabulary.ids]
    texts = list(_ENDS)
    if "<|return|>" in special:  # there, <|end|> ends a message of several in one answer
        texts.remove("<|end|>")
    ends += [special[text] for text in texts if text in special]
    ids = {f"{role}_token_id": vocabulary.ids.get(role) for role in ("bos", "pad")}
    ids = {key: value for key, value in ids.items() if value is not None}
    return ids | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
