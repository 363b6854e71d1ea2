"""What runs in the engine's process: sessions, their turns, the cache of beginnings."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.apps.engine.penalties import answer_penalty
from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.prefix_tree import shared_prefix
from mlx_mtp.apps.engine.preparing import Refusal, prepare
from mlx_mtp.apps.engine.protocol import Cancel, Job, Submit
from mlx_mtp.apps.engine.scheduler import Scheduler
from mlx_mtp.apps.engine.session import Engine, Session, must_wait
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.apps.engine.tool_calls import ToolCallReader
from mlx_mtp.calibration.stored_costs import (
    SPECULATIONS,
    calibrate,
    measured_costs,
    speculation_for,
)
from mlx_mtp.decoding import step
from mlx_mtp.decoding.grouping import StepGrouper
from mlx_mtp.generate import chat_text, generate
from mlx_mtp.model.caches.blocks import CacheBlocks
from mlx_mtp.planning.costs import GPU_GUESS
from tests.helpers.fixtures_generate import EOS, TEMPLATE, byte_tokenizer, ids_of
from tests.helpers.tiny import BYTE_VOCAB, tiny_mtp
from tests.server.sessions import as_sent, messages_of

PROMPTS = ["Say a word about rain.", "One, two, three, four, one, two, three,", "Why?", "abcabcabc"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = byte_tokenizer()
    tokenizer.add_eos_token(str(EOS))
    model = tiny_mtp(vocab_size=BYTE_VOCAB, max_position_embeddings=512)
    return Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=speculation_for(model),
        prefixes=PrefixCache(CacheBlocks(model, chunk_size=8), max_bytes=0),
        texts=TokenTexts(tokenizer),
        prefill_step_size=8,
    )


def kept(engine: Engine, max_bytes: int = 2**24) -> Engine:
    """The same engine with a cache of beginnings of its own."""
    prefixes = PrefixCache(
        CacheBlocks(engine.model, chunk_size=8), max_bytes=max_bytes, block_size=16
    )
    return replace(engine, prefixes=prefixes)


def job(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 24} | more


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(message["text"] for message in messages if message["type"] == "group")


def expected(engine: Engine, text: str, **options: Any) -> str:
    """What ``generate`` answers."""
    prompt = chat_text(engine.tokenizer, [{"role": "user", "content": text}])
    ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
    ways = {"max_tokens": 24, "layout": "plain"} | options
    return generate(engine.model, engine.tokenizer, ids, **ways)


class Turns:
    """A scheduler whose messages are kept, and which runs until all jobs have ended."""

    def __init__(self, engine: Engine) -> None:
        self.messages: list[dict[str, Any]] = []
        self.scheduler = Scheduler(
            prepare=lambda values: prepare(Job.from_dict(values), engine.model, engine.tokenizer),
            begin=lambda prepared: Session(prepared, engine),
            group=StepGrouper(engine.model, engine.speculation).groups,
            run=lambda steps: step.run(engine.model, steps),
            send=lambda message: self.messages.append(as_sent(message)),
            must_wait=lambda job, running: must_wait(job, running, engine),
        )

    def submit(self, number: int, values: dict[str, Any]) -> None:
        self.scheduler.receive(Submit(id=number, job=values))

    def wait_until_prepared(self, count: int) -> None:
        """So that all of the jobs submitted are there when the first begins."""
        while self.scheduler._inbox.qsize() < 2 * count:
            time.sleep(0.001)

    def cancel(self, number: int) -> None:
        self.scheduler.receive(Cancel(id=number))

    def run(self, count: int) -> None:
        """Go on until so many jobs have ended."""
        while (
            sum(each["type"] in ("finished", "refused", "failed") for each in self.messages) < count
        ):
            self.scheduler.turn()

    def of(self, number: int) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["id"] == number]


@pytest.mark.parametrize("layout", ["auto", "linear", "quadratic", "plain"])
def test_answers_made_by_turns_are_those_of_generate(engine, layout):
    turns = Turns(engine)
    for at, text in enumerate(PROMPTS):
        turns.submit(at, job(text, layout=layout))
    turns.wait_until_prepared(len(PROMPTS))
    turns.run(len(PROMPTS))
    for at, text in enumerate(PROMPTS):
        assert text_of(turns.of(at)) == expected(engine, text)
    order = [message["id"] for message in turns.messages if message["type"] == "group"]
    assert order[:8] != sorted(order[:8]), "one after the other"


def test_turns_are_fair(engine):
    turns = Turns(engine)
    for at in range(3):
        turns.submit(at, job(PROMPTS[2], layout="plain", max_tokens=5))
    turns.wait_until_prepared(3)
    turns.run(3)
    order = [message["id"] for message in turns.messages if message["type"] == "group"]
    assert order == [0, 1, 2] * 5


def test_long_prompts_let_others_have_their_turn(engine):
    turns = Turns(engine)
    turns.submit(0, job("x" * 200, max_tokens=2))
    turns.submit(1, job("Why?", max_tokens=6, layout="plain"))
    turns.run(2)
    kinds = [(message["id"], message["type"]) for message in turns.messages]
    first = kinds.index((0, "group"))
    assert (1, "finished") in kinds[:first]


def test_every_group_is_one_step(engine):
    messages = messages_of(engine, job(PROMPTS[1], layout="quadratic"))
    groups = [message for message in messages if message["type"] == "group"]
    stats = messages[-1]["stats"]
    assert len(groups) == stats["num_steps"]
    assert sum(group["tokens"] for group in groups) == stats["generation_tokens"] == 24
    assert sum(group["accepted"] for group in groups) == stats["num_accepted"]
    parts = [dict(group["parts"]) for group in groups]
    assert sum(sum(each.values()) for each in parts) == stats["num_draft_tokens"] > 0
    steps = zip(groups, parts, strict=True)
    assert all(group["tokens"] <= sum(each.values()) + 1 for group, each in steps)
    assert set().union(*parts) == {"mask"}


@pytest.mark.parametrize("drafter", ["mask", "lookup"])
def test_a_job_may_choose_the_drafter(engine, drafter):
    whole = job("abcabcabc" * 3, max_tokens=48, layout="linear")
    messages = messages_of(engine, whole | {"drafter": drafter})
    stats = messages[-1]["stats"]
    assert list(stats["drafters"]) == [drafter] and stats["num_draft_tokens"] > 0
    assert text_of(messages) == text_of(messages_of(engine, whole | {"layout": "plain"}))


@pytest.mark.parametrize(
    ("more", "message", "param"),
    [
        (
            {"drafter": "native"},
            "drafter is native, but .* has no MTP modules of its own",
            "drafter",
        ),
        (
            {"drafter": "draft-model"},
            "drafter is draft-model, but .* has no draft model",
            "drafter",
        ),
        ({"drafter": "magic"}, "drafter must be one of auto, .*, got 'magic'", None),
        ({"drafter": "mask", "num_draft_tokens": 9}, "num_draft_tokens is 9", "num_draft_tokens"),
    ],
)
def test_a_drafter_that_the_model_lacks_is_refused(engine, more, message, param):
    with pytest.raises(Refusal, match=message) as refusal:
        prepare(Job.from_dict(job("Why?") | more), engine.model, engine.tokenizer)
    assert refusal.value.param == param


def test_the_adapter_limits_only_its_own_drafts(engine):
    text = "abcabcabc" * 3
    whole = job(text, max_tokens=48, layout="linear", drafter="lookup", num_draft_tokens=9)
    messages = messages_of(engine, whole)
    counts = [sum(dict(m["parts"]).values()) for m in messages if m["type"] == "group"]
    assert max(counts) == 9 > engine.model.num_draft_tokens


def test_a_job_may_turn_speculation_off(engine):
    messages = messages_of(engine, job(PROMPTS[0], layout="plain"))
    assert messages[-1]["stats"]["num_draft_tokens"] == 0 and not messages[-1]["stats"]["mtp"]


def test_a_conversation_goes_on_from_what_is_cached(engine):
    engine = kept(engine)
    first = messages_of(engine, job(PROMPTS[0]))
    assert first[0]["cached_tokens"] == 0
    said = {"role": "assistant", "content": "Rain."}
    turns = [{"role": "user", "content": PROMPTS[0]}, said, {"role": "user", "content": "More!"}]
    second = messages_of(engine, job("") | {"messages": turns})
    assert second[0]["cached_tokens"] >= len(PROMPTS[0])
    fresh = messages_of(kept(engine, 0), job("") | {"messages": turns})
    assert fresh[0]["cached_tokens"] == 0 and text_of(second) == text_of(fresh)
    assert second[0]["prompt_tokens"] == fresh[0]["prompt_tokens"]
    again = messages_of(engine, job("") | {"messages": turns})
    assert again[0]["cached_tokens"] == again[0]["prompt_tokens"] - 1
    assert text_of(again) == text_of(fresh)


def test_penalties_see_what_is_cached(engine):
    values = job("abcabc", repetition_penalty=3.0, max_tokens=10)
    fresh = messages_of(engine, values)
    engine = kept(engine)
    messages_of(engine, values | {"repetition_penalty": None, "max_tokens": 1})
    cached = messages_of(engine, values)
    assert cached[0]["cached_tokens"] == cached[0]["prompt_tokens"] - 1
    assert (
        text_of(cached)
        == text_of(fresh)
        != text_of(messages_of(engine, job("abcabc", max_tokens=10)))
    )


def test_a_cancelled_answer_leaves_a_whole_cache(engine):
    engine = kept(engine)
    turns = Turns(engine)
    turns.submit(0, job("y" * 100))
    for _ in range(8):
        turns.scheduler.turn()
    turns.cancel(0)
    turns.submit(1, job("y" * 100))
    turns.run(2)
    last = {"type": "finished", "id": 0, "reason": "cancelled"}
    assert turns.of(0)[-1] == last | {"tool_calls": [], "reasoning_tokens": 0, "stats": {}}
    assert turns.of(1)[0]["cached_tokens"] > 8
    assert text_of(turns.of(1)) == expected(engine, "y" * 100)


def test_what_several_begin_with_is_computed_once(engine):
    engine = kept(engine)
    shared = "s" * 60
    values = [job("") | {"messages": [{"role": "user", "content": shared + tail}]}
              for tail in ("one, and more of it, and more, and more", "two", "three")]  # fmt: skip
    first = messages_of(engine, values[0])
    turns = Turns(engine)
    for at, each in enumerate(values[1:]):
        turns.submit(at, each)
    turns.wait_until_prepared(2)
    turns.run(2)
    for at, each in enumerate(values[1:]):
        assert turns.of(at)[0]["cached_tokens"] >= 60
        assert text_of(turns.of(at)) == text_of(messages_of(kept(engine, 0), each))
    again = messages_of(engine, values[0])
    assert again[0]["cached_tokens"] == again[0]["prompt_tokens"] - 1
    assert text_of(again) == text_of(first)


def test_the_cache_of_beginnings_has_a_bound(engine):
    engine = kept(engine)
    one = messages_of(engine, job(PROMPTS[0]))
    assert one and len(engine.prefixes) > 1
    size = engine.prefixes.nbytes
    small = kept(engine, int(2.5 * size))
    for text in PROMPTS + ["z" * 30, "w" * 30]:
        messages_of(small, job(text))
        assert small.prefixes.nbytes <= 2.5 * size
    again = messages_of(small, job("w" * 30))
    assert again[0]["cached_tokens"] == again[0]["prompt_tokens"] - 1
    none = kept(engine, 0)
    messages_of(none, job(PROMPTS[0]))
    assert len(none.prefixes) == 0


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4], 2), ([1], [2], 0)],
)
def test_shared_prefix(one, other, count):
    assert shared_prefix(one, other) == count
    assert shared_prefix([*one, 9], [*one, *[7] * 5]) == len(one)


@pytest.mark.parametrize("layout", ["plain", "auto"])
def test_a_seed_makes_an_answer_repeatable(engine, layout):
    values = job(PROMPTS[0], temp=1.0, layout=layout, seed=3)
    one, two = text_of(messages_of(engine, values)), text_of(messages_of(engine, values))
    assert one == two
    others = {text_of(messages_of(engine, values | {"seed": None})) for _ in range(3)}
    assert len(others) > 1


def test_stop_strings_end_the_text_and_are_told(engine):
    whole = expected(engine, PROMPTS[0])
    stop = whole[4:6]
    messages = messages_of(engine, job(PROMPTS[0], stop=["nowhere", stop], layout="quadratic"))
    assert text_of(messages) == whole[: whole.index(stop)]
    assert messages[-1]["reason"] == "stop" and messages[-1]["stop_string"] == stop


def test_log_probabilities_are_those_of_the_chosen_ids(engine):
    messages = messages_of(engine, job(PROMPTS[1], top_logprobs=3, layout="quadratic"))
    entries = [each for message in messages for each in message.get("logprobs", ())]
    assert len(entries) == messages[-1]["stats"]["generation_tokens"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])
        assert entry["logprob"] <= 0
    assert json.dumps(messages, allow_nan=False)
    data = bytes(byte for entry in entries for byte in entry["bytes"])
    assert data.decode("utf-8", "replace").startswith(text_of(messages)[:4])


def test_a_bias_and_penalties_change_the_answer(engine):
    messages = messages_of(engine, job("Why?", logit_bias={"65": 100.0}, max_tokens=5))
    assert text_of(messages) == "AAAAA"
    free = text_of(
        messages_of(engine, job("Why?", logit_bias={"65": 30.0, "66": 25.0}, max_tokens=6))
    )
    assert free == "AAAAAA"
    bias = {"65": 100.0, "66": 99.0}
    penalised = messages_of(engine, job("A", logit_bias=bias, frequency_penalty=0.8, max_tokens=6))
    assert {"A", "B"} == set(text_of(penalised))


def test_penalties_count_the_answer_only():
    process = answer_penalty(num_prompt=2, frequency=0.5, presence=1.0)
    logits = mx.zeros((1, 4))
    assert process(mx.array([0, 0]), logits).tolist() == [[0, 0, 0, 0]]
    assert process(mx.array([0, 0, 1, 1, 3]), logits).tolist() == [[0, -2.0, 0, -1.5]]


@pytest.mark.parametrize(
    ("values", "param", "word"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [1, 999]}, "prompt", "999"),
        ({"prompt": "x" * 600}, "prompt", "takes fewer than 512"),
        ({"prompt": "x", "logit_bias": {260: 1.0}}, "logit_bias", "260"),
        ({"prompt": "x", "num_draft_tokens": 9}, "num_draft_tokens", "9"),
        ({"prompt": "x", "top_p": 2.0}, None, "top_p"),
    ],
)
def test_jobs_that_cannot_be_done_are_refused(engine, values, param, word):
    with pytest.raises(Refusal, match=word) as refusal:
        prepare(Job(max_tokens=5, **values), engine.model, engine.tokenizer)
    assert refusal.value.param == param


def test_xtc_drops_neither_line_breaks_nor_end_tokens(engine):
    values = {"prompt": "x", "temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001}
    prepared = prepare(Job(max_tokens=5, **values), engine.model, engine.tokenizer)
    assert {EOS, *ids_of("\n")} <= set(prepared.sampling.xtc_special_tokens or ())


def test_refusals_and_failures_leave_the_others_alone(engine, monkeypatch):
    turns = Turns(engine)
    turns.submit(0, job("x" * 600))
    turns.submit(1, job("Why?"))
    turns.submit(2, job("Why?") | {"max_tokens": "many"})
    turns.cancel(99)
    turns.run(3)
    assert turns.of(0)[-1]["code"] == "context_length_exceeded"
    assert text_of(turns.of(1)) == expected(engine, "Why?")
    assert turns.of(2)[-1]["type"] == "failed"


def test_a_forward_that_fails_ends_those_in_it(engine, monkeypatch):
    engine = kept(engine)
    turns = Turns(engine)
    for at in range(2):
        turns.submit(at, job(PROMPTS[at], layout="plain"))
    turns.wait_until_prepared(2)
    for _ in range(16):
        turns.scheduler.turn()
    with monkeypatch.context() as patch:
        patch.setattr("mlx_mtp.decoding.outcome._outcome", lambda *_: 1 / 0)
        turns.run(2)
    assert [turns.of(at)[-1]["type"] for at in range(2)] == ["failed", "failed"]
    for at in range(2):
        turns.submit(2 + at, job(PROMPTS[at]))
    turns.run(4)
    for at in range(2):
        assert text_of(turns.of(2 + at)) == expected(engine, PROMPTS[at])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_tool_calls_are_found_however_the_text_is_cut(size):
    text = 'Sum:<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> ok <tool'
    reader = ToolCallReader(tool_tokenizer(), [])
    shown = "".join(reader.push(text[at : at + size]) for at in range(0, len(text), size))
    assert shown + reader.finish() == "Sum: ok <tool"
    assert reader.calls == [{"name": "add", "arguments": '{"a": 1}'}]


@pytest.mark.parametrize(
    "text", ["<tool_call>no JSON</tool_call>", "a<tool_call>{", "<tool_call>[1]</tool_call>"]
)
def test_what_is_no_tool_call_stays_text(text):
    reader = ToolCallReader(tool_tokenizer(), [])
    assert reader.push(text) + reader.finish() == text
    assert reader.calls == []


def tool_tokenizer() -> Any:
    def parse(text: str, tools: Any) -> Any:
        del tools
        return json.loads(text)

    return SimpleNamespace(
        tool_call_start="<tool_call>", tool_call_end="</tool_call>", tool_parser=parse
    )


def test_tools_reach_the_template(engine):
    template = TEMPLATE + "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}"
    tokenizer = byte_tokenizer(template=template)
    tools = [{"type": "function", "function": {"name": "add"}}]
    prepared = prepare(Job.from_dict(job("hi", tools=tools)), engine.model, tokenizer)
    assert prepared.ids[-3:] == ids_of("add") and prepared.tools == tools


def test_ids_look_like_their_bytes():
    texts = TokenTexts(byte_tokenizer())
    assert [texts.bytes_of(byte) for byte in (0, 32, 65, 255)] == [b"\0", b" ", b"A", b"\xff"]
    assert texts.entry(255, float("nan")) == {
        "token": "bytes:\\xff", "logprob": -9999.0, "bytes": [255],
    }  # fmt: skip
    assert texts.entry(EOS, -1.0)["token"] == "<eos>"
    found = texts.entries([65, 66], mx.zeros((2, BYTE_VOCAB)), 0)
    assert [(each["token"], each["top_logprobs"]) for each in found] == [("A", []), ("B", [])]


def test_costs_that_steps_disprove_are_discarded_after_the_answer(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    minutes = replace(GPU_GUESS, forward_ms=((6e4,) * 6,), is_guess=False)
    monkeypatch.setattr("mlx_mtp.calibration.stored_costs.measure_costs", lambda *_, **__: minutes)
    SPECULATIONS.forget(engine.model)
    calibrate(engine.model)
    known = speculation_for(engine.model)
    for _ in range(16):
        known.costs.observe(rows=1, largest_group=0, context=0, ms=0.01)
    assert measured_costs(engine.model) == minutes
    messages_of(engine, job("Why?"))
    assert measured_costs(engine.model) is None
