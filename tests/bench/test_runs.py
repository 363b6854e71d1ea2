"""The timing of one answer, the order of the modes, and the sources of prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.bench import contexts, machine_state, measure, modes, runs
from mlx_mtp.bench.contexts import Question, check_room, questions
from mlx_mtp.bench.measure import schedule
from mlx_mtp.bench.modes import Mode, draft_steps
from mlx_mtp.bench.runs import RUN, Step, num_repeated, time_answer
from mlx_mtp.bench.settings import Settings
from mlx_mtp.evaluation import prompt_sets
from mlx_mtp.evaluation.prompts import BENCHMARK_KINDS, ENGLISH_KINDS, Prompt, builtin_prompts
from tests.helpers.benchmark_answers import answer
from tests.helpers.fixtures_generate import byte_tokenizer


def test_the_first_step_is_not_timed(monkeypatch):
    times = iter([100.0, 101.0, 103.0, 106.0])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(times))
    steps = [Step(tokens=[1, 2]), Step(tokens=[3]), Step(tokens=[4, 5, 6])]
    done = time_answer(lambda: iter(steps))
    assert (done.ids, done.steps, done.first) == ([1, 2, 3, 4, 5, 6], 3, 2)
    assert (done.ttft_s, done.seconds, done.num_timed) == (1.0, 5.0, 4)
    assert done.layouts == {(0, 0): (2, 5.0)}


def drafted(tokens, accepted, *parts):
    drafts = sum(count for _, count in parts)
    return Step(
        tokens=tokens, num_draft_tokens=drafts, num_accepted=accepted, num_masks=3, parts=parts
    )


def test_drafts_are_counted_by_position_and_drafter():
    steps = [
        Step(tokens=[1]),
        drafted([1, 2, 3], 2, ("mask", 3)),
        drafted([1], 0, ("mask", 2)),
        drafted([1, 2, 3], 2, ("lookup", 5)),
        drafted([1, 2, 3, 4], 3, ("mask", 2), ("lookup", 4)),
        drafted([1, 2], 1, ("mask", 2), ("lookup", 4)),
        drafted([1, 2], 2, ("mask", 4)),  # the answer ends among its drafts: two not verified
    ]
    done = time_answer(lambda: iter(steps))
    assert (done.verified, done.accepted) == ([5, 5, 1], [4, 3, 0])
    assert done.drafters == {"mask": (11, 7), "lookup": (13, 3)}
    assert done.layouts.keys() == {(3, 3), (2, 3), (5, 3), (4, 3), (6, 3)}


def test_drafts_after_the_end_count_for_no_drafter():
    """The stop id is the first looked-up draft of a chain."""
    done = time_answer(lambda: iter([drafted([1, 2, 3], 3, ("mask", 2), ("lookup", 4))]))
    assert done.drafters == {"mask": (2, 2), "lookup": (1, 1)}
    assert (done.verified, done.accepted) == ([1, 1], [1, 1])


def test_an_answer_as_json_keeps_its_former_keys():
    timing = time_answer(lambda: iter([drafted([1, 2], 1, ("lookup", 2))]))
    made = replace(answer(), timing=timing).to_dict()
    assert made["lookup"] == [2, 1] and made["drafters"] == {"lookup": (2, 1)}
    assert made["verified"] == made["held"] == [] and "accepted" not in made


@pytest.mark.parametrize(
    ("ids", "count"),
    [
        ([1, 2, 3], 0),
        ([9, 3, 4, 5, 6, 9], 4),
        ([1, 2, 3, 4, 5], 5),
        ([1, 2, 3, 4, 9, 5, 6, 7, 8], 8),
    ],
)
def test_repeated_ids_lie_in_runs_of_four(ids, count):
    assert num_repeated(ids, range(9)) == count


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_repetition_by_looking_at_each_id(ids, conversation):
    def runs_of(text):
        return [text[at : at + RUN] for at in range(len(text) - RUN + 1)]

    def is_repeated(place):
        around = ids[max(place - RUN + 1, 0) : place + RUN]
        return any(run in runs_of(conversation) for run in runs_of(around))

    assert num_repeated(ids, conversation) == sum(map(is_repeated, range(len(ids))))


def test_ids_of_a_draft_model_are_put_back_into_steps():
    tokens = [(1, False), (2, True), (3, True), (4, False), (5, True), (6, True)]
    steps = list(draft_steps(iter(tokens), {9}, 2, 6))
    assert [step.tokens for step in steps] == [[1], [2, 3, 4], [5, 6]]
    assert [(step.num_draft_tokens, step.num_accepted) for step in steps] == [
        (2, 0),
        (2, 2),
        (2, 2),
    ]
    stopped = list(draft_steps(iter(tokens), {3}, 2, 6))
    assert [step.tokens for step in stopped] == [[1], [2, 3]]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 6))
def test_every_mode_answers_before_the_next_prompt(prompts, count, repeats):
    order = list(schedule(prompts, count, repeats))
    assert len(order) == len(set(order)) == prompts * count * repeats
    for start in range(0, len(order), count):
        group = order[start : start + count]
        assert len({place[:2] for place in group}) == 1
        assert {place[2] for place in group} == set(range(count))


@pytest.mark.parametrize("prompts", [3, 4])
def test_each_mode_goes_first_equally_often_with_every_prompt(prompts):
    firsts = Counter(place[1:] for place in list(schedule(prompts, 2, 4))[::2])
    assert set(firsts.values()) == {2} and len(firsts) == 2 * prompts


def fake_mode(name: str, log: list[str]) -> Mode:
    def begin(ids, check):
        log.append(name)
        return iter([Step(tokens=[1]), Step(tokens=[2])])

    return Mode(name, begin, True, 10, 20)


def asked(*ids: str) -> list[Question]:
    return [Question(Prompt(name, "chat", name), 0, [1, 2, 3]) for name in ids]


def test_warm_ups_come_first_and_do_not_count():
    log: list[str] = []
    pair = [fake_mode("plain", log), fake_mode("auto", log)]
    measured = measure.measure(asked("a", "b"), pair, Settings(repeats=2, warmup=2))
    assert log[:4] == ["plain", "plain", "auto", "auto"] and measured.warmups == 4
    assert [answer.mode for answer in measured.answers] == log[4:]
    assert log[4:] == ["plain", "auto", "auto", "plain", "auto", "plain", "plain", "auto"]
    assert [answer.number for answer in measured.answers] == list(range(8))
    assert not measured.interrupted


def test_rests_are_before_every_answer_but_the_first(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(measure, "_rest", lambda seconds, check: naps.append(seconds))
    pair = [fake_mode("plain", []), fake_mode("auto", [])]
    measure.measure(asked("a", "b"), pair, Settings(cooldown_s=3.0))
    assert naps == [0.0, 3.0, 3.0, 3.0]


def test_ctrl_c_leaves_whole_pairs():
    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == 2 * 5 + 1:  # two steps an answer: in the sixth answer
            raise KeyboardInterrupt

    pair = [fake_mode("plain", []), fake_mode("auto", [])]
    measured = measure.measure(asked("a", "b", "c"), pair, Settings(warmup=0), check=check)
    assert measured.interrupted and len(measured.answers) == 4
    assert {answer.prompt for answer in measured.answers} == {"a", "b"}


@given(st.integers(1, 100))
def test_a_limit_is_spread_over_the_kinds(limit):
    every = builtin_prompts(BENCHMARK_KINDS)
    selected = prompt_sets.spread(every, limit)
    assert len(selected) == min(limit, len(every))
    assert selected == [prompt for prompt in every if prompt in selected]
    counts = Counter(prompt.kind for prompt in selected)
    sizes = Counter(prompt.kind for prompt in every)
    for kind in counts:
        assert counts[kind] >= max(counts.values()) - 1 or counts[kind] == sizes[kind]


def test_fifteen_english_prompts_are_every_fourth():
    """The figures in the README were taken on these."""
    english = builtin_prompts(ENGLISH_KINDS)
    assert prompt_sets.spread(english, 15) == english[::4]
    assert prompt_sets.spread(english, None) == english


def test_human_eval_has_164_problems():
    prompts = prompt_sets.human_eval_prompts()
    assert len(prompts) == 164
    assert len({prompt.text for prompt in prompts}) == 164


def test_prompts_by_name(tmp_path: Path):
    assert len(prompt_sets.prompts_of("builtin")) == 100
    assert len(prompt_sets.prompts_of("builtin", kinds=["summary"])) == 8
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "kind": "x"}\n{"prompt": "b"}\n')
    assert [prompt.text for prompt in prompt_sets.prompts_of(str(file), kinds=["x"])] == ["a"]
    with pytest.raises(ValueError, match="no prompts of kind y, only of user, x"):
        prompt_sets.prompts_of(str(file), kinds=["y"])


def test_text_before_a_prompt_is_real_and_as_long_as_requested():
    tokenizer = byte_tokenizer()
    prompts = [Prompt("a", "chat", "What is a fjord?"), Prompt("b", "chat", "And a geyser?")]
    asked_all = questions(tokenizer, prompts, (0, 3000))
    plain, with_text = asked_all[:2], asked_all[2:]
    texts = [tokenizer.decode(question.ids) for question in with_text]
    manual = "\n\n".join(contexts.sections())
    for bare, long, text in zip(plain, with_text, texts, strict=True):
        assert 3000 <= len(long.ids) - len(bare.ids) <= 3100  # and its introduction
        assert long.prompt.text in text
        notes = text.split("\n\n", 1)[1].rsplit(contexts._AFTER, 1)[0]
        assert all(part in manual for part in notes.split("\n\n"))
    assert texts[0][:1000] != texts[1][:1000]  # in another order
    again = questions(tokenizer, prompts, (3000,))
    assert [question.ids for question in again] == [question.ids for question in with_text]


def test_text_is_never_repeated(monkeypatch):
    monkeypatch.setattr(contexts, "sections", lambda: ["one two three", "four five six"])
    with pytest.raises(
        ValueError, match="there are only 26 tokens of text to fill contexts, not 99"
    ):
        questions(byte_tokenizer(), [Prompt("a", "chat", "x")], (99,))


def test_a_prompt_that_does_not_fit_is_named():
    long = Question(Prompt("big", "chat", "x"), 64, [1] * 90)
    check_room([*asked("a"), long], max_tokens=10, max_context=100, model="m")
    check_room([long], max_tokens=10, max_context=None, model="m")
    with pytest.raises(ValueError, match="prompt big after 64 tokens .* 90 .* 11, but m .* 100"):
        check_room([*asked("a"), long], max_tokens=11, max_context=100, model="m")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain", "fast"], "unknown mode 'fast'"),
        (["plain", "plain"], "given twice"),
        ([], "no mode is given"),
        (
            ["plain", "auto:2"],
            "unknown mode 'auto:2'; a number, as in linear:2, may follow linear, quadratic, tree",
        ),
        (["linear:0"], "unknown mode 'linear:0'"),
        (["linear:"], "unknown mode 'linear:'"),
        (["plain", "draft"], "mode draft needs --draft-model"),
        (["plain", "draft-model:2"], "mode draft-model:2 needs --draft-model"),
        (["stock:2"], "unknown mode 'stock:2'"),
    ],
)
def test_modes_that_cannot_be_measured(names, message):
    with pytest.raises(ValueError, match=message):
        modes.check_modes(names, draft_model=None)


def test_swap_in_use_is_none_if_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    assert machine_state.swap_bytes() == psutil.swap_memory().used

    def hidden():
        raise RuntimeError("no /proc/vmstat")

    monkeypatch.setattr(psutil, "swap_memory", hidden)
    assert machine_state.swap_bytes() is None


def counters(root: Path, **packages: int) -> None:
    for name, joules in packages.items():
        folder = root / f"intel-rapl:{name[-1]}"
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text("psys\n" if name.startswith("psys") else f"package-{name}\n")
        (folder / "energy_uj").write_text(f"{joules * 1_000_000}\n")
        (folder / "max_energy_range_uj").write_text(f"{1000 * 1_000_000 - 1}\n")


def test_energy_counts_whole_packages(tmp_path):
    counters(tmp_path, p0=100, p1=990, psys2=5)
    meter = machine_state.PowerMeter(tmp_path)
    assert meter.reason == "" and meter.joules() == 0
    counters(tmp_path, p0=130, p1=20, psys2=500)  # the second one overflowed
    assert meter.joules() == pytest.approx(60)
    assert meter.joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules() is None


def test_energy_that_cannot_be_read_is_none(tmp_path):
    meter = machine_state.PowerMeter(tmp_path)
    assert meter.joules() is None and meter.reason.startswith("not readable")
    counters(tmp_path, p0=1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    meter = machine_state.PowerMeter(tmp_path)
    assert meter.joules() is None and meter.reason == (
        "not readable: the energy counters require root"
    )


def test_facts_about_the_machine():
    facts = machine_state.machine()
    assert facts["name"] and facts["threads"] >= 1 and facts["memory_bytes"] > 2**28
    assert machine_state.differences(facts, facts) == []
    assert machine_state.differences(facts, facts | {"threads": 999}) == [
        f"threads {facts['threads']} in A, 999 in B"
    ]
