"""Tokenizers of two models: the same, or a difference that names it."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_mtp.text.same_tokenizer import tokenizer_difference
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tokenizers import KINDS, make


def bpe(merges: list[tuple[str, str]], *, added: tuple[str, ...] = ()) -> Any:
    """A byte-level tokenizer with the tokens of ``MERGES``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*letters, "he", "qu", "ui", "qui"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(added))
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


MERGES = [("h", "e"), ("q", "u"), ("u", "i"), ("qu", "i")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_the_same_as_itself(kind: str) -> None:
    one, other = (TokenizerWrapper(make(kind)) for _ in range(2))
    assert tokenizer_difference(one, other) is None


def test_more_tokens_at_the_end_are_no_difference() -> None:
    small, large = bpe(MERGES, added=("<s>",)), bpe(MERGES, added=("<s>", "<think>", "<pad>"))
    assert tokenizer_difference(small, large) is None
    assert tokenizer_difference(large, small) is None


def test_other_tokens_are_named_with_their_ids() -> None:
    one, other = bpe(MERGES, added=("<s>", "<end>")), bpe(MERGES, added=("<end>", "<s>"))
    assert tokenizer_difference(one, other) in (
        "its token '<s>' has id 260, not 261",
        "its token '<end>' has id 261, not 260",
    )
    less, more = bpe(MERGES, added=("<end>",)), bpe(MERGES, added=("<x>", "<y>"))
    assert tokenizer_difference(less, more) == "only it has a token '<end>'"
    assert tokenizer_difference(more, less) == "it has no token '<end>'"


def test_other_merges_of_the_same_tokens_are_found() -> None:
    swapped = [MERGES[0], MERGES[2], MERGES[1]]
    found = tokenizer_difference(bpe(MERGES), bpe(swapped))
    assert found == "it splits text such as 'The quick brown fox ' into other tokens"


def test_other_kinds_are_found() -> None:
    assert tokenizer_difference(byte_tokenizer(), bpe(MERGES)) is not None
