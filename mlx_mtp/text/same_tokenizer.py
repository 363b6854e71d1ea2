"""Whether two models have the same tokenizer, which a draft model needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_mtp.terminal import visible

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Texts in which tokenizers differ: merges, normalisation, digits, spaces, letters beyond ASCII.
_TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it's a well-known sentence.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2  # tabs:\t\tand  spaces\n\n",
    "In 1984, 1,234,567 people paid $99.95 (or 12.5 %) at 07:45.",
    "Größe, naïve, cafe\u0301, Ångström, ﬁne, İstanbul, ½",
    "Привет, мир! こんにちは世界。你好，世界！ 안녕하세요 مرحبا שלום नमस्ते",
    "🙂👩‍🚀🇪🇺 — “quoted” … \u00a0\u200bx",
    "  leading, trailing  \r\n\r\n   and UPPER camelCase snake_case <b>tags</b> &amp; @ # \\ ~",
)  # fmt: skip


def tokenizer_difference(one: TokenizerWrapper, other: TokenizerWrapper) -> str | None:
    """Find a difference between two tokenizers.

    They are the same if every token of the smaller vocabulary has the same id in the other one, and
    if sample texts have the same ids.  Tokens that only the larger vocabulary has do not count:
    models with one tokenizer have different numbers of added and of unused ones.

    Returns:
        A difference of ``one``, such as "it has no token '<s>'"; None if there is none.
    """
    mine, theirs = one.get_vocab(), other.get_vocab()
    for token in min(theirs, mine, key=len) if mine != theirs else ():
        name = visible(repr(token))
        if token not in mine:
            return f"it has no token {name}"
        if token not in theirs:
            return f"only it has a token {name}"
        if mine[token] != theirs[token]:
            return f"its token {name} has id {mine[token]}, not {theirs[token]}"
    for text in _TEXTS:
        ids, expected = (each.encode(text, add_special_tokens=False) for each in (one, other))
        if ids != expected:
            return f"it splits text such as {text[:20]!r} into other tokens"
    return None
