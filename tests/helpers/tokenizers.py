"""Small tokenizers of the kinds that models have, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from tests.helpers.fixtures_generate import _byte_letters

SPECIAL = ("<unk>", "<s>", "</s>")
ADDED = [
    *(AddedToken(text, normalized=False) for text in ("<a b>", " x ", "<é日>", "é", "Ġ", "▁")),
    *(AddedToken(text, normalized=False) for text in ("<a", "<a><a>", "  ", "##x", "<0xE6>")),
    AddedToken("<left>", lstrip=True),
    AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("word", single_word=True),
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["don", "n", "'", "t", "'t", "'s", "n't", ".", ",", "?", "é", "日", "\ufffd", "\0", *"ab"]
PIECES = ["▁", "▁▁", "▁Hello", "▁.", "▁n't", "a▁b", "▁é", " ", *WORDS]
STRIP = decoders.Strip(" ", 1, 0)
SPM = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
TEKKEN = pre.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")


def byte_level(
    *, decoder: Any = None, before: Sequence[Any] = (), prefix: bool = False
) -> Tokenizer:
    """GPT-2's kind."""
    pairs = ["Ġ n", "Ġ Ġ", "ĠĠ ĠĠ", "æ Ĺ", "Ċ ĠĠ", "Ã ©", "ð Ł", "¥ Ġ"]
    pieces = [*_byte_letters(), *(pair.replace(" ", "") for pair in pairs)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [(pair.split()[0], pair.split()[1]) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    last = pre.ByteLevel(add_prefix_space=prefix, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([*before, last])
    tokenizer.decoder = decoder or decoders.ByteLevel()
    return tokenizer


def sentencepiece(*, decoder: Any, prepends: bool = True, step: int = 1) -> Tokenizer:
    """Llama's kind: byte tokens, and spaces as a letter; only every ``step``-th id has a token."""
    vocab = {piece: index * step for index, piece in enumerate([*SPECIAL, *BYTES, *PIECES])}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    first = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    return tokenizer


def unigram(*, decoder: Any, byte_fallback: bool = False) -> Tokenizer:
    """T5's kind."""
    pieces = [*SPECIAL, *(BYTES if byte_fallback else ()), *PIECES]
    scores = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre.Metaspace()
    tokenizer.decoder = decoder
    return tokenizer


def words(model: Any, *, decoder: Any, prefix: str = "", suffix: str = "") -> Tokenizer:
    """BERT's and GPT's first kind, where spaces are not a part of tokens."""
    inner = [f"{prefix}{word}{suffix}" for word in WORDS]
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, *WORDS, *inner])}
    tokenizer = Tokenizer(model(vocab))
    tokenizer.pre_tokenizer = pre.Whitespace()
    tokenizer.decoder = decoder
    return tokenizer


def _bpe(vocab: dict[str, int]) -> Any:
    return models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>")


def _wordpiece(vocab: dict[str, int]) -> Any:
    return models.WordPiece(vocab, unk_token="<unk>")


KINDS = {
    "byte-level": lambda: byte_level(),
    "byte-level, prefix": lambda: byte_level(prefix=True),
    "byte-level, added": lambda: byte_level(),
    "Tekken": lambda: byte_level(before=[TEKKEN]),
    "byte-level, foreign decoder": lambda: byte_level(decoder=decoders.Sequence([*SPM, STRIP])),
    "byte-level, joined": lambda: byte_level(decoder=decoders.Fuse()),
    "Llama": lambda: sentencepiece(decoder=decoders.Sequence([*SPM, STRIP])),
    "Llama, added": lambda: sentencepiece(decoder=decoders.Sequence([*SPM, STRIP])),
    "Llama, holes": lambda: sentencepiece(decoder=decoders.Sequence([*SPM, STRIP]), step=3),
    "Llama, foreign decoder": lambda: sentencepiece(decoder=decoders.ByteLevel()),
    "Gemma": lambda: sentencepiece(decoder=decoders.Sequence(SPM), prepends=False),
    "Metaspace, always": lambda: unigram(decoder=decoders.Metaspace(prepend_scheme="always")),
    "Metaspace, first": lambda: unigram(decoder=decoders.Metaspace(prepend_scheme="first")),
    "Metaspace, never": lambda: unigram(decoder=decoders.Metaspace(prepend_scheme="never")),
    "Unigram, bytes": lambda: unigram(decoder=decoders.Sequence([*SPM, STRIP]), byte_fallback=True),
    "Unigram, clean-up": lambda: unigram(decoder=decoders.Metaspace()),
    "Unigram, both ends": lambda: unigram(
        decoder=decoders.Sequence([*SPM, decoders.Strip(" ", 1, 1)]), byte_fallback=True
    ),
    "Unigram, bytes, clean-up": lambda: unigram(
        decoder=decoders.Sequence([*SPM, STRIP]), byte_fallback=True
    ),
    "WordPiece": lambda: words(_wordpiece, decoder=decoders.WordPiece(), prefix="##"),
    "WordPiece, clean-up": lambda: words(
        _wordpiece, decoder=decoders.WordPiece(cleanup=False), prefix="##"
    ),
    "WordPiece, added": lambda: words(_wordpiece, decoder=decoders.WordPiece(), prefix="##"),
    "suffixes": lambda: words(_bpe, decoder=decoders.BPEDecoder(), suffix="</w>"),
    "characters": lambda: words(models.WordLevel, decoder=decoders.Fuse()),
    "no decoder": lambda: words(_wordpiece, decoder=None, prefix="##"),
}


def make(kind: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of transformers, of a kind in ``KINDS``."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    if "added" in kind:
        tokenizer.add_tokens(ADDED)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces="clean-up" in kind,
    )
