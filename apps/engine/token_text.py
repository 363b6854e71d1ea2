"""Logprobs of emitted ids, with the text and the bytes of ids."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

MIN_LOGPROB = -9999.0  # OpenAI's value for impossible tokens; JSON has no infinity


class TokenTexts:
    """Returns the text and the bytes of ids of a tokenizer."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_letters() if _is_byte_level(tokenizer) else None

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of an id; if the tokenizer is not byte-level, those of its text."""
        if self._letters is not None:
            piece: Any = self._tokenizer.convert_ids_to_tokens(token)
            if piece is not None and all(letter in self._letters for letter in piece):
                return bytes(self._letters[letter] for letter in piece)
        return self._tokenizer.decode([token]).encode()

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return an id in the form of OpenAI's ``logprobs``."""
        data = self.bytes_of(token)
        return {
            "token": _text(data),
            "logprob": logprob if logprob > MIN_LOGPROB else MIN_LOGPROB,
            "bytes": list(data),
        }

    def entries(self, tokens: list[int], logprobs: mx.array, top: int) -> list[dict[str, Any]]:
        """Return entries for the ids of a step.

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
            | {"top_logprobs": [self.entry(*pair) for pair in zip(row, row_values, strict=True)]}
            for token, logprob, row, row_values in zip(tokens, own, likeliest, values, strict=True)
        ]


def _text(data: bytes) -> str:
    """The text of a token, or its bytes in OpenAI's notation if it is not valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _is_byte_level(tokenizer: TokenizerWrapper) -> bool:
    return isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)


def _byte_letters() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes, as published with GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {chr(byte) if byte in printable else chr(next(spare)): byte for byte in range(256)}
