"""Byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``): how each kind of model splits its texts.

GGUF names the split only; the rules here are those of the models' own ``tokenizer.json``.
A vocabulary may lack some of the 256 byte symbols; such bytes are dropped from a text, as by the
original tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mlx_mtp.storage.gguf.vocabulary import Vocabulary

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(ending: str, *, digits: str, last: str, without: str = "") -> str:
    """Words that end before a capital letter, as in GPT-4o's and Mistral's tokenizers."""
    upper, lower = f"[{_UPPER}{without}]", f"[{_LOWER}{without}]"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[{last}]*|{_SPACES}"
    )


_GPT4O = _cased(f"{_ENDINGS}?", digits=r"\p{N}{1,3}", last=r"\r\n/")
_TEKKEN = _cased("", digits=r"\p{N}", last=r"\r\n/")
_KIMI = r"[\p{Han}]+|" + _cased(
    f"{_ENDINGS}?", digits=r"\p{N}{1,3}", last=r"\r\n", without=r"&&[^\p{Han}]"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a text is split before its words are merged.

    Attributes:
        splits: each one's matches are kept apart, the first pattern first.
        digits: whether every digit is split off.
        punctuation: whether runs of punctuation are split off.
        gpt2: whether GPT-2's own split follows.
        after: patterns that split the result once more.
        nfc: whether texts are composed first.
        whole_words: whether a word that is a token is not made by merges.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    punctuation: bool = False
    gpt2: bool = False
    after: tuple[str, ...] = ()
    nfc: bool = False
    whole_words: bool = False


_GPT2 = Rule(gpt2=True)
_DIGITS = Rule(gpt2=True, digits=True)
_NEOX = Rule(gpt2=True, nfc=True)
RULES = {
    "default": Rule(splits=(r"[\p{P}\$\+<=>\^~\|]+",), gpt2=True, after=(r"\p{N}+", _THREE_DIGITS)),
    "falcon": Rule(punctuation=True, gpt2=True, after=(r"\p{N}+", _THREE_DIGITS)),
    **dict.fromkeys(("mpt", "olmo"), _NEOX),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion"), _GPT2
    ),
    "granite-docling": _GPT2,
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS
    ),
    "command-r": Rule(gpt2=True, digits=True, nfc=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Rule(splits=(_LLAMA3,), whole_words=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Rule(splits=(_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Rule(splits=(_QWEN2,), nfc=True)),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan", "grok-2"), Rule(splits=(_QWEN2,))),
    "qwen35": Rule(splits=(_QWEN35,), nfc=True),
    "tekken": Rule(splits=(_TEKKEN,), whole_words=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Rule(splits=(_GPT4O,))),
    "kimi-k2": Rule(splits=(_KIMI,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Rule(splits=_DEEPSEEK3)),
    "deepseek-coder": Rule(splits=_DEEPSEEK_CODER),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), Rule(splits=(_BAILING,))),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Rule(splits=(_BLOOM,))),
}


def build(vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer, without the tokens that are added to it.

    Raises:
        ValueError: the split is unknown, or a merge has no token.
    """
    rule = RULES.get(vocabulary.pre)
    if rule is None:
        raise ValueError(
            f"tokenizer.ggml.pre is {vocabulary.pre[:60]!r}, a split that is not known; known are "
            f"{', '.join(RULES)}"
        )
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    for pair in vocabulary.merges:
        for token in (*pair, "".join(pair)):
            if token not in ids:
                raise ValueError(
                    f"tokenizer.ggml.merges has {' '.join(pair)[:60]!r}, but {token[:60]!r} is not "
                    "a token"
                )
    model = BPE(vocab=ids, merges=vocabulary.merges, ignore_merges=rule.whole_words)
    tokenizer: Any = Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_steps(rule))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _steps(rule: Rule) -> list[Any]:
    """Return the splits, with the change from bytes to letters where the rule has it."""
    steps: list[Any] = [pre_tokenizers.Split(Regex(text), "isolated") for text in rule.splits]
    if rule.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.punctuation:
        steps.append(pre_tokenizers.Punctuation("contiguous"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2))
    return steps + [pre_tokenizers.Split(Regex(text), "isolated") for text in rule.after]
