"""Conversion of a sentencepiece model to a fast tokenizer of the ``tokenizers`` library.

transformers can convert some of these files, but follows the tokenizer class instead of the file:
it omits the space before a text, or adds tokens that do not exist.  Here every field of the file
that changes ids or text is respected, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, Unigram

SPACE = "\u2581"  # sentencepiece writes a space as this letter

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
_NEVER = 1e4  # so far below the lowest score that the piece is never chosen


@dataclass(frozen=True, kw_only=True)
class AddedPiece:
    """A token that tokenizer files add to a sentencepiece vocabulary, or rename in it.

    Attributes:
        content: its text.
        id: its id.
        special: whether it is omitted when special tokens are skipped.
        options: ``lstrip``, ``rstrip`` and ``single_word`` of the ``tokenizers`` library.
        source: file that names it.
    """

    content: str
    id: int
    special: bool
    options: Mapping[str, bool]
    source: str


def parse(path: Path) -> Any:
    """Parse a sentencepiece file into its ``ModelProto``; None if it is something else."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return proto if len(proto.pieces) else None


def build_tokenizer(
    proto: Any,
    *,
    added: Sequence[AddedPiece] = (),
    around: tuple[str | None, str | None] = (None, None),
    legacy: bool = True,
) -> Tokenizer:
    """Build a fast tokenizer from a parsed sentencepiece model.

    Args:
        proto: the ``ModelProto``.
        added: tokens beyond the vocabulary, or new names of tokens in it.
        around: tokens before and after every text.
        legacy: whether text after a special token also begins with the dummy space, as
            sentencepiece does for separate texts.

    Raises:
        ValueError: the model uses a feature that fast tokenizers lack.
    """
    _refuse(proto)
    added = sorted(added, key=lambda token: token.id)
    names = [piece.piece for piece in proto.pieces]
    for token in added:
        if token.id < len(names):
            names[token.id] = token.content
    if len(set(names)) < len(names):
        raise ValueError("two tokens have the same name")
    tokenizer: Any = Tokenizer(_model(proto, names))
    tokenizer.normalizer = _normalizer(proto, legacy=legacy)
    if steps := _pre_tokenizers(proto, legacy=legacy):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = _decoder(proto)
    _add_tokens(tokenizer, proto, names, added)
    tokenizer.post_processor = tokens_around(tokenizer, *around)
    return tokenizer


def user_defined(proto: Any) -> list[str]:
    """Return the symbols that are matched first; those with a space are never matched."""
    return [p.piece for p in proto.pieces if p.type == _USER and " " not in p.piece]


def normal_pieces(proto: Any) -> list[str]:
    """Return the pieces that texts are split into."""
    return [piece.piece for piece in proto.pieces if piece.type == _NORMAL]


def _refuse(proto: Any) -> None:
    """Refuse unsupported features by name."""
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        kind = {3: "word", 4: "char"}.get(trainer.model_type, trainer.model_type)
        raise ValueError(
            f"sentencepiece models of type {kind} are not supported, only unigram, bpe"
        )
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix is not supported")
    if not rules.escape_whitespaces:
        raise ValueError("escape_whitespaces = false is not supported")
    if proto.HasField("denormalizer_spec") and proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError("denormalisation rules are not supported")
    unused = {piece.piece for piece in proto.pieces if piece.type == _UNUSED}
    if unused and (trainer.model_type == _UNIGRAM or any(_can_appear(unused, proto))):
        raise ValueError("a vocabulary with unused pieces is not supported")


def _can_appear(unused: AbstractSet[str], proto: Any) -> Iterator[bool]:
    """For each unused piece: whether merges of others lead to it, which sentencepiece undoes.

    Padding that converters add to a vocabulary, such as ``[PAD32000]``, cannot appear.
    """
    parts = unused | {piece.piece for piece in proto.pieces if piece.type == _NORMAL}

    def is_part(text: str) -> bool:
        return len(text) == 1 or text in parts

    for name in unused:
        cuts = range(1, len(name))
        yield len(name) == 1 or any(is_part(name[:cut]) and is_part(name[cut:]) for cut in cuts)


def _model(proto: Any, names: Sequence[str]) -> Any:
    """Return the segmentation model."""
    pieces, fallback = proto.pieces, proto.trainer_spec.byte_fallback
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN), None)
    if unknown is None:
        raise ValueError("the vocabulary has no unknown piece")
    if proto.trainer_spec.model_type == _UNIGRAM:
        normal = [piece.score for piece in pieces if piece.type == _NORMAL] or [0.0]
        scores = [_score(piece, lowest=min(normal), highest=max(normal)) for piece in pieces]
        vocab = list(zip(names, scores, strict=True))
        return Unigram(vocab, unk_id=unknown, byte_fallback=fallback)
    return BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=_merges(proto),
        unk_token=names[unknown],
        fuse_unk=True,
        byte_fallback=fallback,
        # A user-defined symbol, which the pre-tokenizer splits off, is one token.
        ignore_merges=bool(user_defined(proto)),
    )


def _score(piece: Any, *, lowest: float, highest: float) -> float:
    """Return a unigram piece's score, by sentencepiece's rules.

    Control and byte pieces get a very low score, as a fast tokenizer would match them in a text.
    """
    if piece.type == _NORMAL:
        return piece.score
    if piece.type == _USER and " " not in piece.piece:
        return len(piece.piece.encode()) * highest - 0.1  # beats whatever else covers its bytes
    return lowest - _NEVER


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return all merges of two pieces into a third, best score first, as in sentencepiece."""
    joinable = set(normal_pieces(proto))
    results = [piece for piece in proto.pieces if piece.type == _NORMAL and len(piece.piece) > 1]
    results.sort(key=lambda piece: -piece.score)  # stable: equal scores stay in order of id
    return [
        (name[:cut], name[cut:])
        for name in (piece.piece for piece in results)
        for cut in range(1, len(name))
        if name[:cut] in joinable and name[cut:] in joinable
    ]


def _normalizer(proto: Any, *, legacy: bool) -> Any:
    """Return the normalisation of a text: rules, spaces, the leading space."""
    rules = proto.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        # The library looks up a letter with its marks, applies the first rule and drops the other
        # marks; composed first, they are one letter.  All NFKC rules compose anyway.
        steps += [normalizers.NFC()] if "nfkc" in rules.name else []
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    if rules.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    elif rules.add_dummy_prefix:
        # The pre-tokenizer adds the space then, but none to a text that begins with one.
        steps.append(normalizers.Replace(Regex(rf"\A(?={SPACE})"), SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizers(proto: Any, *, legacy: bool) -> list[Any]:
    """Return the splits before the model: the leading space, user-defined symbols."""
    steps: list[Any] = []
    if proto.normalizer_spec.add_dummy_prefix and not legacy:
        first = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
        steps.append(first)
    symbols = user_defined(proto)
    if symbols and proto.trainer_spec.model_type == _BPE:
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = "|".join(re.escape(symbol) for symbol in longest_first)
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    return steps


def _decoder(proto: Any) -> Any:
    """Return the decoder, in the form for which mlx-lm has a streaming detokeniser."""
    rules = proto.normalizer_spec
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def _add_tokens(
    tokenizer: Tokenizer, proto: Any, names: Sequence[str], added: Sequence[AddedPiece]
) -> None:
    """Register the tokens that are matched in the original text, before spaces are added."""
    renamed = {token.id for token in added}
    special = [
        AddedToken(names[index], normalized=False, special=True)
        for index, piece in enumerate(proto.pieces)
        if piece.type in (_CONTROL, _UNKNOWN) and index not in renamed
    ]
    tokenizer.add_special_tokens(special)
    for token in added:
        entry = AddedToken(token.content, special=token.special, normalized=False, **token.options)
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([entry])
        index = tokenizer.token_to_id(token.content)
        if index != token.id:
            raise ValueError(f"{token.source} gives {token.content} the id {token.id}, not {index}")


def tokens_around(tokenizer: Tokenizer, before: str | None, after: str | None) -> Any:
    """Return the processor that adds tokens before and after every text.

    Raises:
        ValueError: the vocabulary lacks one of them.
    """
    around = [token for token in (before, after) if token is not None]
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)]
    for token, index in ids:
        if index is None:
            raise ValueError(f"the vocabulary has no {token} to put around a text")
    first = [*([before] if before is not None else []), "$A:0"]
    first += [after] if after is not None else []
    second = [token.replace("$A:0", "$B:1") for token in first]
    return processors.TemplateProcessing(single=first, pair=first + second, special_tokens=ids)
