"""The few edits that turn Metal text into C++, one rule a function; line numbers stay.

Two targets.  `host`: g++ or clang++, where address spaces are erased, so definitions that differ
in nothing else become one.  `gate`: clang's "C++ for OpenCL", which knows address spaces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .tokens import Tokens

Target = Literal["host", "gate"]
ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
SPECIFIERS = {"const", "constexpr", "static", "inline", "volatile"}
BARE_FLOAT = re.compile(r"(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+")
FUNCTION_CONSTANT = re.compile(r"\[\[\s*function_constant\s*\(\s*(\d+)")


@dataclass(frozen=True)
class Rewritten:
    """C++ text, and the function constants in it as (id, name)."""

    text: str
    function_constants: tuple[tuple[int, str], ...]


def rewrite(text: str, *, target: Target = "host") -> Rewritten:
    """Preprocessed Metal text as C++ for the target."""
    tokens = Tokens(text)
    threadgroup_variables(tokens)
    if target == "host":
        merge_methods(tokens)
        merge_templates(tokens)
    else:
        loosen_constructors(tokens)
    constants = function_constants(tokens, target=target)
    suffix_floats(tokens)
    if target == "host":
        constant_to_const(tokens)
    else:
        constant_needs_const(tokens)
    return Rewritten(tokens.source(), tuple(constants))


# ---- threadgroup variables: `threadgroup float a[8];` → a reference to the runtime's memory ----


def threadgroup_variables(tokens: Tokens) -> None:
    number, i = 0, 0
    while i < len(tokens):
        starts = tokens.step(i, -1) < 0 or tokens.text(tokens.step(i, -1)) in (";", "{", "}")
        if tokens.items[i] == ("word", "threadgroup") and starts:
            end, declarators = _declarators(tokens, i)
            if declarators:
                lines = _references(declarators, number)
                number += len(declarators)
                tokens.replace(i, end + 1, " ".join(lines))
        i += 1


def _declarators(tokens: Tokens, start: int) -> tuple[int, list[list[str]]]:
    """Where the statement ends, and its declarators; none for a pointer or a function."""
    i, depth, angle = tokens.step(start), 0, 0
    declarators: list[list[str]] = [[]]
    while True:
        text = tokens.text(i)
        if text == ";" and depth == 0:
            return i, declarators
        if text == "" or (text in ("{", "}") and depth == 0):
            return i, []
        depth += (text in ("(", "[")) - (text in (")", "]"))
        if depth == 0:
            angle += (text == "<") - (text == ">") - 2 * (text == ">>")
        outside = depth == 0 and angle <= 0
        if (outside and text in ("*", "&", "=")) or (text == "(" and angle <= 0 and depth == 1):
            return i, []
        if outside and text == ",":
            declarators.append([])
        else:
            declarators[-1].append(text)
        i = tokens.step(i)


def _references(declarators: list[list[str]], number: int) -> list[str]:
    """One reference a declarator; the first one carries the type before its name."""

    def split(words: list[str]) -> tuple[list[str], str]:
        end = words.index("[") if "[" in words else len(words)
        return words[:end], " ".join(words[end:]).replace("[", "[(").replace("]", ")]")

    kind = " ".join(split(declarators[0])[0][:-1])
    lines = []
    for i, words in enumerate(declarators, number + 1):
        names, dimensions = split(words)
        name = names[-1]
        place = f"::msl::threadgroup_variable<{kind}{dimensions}, {i}>"
        lines.append(f'auto& {name} = {place}("{name}");')
    return lines


# ---- member functions qualified with an address space: `void f() const threadgroup { }` ----


@dataclass(frozen=True)
class _Method:
    at: int  # the address space after the parameters
    space: str
    start: int
    key: str  # the declaration without address spaces


def _declaration_start(tokens: Tokens, i: int) -> int:
    while True:
        before = tokens.step(i, -1)
        text = tokens.text(before)
        label = text == ":" and tokens.text(tokens.step(before, -1)) in (
            "public",
            "private",
            "protected",
        )
        if before < 0 or text in (";", "{", "}") or label:
            return i
        i = before


def _methods(tokens: Tokens) -> list[_Method]:
    found = []
    for i, (kind, text) in enumerate(tokens.items):
        if kind != "word" or text not in ADDRESS_SPACES:
            continue
        before, qualifiers = tokens.step(i, -1), ""
        while tokens.text(before) in ("const", "volatile"):
            qualifiers += tokens.text(before)
            before = tokens.step(before, -1)
        follows = tokens.text(tokens.step(i)) in ("{", ":", ";", "noexcept", "->", "=")
        if tokens.text(before) == ")" and follows:
            start = _declaration_start(tokens, tokens.step(tokens.match(before), -1))
            words = tokens.visible(start, before)
            key = " ".join(word for word in words if word not in ADDRESS_SPACES)
            found.append(_Method(i, text, start, key + qualifiers))
    return found


def _body_end(tokens: Tokens, i: int) -> int:
    """The last token of the definition whose qualifier stands at i."""
    i = tokens.step(i)
    if tokens.text(i) == ":":  # initialisers: the body's brace follows a bracket that closes
        while not (tokens.text(i) == "{" and tokens.text(tokens.step(i, -1)) in (")", "}")):
            i = tokens.match(i) + 1 if tokens.text(i) in ("(", "[", "{") else i + 1
    while tokens.text(i) not in ("{", ";"):
        i = tokens.step(i)
    if tokens.text(i) == "{":
        i = tokens.match(i)
        after = tokens.step(i)
        return after if tokens.text(after) == ";" else i
    return i


def merge_methods(tokens: Tokens) -> None:
    """Of methods that differ only in address space keep one, the `thread` one where there is."""
    methods = _methods(tokens)
    kept: dict[str, _Method] = {}
    for method in methods:
        known = kept.get(method.key)
        if known is None or (method.space == "thread" and known.space != "thread"):
            kept[method.key] = method
    for method in reversed(methods):
        if kept[method.key] is method or method.space == "thread":
            tokens.blank(method.at)
        else:
            tokens.replace(method.start, _body_end(tokens, method.at) + 1, "")


def loosen_constructors(tokens: Tokens) -> None:
    """OpenCL builds temporaries in its generic space: constructors must not ask for `thread`."""
    leading = {"constexpr", "inline", "explicit", "METAL_FUNC"}
    for method in _methods(tokens):
        start = method.start
        if tokens.text(start) == "template":
            start = tokens.match(tokens.step(start)) + 1
        words = [word for word in tokens.visible(start, method.at) if word not in leading]
        if method.space == "thread" and words[1:2] == ["("]:
            tokens.blank(method.at)


def merge_templates(tokens: Tokens) -> None:
    """Of templates that differ only in address spaces keep the first."""
    seen: dict[str, str] = {}
    i = 0
    while i < len(tokens):
        if tokens.text(i) == "template" and tokens.text(tokens.step(i)) == "<":
            _merge_template(tokens, i, seen)
        i += 1


def _merge_template(tokens: Tokens, start: int, seen: dict[str, str]) -> None:
    head = tokens.step(tokens.match(tokens.step(start)))
    i, depth = head, 0
    while tokens.text(i) not in ("{", ";", "", "=") or depth:
        depth += (tokens.text(i) == "(") - (tokens.text(i) == ")")
        i = tokens.step(i)
    words = tokens.visible(start, i)
    exact = " ".join(words)
    erased = " ".join(word for word in words if word not in ADDRESS_SPACES)
    if tokens.text(i) != "{" or exact == erased:
        return
    end = tokens.match(i)
    if tokens.text(head) in ("struct", "class"):
        end = tokens.step(end)
    if seen.setdefault(erased, exact) != exact:
        tokens.replace(start, end + 1, "")


# ---- constants ----


def function_constants(tokens: Tokens, *, target: Target) -> list[tuple[int, str]]:
    """`constant int n [[function_constant(3)]];` becomes a variable that the host can set."""
    found = []
    for i in range(len(tokens)):
        match = FUNCTION_CONSTANT.match(tokens.text(i)) if tokens.kind(i) == "attribute" else None
        if not match:
            continue
        j = tokens.step(i, -1)
        found.append((int(match.group(1)), tokens.text(j)))
        while j >= 0 and tokens.text(j) not in (";", "}"):
            if tokens.text(j) in ("constant", "const", "constexpr", "static"):
                extern = target == "gate" and tokens.text(j) == "constant"
                tokens.items[j] = ("word", "extern const constant") if extern else ("space", " ")
            j = tokens.step(j, -1)
    return found


def suffix_floats(tokens: Tokens) -> None:
    """A floating literal without a suffix is a float in Metal."""
    for i, (kind, text) in enumerate(tokens.items):
        if kind == "number" and BARE_FLOAT.fullmatch(text):
            tokens.items[i] = (kind, text + "f")


def _is_const(tokens: Tokens, i: int) -> bool:
    """Whether `const` stands among the specifiers around the `constant` at i."""
    words = set()
    for direction in (-1, 1):
        j = tokens.step(i, direction)
        while tokens.text(j) in SPECIFIERS:
            words.add(tokens.text(j))
            j = tokens.step(j, direction)
    return "const" in words


def constant_to_const(tokens: Tokens) -> None:
    for i, item in enumerate(tokens.items):
        if item == ("word", "constant"):
            tokens.items[i] = ("space", " ") if _is_const(tokens, i) else ("word", "const")


def constant_needs_const(tokens: Tokens) -> None:
    for i, item in enumerate(tokens.items):
        after_bracket = tokens.text(tokens.step(i, -1)) == ")"
        if item == ("word", "constant") and not _is_const(tokens, i) and not after_bracket:
            tokens.items[i] = ("word", "const constant")
