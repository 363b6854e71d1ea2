"""Reasoning: its marks, the parser, the budget, exact under speculation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_mtp.batch import batch_generate
from mlx_mtp.cli.main import cli
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.generate import chat_text, encode_prompt, generate, stream_generate
from mlx_mtp.terminal import AnswerWriter, Status
from mlx_mtp.text.answer_printer import AnswerPrinter
from mlx_mtp.text.reasoning import (
    Parts,
    Reasoning,
    ReasoningParser,
    ReasoningTracker,
    reasoning_marks,
    split_reasoning,
    template_settings,
)
from tests.helpers.fixtures_generate import (
    EOS,
    FakeModel,
    byte_tokenizer,
    reasoning_tokenizer,
    scripted,
)
from tests.helpers.tiny import tiny_mtp

__all__ = ["scripted"]

THINK = Reasoning(start="<think>", end="</think>")
INSIDE, AFTER = replace(THINK, phase="inside"), replace(THINK, phase="after")
FIRST = replace(THINK, anywhere=False)
VOCAB = 264
LENGTH = 20


@pytest.mark.parametrize(
    ("reasoning", "text", "parts"),
    [
        (THINK, "<think>\nabc\n</think>\n\nHello", ("abc", "Hello")),
        (THINK, "\n<think>abc</think>Hello\n", ("abc", "Hello\n")),
        (INSIDE, "abc\n</think>\n\n    return", ("abc", "    return")),
        (INSIDE, "<think>\nabc\r\n\r\n</think>\r\nHello", ("abc", "Hello")),
        (INSIDE, "  indented </think> Hello", ("  indented ", " Hello")),
        (THINK, "    return 1\n", ("", "    return 1\n")),
        (THINK, "\n\n", ("", "\n\n")),
        (THINK, "Well.\n<think>a</think>\nb", ("a", "Well.\nb")),
        (THINK, "`<think>` or '<think>'", ("", "`<think>` or '<think>'")),
        (THINK, "<think>a</think>b <think>c</think>", ("a", "b <think>c</think>")),
        (THINK, "<think>a<think>b</think>c</think>", ("a<think>b", "c</think>")),
        (THINK, "<think>\n\n</think>\n\nHi", ("", "Hi")),
        (THINK, "<think>\n never closed\n", (" never closed\n", "")),
        (INSIDE, "cut off</thi", ("cut off</thi", "")),
        (THINK, "<thi", ("", "<thi")),
        (AFTER, "\na</think>", ("", "\na</think>")),
        (Reasoning(start="[THINK]", end="[/THINK]"), "[THINK]a[/THINK]b", ("a", "b")),
        (FIRST, "{<think>}", ("", "{<think>}")),
        (FIRST, " <think>a</think>{", ("a", "{")),
    ],
)  # fmt: skip
def test_the_parser_splits(reasoning, text, parts):
    assert split_reasoning(reasoning, text) == Parts(*parts)


_PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<", "/think>", "\n", "  ", "\r\n", "a", "日", "`", ">"]
    ),
    max_size=9,
)


@given(_PIECES, st.sampled_from(["before", "inside", "after"]), st.booleans(), st.data())
@example(["<think>", "\n", "a", "\n", "</think>", "\n", "a"], "before", True, None)
def test_cuts_make_no_difference_and_no_text_is_lost(pieces, phase, anywhere, data):
    reasoning = Reasoning(start="<think>", end="</think>", phase=phase, anywhere=anywhere)
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=9))) if data else [3, 4]
    parser = ReasoningParser(reasoning)
    bounds = [0, *cuts, len(text)]
    parts = [parser.push(text[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    parts.append(parser.finish())
    split = Parts("".join(part[0] for part in parts), "".join(part[1] for part in parts))
    assert split == split_reasoning(reasoning, text)
    if parser.span is None:
        assert split == ("", text)
        return
    opening, inner, *closed = parser.span
    end, after = closed or (len(text), len(text))
    head = text[:opening] if text[:opening].strip() else ""
    assert split == (text[inner:end], head + text[after:])
    assert not text[opening:inner].replace("<think>", "").strip()
    assert text[end:after].strip() in ("", "</think>")


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("{{ '[THINK]' }}[/THINK]", ("[THINK]", "[/THINK]")),
        ("<seed:think></seed:think>", ("<seed:think>", "</seed:think>")),
        ("<thinking> </thinking>", ("<thinking>", "</thinking>")),
        ("{{ messages }}<think>", ("<think>", "</think>")),
        ("{{ content.split('</think>')[-1] }}", ("<think>", "</think>")),
        (None, None),
    ],
)
def test_marks_are_found_in_the_template(template, marks):
    assert reasoning_marks(byte_tokenizer(template=template)) == marks


def test_marks_are_found_in_the_vocabulary():
    assert reasoning_marks(reasoning_tokenizer(template=None)) == ("<think>", "</think>")
    tokenizer = reasoning_tokenizer(template=None, marks=("[THINK]", "[/THINK]"))
    assert reasoning_marks(tokenizer) == ("[THINK]", "[/THINK]")


def test_special_tokens_are_marks_too(scripted):
    tokenizer = reasoning_tokenizer(template=None, marks=("[THINK]", "[/THINK]"), special=True)
    scripted.answers = [[*tokenizer.encode("[THINK]hm[/THINK]ok"), EOS]]
    text = "".join(r.text for r in stream_generate(scripted, tokenizer, "hi", max_tokens=-1))
    reasoning = Reasoning.of(tokenizer, [1])
    assert split_reasoning(reasoning, text) == Parts("hm", "ok")


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(
    ("prompt", "prefill", "phase"),
    [
        ("<user>hi<eos><assistant>", "", "before"),
        ("<user>what is <think>?<eos><assistant>", "", "before"),
        ("<user>hi<eos><assistant><think>\n", "", "inside"),
        ("<user>hi<eos><assistant><think>\n\n</think>\n\n", "", "after"),
        ("<assistant>Sure, ", "Sure, ", "after"),
        ("<assistant><think>\nWell, ", "<think>\nWell, ", "inside"),
        ("<assistant><think>\nWell</think>So", "<think>\nWell</think>So", "after"),
    ],
)
def test_the_prompt_shows_where_the_answer_begins(single, prompt, prefill, phase):
    tokenizer = reasoning_tokenizer(single=single)
    reasoning = Reasoning.of(tokenizer, tokenizer.encode(prompt), prefill=prefill)
    assert reasoning is not None and reasoning.phase == phase


def test_settings_become_variables_of_the_template_or_a_budget():
    def settings(template: str, **ways: Any) -> tuple[dict[str, Any], int | None]:
        ways = {"budget": None} | ways
        return template_settings(byte_tokenizer(template=template), **ways)

    assert settings("") == ({}, None)
    assert settings("", budget=5) == ({}, 5)
    assert settings("", enable=False, budget=5) == ({"enable_thinking": False}, 0)
    assert settings("{{ thinking }}", enable=True) == (
        {"enable_thinking": True, "thinking": True}, None,
    )  # fmt: skip
    assert settings("{{ reasoning_effort }}", effort="low") == ({"reasoning_effort": "low"}, None)
    assert settings("", effort="low") == ({}, 1024)
    assert settings("", effort="high") == ({}, None)
    assert settings("", effort="low", budget=7) == ({}, 7)
    assert settings("{{ reasoning_effort }}", effort="none") == ({"enable_thinking": False}, 0)
    assert settings("{{ thinking_budget }}", budget=7) == ({"thinking_budget": 7}, 7)


@pytest.mark.parametrize("single", [True, False])
def test_the_tracker_agrees_with_the_parser_forwards_and_backwards(single):
    tokenizer = reasoning_tokenizer(single=single)

    @given(_PIECES, st.sampled_from([THINK, FIRST, INSIDE]), st.data())
    @example(
        ["é `", "<think>", "` a", "<think>", "b 日 ", "</think>", "c", "</think>"], THINK, None
    )
    def check(pieces, reasoning, data):
        ids = tokenizer.encode("".join(pieces))
        tracker = ReasoningTracker(tokenizer, reasoning, num_prompt=2)
        counts = [*range(len(ids) + 1), *reversed(range(len(ids)))]
        counts += data.draw(st.lists(st.integers(0, len(ids)), max_size=3)) if data else []
        for count in counts:
            parser = ReasoningParser(reasoning)
            parser.push(tokenizer.decode(ids[:count]))
            assert tracker.at(mx.array([1, 2, *ids[:count]]))[0] == parser.phase, count

    check()


def reference(model: Any, tokenizer: Any, ids: list[int], budget: int, bias: float) -> list[int]:
    """Plain greedy decoding with a budget: a whole forward per id, marks found in the text."""
    closing, opening = tokenizer.encode("</think>"), tokenizer.encode("<think>")[0]
    began = 0 if tokenizer.decode(ids).endswith("<think>\n") else None
    answer: list[Any] = []
    while len(answer) < LENGTH:
        hidden = model(mx.array([[*ids, *answer]]), cache=model.make_cache())
        logits = model.logits(hidden)[0, -1]
        logits[opening] += bias
        if began is None and "<think>" in tokenizer.decode(answer):
            began = len(answer)
        is_over = began is not None and len(answer) == began + budget
        if is_over and "</think>" not in tokenizer.decode(answer[began:]):
            answer += closing
            continue
        answer.append(mx.argmax(logits).tolist())
    return answer[:LENGTH]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_mtp(vocab_size=VOCAB)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("budget", [0, pytest.param(1, marks=pytest.mark.soak), 7, 1000])
@pytest.mark.parametrize(
    ("prompt", "bias"), [(f"{'<think>ab</think>c' * 2}<think>\n", 0.0), ("hi", 9.0)]
)
def test_speculation_with_a_budget_equals_plain_and_the_reference(
    model, single, budget, prompt, bias
):
    tokenizer = reasoning_tokenizer(single=single)
    ids = tokenizer.encode(prompt)
    ways: Any = {"max_tokens": LENGTH, "thinking_budget": budget}
    ways["sampling"] = Sampling(logit_bias={tokenizer.encode("<think>")[0]: bias})
    answers = [
        [r.token for r in stream_generate(model, tokenizer, ids, layout=layout, **ways)]
        for layout in ("plain", "linear", "quadratic", "auto")
    ]
    assert answers == [reference(model, tokenizer, ids, budget, bias)] * 4


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("layout", ["plain", "quadratic"])
@pytest.mark.parametrize("sampler", [None, mx.random.categorical])
def test_sampled_answers_keep_to_the_budget(model, single, layout, sampler):
    tokenizer = reasoning_tokenizer(single=single)
    how: Any = {"sampler": sampler} if sampler else {"sampling": Sampling(temp=2.0), "seed": 3}
    answer = stream_generate(
        model, tokenizer, "hi<think>\n", layout=layout, thinking_budget=5, max_tokens=20, **how
    )
    mx.random.seed(0)
    ids, closing = [response.token for response in answer], tokenizer.encode("</think>")
    assert EOS in ids[:5] or "</think>" in tokenizer.decode(ids[: 5 + len(closing)])


def test_answers_of_a_batch_have_a_budget_each(model):
    tokenizer = reasoning_tokenizer()
    prompts = [tokenizer.encode(text) for text in ("hi<think>\n", "hi", "yes<think>\n")]
    ways: Any = {"thinking_budget": 3, "max_tokens": 12}
    together = batch_generate(model, tokenizer, prompts, layout="quadratic", **ways).texts
    assert together == [generate(model, tokenizer, ids, layout="plain", **ways) for ids in prompts]
    assert [split_reasoning(INSIDE, text).content != "" for text in together] == [True, False, True]


def test_a_prompt_without_marks_has_no_budget(model):
    tokenizer = reasoning_tokenizer()
    prompt = chat_text(
        tokenizer,
        [{"role": "user", "content": "hi"}],
        template_config={"enable_thinking": False},
    )
    assert prompt.endswith("<think>\n\n</think>\n\n")
    ids = encode_prompt(tokenizer, prompt, add_special_tokens=False)
    ways: Any = {"max_tokens": 8, "layout": "quadratic"}
    plain, limited = (
        [r.token for r in stream_generate(model, tokenizer, ids, thinking_budget=budget, **ways)]
        for budget in (None, 0)
    )
    assert plain == limited


def test_the_template_gets_the_reasoning_of_the_history():
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
    ]
    assert "<assistant><think>hm</think>b<eos>" in chat_text(reasoning_tokenizer(), turns)
    assert "<assistant>b<eos>" in chat_text(byte_tokenizer(), turns)


def printed(capsys: Any, pieces: list[str], reasoning: Reasoning | None) -> str:
    printer = AnswerPrinter(AnswerWriter(Status("")), reasoning)
    for piece in pieces:
        printer.write(piece)
    printer.finish()
    return capsys.readouterr().out


def test_a_terminal_shows_reasoning_faintly_and_a_pipe_gets_the_text(capsys, monkeypatch):
    pieces = ["<thi", "nk>\nhm\x1b[2J", "\n</think>\n", "\nok"]
    assert printed(capsys, pieces, THINK) == "".join(pieces)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert printed(capsys, pieces, THINK) == "\x1b[2mhm\\x1b[2J\x1b[0m\n\nok"
    assert printed(capsys, ["ok", "\n"], THINK) == "ok\n"
    assert printed(capsys, ["<think>"], None) == "<think>"
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(capsys, pieces, THINK) == "hm\\x1b[2J\n\nok"


@pytest.fixture
def command(scripted: FakeModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command over the scripted loop; returns stdout and the call of the loop."""
    tokenizer = reasoning_tokenizer()
    monkeypatch.setattr("mlx_mtp.loading.load", lambda *_, **__: (scripted, tokenizer, {}))

    def run(*args: str, stdin: str | None = None) -> tuple[str, str, Any]:
        scripted.answers = [[*tokenizer.encode("hm</think>\n\nok"), EOS] for _ in range(2)]
        result = CliRunner().invoke(cli, list(args), input=stdin)
        assert result.exit_code == 0, result.output
        return result.stdout, tokenizer.decode(scripted.calls[-1].prompt), scripted.calls[-1]

    return run


def test_generate_has_options_for_reasoning(command):
    plain = ("generate", "--prompt", "hi", "--verbose", "False")
    out, prompt, call = command(*plain)
    assert out == "hm</think>\n\nok\n" and prompt.endswith("<think>\n")
    assert not vars(call).get("logits_processors")
    _, prompt, call = command(*plain, "--thinking-budget", "3")
    assert prompt.endswith("<think>\n") and len(call.logits_processors) == 1
    for off in (["--no-enable-thinking"], ["--chat-template-args", '{"enable_thinking": false}']):
        _, prompt, _ = command(*plain, *off)
        assert prompt.endswith("</think>\n\n")


def test_chat_keeps_reasoning_apart(command):
    out, prompt, call = command("chat", "--thinking-budget", "9", stdin="a\nb\n")
    assert out.count("hm</think>\n\nok\n") == 2
    sent = reasoning_tokenizer().decode([*call.cached, *call.prompt])
    assert "<assistant><think>hm</think>ok<eos>" in sent and prompt.endswith("<think>\n")
    assert len(call.logits_processors) == 1
