"""The text layer over a scripted loop: characters, stop strings, counts, cache, printed lines."""

from __future__ import annotations

import random
import re
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.generate import (
    NO_TEXT,
    ContextOverflow,
    TextStream,
    chat_text,
    encode_prompt,
    generate,
    stream_generate,
)
from mlx_mtp.stats import GenerationStats, StatsMeter
from mlx_mtp.text.detokenizer import detokenizer_for
from tests.helpers.fixtures_generate import (
    ASSISTANT,
    EOS,
    TEMPLATE,
    USER,
    FakeModel,
    byte_tokenizer,
    ids_of,
    scripted,
)
from tests.helpers.tiny import BYTE_VOCAB, tiny_mtp

__all__ = ["scripted"]

MIXED = "né 日本語 👍🏽 naïve\n\tтест — “fin” 🇨🇭."


def answer(model: FakeModel, text: str, **options):
    """Stream the given text through the text layer; return the responses."""
    model.answers.append([*ids_of(text), EOS])
    return list(stream_generate(model, byte_tokenizer(), "hi", max_tokens=-1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("naive", [False, True])
def test_pieces_are_whole_characters_and_join_to_the_text(scripted, group, naive):
    scripted.group = group
    scripted.answers = [[*ids_of(MIXED), EOS]]
    responses = list(stream_generate(scripted, byte_tokenizer(naive=naive), "hi", max_tokens=-1))
    assert "".join(r.text for r in responses) == MIXED
    assert all("\ufffd" not in r.text for r in responses)
    assert [r.token for r in responses] == [*ids_of(MIXED), EOS]


@pytest.mark.parametrize("naive", [False, True])
def test_a_character_cut_off_by_the_limit_is_shown_as_decode_shows_it(scripted, naive):
    ids = ids_of("ok 日")
    for cut in range(4, len(ids)):
        scripted.answers = [ids]
        responses = list(
            stream_generate(scripted, byte_tokenizer(naive=naive), "hi", max_tokens=cut)
        )
        assert "".join(r.text for r in responses) == "ok \ufffd"
        assert responses[-1].finish_reason == "length"
        assert responses[-1].generation_tokens == cut


def test_bytes_that_are_no_character_are_shown_where_they_are(scripted):
    scripted.answers = [[*b"a\xffb\xe6\x97", EOS]]
    text = generate(scripted, byte_tokenizer(), "hi")
    assert text == "a\ufffdb\ufffd"


def test_text_streams_token_by_token(scripted):
    pieces = [r.text for r in answer(scripted, "abc")]
    assert pieces == ["a", "b", "c", ""]


@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_a_stop_string_ends_the_text_across_token_borders(scripted, group):
    scripted.group = group
    responses = answer(scripted, "one STOP two", stop=["STOP"])
    assert "".join(r.text for r in responses) == "one "
    last = responses[-1]
    assert last.finish_reason == "stop"
    assert last.token == ord("P")
    assert last.generation_tokens == len("one STOP") == len(responses)


def test_ids_after_a_stop_string_are_neither_counted_nor_left_in_the_cache(scripted):
    scripted.group = 9
    cache = scripted.make_cache()
    responses = answer(scripted, "ab!cdefgh", stop="!", prompt_cache=cache)
    assert [r.token for r in responses] == ids_of("ab!")
    assert responses[-1].num_accepted == 2  # "b" and "!"; the step had accepted 8
    assert responses[-1].num_draft_tokens == 9
    assert cache.ids == ids_of("hi") + ids_of("ab")


def test_closing_early_leaves_the_cache_at_the_last_id_handed_out(scripted):
    scripted.group = 5
    scripted.answers = [[*ids_of("abcdefgh"), EOS]]
    cache = scripted.make_cache()
    stream = stream_generate(scripted, byte_tokenizer(), "hi", prompt_cache=cache)
    for response in stream:
        if response.token == ord("c"):
            break
    stream.close()
    assert cache.ids == ids_of("hi") + ids_of("ab")


def test_text_that_only_looked_like_a_stop_string_is_let_go(scripted):
    responses = answer(scripted, "a STO b STOPP", stop=["STOPPED", "xyz"])
    assert "".join(r.text for r in responses) == "a STO b STOPP"
    assert responses[-1].finish_reason == "stop"


def test_the_stop_string_that_is_complete_first_wins(scripted):
    text = "".join(r.text for r in answer(scripted, "abcdef", stop=["abcde", "bcd"]))
    assert text == "a"


def test_a_stop_string_wins_over_the_token_limit(scripted):
    scripted.answers = [ids_of("ab.")]
    responses = list(stream_generate(scripted, byte_tokenizer(), "hi", max_tokens=3, stop=["."]))
    assert (responses[-1].finish_reason, responses[-1].text) == ("stop", "")


def test_a_stop_string_may_be_what_the_detokeniser_still_held(scripted):
    """The BPE detokeniser keeps a single space back until it knows what follows."""
    responses = answer(scripted, "one two ", stop=["two "])
    assert "".join(r.text for r in responses) == "one "
    assert responses[-1].finish_reason == "stop"


def test_stop_strings_agree_with_a_search_in_the_whole_text():
    """However ids are grouped into text, the result is the text up to the first complete stop."""
    rng = random.Random(5)
    for _ in range(500):
        whole = "".join(rng.choices("ab", k=rng.randint(1, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        stream, text = TextStream(detokenizer_for(byte_tokenizer(), [1]), stop=stops), ""
        for token in ids_of(whole):
            text += stream.push(token)
            assert not any(stop in text for stop in stops)
            if stream.stopped:
                break
        text += stream.finish()
        ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
        assert text == (whole[: min(ends)[1]] if ends else whole)
        assert stream.stopped == bool(ends)


def test_counts_follow_mlx_lm_and_count_the_stop_id(scripted):
    responses = answer(scripted, "abcdef")  # steps: a | bcd | ef<eos>
    last = responses[-1]
    assert (last.prompt_tokens, last.generation_tokens, last.num_steps) == (2, 7, 3)
    assert (last.num_draft_tokens, last.num_accepted) == (6, 4)
    assert last.tokens_per_step == pytest.approx(7 / 3)
    assert [r.from_draft for r in responses] == [False, True, True, False, True, True, False]
    assert [r.generation_tokens for r in responses] == list(range(1, 8))
    assert last.logprobs.shape == (260,)
    assert last.prompt_tps > 0 and last.generation_tps > 0
    assert {r.finish_reason for r in responses[:-1]} == {None}


def test_lines_are_those_of_mlx_lm_and_one_more():
    stats = GenerationStats(
        prompt_tokens=12,
        prompt_tps=345.6789,
        cached_tokens=0,
        generation_tokens=100,
        generation_tps=31.41592,
        peak_memory=0.98765,
        num_steps=27,
        num_draft_tokens=90,
        num_accepted=81,
        mtp=True,
    )
    assert stats.lines() == [
        "Prompt: 12 tokens, 345.679 tokens-per-sec",
        "Generation: 100 tokens, 31.416 tokens-per-sec",
        "Peak memory: 0.988 GB",
        "MTP: 81/90 drafts accepted (90.0%), 3.70 tokens/step",
    ]


def test_a_meter_without_time_or_steps_gives_finite_numbers():
    meter = StatsMeter(prompt_tokens=3, cached_tokens=0, mtp=True, clock=lambda: 1.0)
    stats = GenerationStats(**meter.counts())
    assert stats.stats_dict()["tokens_per_step"] == 0.0
    assert stats.lines()[-1] == "MTP: 0/0 drafts accepted, 0.00 tokens/step"
    meter.add_step()
    meter.add_token(from_draft=False)
    assert GenerationStats(**meter.counts()).generation_tps == 0.0


def test_plain_decoding_prints_no_mtp_line(scripted):
    assert len(answer(scripted, "abc", layout="plain")[-1].lines()) == 3
    assert len(answer(scripted, "abc", num_draft_tokens=0)[-1].lines()) == 3


def test_the_line_names_the_drafters(scripted):
    def line() -> str:
        scripted.answers = [ids_of("Hello.")]
        return answer(scripted, "abc")[-1].lines()[-1]

    assert line().startswith("MTP (mask): ")
    scripted.source = "lookup"
    assert line().startswith("MTP (lookup): ")
    scripted.k = None
    assert line().startswith("MTP: 0/0 drafts accepted, ")


def test_drafts_of_a_chain_are_counted_by_drafter():
    meter = StatsMeter(prompt_tokens=3, cached_tokens=0, mtp=True)
    steps = [
        (5, (("mask", 3), ("lookup", 4))),  # emitted ids, the last one of which is no draft
        (2, (("mask", 3), ("lookup", 4))),
        (3, (("lookup", 2),)),
        (1, ()),
    ]
    for size, parts in steps:
        meter.add_step(parts)
        for index in range(size):
            meter.add_token(from_draft=index < size - 1)
    stats = GenerationStats(**meter.counts())
    assert stats.drafters == {"mask": (6, 4), "lookup": (10, 3)}
    assert stats.lines()[-1] == (
        "MTP (mask 4/6, lookup 3/10): 7/16 drafts accepted (43.8%), 2.75 tokens/step"
    )


def test_generate_prints_like_mlx_lm(scripted, capsys):
    scripted.answers = [[*ids_of("Hello."), EOS]]
    text = generate(scripted, byte_tokenizer(), prompt="hi", verbose=True, max_tokens=50)
    assert text == "Hello."
    out = capsys.readouterr().out
    number = r"\d+\.\d{3}"
    assert re.fullmatch(
        rf"==========\nHello\.\n==========\n"
        rf"Prompt: 2 tokens, {number} tokens-per-sec\n"
        rf"Generation: 7 tokens, {number} tokens-per-sec\n"
        rf"Peak memory: {number} GB\n"
        rf"MTP \(mask\): 4/6 drafts accepted \(66\.7%\), 2\.33 tokens/step\n",
        out,
    )


def test_no_text_is_said_as_in_mlx_lm(scripted, capsys):
    scripted.answers = [[EOS]]
    assert generate(scripted, byte_tokenizer(), "hi", verbose=True) == ""
    assert capsys.readouterr().out == f"==========\n\n==========\n{NO_TEXT}\n"


def test_prompts_may_be_text_ids_or_arrays(scripted):
    for prompt in ("hi", [104, 105], mx.array([104, 105])):
        scripted.answers = [[EOS]]
        generate(scripted, byte_tokenizer(), prompt)
        assert scripted.calls[-1].prompt == [104, 105]


def test_options_reach_the_loop_and_the_cache(scripted):
    answer(
        scripted, "a", layout="linear", num_draft_tokens=2, seed=7, prefill_step_size=64,
        max_kv_size=128, kv_bits=4, kv_group_size=32, quantized_kv_start=9, lookup_ids=[[1, 2]],
        lookup_texts=["text"],
    )  # fmt: skip
    call = scripted.calls[-1]
    assert call.lookup_ids == [[1, 2], ids_of("text")]
    assert (call.layout, call.num_draft_tokens, call.seed) == ("linear", 2, 7)
    assert (call.prefill_step_size, call.stop_ids) == (64, {EOS})
    assert scripted.cache_options == {
        "max_kv_size": 128, "kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("\udce9", {}, "not valid UTF-8"),
        ([1.5], {}, "whole numbers, got 1.5"),
        ([True], {}, "whole numbers, got True"),
        (mx.array(3), {}, "one dimension"),
        ("hi", {"stop": [""]}, "must not be empty"),
        ("hi", {"num_draft_tokens": 5}, "num_draft_tokens must be at most 4"),
        ("hi", {"lookup_texts": "text"}, "lookup_texts must be a list of texts, got 'text'"),
        ("hi", {"lookup_texts": [b"text"]}, "lookup_texts must be a list of texts, got [b'te"),
        ("x" * 1000, {}, "the prompt has 1000 tokens, but fake takes fewer than 1000"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(scripted, prompt, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream_generate(scripted, byte_tokenizer(), prompt, **options)


def test_the_cached_part_counts_towards_the_context(scripted):
    cache = scripted.make_cache()
    cache.ids = [1] * 990
    with pytest.raises(ContextOverflow, match="1001 tokens"):
        stream_generate(scripted, byte_tokenizer(), "x" * 11, prompt_cache=cache)


def test_special_tokens_are_added_unless_the_prompt_begins_with_bos():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<user>"
    assert encode_prompt(tokenizer, "<user>a") == [USER, 97]
    assert encode_prompt(tokenizer, "a", add_special_tokens=False) == [97]


def test_chat_text_leaves_a_last_assistant_message_open():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "hi"}]
    assert chat_text(tokenizer, messages) == "<user>hi<eos><assistant>"
    messages.append({"role": "assistant", "content": "Well"})
    text = chat_text(tokenizer, messages)
    assert text == "<user>hi<eos><assistant>Well"
    ids = encode_prompt(tokenizer, text, add_special_tokens=False)
    assert ids == [USER, *ids_of("hi"), EOS, ASSISTANT, *ids_of("Well")]


def test_chat_text_takes_template_settings_and_names_a_refusal():
    tokenizer = byte_tokenizer(template="{{ mood }}" + TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    text = chat_text(tokenizer, messages, template_config={"mood": "calm "})
    assert text.startswith("calm <user>hi")
    with pytest.raises(ValueError, match="refuses the conversation: no tools here"):
        chat_text(tokenizer, [{"role": "tool", "content": "x"}])


@pytest.fixture(scope="module")
def real():
    """The default model with the adapter that the package ships."""
    from mlx_mtp import load

    return load()


def real_prompt(tokenizer, question: str) -> list[int]:
    text = chat_text(tokenizer, [{"role": "user", "content": question}])
    return encode_prompt(tokenizer, text, add_special_tokens=False)


@pytest.mark.slow
def test_the_real_model_answers_as_mlx_lm_does_in_fewer_steps(real):
    """Same text, ids, counts and reason as mlx-lm's own loop on the same weights."""
    from mlx_lm.generate import stream_generate as stock_stream_generate

    model, tokenizer = real
    options: dict[str, Any] = {"num_draft_tokens": 3}  # of 8, which are 81 rows
    for question, max_tokens, layouts in (
        ("List three fruits.", 30, ("plain", "quadratic")),
        ("Say the word 日本 twice.", 16, ("linear", "auto")),
    ):
        ids = real_prompt(tokenizer, question)
        stock = list(
            stock_stream_generate(model.base, tokenizer, mx.array(ids), max_tokens=max_tokens)
        )
        for layout in layouts:
            options |= {"max_tokens": max_tokens, "layout": layout}
            ours = list(stream_generate(model, tokenizer, ids, **options))
            assert [r.token for r in ours] == [r.token for r in stock]
            text = tokenizer.decode([r.token for r in ours if r.token not in {0, 2}])
            assert "".join(r.text for r in ours) == text
            assert ours[-1].finish_reason == stock[-1].finish_reason
            assert ours[-1].generation_tokens == stock[-1].generation_tokens
            assert ours[-1].prompt_tokens == stock[-1].prompt_tokens
            if layout == "quadratic":
                assert ours[-1].tokens_per_step > 1.2


@pytest.mark.slow
def test_the_real_model_stops_at_a_string_and_goes_on_from_there(real):
    """After a stop string the cache is as good as a fresh one for what follows."""
    model, tokenizer = real
    ids = real_prompt(tokenizer, "Count from one to ten in words.")
    cache = model.make_cache()
    first = list(
        stream_generate(
            model, tokenizer, ids, max_tokens=60, layout="quadratic", num_draft_tokens=3,
            stop=["four", "4"], prompt_cache=cache,
        )
    )  # fmt: skip
    emitted = [r.token for r in first]
    assert first[-1].finish_reason == "stop"
    assert cache.offset == len(ids) + len(emitted) - 1
    rest = [emitted[-1], *tokenizer.encode(" and then", add_special_tokens=False)]
    resumed = generate(model, tokenizer, rest, max_tokens=12, prompt_cache=cache)
    fresh = generate(model, tokenizer, [*ids, *emitted[:-1], *rest], max_tokens=12)
    assert resumed == fresh


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["The capital of France is", "1, 2, 3,"])
def test_the_real_model_continues_a_text_with_its_first_space(real, prompt):
    model, tokenizer = real
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=8))
    ids = [*encode_prompt(tokenizer, prompt), *(response.token for response in responses)]
    text = "".join(response.text for response in responses)
    assert prompt + text == tokenizer.decode(ids) and text.startswith(" ")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text(real):
    from mlx_mtp import Sampling

    model, tokenizer = real
    ids = real_prompt(tokenizer, "Tell me a story.")
    sampling = Sampling(temp=1.0, top_p=0.95)
    texts = [
        generate(model, tokenizer, ids, max_tokens=20, sampling=sampling, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


class TestTheCallStyleOfMlxLm:
    """On a tiny model with a byte vocabulary."""

    @pytest.fixture
    def model(self):
        return tiny_mtp("llama", k=3, vocab_size=BYTE_VOCAB)

    def test_a_sampler_and_processors_work(self, model):
        def only_letters(tokens, logits):
            del tokens
            return mx.where(mx.arange(logits.shape[-1]) < 128, logits, -mx.inf)

        greedy = generate(model, byte_tokenizer(), "hi", max_tokens=12)
        drawn = generate(model, byte_tokenizer(), "hi", max_tokens=12, sampler=make_sampler(0.0))
        assert drawn == greedy
        text = generate(
            model,
            byte_tokenizer(),
            prompt="hi",
            max_tokens=12,
            sampler=make_sampler(temp=0.7),
            logits_processors=[only_letters],
        )
        assert len(text) == 12 and text.isascii()

    def test_configurations_and_keywords_mean_the_same(self, model):
        ways = {"max_tokens": 9, "layout": "linear", "stop": ["zz"]}
        config = GenerationConfig(**ways)
        expected = generate(model, byte_tokenizer(), "hi", **ways)
        assert generate(model, byte_tokenizer(), "hi", config=config) == expected
        longer = generate(model, byte_tokenizer(), "hi", config=config, max_tokens=12)
        assert longer.startswith(expected) and longer != expected
        bound = CacheConfig(max_kv_size=8)
        ways_to_bound: tuple[dict[str, Any], ...] = ({"cache_config": bound}, {"max_kv_size": 8})
        for cache in ways_to_bound:
            assert generate(model, byte_tokenizer(), "hi", config=config, **cache)
        with pytest.raises(ValueError, match="kv_bits must be 2, 3, 4, 5, 6 or 8, got 7"):
            generate(model, byte_tokenizer(), "hi", cache_config=CacheConfig(kv_bits=7))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"draft_model": object()}, "draft_model must come from load, got object"),
            ({"prompt_cache": []}, "must come from model.make_cache"),
            ({"temp": 0.7}, "pass sampling=Sampling"),
        ],
    )
    def test_what_is_different_is_said_in_one_line(self, model, options, message):
        with pytest.raises(ValueError, match=message) as error:
            generate(model, byte_tokenizer(), "hi", **options)
        assert "\n" not in str(error.value)
