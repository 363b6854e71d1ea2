"""Log-probabilities of emitted ids, and what an id looks like as text and as bytes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

LEAST_LOGPROB = -9999.0  # what OpenAI writes for impossible; JSON has no infinity


class TokenTexts:
    """Says what ids of a tokenizer look like."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_letters() if _is_byte_level(tokenizer) else None

    def bytes_of(self, token: int) -> bytes:
        """The bytes that an id stands for; of other tokenizers than byte-level ones, its text's."""
        if self._letters is not None:
            piece: Any = self._tokenizer.convert_ids_to_tokens(token)
            if piece is not None and all(letter in self._letters for letter in piece):
                return bytes(self._letters[letter] for letter in piece)
        return self._tokenizer.decode([token]).encode()

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """An id in the shape of OpenAI's ``logprobs``."""
        data = self.bytes_of(token)
        return {
            "token": _shown(data),
            "logprob": logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB,
            "bytes": list(data),
        }

    def entries(self, tokens: list[int], logprobs: mx.array, top: int) -> list[dict[str, Any]]:
        """Entries for the ids of a step.

        Args:
            tokens: the ids.
            logprobs: ``[len(tokens), V]``.
            top: how many of the likeliest ids to tell beside each.
        """
        chosen = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)[:, 0]
        best = mx.argsort(-logprobs, axis=-1)[:, :top]
        values: Any = mx.take_along_axis(logprobs, best, axis=-1).tolist()
        likeliest: Any = best.tolist()
        found = []
        for at, (token, logprob) in enumerate(zip(tokens, _floats(chosen), strict=True)):
            pairs = zip(likeliest[at], values[at], strict=True)
            found.append(
                self.entry(token, logprob)
                | {"top_logprobs": [self.entry(each, value) for each, value in pairs]}
            )
        return found


def _shown(data: bytes) -> str:
    """The text of a token; of one that is no whole character, its bytes as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _floats(values: mx.array) -> list[float]:
    found: Any = values.tolist()
    return found


def _is_byte_level(tokenizer: TokenizerWrapper) -> bool:
    return isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)


def _byte_letters() -> dict[str, int]:
    """The byte of each letter that byte-level BPE writes, as published with GPT-2."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {chr(byte) if byte in kept else chr(next(spare)): byte for byte in range(256)}
