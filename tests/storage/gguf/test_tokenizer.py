"""Tokenizers rebuilt from GGUF metadata give the ids and text of independent libraries.

Byte-level BPE is compared with tiktoken and with transformers' own classes, sentencepiece-style
BPE with sentencepiece, on models trained here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from mlx_lm import utils as lm_utils
from sentencepiece import SentencePieceProcessor
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CohereTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from mlx_mtp.converters.tokenizer.write import corpus
from mlx_mtp.storage.gguf.byte_level import RULES
from mlx_mtp.storage.gguf.tokenizer import generation_ids, write_tokenizer
from mlx_mtp.storage.sentencepiece import parse
from tests.converters.test_sentencepiece import ALPHABETS, STYLES, train

CONTROL, USER = 3, 4
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"


def texts(seed: int = 0) -> list[str]:
    """Prose, code, many scripts, runs of white space, broken UTF-8 as it is decoded, noise."""
    rng = random.Random(seed)
    broken = ["Grüße 日本".encode()[:cut].decode(errors="replace") for cut in range(15)]
    noise = ["".join(rng.choices("".join(ALPHABETS), k=rng.randrange(1, 40))) for _ in range(200)]
    own = [
        "I'M, we'LL they'Re d'accord ſ's 'ſ", "CamelCaseHTTPServer iPhone ΑΒΓαβγ ǅungla",
        "١٢٣ ½²³ 1234567", "a\r\nb\r\n\r\n  c\n \n", "x = {'a': [1, 2]}  # //\n\n\t\treturn\n/",
        "का हिन्दी e\u0301\u0301", "漢字abc漢字ABC", "\u0080\u00ff", " " * 33, "\t" * 5 + "\n" * 7,
    ]  # fmt: skip
    return [*corpus(), *own, *broken, *noise]


def ids_differ(tokenizer: Any, encode: Any, lines: Sequence[str]) -> list[str]:
    return [line for line in lines if list(tokenizer.encode(line)) != list(encode(line))]


def load(folder: Path) -> Any:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return lm_utils.load_tokenizer(folder)


class TestByteLevel:
    """Tiny vocabularies, trained with GPT-2's split."""

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls) -> tuple[list[str], list[str]]:
        """Tokens and merges."""
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet)  # type: ignore
        tokenizer.train_from_iterator(texts(1) * 2, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        return tokens, [" ".join(pair) for pair in model["merges"]]

    def metadata(self, trained: Any, pre: str) -> dict[str, Any]:
        tokens, merges = trained
        added = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "   ": USER, "[tool]": USER}
        padding = {"[PAD1]": 5}
        return {
            "general.architecture": "llama",
            "llama.context_length": 512,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [*tokens, *added, *padding],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [*added.values(), 5],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": len(tokens),
            "tokenizer.ggml.eos_token_id": len(tokens) + 1,
            "tokenizer.chat_template": TEMPLATE,
        }

    def encoding(self, trained: Any, pattern: str) -> tiktoken.Encoding:
        letters = pre_tokenizers.ByteLevel.alphabet()
        by_letter = {bytes_to_letter(byte): byte for byte in range(256)}
        assert set(by_letter) == set(letters)
        ranks = {bytes(by_letter[c] for c in token): i for i, token in enumerate(trained[0])}
        return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @pytest.mark.parametrize(
        ("pre", "name"),
        [
            ("gpt-2", "gpt2"),
            ("llama-bpe", "cl100k_base"),
            ("dbrx", "cl100k_base"),
            ("gpt-4o", "o200k_base"),
            ("llama4", "o200k_base"),
        ],
    )
    def test_ids_are_tiktokens_own(
        self, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre: str, name: str
    ) -> None:
        monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
        monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **kwargs: {})
        pattern = getattr(openai_public, name)()["pat_str"]
        write_tokenizer(self.metadata(trained, pre), tmp_path)
        tokenizer = load(tmp_path)
        encoding = self.encoding(trained, pattern)
        lines = [line for line in texts() if "   " not in line]
        assert ids_differ(tokenizer, encoding.encode_ordinary, lines) == []
        for line in lines:
            assert tokenizer.decode(encoding.encode_ordinary(line)) == line

    @pytest.mark.parametrize(
        ("pre", "kind"),
        [
            ("gpt-2", GPT2Tokenizer),
            ("olmo", GPTNeoXTokenizer),
            ("qwen2", Qwen2Tokenizer),
            ("command-r", CohereTokenizer),
        ],
    )
    def test_ids_are_those_of_transformers(
        self, trained: Any, tmp_path: Path, pre: str, kind: Any
    ) -> None:
        tokens, merges = trained
        vocab = {token: index for index, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        inner = kind(vocab=vocab, merges=pairs).backend_tokenizer
        reference = PreTrainedTokenizerFast(tokenizer_object=inner)
        write_tokenizer(self.metadata(trained, pre), tmp_path)

        def encode(line: str) -> list[int]:
            return reference.encode(line, add_special_tokens=False)

        assert ids_differ(load(tmp_path), encode, [t for t in texts() if "   " not in t]) == []

    @pytest.mark.parametrize("pre", RULES)
    def test_every_rule_keeps_the_text(self, trained: Any, tmp_path: Path, pre: str) -> None:
        write_tokenizer(self.metadata(trained, pre), tmp_path)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for line in ["x 12345 <|im_end|>'ll  \n\n", "日本語 Ünïcode!? 漢字", *texts()[-60:]]:
            decoded = tokenizer.decode(tokenizer.encode(line).ids, skip_special_tokens=False)
            assert decoded == (tokenizer.normalizer.normalize_str(line) if RULES[pre].nfc else line)

    def test_splits(self, trained: Any, tmp_path: Path) -> None:
        expected = {
            "smollm": ["a", "Ġ", "1", "2", "Ġb"],
            "qwen2": ["a", "Ġ", "1", "2", "Ġb"],
            "llama-bpe": ["a", "Ġ", "12", "Ġb"],
            "deepseek-v3": ["a", "Ġ", "12", "Ġb"],
            "gpt-2": ["a", "Ġ12", "Ġb"],
        }
        for pre, words in expected.items():
            write_tokenizer(self.metadata(trained, pre), tmp_path)
            tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
            split = tokenizer.pre_tokenizer.pre_tokenize_str("a 12 b")
            assert [word for word, _ in split] == words

    def test_added_tokens_templates_and_ids(self, trained: Any, tmp_path: Path) -> None:
        metadata = self.metadata(trained, "qwen2") | {
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "tools",
        }
        write_tokenizer(metadata, tmp_path)
        tokenizer = load(tmp_path)
        first = len(trained[0])
        assert tokenizer.encode("a<|im_start|>b   c[tool]")[::2][-1] == first + 3
        assert tokenizer.encode("x")[0] == first
        assert [first + 2] == [i for i in tokenizer.encode("b   c") if i >= first][1:]
        assert tokenizer.decode([first, first + 1, first + 3], skip_special_tokens=True) == "[tool]"
        assert tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "<|im_start|>x"
        messages = [{"content": "x"}]
        chosen = tokenizer.apply_chat_template(messages, chat_template="tool_use", tokenize=False)
        assert chosen == "tools"
        assert generation_ids(metadata) == {"bos_token_id": first, "eos_token_id": [first + 1]}


def bytes_to_letter(byte: int) -> str:
    """GPT-2's letter for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


def as_metadata(path: Path) -> dict[str, Any]:
    """Return what llama.cpp's converter writes for a sentencepiece model."""
    proto = parse(path)
    assert proto is not None
    tokens = [p.piece.replace("▁", " ") if p.type == USER else p.piece for p in proto.pieces]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [p.score for p in proto.pieces],
        "tokenizer.ggml.token_type": [p.type for p in proto.pieces],
        "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.bos_token_id": proto.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": proto.trainer_spec.eos_id,
        "tokenizer.ggml.unknown_token_id": proto.trainer_spec.unk_id,
    }


class TestSentencepiece:
    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("spm")
        runs = {"user_defined_symbols": ["<user>", "<user>x", "\n", "▁▁", "▁▁▁", "[a.b]"]}
        styles = {
            "llama": STYLES["llama"],
            "llama with symbols": STYLES["llama"] | runs,
            "gemma": STYLES["gemma"] | runs,
        }
        return {name: train(root / name, options) for name, options in styles.items()}

    @pytest.mark.parametrize("style", ["llama", "llama with symbols", "gemma"])
    def test_ids_and_text_are_sentencepieces_own(
        self, trained: dict[str, Path], tmp_path: Path, style: str
    ) -> None:
        reference: Any = SentencePieceProcessor(model_file=str(trained[style]))
        write_tokenizer(as_metadata(trained[style]), tmp_path)
        tokenizer = load(tmp_path)

        def encode(line: str) -> list[int]:
            return [reference.bos_id(), *reference.encode(line)]

        lines = [*texts(), *corpus(parse(trained[style]))]
        assert ids_differ(tokenizer, encode, lines) == []
        for line in lines:
            ids = reference.encode(line)
            assert tokenizer.decode(ids) == reference.decode(ids)

    def test_padding_of_the_vocabulary(self, trained: dict[str, Path], tmp_path: Path) -> None:
        metadata = as_metadata(trained["llama"])
        metadata["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
        metadata["tokenizer.ggml.scores"] += [-10000.0] * 2
        metadata["tokenizer.ggml.token_type"] += [5, 5]
        write_tokenizer(metadata, tmp_path)
        reference: Any = SentencePieceProcessor(model_file=str(trained["llama"]))
        assert load(tmp_path).encode("a [PAD1]")[1:] == reference.encode("a [PAD1]")
        metadata["tokenizer.ggml.token_type"][300] = 5  # that merges lead to
        with pytest.raises(ValueError, match="unused pieces"):
            write_tokenizer(metadata, tmp_path)

    def test_tokens_of_the_tokenizer_files(self, trained: dict[str, Path], tmp_path: Path) -> None:
        metadata: dict[str, Any] = as_metadata(trained["llama"]) | {"general.name": "Phi-3 mini"}
        count = len(metadata["tokenizer.ggml.tokens"])
        metadata["tokenizer.ggml.tokens"] += ["<|note|>", "<|user|>"]
        metadata["tokenizer.ggml.scores"] += [-1000.0] * 2
        metadata["tokenizer.ggml.token_type"] += [USER, CONTROL]
        write_tokenizer(metadata, tmp_path)
        reference: Any = SentencePieceProcessor(model_file=str(trained["llama"]))
        a, b = reference.encode("a"), reference.encode("b")
        encode = load(tmp_path).encode
        assert encode("a<|note|>b")[1:] == [*a, count, *b]  # each text with its space
        assert encode("a<|user|>\n b")[1:] == [*a, count + 1, *b]  # Phi-3's tokens take spaces
        assert encode("<s>a")[1:] == [1, *a]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
            ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
            ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
            ({"model": 5}, "tokenizer.ggml.model is not text"),
            ({"model": None}, "tokenizer.ggml.model is missing"),
            ({"pre": "viking"}, "tokenizer.ggml.pre is 'viking'"),
            ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
            ({"tokens": "abc"}, "tokenizer.ggml.tokens is not a list of str"),
            ({"tokens": ["a", "b", "ab", "b"]}, "has 'b' twice: 1 and 3"),
            ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 values for 4 tokens"),
            ({"token_type": [1.5] * 4}, "tokenizer.ggml.token_type is not a list of int"),
            ({"merges": None}, "tokenizer.ggml.merges is missing"),
            ({"merges": ["ab"]}, "'ab', which is not two tokens"),
            ({"merges": ["a c"]}, "'a c', but 'c' is not a token"),
            ({"bos_token_id": 4}, "bos_token_id is 4, which is not the id of a token"),
            ({"add_eos_token": True}, "add_eos_token is true without"),
            ({"add_bos_token": 7}, "add_bos_token is neither true nor false"),
            ({"add_sep_token": True}, "add_sep_token is true, which is not supported"),
            ({"precompiled_charsmap": "x"}, "precompiled_charsmap is set"),
            ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true"),
            ({"add_space_prefix": True}, "add_space_prefix is true for byte-level BPE"),
            ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
            ({"model": "llama", "scores": [float("nan")] * 4}, "scores has a value that is not"),
            ({"model": "llama", "scores": [0.0] * 4, "token_type": [1, 1, 1, 6]}, "1 tokens for"),
        ],
    )
    def test_in_one_line(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
            "tokenizer.ggml.merges": ["a b"],
        }
        for name, value in changes.items():
            metadata[f"tokenizer.ggml.{name}"] = value
        with pytest.raises(ValueError) as caught:
            write_tokenizer(metadata, tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not any(tmp_path.iterdir())

    def test_a_name_that_leaves_the_folder(self, tmp_path: Path) -> None:
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": ["a"],
            "tokenizer.ggml.merges": [],
            "tokenizer.chat_templates": ["../x"],
        }
        with pytest.raises(ValueError, match="cannot be the name of a file"):
            write_tokenizer(metadata, tmp_path)
