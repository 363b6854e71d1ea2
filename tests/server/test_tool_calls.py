"""Tool calls are found wherever they are, in every format that mlx-lm knows."""

from __future__ import annotations

import importlib
import json
import pkgutil
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx_lm.tool_parsers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.apps.engine import tool_calls
from mlx_mtp.apps.engine.tool_calls import GENERIC, ToolCallReader, reads_tools
from mlx_mtp.text.tool_prompt import as_object, with_tools
from tests.helpers.chat_templates import LLAMA_3, MINISTRAL_3, QWEN_35, TEMPLATES
from tests.helpers.fixtures_generate import byte_tokenizer

Calls = list[tuple[str, dict[str, Any]]]
_PAIR = "w\n<{0}arg_key>t</{0}arg_key>\n<{0}arg_value>{1}</{0}arg_value>\n"
_XML = '<{0}invoke name="w">\n<{0}parameter name="t">{1}</{0}parameter>\n</{0}invoke>'
_K3 = '<|open|>call tool="w" index="1"<|sep|>{}<|close|>call<|sep|>'
# Calls of the function w with the text t, without the outer marks.
FORMATS = {
    "json_tools": ['\n{"name": "w", "arguments": {"t": "%s"}}\n',
                   '{"name":"w","parameters":{"t":"%s"}}',
                   '{"type": "function", "function": {"name": "w", "arguments": {"t": "%s"}}}'],
    "mistral": [' [{"name": "w", "arguments": {"t": "%s"}, "id": "123456789"}]',
                'w[ARGS]{"t": "%s"}', 'w[CALL_ID]abcdefghi[ARGS]{"t": "%s"}'],
    "kimi_k2": ['<|tool_call_begin|>functions.w:0<|tool_call_argument_begin|>{"t": "%s"}'
                "<|tool_call_end|>"],
    "kimi_k3": [_K3.format('<|open|>argument key="t" type="string"<|sep|>%s'
                           "<|close|>argument<|sep|>"),
                _K3.format('<|open|>json type="object"<|sep|>{"t": "%s"}<|close|>json<|sep|>')],
    "qwen3_coder": ["\n<function=w>\n<parameter=t>\n%s\n</parameter>\n</function>\n"],
    "glm47": [_PAIR.format("", "%s"), '\n{"name": "w", "arguments": {"t": "%s"}}'],
    "laguna": [_PAIR.format("", "%s")],
    "longcat": [_PAIR.format("longcat_", "%s"), '{"name": "w", "arguments": {"t": "%s"}}'],
    "minimax_m2": ["\n" + _XML.format("", "%s") + "\n"],
    "muse_spark": ["\n" + _XML.format("atem:", "%s") + "\n"],
    "function_gemma": ["call:w{t:<escape>%s<escape>}"],
    "gemma4": ['call:w{t:<|"|>%s<|"|>}'],
    "pythonic": ['[w(t="%s")]'],
    "minicpm5": ['"w"><param name="t"><![CDATA[%s]]></param>'],
}  # fmt: skip
PARAMETERS = {"type": "object", "properties": {"t": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": PARAMETERS}}]


def marks(name: str) -> Any:
    """The format of a parser of mlx-lm, as a tokenizer has it."""
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return SimpleNamespace(
        tool_call_start=parser.tool_call_start, tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
    )  # fmt: skip


def read(form: Any, *pieces: str, tools: Any = TOOLS) -> tuple[str, Calls]:
    reader = ToolCallReader(form, list(tools))
    text = "".join(reader.push(piece) for piece in pieces) + reader.finish()
    return text, [(call["name"], json.loads(call["arguments"])) for call in reader.calls]


def examples() -> Any:
    return [(name, form, body) for name, bodies in FORMATS.items()
            for form in [marks(name)] for body in bodies]  # fmt: skip


def test_every_parser_of_mlx_lm_is_covered():
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)}
    assert names == FORMATS.keys()


@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "no tools"])
@pytest.mark.parametrize(("name", "form", "body"), examples())
def test_a_call_is_found_wherever_it_is(name, form, body, tools):
    start, end = form.tool_call_start, form.tool_call_end
    for value in ("hi", "a } b { c", f"x {end} y", f"x {start} y", f"{end}", "(b) [c] 'd"):
        call = start + body % value + end
        one = [("w", {"t": value})]
        for text, shown, calls in (
            (call, "", one),
            (f"A {start} may help. {call}", f"A {start} may help. ", one),
            (f"{call}\n{call}\n", "", one * 2),
            (f"\n\n{call}", "", one),
            (f"Now: {call} bye", "Now:  bye", one),
        ):
            assert read(form, text, tools=tools) == (shown, calls), (name, text)
            assert read(form, *text, tools=tools) == (shown, calls), (name, text)


@pytest.mark.parametrize(("name", "form", "body"), examples())
def test_a_call_that_is_cut_off_stays_text(name, form, body):
    call = form.tool_call_start + body % "hi"
    cut = call[: call.index("hi") + 1]
    assert read(form, cut) == (cut, [])
    assert read(form, *cut) == (cut, [])


NO_ARGUMENTS = {
    "json_tools": '{"name": "w"}', "mistral": "w[ARGS]{}",
    "qwen3_coder": "<function=w>\n</function>",
    "kimi_k2": "<|tool_call_begin|>functions.w:0<|tool_call_argument_begin|><|tool_call_end|>",
    "kimi_k3": _K3.format(""), "glm47": "w\n", "laguna": "w", "longcat": "w",
    "minimax_m2": '<invoke name="w"></invoke>', "gemma4": "call:w{}", "function_gemma": "call:w{}",
    "muse_spark": '<atem:invoke name="w"></atem:invoke>', "pythonic": "[w()]", "minicpm5": '"w">',
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_calls_without_arguments_have_an_empty_object(name):
    form = marks(name)
    text = form.tool_call_start + NO_ARGUMENTS[name] + form.tool_call_end
    bare = [{"type": "function", "function": {"name": "w"}}]
    assert read(form, text, tools=bare) == ("", [("w", {})])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "w", "arguments": ""}', {}),
        ('{"name": "w", "arguments": "null"}', {}),
        ('{"name": "w", "arguments": null}', {}),
        ('{"name": "w", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "w", "arguments": [1]}', {"arguments": [1]}),
        ('{"name": "w", "arguments": "[1]"}', {"arguments": [1]}),
        ('{"name": "w", "parameters": {"a": 1}}', {"a": 1}),
        ('{"name": "w", "a": 1}', {"a": 1}),
        ('{"name": "w", "arguments": {"a": NaN, "b": "\\ud800"}}', {"a": None, "b": "\ufffd"}),
        ('{"name": "w", "arguments": {"a": "line\nbreak"}}', {"a": "line\nbreak"}),
    ],
)
def test_arguments_are_always_an_object(text, expected):
    assert read(GENERIC, f"<tool_call>{text}</tool_call>") == ("", [("w", expected)])


def test_surplus_braces_before_the_closing_mark_are_no_text():
    assert read(GENERIC, *'<tool_call>{"name": "w"}}\n</tool_call>') == ("", [("w", {})])
    assert read(GENERIC, *'<tool_call>{"name": "w"} } so') == (" } so", [("w", {})])


def test_arguments_that_are_nested_too_deep_become_text():
    deep = '{"a": ' * 200 + "1" + "}" * 200
    assert as_object(deep) == {"arguments": deep}


def test_nested_objects_of_gemma_are_parsed():
    text = "call:w{a:{b:<escape>x } y<escape>,c:[1,2]},d:true}"
    form = marks("function_gemma")
    assert read(form, form.tool_call_start + text + form.tool_call_end) == (
        "", [("w", {"a": {"b": "x } y", "c": [1, 2]}, "d": True})],
    )  # fmt: skip


def test_bare_calls_of_known_functions_are_read_without_marks():
    call = '{"name": "w", "parameters": {"t": "a"}}'
    assert read(GENERIC, call) == ("", [("w", {"t": "a"})])
    assert read(GENERIC, *f"<|python_tag|>{call}; {call}") == ("", [("w", {"t": "a"})] * 2)
    for text in (call.replace('"w"', '"v"'), f"Like {call}", '{"name": "w"', '{"a": 1}'):
        assert read(GENERIC, *text) == (text, [])
    assert read(GENERIC, call, tools=[]) == (call, [])


@st.composite
def cut_texts(draw: Any) -> tuple[Any, list[str]]:
    """A format, and a text of marks, calls and parts of them in pieces."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    form = marks(name)
    bodies = [body % value for body in FORMATS[name] for value in ("v", form.tool_call_end)]
    parts = [form.tool_call_start, form.tool_call_end, " ", "\n", "word", "{", '"', "</", *bodies]
    parts += [form.tool_call_start + body + form.tool_call_end for body in bodies]
    text = "".join(draw(st.lists(st.sampled_from(parts), max_size=8)))
    text = text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return form, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def check_pieces(case: tuple[Any, list[str]]) -> None:
    form, pieces = case
    whole = "".join(pieces)
    for tools, limit in ((TOOLS, 1024), ([], 1024), (TOOLS, 8)):
        expected = read(form, whole, tools=tools)
        with patch.object(tool_calls, "_MAX_RETRIED", limit):
            assert read(form, *pieces, tools=tools) == expected == read(form, *whole, tools=tools)
        assert len(expected[0]) + len(expected[1]) <= len(whole)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(cut_texts())
def test_pieces_make_no_difference(case):
    check_pieces(case)


@pytest.mark.soak
@settings(max_examples=5000, deadline=None, database=None)
@given(cut_texts())
def test_pieces_make_no_difference_in_many_texts(case):
    check_pieces(case)


def test_tools_are_passed_to_templates_whose_calls_can_be_read():
    for template, expected in (
        (LLAMA_3, True),  # bare JSON
        (QWEN_35, False),  # XML, and no parser
        (MINISTRAL_3, False),
        (TEMPLATES["smollm 2"], False),
    ):
        assert reads_tools(byte_tokenizer(template=template)) is expected


def test_tools_calls_and_results_are_text_where_the_template_has_none():
    call = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"t": "é"}'}}
    messages = [
        {"role": "system", "content": "Brief."},
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        *({"role": "tool", "content": text, "tool_call_id": "c"} for text in "ab"),
    ]
    system, answer, results = with_tools(messages, TOOLS)
    assert system["content"].startswith("Brief.\n\n# Tools") and '"name": "w"' in system["content"]
    assert read(GENERIC, answer["content"]) == ("Well.\n", [("w", {"t": "é"})])
    assert results["role"] == "user" and results["content"].count("<tool_response>") == 2
    assert with_tools(messages[1:], TOOLS)[0]["role"] == "system"
