"""Sentencepiece models of many kinds become fast tokenizers with sentencepiece's ids and text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import utils as lm_utils
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from mlx_mtp.converters.tokenizer.write import (
    check_sentencepiece,
    convert_sentencepiece,
    corpus,
    find_sentencepiece,
    write_tokenizer,
)
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.storage.sentencepiece import parse

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
STYLES: dict[str, dict[str, Any]] = {
    "llama": {
        **PLAIN,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "llama without prefix": {
        **PLAIN,
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
    },
    "llama with symbols": {
        **PLAIN,
        "model_type": "bpe",
        "byte_fallback": True,
        "user_defined_symbols": ["<user>", "<user>x", "\n", "  ", "[a.b]"],
    },
    "gemma": {
        **PLAIN,
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>"],
    },
    "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "unigram": {**PLAIN, "model_type": "unigram"},
    "unigram bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "nfkc",
    },
    "unigram symbols": {
        **PLAIN,
        "model_type": "unigram",
        "byte_fallback": True,
        "user_defined_symbols": ["<user>", "\n"],
    },
    "bpe folded": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "nmt_nfkc_cf",
    },
    "bpe unknown": {"model_type": "bpe"},
}
ALPHABETS = (
    "abc ",
    "aé\u0301ß ",
    " \t\n\r",
    "0123456789,. ",
    "日本語テキスト 。",
    "😀👍🏽\u200d",
    "=-_/\\<>|{}",
)


def train(folder: Path, options: dict[str, Any], *, vocab_size: int = 520) -> Path:
    """Train a tiny model on the built-in prompts; returns the ``tokenizer.model`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [prompt.text for prompt in builtin_prompts()]
    texts += ["def f(x):\n    return x  # <0x41> ...", "日本語のテキスト。", "Привет, мир!"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 2),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained model of every style."""
    root = tmp_path_factory.mktemp("sentencepiece")
    return {name: train(root / str(i), options) for i, (name, options) in enumerate(STYLES.items())}


def place(model: Path, folder: Path, **files: dict[str, Any]) -> Path:
    """A model folder with that tokenizer and those JSON files; returns it."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def converted(source: Path, tmp_path: Path) -> Any:
    """Convert a folder's tokenizer; returns it as mlx-lm loads it."""
    output, scratch = tmp_path / "out", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    write_tokenizer(source, output, scratch, model_type="llama", trust_remote_code=False)
    (output / "config.json").write_text('{"model_type": "llama"}')
    return lm_utils.load_tokenizer(output)


def refusal(source: Path, tmp_path: Path) -> str:
    """The one line with which a tokenizer is refused."""
    with pytest.raises(ValueError) as caught:
        converted(source, tmp_path)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "out").iterdir())
    return str(caught.value)


def random_texts(seed: int, *, count: int = 200) -> list[str]:
    """Texts that no corpus has: letters of several alphabets, mixed."""
    rng = random.Random(seed)
    letters = ["".join(rng.sample(ALPHABETS, 2)) for _ in range(count)]
    return ["".join(rng.choices(own, k=rng.randrange(1, 40))) for own in letters]


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_text_are_sentencepieces_own(models, tmp_path, style):
    tokenizer = converted(place(models[style], tmp_path / "in"), tmp_path)
    reference: Any = SentencePieceProcessor(model_file=str(models[style]))
    assert check_sentencepiece(models[style], tokenizer) > 300
    assert len(tokenizer) == reference.get_piece_size()
    for index in range(len(tokenizer)):
        assert tokenizer.convert_ids_to_tokens(index) == reference.id_to_piece(index)
    trims = parse(models[style]).normalizer_spec.remove_extra_whitespaces
    for text in random_texts(len(style)):
        wanted = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == wanted, repr(text)
        known = [token for token in wanted if token != reference.unk_id()]
        pair = tokenizer.decode(known), reference.decode(known)
        assert pair[0] == pair[1] or (trims and pair[0].lstrip() == pair[1].lstrip()), repr(text)


@pytest.mark.parametrize("style", STYLES)
def test_texts_begin_with_the_token_that_the_model_expects(models, tmp_path, style):
    tokenizer = converted(place(models[style], tmp_path / "in"), tmp_path)
    bos = {"gemma": [2], "t5": []}.get(style, [1])
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == bos + plain
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.bos_token == (None if style == "t5" else "<s>")


@pytest.mark.parametrize("style", ["llama", "gemma", "unigram bytes"])
def test_streamed_text_is_the_decoded_text(models, tmp_path, style):
    tokenizer = converted(place(models[style], tmp_path / "in"), tmp_path)
    assert type(tokenizer.detokenizer).__name__ == "SPMStreamingDetokenizer"
    for text in ("Hello, world! 日本語 😀 é", "one\ntwo\n\n three", "def f():"):
        detokenizer = tokenizer.detokenizer
        for token in tokenizer.encode(text, add_special_tokens=False):
            detokenizer.add_token(token)
        detokenizer.finalize()
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert detokenizer.text == tokenizer.decode(ids)


@pytest.mark.parametrize("style", ["llama", "unigram bytes"])
def test_names_of_byte_pieces_are_ordinary_text(models, tmp_path, style):
    """They would be byte tokens if a fast tokenizer found them in its vocabulary."""
    proto = parse(models[style])
    for letter in "<>":
        if letter not in {piece.piece for piece in proto.pieces}:
            proto.pieces.add(piece=letter, score=-12.0)
    source = place(models[style], tmp_path / "in")
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = converted(source, tmp_path)
    reference: Any = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    text = "is <0x41> a byte?"
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


def test_control_tokens_are_recognised_in_prompts(models, tmp_path):
    tokenizer = converted(place(models["llama"], tmp_path / "in"), tmp_path)
    inner = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("<s>hi</s>", add_special_tokens=False) == [1, *inner, 2]
    assert tokenizer.decode([1, *inner, 2], skip_special_tokens=True) == "hi"


def test_without_legacy_only_the_text_itself_gets_a_space(models, tmp_path):
    """transformers' setting: the text behind a special token begins as it is written."""
    source = place(models["llama"], tmp_path / "in", tokenizer_config={"legacy": False})
    tokenizer = converted(source, tmp_path)
    reference: Any = SentencePieceProcessor(model_file=str(models["llama"]))
    assert tokenizer.encode(" a", add_special_tokens=False) == reference.encode(" a")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("<s>hi", add_special_tokens=False))
    assert pieces[0] == "<s>" and "".join(pieces[1:]) == "hi"


def test_settings_come_from_the_files_beside_it(models, tmp_path):
    source = place(
        models["llama"],
        tmp_path / "in",
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": True,
            "chat_template": "{{ messages[0].content }}",
            "model_max_length": 77,
            "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
            "pad_token": None,
        },
        special_tokens_map={"pad_token": "<unk>", "eos_token": "</s>"},
        added_tokens={"<|end|>": 520, "<tool>": 521},
    )
    tokenizer = converted(source, tmp_path)
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [*plain, 520]
    assert tokenizer.encode("<tool>x", add_special_tokens=False)[0] == 521
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<unk>")
    assert tokenizer.decode([*plain, 520, 521], skip_special_tokens=True).strip() == "hi<tool>"
    assert tokenizer.model_max_length == 77 and len(tokenizer) == 522
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi"


def test_tokens_in_the_vocabulary_can_have_new_names(models, tmp_path):
    entries = {"5": {"content": "<|im_start|>", "special": True}}
    source = place(
        models["llama"], tmp_path / "in", tokenizer_config={"added_tokens_decoder": entries}
    )
    tokenizer = converted(source, tmp_path)
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [5]
    assert len(tokenizer) == 520


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<a>": 530}}, "added_tokens.json gives <a> the id 530, not 520"),
        ({"added_tokens": {"<a>": "x"}}, "'x' is not a token id"),
        ({"added_tokens": {"<s>": 520}}, "gives <s> the id 520, not 1"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "<s>"}}}}, "same name"),
        ({"tokenizer_config": {"eos_token": "<e>", "add_eos_token": True}}, "has no <e> to put"),
    ],
)
def test_files_that_do_not_fit_are_refused(models, tmp_path, files, message):
    source = place(models["llama"], tmp_path / "in", **files)
    assert message in refusal(source, tmp_path)


def test_broken_files_are_refused_by_name(models, tmp_path):
    source = place(models["llama"], tmp_path / "in")
    (source / "added_tokens.json").write_text("[1]")
    assert "added_tokens.json must hold a JSON object" in refusal(source, tmp_path)
    (source / "tokenizer.model").write_bytes(b"\x00garbage")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        find_sentencepiece(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char"}, "type char are not supported"),
        ({"model_type": "word", "vocab_size": 100}, "type word are not supported"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_kinds_without_a_fast_form_are_refused(tmp_path, options, message):
    size = options.pop("vocab_size", 520)
    model = train(tmp_path / "trained", options, vocab_size=size)
    assert message in refusal(place(model, tmp_path / "in"), tmp_path)


def test_unused_pieces_are_refused(models, tmp_path):
    proto = parse(models["llama"])
    proto.pieces[300].type = 5
    source = place(models["llama"], tmp_path / "in")
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert "unused pieces" in refusal(source, tmp_path)


def test_the_first_text_that_differs_is_named(models, tmp_path):
    tokenizer = converted(place(models["llama without prefix"], tmp_path / "in"), tmp_path)
    with pytest.raises(ValueError, match="would differ on the text ' ': .* instead of") as caught:
        check_sentencepiece(models["llama"], tokenizer)
    assert "\n" not in str(caught.value)


def test_a_wrong_conversion_is_refused(models, tmp_path, monkeypatch):
    """Were the space in front forgotten, as transformers does, nothing would be written."""
    from mlx_mtp.storage import sentencepiece as module

    right = module._normalizer

    def wrong(proto: Any, *, legacy: bool) -> Any:
        proto.normalizer_spec.add_dummy_prefix = False
        return right(proto, legacy=legacy)

    monkeypatch.setattr(module, "_normalizer", wrong)
    assert "would differ on the text" in refusal(place(models["llama"], tmp_path / "in"), tmp_path)


def test_other_forms_of_a_tokenizer_go_first(models, tmp_path):
    source = place(models["llama"], tmp_path / "in")
    assert find_sentencepiece(source) == source / "tokenizer.model"
    (source / "tokenizer.json").write_text("{}")
    assert find_sentencepiece(source) is None
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"aGVsbG8= 0\nd29ybGQ= 1\n")  # tokens with ranks
    assert find_sentencepiece(source) is None


def test_the_corpus_has_many_scripts_and_difficult_lines():
    texts = corpus()
    assert {"", " ", "\n", "\t", "\x00a"} <= set(texts) and len(texts) > 120
    blocks = {ord(letter) >> 8 for text in texts for letter in text}
    assert len(blocks) > 25


def test_mutated_models_raise_value_errors_or_convert(models, tmp_path):
    data = models["llama"].read_bytes()
    rng = random.Random(0)
    source = place(models["llama"], tmp_path / "in")
    output = tmp_path / "out"
    output.mkdir()
    for _ in range(60):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
        path = source / "tokenizer.model"
        path.write_bytes(mutated[: rng.choice([len(mutated), rng.randrange(len(mutated))])])
        try:
            convert_sentencepiece(path, output)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
