"""Logprobs of emitted ids, with the text and the bytes of ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.text.detokenizer import Detokenizer, detokenizer_for, is_utf8

MIN_LOGPROB = -9999.0  # OpenAI's value for impossible tokens; JSON has no infinity


class TokenTexts:
    """Returns the text and the bytes of ids of a tokenizer, as in the middle of a text."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self.pieces = detokenizer_for(tokenizer, ()).pieces

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of an id, which may be a part of a character."""
        piece = self.pieces[token]
        return piece if isinstance(piece, bytes) else piece.encode()

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return an id in the form of OpenAI's ``logprobs``."""
        logprob = logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
        data = self.bytes_of(token)
        return {"token": _text(data), "logprob": logprob, "bytes": list(data)}

    def entries(self, tokens: list[int], logprobs: mx.array, top: int) -> list[dict[str, Any]]:
        """Return entries for the ids of a step; those of the most likely ids have an ``id``.

        Args:
            tokens: the ids.
            logprobs: ``[len(tokens), V]``.
            top: number of most likely ids to report for each position.
        """
        chosen = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)[:, 0]
        best = mx.argsort(-logprobs, axis=-1)[:, :top]
        values: Any = mx.take_along_axis(logprobs, best, axis=-1).tolist()
        likeliest: Any = best.tolist()
        own: Any = chosen.tolist()
        return [
            self.entry(token, logprob)
            | {
                "top_logprobs": [
                    self.entry(*pair) | {"id": pair[0]}
                    for pair in zip(row, row_values, strict=True)
                ]
            }
            for token, logprob, row, row_values in zip(tokens, own, likeliest, values, strict=True)
        ]

    def of_answer(
        self, prompt: Sequence[int], *, top: int, stop_ids: Collection[int]
    ) -> AnswerLogprobs:
        """Return the logprobs of an answer, to be filled.

        Args:
            prompt: the ids before the answer.
            top: number of most likely ids to report for each position.
            stop_ids: ids without text.
        """
        return AnswerLogprobs(self, detokenizer_for(self._tokenizer, prompt), top, stop_ids)


class AnswerLogprobs:
    """Entries for the ids of an answer, whose bytes joined are its text.

    An entry waits until it is known which part of its text belongs to the answer: none of a stop id
    and of what a stop string cuts off.
    """

    def __init__(
        self, texts: TokenTexts, detokenizer: Detokenizer, top: int, stop_ids: Collection[int]
    ) -> None:
        self._texts = texts
        self._detokenizer = detokenizer
        self._top = top
        self._stop_ids = stop_ids
        self._waiting: deque[tuple[dict[str, Any], str | bytes, int, int]] = deque()
        self._text, self._text_start = "", 0  # of the waiting entries

    def add(self, tokens: list[int], logprobs: mx.array) -> None:
        """Take the ids of a step; ``logprobs`` are ``[len(tokens), V]``."""
        entries = self._texts.entries(tokens, logprobs, self._top)
        for token, entry in zip(tokens, entries, strict=True):
            start, data = self._detokenizer.position, b""
            if token not in self._stop_ids:
                self._detokenizer.add_token(token)
                data = self._texts.pieces[token]
            self._waiting.append((entry, data, start, self._detokenizer.position))

    def take(self, num_characters: int, *, is_end: bool) -> list[dict[str, Any]]:
        """Return the entries of the first characters of the answer that were not returned yet.

        Args:
            num_characters: length of the text so far.
            is_end: whether this is the whole text.
        """
        if is_end:
            self._detokenizer.finalize()
        self._text += self._detokenizer.last_segment
        taken = []
        while self._waiting:
            entry, piece, start, end = self._waiting[0]
            if not is_end and (start >= num_characters or end > num_characters):
                break
            self._waiting.popleft()
            start = max(start, self._text_start)
            end = max(start, end)
            text = self._text[start - self._text_start : end - self._text_start]
            kept = text[: max(num_characters - start, 0)]
            if isinstance(piece, str):  # at the beginning of a text it may be without its space
                data = kept.encode()
            else:
                data = piece.removesuffix(text[len(kept) :].encode())
            data = b"" if start >= num_characters else data
            taken.append(entry | {"token": _text(data), "bytes": list(data)})
            self._text, self._text_start = self._text[end - self._text_start :], end
        return taken


def _text(data: bytes) -> str:
    """The text of a token, or its bytes in OpenAI's notation if it is not valid UTF-8."""
    if is_utf8(data):
        return data.decode()
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
