"""Ids to text, one id at a time, exactly as the tokenizer decodes the whole.

The text of an answer is ``tokenizer.decode(prompt + answer)`` without the beginning that it shares
with ``tokenizer.decode(prompt)``; special tokens are shown, as ``decode`` does by default.
``Detokenizer`` returns every part of it as soon as no later id can change it:

- byte-level vocabularies: the bytes of the ids are one UTF-8 text;
- other decoders of ``tokenizers`` that map tokens one by one: every id has its text, except that a
  run of byte tokens is decided at its end, as it becomes U+FFFD per byte if it is not UTF-8;
- anything else, such as ``clean_up_tokenization_spaces``: a few ids are decoded again for each new
  one, and the last word waits.

A byte sequence that is not UTF-8, or that the end cuts off, is U+FFFD, as in the whole decoding.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

from mlx_mtp.storage.sidecars import sidecar_template

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_SPACE = "\u2581"  # sentencepiece's letter for a space
_BYTE_SPACE = "\u0120"  # GPT-2's letter for byte 32
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_CHARACTER_BYTES = 4
_NUM_CONTEXT_IDS, _MAX_WINDOW_IDS = 16, 64
# Decoders that map tokens one by one, and join them.
_BY_TOKEN = re.compile(
    r"ByteLevel|((Replace|Metaspace|WordPiece|Strip) ?)*(ByteFallback ?)?(Fuse ?(Strip ?)*)?"
)
# A place that later ids cannot change: before white space, or after a letter beyond ASCII, unless
# it is in what a clean-up of spaces may join ("don ' t", "do n't") or in an incomplete character.
_WORD_END = re.compile(r"(?<=[^\s'n\ufffd])(?=\s)|(?<=[^\0-\x7f\ufffd])(?=.)", re.DOTALL)


def load_tokenizer(
    folder: Path, options: dict[str, Any] | None = None, *, eos_token_ids: Any = None
) -> TokenizerWrapper:
    """Load a tokenizer as mlx-lm does, with a decoder that fits its vocabulary.

    A chat template in ``chat_template.json`` is read too.

    Its ``detokenizer`` is a ``Detokenizer``.

    Args:
        folder: a model folder.
        options: passed to transformers.
        eos_token_ids: ids that end an answer, from the model's configuration.
    """
    from mlx_lm import tokenizer_utils, utils

    tokenizer: Any = tokenizer_utils.load(
        _WithoutTokenizerFile(folder),
        sidecar_template(folder) | (options or {}),
        eos_token_ids=eos_token_ids,
        defaults=utils._tokenizer_defaults(folder),
    )
    tokenizer._detokenizer = Detokenizer(tokenizer)
    return tokenizer


class Detokenizer:
    """A streaming detokenizer with the interface of mlx-lm's.

    Args:
        tokenizer: a tokenizer of transformers, or one wrapped by mlx-lm.
        prompt: the ids before the answer; see ``reset``.

    Attributes:
        tokens: the ids so far.
        pieces: what single ids add to a text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.pieces = TokenPieces(tokenizer)
        self.reset(prompt)

    def reset(self, prompt: Sequence[int] = (), *, continued: bool = False) -> None:
        """Start another answer.

        Args:
            prompt: the ids before the answer.
            continued: whether there is more text before the prompt.
        """
        self.tokens: list[int] = []
        self._parts: list[str] = []
        self._num_read = self._num_characters = 0
        reader = _Window if self.pieces.joined_bytes is None else _PieceReader
        self._reader: _Reader = reader(self.pieces, prompt, continued)
        self._of_prompt = self._reader.pending

    def add_token(self, token: int) -> None:
        """Take the next id."""
        self.tokens.append(token)
        self._add(self._reader.add(token))

    def finalize(self) -> None:
        """End the answer: nothing waits any more."""
        self._add(self._reader.finish())

    @property
    def text(self) -> str:
        """The text that is certain."""
        return "".join(self._parts)

    @property
    def last_segment(self) -> str:
        """The text that has become certain since this was last read."""
        parts, self._num_read = self._parts[self._num_read :], len(self._parts)
        return "".join(parts)

    @property
    def position(self) -> int:
        """Number of characters so far; one that is incomplete does not count."""
        pending = len(self._reader.complete_pending) - len(self._of_prompt)
        return self._num_characters + max(pending, 0)

    def _add(self, text: str) -> None:
        """Add text without what belongs to the prompt."""
        if not text:
            return
        if self._of_prompt:
            size = len(os.path.commonprefix([text, self._of_prompt]))
            self._of_prompt = self._of_prompt[size:] if size == len(text) else ""
            text = text[size:]
        self._parts.append(text)
        self._num_characters += len(text)


def detokenizer_for(
    tokenizer: TokenizerWrapper, prompt: Sequence[int], *, continued: bool = False
) -> Detokenizer:
    """Return a new detokenizer for the answer to a prompt; see ``Detokenizer.reset``."""
    detokenizer: Any = tokenizer.detokenizer  # a copy
    if not isinstance(detokenizer, Detokenizer):
        detokenizer = Detokenizer(tokenizer)
    detokenizer.reset(prompt, continued=continued)
    return detokenizer


def is_utf8(data: bytes) -> bool:
    """Whether bytes are valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class TokenPieces(dict[int, "str | bytes"]):
    """What an id adds in the middle of a text, by id; computed on first use.

    Bytes for ids that may be a part of a character, and none for ids without a token; otherwise a
    string.

    Args:
        tokenizer: a tokenizer of transformers, or one wrapped by mlx-lm.

    Attributes:
        decode: decodes ids.
        byte_level: whether all pieces are bytes.
        joined_bytes: creates the decoder of adjacent bytes; None if the decoder of the tokenizer is
            not known to map tokens one by one, so that the pieces may differ from the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        _mend_decoder(tokenizer)
        self.decode: Callable[[Sequence[int]], str] = tokenizer.decode
        self._token_of = tokenizer.convert_ids_to_tokens
        kinds = _decoder_kinds(tokenizer)
        self.byte_level = kinds == ["ByteLevel"]
        self.joined_bytes: Callable[[], codecs.IncrementalDecoder] | None = None
        if self.byte_level:
            self.joined_bytes = _utf8
        elif kinds is not None:
            self.joined_bytes = _ByteRun
        self._before: list[int] | None = None

    def __missing__(self, token: int) -> str | bytes:
        self[token] = piece = self._piece(token)
        return piece

    def _piece(self, token: int) -> str | bytes:
        try:
            name = self._token_of(token)
        except (IndexError, KeyError, OverflowError, ValueError):
            name = None
        if name is None:
            return b""
        if self.byte_level:
            # As the decoder does: a token with any other letter is text.
            values = [_BYTE_LETTERS.get(letter) for letter in name]
            return name.encode() if None in values else bytes(values)  # type: ignore[arg-type]
        if (match := _BYTE_TOKEN.fullmatch(name)) and self.decode([token]) != name:
            return bytes.fromhex(match[1])
        if self._before is None:  # any id with a text, because the first of a text is special
            texts = ((index, self.decode([index])) for index in count())
            self._before = [next(index for index, text in texts if text.strip())]
        return self.decode([*self._before, token])[len(self.decode(self._before)) :]


class _Reader:
    """Turns ids into text that no later id can change.

    Args:
        pieces: of the tokenizer.
        prompt: the ids before; the text that is decided after them is pending at the start.
        continued: whether there is more text before the prompt.
    """

    def __init__(self, pieces: TokenPieces, prompt: Sequence[int], continued: bool) -> None:
        raise NotImplementedError

    def add(self, token: int) -> str:
        """Take an id; return the text that is now certain."""
        raise NotImplementedError

    def finish(self) -> str:
        """Return the pending text and forget it."""
        raise NotImplementedError

    @property
    def pending(self) -> str:
        """What ``finish`` would return."""
        raise NotImplementedError

    @property
    def complete_pending(self) -> str:
        """The pending text without a character that may yet be completed."""
        raise NotImplementedError


class _PieceReader(_Reader):
    """Joins pieces."""

    def __init__(self, pieces: TokenPieces, prompt: Sequence[int], continued: bool) -> None:
        assert pieces.joined_bytes is not None
        self._pieces = pieces
        self._bytes = pieces.joined_bytes()
        run, start = b"", len(prompt)
        while start and isinstance(piece := pieces[prompt[start - 1]], bytes):
            run, start = piece + run, start - 1
            if pieces.byte_level and len(run) >= _MAX_CHARACTER_BYTES:
                break
        self._bytes.decode(run)
        before = prompt[:start]
        in_the_middle = (
            pieces.byte_level
            or continued
            or any(pieces.decode(ids) for ids in (before[-_NUM_CONTEXT_IDS:], before))
        )
        # All ids until there is text: a decoder may drop the space at the beginning of a text.
        self._all: list[int] | None = None
        if not in_the_middle:
            self._all = [token for token in prompt if pieces[token] != b""]

    def add(self, token: int) -> str:
        piece = self._pieces[token]
        if isinstance(piece, bytes):
            text = self._bytes.decode(piece)
        else:
            text = self._bytes.decode(b"", True) + piece
        if self._all is None or piece == b"":
            return text
        self._all.append(token)
        text = "" if isinstance(piece, bytes) else self._pieces.decode(self._all)
        if text:
            self._all = None
        return text

    def finish(self) -> str:
        text = self.pending
        self._all = None
        self._bytes.reset()
        return text

    @property
    def pending(self) -> str:
        if self._all is not None:
            return self._pieces.decode(self._all)
        assert self._pieces.joined_bytes is not None
        return self._pieces.joined_bytes().decode(self._bytes.getstate()[0], True)

    @property
    def complete_pending(self) -> str:
        utf8 = _utf8()
        text = utf8.decode(self._bytes.getstate()[0])
        if self._all is None:
            return text
        num_incomplete = len(utf8.getstate()[0])  # ids, each of one byte
        return self._pieces.decode(self._all[: len(self._all) - num_incomplete])


class _Window(_Reader):
    """Decodes the last ids again for each new one; the last word waits."""

    def __init__(self, pieces: TokenPieces, prompt: Sequence[int], continued: bool) -> None:
        self._decode = pieces.decode
        self._pieces = pieces
        self._ids = list(prompt[-_NUM_CONTEXT_IDS:])
        if not self._ids or not continued and not self._decode(self._ids):
            self._ids = list(prompt)
        self._num_certain = 0

    def add(self, token: int) -> str:
        piece = self._pieces[token]
        if piece != b"":
            self._ids.append(token)
        if isinstance(piece, bytes):  # a run of byte tokens is decided at its end
            return ""
        text = self._decode(self._ids)
        end = max((match.start() for match in _WORD_END.finditer(text)), default=0)
        certain, self._num_certain = text[self._num_certain : end], max(self._num_certain, end)
        if len(self._ids) % _MAX_WINDOW_IDS == 0:
            self._shorten(text[self._num_certain :])
        return certain

    def finish(self) -> str:
        text = self.pending
        self._num_certain += len(text)
        return text

    @property
    def pending(self) -> str:
        return self._decode(self._ids)[self._num_certain :]

    @property
    def complete_pending(self) -> str:
        return self.pending.rstrip("\ufffd")

    def _shorten(self, pending: str) -> None:
        """Drop the first ids, if the rest still ends with the pending text after some other."""
        ids = self._ids[-_NUM_CONTEXT_IDS:]
        text = self._decode(ids)
        if text.endswith(pending) and len(text) > len(pending):
            self._ids, self._num_certain = ids, len(text) - len(pending)


def _utf8() -> codecs.IncrementalDecoder:
    """Decodes bytes; what is not UTF-8 becomes U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace")


class _ByteRun(codecs.IncrementalDecoder):
    """Decodes a run of byte tokens: all of it, or U+FFFD for every byte, as ``tokenizers`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self._run = b""

    def decode(self, input: Any, final: bool = False) -> str:
        self._run += input
        if not final:
            return ""
        run, self._run = self._run, b""
        return run.decode() if is_utf8(run) else "\ufffd" * len(run)

    def getstate(self) -> tuple[bytes, int]:
        return self._run, 0


class _WithoutTokenizerFile(PosixPath):
    """A folder in which mlx-lm does not see ``tokenizer.json``.

    It would parse the file to choose a detokenizer by the decoder alone, and build a table of
    all ids, which fails if there are ids without a token.
    """

    def __truediv__(self, key: Any) -> Path:
        return Path(os.devnull, key)


def _decoder_kinds(tokenizer: Any) -> list[str] | None:
    """Return the kinds of a decoder that maps tokens one by one and joins them, else None."""
    from transformers import PreTrainedTokenizerFast as Stock

    inner = _unwrapped(tokenizer)
    if not isinstance(inner, Stock) or _cleans_up(inner):
        return None
    if (type(inner).decode, type(inner)._decode) != (Stock.decode, Stock._decode):
        return None
    decoder = inner.backend_tokenizer.decoder
    try:
        spec: Any = json.loads(decoder.__getstate__()) if decoder else {"type": "Fuse"}
    except Exception:  # a decoder that is written in Python
        return None
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [part["type"] for part in parts]
    fused = parts[kinds.index("Fuse") :] if "Fuse" in kinds else []
    strips_the_end = any(part.get("stop") for part in fused)
    return kinds if _BY_TOKEN.fullmatch(" ".join(kinds)) and not strips_the_end else None


def _cleans_up(tokenizer: Any) -> bool:
    """Whether ``decode`` removes spaces before punctuation; transformers ignores it for some."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    ids = tokenizer.encode("a .", add_special_tokens=False)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return " ." not in text or tokenizer.decode(ids) != text


def _mend_decoder(tokenizer: Any) -> None:
    """Replace a decoder that does not fit the vocabulary: sentencepiece's for byte-level tokens, or
    the other way round.
    """
    from tokenizers import decoders

    backend = getattr(_unwrapped(tokenizer), "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ not in ("BPE", "Unigram"):
        return
    decode = backend.decoder.decode if backend.decoder else "".join
    reads = {space: decode(["a", space]) == "a " for space in (_BYTE_SPACE, _SPACE)}
    has = {space: backend.token_to_id(space) is not None for space in reads}
    if has == {_BYTE_SPACE: reads[_BYTE_SPACE], _SPACE: False} and any(reads.values()):
        return
    vocab = backend.get_vocab()
    begins = Counter(token[:1] for token in vocab)
    if begins[_BYTE_SPACE] > begins[_SPACE] and len(vocab.keys() & _BYTE_LETTERS.keys()) > 128:
        if not reads[_BYTE_SPACE]:
            backend.decoder = decoders.ByteLevel()
    elif begins[_SPACE] > begins[_BYTE_SPACE] and not reads[_SPACE]:
        parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if backend.encode("a", add_special_tokens=False).tokens[:1] in ([_SPACE], [f"{_SPACE}a"]):
            parts.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(parts)


def _unwrapped(tokenizer: Any) -> Any:
    """The tokenizer of transformers in mlx-lm's wrapper."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer


def _byte_letters() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes, as published with GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}


_BYTE_LETTERS = _byte_letters()
