"""Conversations are made to fit strict chat templates, and only where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.text.chat_template import chat_text, lists_tools
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.fixtures_generate import byte_tokenizer

TOKENIZERS = {name: byte_tokenizer(template=text) for name, text in TEMPLATES.items()}
LENIENT = byte_tokenizer(
    template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
SYSTEM_FIRST = byte_tokenizer(
    template="{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
TAKE_TURNS = byte_tokenizer(
    template="{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def call(name: str, call_id: str = "call_1", arguments: Any = None) -> dict[str, Any]:
    function = {"name": name, "arguments": {"x": name * 2} if arguments is None else arguments}
    return {"id": call_id, "type": "function", "function": function}


CODEX = [say("system", "Brief."), say("system", "Rules."), say("user", "Place."), say("user", "hi")]
CLAUDE = [say("system", "Brief."), say("user", "hi"), say("system", "Note.")]


@pytest.mark.parametrize(
    ("tokenizer", "messages", "expected"),
    [
        (LENIENT, CODEX, "<system>Brief.<system>Rules.<user>Place.<user>hi<assistant>"),
        (SYSTEM_FIRST, CODEX, "<system>Brief.\n\nRules.<user>Place.<user>hi<assistant>"),
        (SYSTEM_FIRST, CLAUDE, "<system>Brief.\n\nNote.<user>hi<assistant>"),
        (TAKE_TURNS, CLAUDE[1:2] * 2, "<user>hi\n\nhi<assistant>"),
        (TAKE_TURNS, [say("assistant", "Hello"), say("user", "hi")],
         "<user><assistant>Hello<user>hi<assistant>"),
        (TOKENIZERS["gemma 3"], CODEX, "<bos><start_of_turn>user\nBrief.\n\nRules.\n\nPlace.\n\nhi"
         "<end_of_turn>\n<start_of_turn>model\n"),
        (TOKENIZERS["gemma 2"], CLAUDE[:2], "<bos><start_of_turn>user\nBrief.\n\nhi<end_of_turn>\n"
         "<start_of_turn>model\n"),
        (TOKENIZERS["no system"], CLAUDE[:2], "<user>Brief.\n\nhi<assistant>"),
        (TOKENIZERS["only the first system"], CLAUDE,
         "<system>Brief.\n\nNote.<user>hi<assistant>"),
        (TOKENIZERS["list contents"], CLAUDE, "<system>Brief.<user>hi<system>Note.<assistant>"),
    ],
)  # fmt: skip
def test_a_conversation_is_changed_as_little_as_the_template_needs(tokenizer, messages, expected):
    assert chat_text(tokenizer, messages) == expected


CALLS = [
    say("system", "Brief."), say("user", "hi"),
    say("assistant", None, tool_calls=[call("one"), call("two", "call_2")]),
    say("tool", "first", tool_call_id="call_1"), say("tool", "second", tool_call_id="call_2"),
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("more", [[], [say("user", "stop")], [say("assistant", "Done.")]])
def test_calls_and_results_reach_every_template(name, more):
    text = chat_text(TOKENIZERS[name], [*CALLS, *more])
    for each in ("Brief.", "hi", "one", "oneone", "two", "twotwo", "first", "second"):
        assert each in text
    assert "{'" not in text and not (more and more[0]["content"] not in text)


def test_parallel_calls_are_split_with_their_results_where_one_is_the_limit():
    text = chat_text(TOKENIZERS["llama 3"], CALLS)
    assert text == (
        '[system]Brief.[user]hi[assistant]{"name": "one", "parameters": {"x": "oneone"}}'
        '[ipython]"first"'
        '[assistant]{"name": "two", "parameters": {"x": "twotwo"}}[ipython]"second"[assistant]'
    )


def test_parallel_calls_are_split_where_the_template_renders_only_the_first():
    tokenizer = byte_tokenizer(
        template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function | tojson }}{% endif %}{% endfor %}<assistant>"
    )
    text = chat_text(tokenizer, CALLS)
    places = [text.index(each) for each in ("oneone", "first", "twotwo", "second")]
    assert places == sorted(places)


def test_ids_of_calls_are_shortened_for_mistral():
    text = chat_text(TOKENIZERS["mistral 7b"], CALLS)
    assert '"id": "' in text and "call_1" not in text and "[TOOL_RESULTS] first" in text
    assert text.startswith("<s>[INST] Brief.\n\nhi[/INST]"), "the template drops it after a result"


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("name", ["text arguments", "printed arguments", "llama 3", "qwen 3.5"])
def test_arguments_have_the_form_that_the_template_expects(name, arguments):
    calls = [call("one", arguments=arguments)]
    messages = [say("user", "hi"), say("assistant", "", tool_calls=calls), say("tool", "ok")]
    text = chat_text(TOKENIZERS[name], messages)
    assert ("<parameter=x>\n1\n" if name == "qwen 3.5" else '{"x": 1}') in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_contents_may_be_text_or_parts(name):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = chat_text(TOKENIZERS[name], [say("user", parts)])
    assert text == chat_text(TOKENIZERS[name], [say("user", "ab")]) and "ab" in text


def test_templates_that_list_tools_are_recognised():
    listing = {name for name, tokenizer in TOKENIZERS.items() if lists_tools(tokenizer)}
    assert listing == {"mistral 7b", "ministral 3", "qwen 3.5", "llama 3"}


def test_the_first_refusal_is_reported_where_nothing_helps():
    tokenizer = byte_tokenizer(template="{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(ValueError, match="refuses the conversation: no system"):
        chat_text(tokenizer, CODEX)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """Messages in any order, with calls that have results, each text of its own."""
    messages: list[dict[str, Any]] = []
    for at, kind in enumerate(draw(st.lists(st.sampled_from("sduac"), min_size=1, max_size=8))):
        text = draw(st.sampled_from(["", f"text{at}", f" text{at}\n"]))
        if kind != "c":
            role = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}[kind]
            messages.append(say(role, text))
            continue
        calls = [
            call(f"fn{at}{n}", f"id{at}{n}", {"k": [at]})
            for n in range(draw(st.sampled_from([1, 2])))
        ]
        messages.append(say("assistant", text or None, tool_calls=calls))
        messages += [say("tool", f"result{at}", tool_call_id=each["id"]) for each in calls]
    return messages


def check_rendered(messages: list[dict[str, Any]], name: str) -> None:
    text = chat_text(TOKENIZERS[name], messages)
    calls = [each for message in messages for each in message.get("tool_calls") or ()]
    assert all(each["function"]["name"] in text for each in calls)
    for message in messages:
        # Some templates leave out what the assistant writes before its calls.
        if not calls or message["role"] != "assistant":
            assert (message["content"] or "").strip() in text


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(conversations(), st.sampled_from(sorted(TEMPLATES)))
def test_every_message_of_any_conversation_is_rendered(messages, name):
    check_rendered(messages, name)


@pytest.mark.soak
@settings(max_examples=3000, deadline=None, database=None)
@given(conversations(), st.sampled_from(sorted(TEMPLATES)))
def test_every_message_of_many_conversations_is_rendered(messages, name):
    check_rendered(messages, name)
