"""mlx-lm's call style: its arguments, its caches, its results."""

from __future__ import annotations

import inspect
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import greedy_sampler

import mlx_mtp
from mlx_mtp.decoding.loop import decode
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, save_tiny_pair, tiny_base, tiny_mtp

WIDE: dict[str, Any] = {
    "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64,
    "vocab_size": BYTE_VOCAB,
}  # fmt: skip
TOKENIZER: Any = byte_tokenizer()
TURNS = (("hello there", 7), ("and then a longer text", 1), ("x", 9))
QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 15}


def pair(kind: str = "llama") -> tuple[Any, Any]:
    return tiny_base(kind, **WIDE), tiny_mtp(kind, **WIDE)


def ids(responses: Any) -> list[int]:
    return [response.token for response in responses]


def rotating(base: Any) -> list[Any]:
    return [RotatingKVCache(16, keep=4) for _ in base.layers]


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [
        ("llama", make_prompt_cache, {}),
        ("qwen3", make_prompt_cache, QUANTISED),
        ("qwen3", rotating, {}),
        ("gemma3_text", make_prompt_cache, {}),
        ("ministral3", make_prompt_cache, {}),
    ],
)
def test_a_list_of_mlx_lms_caches_goes_on_as_in_mlx_lm(
    kind: str, make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    base, model = pair(kind)
    theirs, ours = make(base), make(base)
    for turn, count in TURNS:
        expected = mlx_lm.stream_generate(
            base, TOKENIZER, turn, max_tokens=count, prompt_cache=theirs, **options
        )
        found = mlx_mtp.stream_generate(
            model, TOKENIZER, turn, count, prompt_cache=ours, layout="quadratic", **options
        )
        assert ids(found) == ids(expected)
        assert [(type(c), c.offset) for c in ours] == [(type(c), c.offset) for c in theirs]
    save_prompt_cache(str(tmp_path / "cache.safetensors"), ours)
    saved: Any = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    answers = [
        ids(function(what, TOKENIZER, "more", max_tokens=9, prompt_cache=cache, **options))
        for function, what, cache in (
            (mlx_lm.stream_generate, base, theirs),
            (mlx_lm.stream_generate, base, ours),
            (mlx_mtp.stream_generate, model, saved),
        )
    ]
    assert answers == [answers[0]] * 3


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_our_cache_goes_on_as_mlx_lms_and_is_saved_by_mlx_lm(kind: str, tmp_path: Path) -> None:
    base, model = pair(kind)
    theirs = make_prompt_cache(base)
    ours: Any = make_prompt_cache(model)
    last: list[int] = []
    for turn, count in TURNS:
        last = ids(
            mlx_lm.stream_generate(base, TOKENIZER, turn, max_tokens=count, prompt_cache=theirs)
        )
        assert (
            ids(mlx_mtp.stream_generate(model, TOKENIZER, turn, count, prompt_cache=ours)) == last
        )
        assert ours.offset == theirs[0].offset - 1  # all but the last id
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, ours)
    assert ours.offset == theirs[0].offset  # the last id was added for the file
    prompt = [last[-1], 65, 66]
    want = ids(mlx_lm.stream_generate(base, TOKENIZER, prompt, max_tokens=9, prompt_cache=theirs))
    caches: list[Any] = [load_prompt_cache(path), ours.copied(), ours]
    for cache in caches:
        assert ids(mlx_mtp.stream_generate(model, TOKENIZER, prompt, 9, prompt_cache=cache)) == want
    assert ours.offset == theirs[0].offset - 1
    assert trim_prompt_cache(ours, 2) == 2 and ours.offset == theirs[0].offset - 2
    assert all(map(isinstance, ours[1:], map(type, theirs[1:])))


@pytest.mark.parametrize("kinds", [("llama", "qwen3"), ("gemma3_text", "gemma3_text")])
@pytest.mark.parametrize("num_draft_tokens", [3, 0])
def test_a_draft_model_goes_on_with_the_caches_of_mlx_lm(
    kinds: tuple[str, str], num_draft_tokens: int
) -> None:
    base, draft = tiny_base(kinds[0], **WIDE), tiny_base(kinds[1], seed=1, **WIDE)
    ours, plain = make_prompt_cache(base) + make_prompt_cache(draft), make_prompt_cache(base)
    options: dict[str, Any] = {"num_draft_tokens": num_draft_tokens, "drafter": "auto"}
    for turn, count in TURNS:
        expected = mlx_lm.stream_generate(
            base, TOKENIZER, turn, max_tokens=count, prompt_cache=plain
        )
        found = list(mlx_mtp.stream_generate(
            base, TOKENIZER, turn, max_tokens=count, draft_model=draft, prompt_cache=ours, **options
        ))  # fmt: skip
        assert ids(found) == ids(expected)
        offsets = [cache.offset for cache in ours]
        if num_draft_tokens:
            assert offsets == [plain[0].offset] * len(ours)
            likes = [*plain, *make_prompt_cache(draft)]
            assert list(map(type, ours)) == list(map(type, likes))
    if num_draft_tokens:  # the draft model has read the same text
        text = mx.array([ids_read(TURNS, base)])
        fresh = make_prompt_cache(draft)
        draft(text, cache=fresh)
        after = [draft(mx.array([[5]]), cache=cache) for cache in (fresh, ours[len(plain) :])]
        assert mx.allclose(*after, rtol=1e-3, atol=1e-3)


def ids_read(turns: Any, base: Any) -> list[int]:
    """Prompts and greedy answers of a conversation without a chat template."""
    read: list[int] = []
    for turn, count in turns:
        read += TOKENIZER.encode(turn)
        read += [int(token) for token, _ in generate_step(mx.array(read), base, max_tokens=count)]
    return read


@pytest.mark.parametrize("like_ours", [True, False])
def test_processors_see_what_they_see_in_mlx_lm(like_ours: bool) -> None:
    base, model = pair()
    seen: list[list[Any]] = [[], []]
    for index, (package, what) in enumerate(((mlx_lm, base), (mlx_mtp, model))):
        cache: Any = make_prompt_cache(what if like_ours else base)
        for turn in ([1, 2, 3, 4], [5, 6, 7]):
            note = [lambda ids, logits, to=seen[index]: to.append(ids.tolist()) or logits]
            options: dict[str, Any] = {"logits_processors": note, "prompt_cache": cache}
            if package is mlx_mtp:  # layout auto may let them see drafts that are then rejected
                options["layout"] = "plain"
            package.generate(what, TOKENIZER, turn, max_tokens=3, **options)
            package.generate(what, TOKENIZER, turn, max_tokens=2, logits_processors=None)
    assert all(history in seen[0] for history in seen[1]) and len(seen[1]) == 6


def test_a_model_of_mlx_lm_is_taken() -> None:
    base, model = pair()
    want = mlx_lm.generate(base, TOKENIZER, "hi", max_tokens=9)
    assert mlx_mtp.generate(base, TOKENIZER, "hi", max_tokens=9) == want
    assert mlx_mtp.batch_generate(base, TOKENIZER, ["hi"], max_tokens=9).texts == [want]
    for what in (None, TOKENIZER, "llama"):
        with pytest.raises(ValueError, match="the model must come from load, got"):
            mlx_mtp.generate(what, TOKENIZER, "hi")  # type: ignore[arg-type]
    for what in (None, model, "llama"):
        with pytest.raises(ValueError, match="the tokenizer must come from load, got"):
            mlx_mtp.generate(model, what, "hi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompts must be a list"):
        mlx_mtp.batch_generate(model, TOKENIZER, "hi")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 5), ("prompt", None), ("max_tokens", "5"), ("max_tokens", 5.0), ("config", {}),
        ("cache_config", {}), ("sampler", 3), ("logits_processors", [3]), ("sampling", {}),
        ("logits_processors", print), ("sampling", greedy_sampler), ("prompt_cache", "x"),
        ("prompt_cache", (1, 2)), ("max_kv_size", "16"), ("kv_bits", "8"), ("seed", "x"),
        ("prefill_step_size", "4"), ("stop", 3), ("stop", [3]), ("num_draft_tokens", "3"),
        ("prompt_progress_callback", 3), ("foo", 1), ("temp", 0.5),
    ],
)  # fmt: skip
def test_an_argument_of_a_wrong_type_is_refused_in_one_line(name: str, value: Any) -> None:
    message = name.replace("config", "Config").removeprefix("cache_")
    with pytest.raises(ValueError, match=message) as error:
        mlx_mtp.generate(pair()[1], TOKENIZER, **{"prompt": "hi", name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"temp": "1"}, {"top_k": 1.5}, {"logit_bias": [1]}])
def test_sampling_of_a_wrong_type_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a"):
        mlx_mtp.Sampling(**options)


def test_a_list_closed_early_has_the_ids_that_were_yielded() -> None:
    base, model = pair()
    cache = make_prompt_cache(base)
    stream = mlx_mtp.stream_generate(model, TOKENIZER, [1, 2, 3], 20, prompt_cache=cache)
    first = [next(stream).token, next(stream).token]
    stream.close()
    fresh = make_prompt_cache(base)
    base(mx.array([[1, 2, 3, *first]]), cache=fresh)
    for found, expected in zip(cache, fresh, strict=True):
        assert found.offset == expected.offset == 5
        assert mx.allclose(found.keys_and_values()[0], expected.keys_and_values()[0], atol=1e-5)


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ([], "must come from model.make_cache"),
        ([1, 2], "must come from model.make_cache"),
        ([KVCache()], "it has 1 layers, this model has 2"),
        (
            [ArraysCache(2), ArraysCache(2)],
            "was made with another model: its recurrent layers are others",
        ),
    ],
)
def test_other_caches_are_refused_in_one_line(caches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        mlx_mtp.generate(pair()[1], TOKENIZER, "hi", prompt_cache=caches)
    assert "\n" not in str(error.value)


def test_caches_of_another_shape_are_refused() -> None:
    _, model = pair()
    cache = make_prompt_cache(tiny_base("llama", vocab_size=BYTE_VOCAB))
    tiny_base("llama", vocab_size=BYTE_VOCAB)(mx.array([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="prompt_cache was made with another model: its keys have"):
        mlx_mtp.generate(model, TOKENIZER, "hi", prompt_cache=cache)
    two = make_prompt_cache(model.base)
    tiny_base("llama", **WIDE)(mx.array([[1, 2], [3, 4]]), cache=two)
    with pytest.raises(ValueError, match="tokens of 2 prompts, where one is needed"):
        mlx_mtp.generate(model, TOKENIZER, "hi", prompt_cache=two)


VALUES: dict[str, Any] = {
    "prompt": mx.array([72, 105]), "max_tokens": 5, "sampler": greedy_sampler,
    "logits_processors": [lambda _, logits: logits], "max_kv_size": 16, "prompt_cache": None,
    "prefill_step_size": 3, "kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4,
    "prompt_progress_callback": print, "input_embeddings": mx.zeros((2, 64)),
    "draft_model": tiny_base("llama", vocab_size=BYTE_VOCAB), "num_draft_tokens": 2,
    "stream": mx.new_stream(mx.cpu),
    "verbose": True, "prompts": [[72, 105]], "prompt_caches": None, "return_prompt_caches": True,
    "return_token_ids": True, "return_logprobs": True, "completion_batch_size": 2,
    "prefill_batch_size": 2, "stop_tokens": [[65]],
}  # fmt: skip
BOUNDED = ((8, 7, 100), (16, 2048, 100), (16, 1, 16), (600, 2048, 2))
SKIPPED = {"model", "tokenizer", "kwargs", "self"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (mlx_mtp.generate, (mlx_lm.generate, mlx_lm.stream_generate, generate_step)),
        (mlx_mtp.batch_generate, (mlx_lm.batch_generate, BatchGenerator.__init__)),
    ],
)
def test_every_argument_of_mlx_lm_is_taken_or_refused_in_one_line(ours: Any, theirs: Any) -> None:
    first: dict[str, Any] = (
        {"prompts": [[72, 105]]} if ours is mlx_mtp.batch_generate else {"prompt": "hi"}
    )
    first |= {"max_tokens": 4, "kv_group_size": 32}
    names = {name for function in theirs for name in inspect.signature(function).parameters}
    for name in sorted(names - SKIPPED):
        try:
            ours(pair()[1], TOKENIZER, **first | {name: VALUES[name]})
        except ValueError as error:
            assert name in ("input_embeddings", "stop_tokens"), name
            assert name in str(error) and "\n" not in str(error)
    leading = [n for n in inspect.signature(theirs[0]).parameters if n != "kwargs"]
    assert list(inspect.signature(ours).parameters)[: len(leading)] == leading


def test_arguments_by_position(tmp_path: Path) -> None:
    folder, adapter = save_tiny_pair(tmp_path, "llama")
    model, tokenizer, config = mlx_mtp.load(  # type: ignore[misc]
        str(folder), {"trust_remote_code": False}, {"max_position_embeddings": 99}, str(adapter),
        True, True,
    )  # fmt: skip
    assert model.base.args.max_position_embeddings == config["max_position_embeddings"] == 99
    with pytest.raises(ValueError, match="fingerprint"):  # the adapter was trained with another one
        mlx_mtp.load(str(folder), {}, {"rms_norm_eps": 0.5}, str(adapter))
    names = list(inspect.signature(mlx_lm.load).parameters)
    assert list(inspect.signature(mlx_mtp.load).parameters)[: len(names)] == names
    model, tokenizer = mlx_mtp.load(
        str(folder), {}, adapter_path=str(adapter), lazy=True, revision="main"
    )
    assert model.config is not None
    prompt: Any = np.array([72, 105])
    responses = list(mlx_mtp.stream_generate(model, tokenizer, prompt, 3))
    assert len(responses) == 3 and responses[-1].finish_reason == "length"
    text = mlx_mtp.generate(model, tokenizer, [72, 105], False, max_tokens=3)
    assert text == "".join(response.text for response in responses)


def test_the_base_model_may_have_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr("mlx_mtp.loading.snapshot_download", download)
    with pytest.raises(ValueError, match="no network"):
        mlx_mtp.load("someone/model", revision="v2")
    assert asked["name"] == "someone/model" and asked["revision"] == "v2"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_batch_is_mlx_lms(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = pair(kind)
    prompts = [TOKENIZER.encode(text) for text in ("hello there", "a", "some other prompt")]
    options: dict[str, Any] = dict.fromkeys(
        ("return_prompt_caches", "return_token_ids", "return_logprobs"), True
    )
    limits = [5, 9, 4]
    theirs = mlx_lm.batch_generate(base, TOKENIZER, prompts, max_tokens=limits, **options)
    ours = mlx_mtp.batch_generate(
        model,
        TOKENIZER,
        prompts,
        None,
        limits,
        layout="quadratic",
        completion_batch_size=2,
        **options,
    )
    assert type(ours) is type(theirs)
    assert ours.token_ids == theirs.token_ids
    for found, expected in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
        assert np.allclose(found, expected, atol=1e-5)
    assert ours.caches and theirs.caches
    for caches, expected in zip(ours.caches, theirs.caches, strict=True):
        assert [cache.offset for cache in caches] == [int(cache.offset) for cache in expected]
    assert ours.stats.prompt_tokens == sum(map(len, prompts)) and ours.stats.generation_tps > 0
    offsets = [cache[0].offset for cache in ours.caches]
    more = mlx_mtp.batch_generate(
        model, TOKENIZER, ["go", "on", "now"], ours.caches, 6, verbose=True, return_token_ids=True
    )
    assert [cache[0].offset for cache in ours.caches] == offsets
    assert capsys.readouterr().out.count("[batch_generate]") >= 4
    for index, text in enumerate(("go", "on", "now")):
        cache = ours.caches[index]
        single = list(mlx_mtp.stream_generate(model, TOKENIZER, text, 6, prompt_cache=cache))
        assert ids(single) == (more.token_ids or [])[index]
        assert "".join(response.text for response in single) == more.texts[index]


def test_a_batch_ends_at_stop_strings_as_generate_does() -> None:
    _, model = pair()
    whole = mlx_mtp.generate(model, TOKENIZER, "hi", max_tokens=30)
    stop = whole[3:5]
    expected = mlx_mtp.generate(model, TOKENIZER, "hi", max_tokens=30, stop=stop)
    found = mlx_mtp.batch_generate(model, TOKENIZER, ["hi", "hi"], max_tokens=30, stop=stop)
    assert found.texts == [expected] * 2 and len(expected) < len(whole)
    with pytest.raises(ValueError, match="max_tokens has 1 values for 2 prompts"):
        mlx_mtp.batch_generate(model, TOKENIZER, ["hi", "hi"], max_tokens=[3])


@pytest.mark.parametrize("count", [1, 2, 7, 9, 10])
@pytest.mark.parametrize("size", [3, 64])
def test_progress_is_reported_as_mlx_lm_does(count: int, size: int) -> None:
    base, model = pair()
    calls: list[list[tuple[int, int]]] = [[], []]
    options: dict[str, Any] = {"max_tokens": 2, "prefill_step_size": size}
    prompt = list(range(1, count + 1))
    list(
        generate_step(
            mx.array(prompt),
            base,
            prompt_progress_callback=lambda *at: calls[0].append(at),
            **options,
        )
    )
    list(decode(model, prompt, prompt_progress_callback=lambda *at: calls[1].append(at), **options))
    assert calls[1] == calls[0]


@pytest.mark.parametrize(
    ("size", "chunk", "count"),
    [
        pytest.param(*values, marks=() if values in BOUNDED else pytest.mark.soak)
        for values in product((8, 16, 600), (1, 7, 2048), (2, 16, 100))
    ],
)
def test_a_bounded_cache_gives_the_ids_of_mlx_lm(size: int, chunk: int, count: int) -> None:
    base, model = pair("qwen3")
    prompt = np.random.default_rng(count).integers(0, BYTE_VOCAB, count).tolist()
    options: dict[str, Any] = {"max_tokens": 20, "prefill_step_size": chunk}
    expected = [
        int(t) for t, _ in generate_step(mx.array(prompt), base, max_kv_size=size, **options)
    ]
    for layout in ("plain", "quadratic"):
        cache = model.make_cache(max_kv_size=size)
        steps = decode(model, prompt, cache=cache, layout=layout, **options)
        assert [token for step in steps for token in step.tokens] == expected
