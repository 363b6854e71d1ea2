"""The static gate: is this text Metal, as far as can be known without Metal's compiler?

clang compiles it as "C++ for OpenCL 2021", whose address spaces and restrictions are Metal's; what
clang allows and Metal does not is found in the tokens and in clang's syntax tree.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import toolchain
from .compiler import preprocess
from .rewriter import rewrite
from .tokens import Tokens

FLAGS = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", "x86_64", "-w"),
    *("-fsyntax-only", "-ferror-limit=20", "-fno-color-diagnostics"),
]
BANNED = {
    *("goto", "new", "delete", "virtual", "try", "catch", "throw", "dynamic_cast", "typeid"),
    *("thread_local", "register", "double", "asm", "std", "printf", "mutable"),
}
NOT_VARIABLES = {
    *("using", "typedef", "template", "struct", "class", "enum", "union", "namespace", "extern"),
    *("constant", "constexpr", "static_assert", "friend", "operator"),
}
LOCATION = re.compile(r"[< ]([^<> ,:]*\.(?:metal|h)):(\d+)")
DECLARATION = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl) 0x\w+ (?:prev 0x\w+ )?<[^>]*>.*? "
    r"(?P<name>\w+) '(?P<type>[^']*)'"
)
UNQUALIFIED = re.compile(r"__generic [^*&]*[*&]")


def check(
    source: str,
    *,
    instantiate: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
) -> list[str]:
    """What is wrong, one `RULE: text at file:line` each; nothing for valid text.

    instantiate: kernel templates to compile, such as `affine_qmv<half, 64, 4, false>`.  Raises
    MslError where no clang of version 15 or newer is installed (`toolchain.find_clang`)."""
    text = preprocess(source, include=include, defines=defines)
    found = [*_words(text), *_variables(text), *_threadgroup_variables(text)]
    return [*found, *_clang(text, instantiate)]


def _places(text: str) -> tuple[Tokens, list[str]]:
    """Tokens, and `file:line` of each, by the preprocessor's line markers."""
    tokens, places = Tokens(text), []
    name, line = "kernel.metal", 1
    for kind, item in tokens.items:
        places.append(f"{name}:{line}")
        marker = re.match(r'# (\d+) "([^"]*)"', item) if kind == "line" else None
        if marker:
            name, line = marker.group(2).rsplit("/", 1)[-1], int(marker.group(1)) - 1
        line += item.count("\n")
    return tokens, places


def _words(text: str) -> Iterator[str]:
    tokens, places = _places(text)
    for i, (kind, word) in enumerate(tokens.items):
        if kind == "word" and word in BANNED:
            deleted = word == "delete" and tokens.text(tokens.step(i, -1)) == "="
            if not deleted:
                yield f"BANNED: '{word}' at {places[i]}"


def _statement(tokens: Tokens, start: int) -> tuple[int, list[str]]:
    """The token that ends the statement at start (`;`, `{`, `=` or `(`), and the words before."""
    i, words = start, []
    while i < len(tokens) and tokens.text(i) not in (";", "{", "}", "=", "("):
        words += [tokens.text(i)] if tokens.kind(i) == "word" else []
        i = tokens.step(i)
    return i, words


def _variables(text: str) -> Iterator[str]:
    """Static locals and program-scope variables that are not constant."""
    tokens, places = _places(text)
    depth = 0  # of braces that are not a namespace's
    i = tokens.step(-1)
    starts = True
    while i < len(tokens):
        item = tokens.text(i)
        if starts and (item == "static" or (depth == 0 and tokens.kind(i) == "word")):
            end, words = _statement(tokens, i)
            variable = tokens.text(end) in (";", "=") and len(words) > 1
            if variable and not {*words} & (NOT_VARIABLES | {"const"}):
                yield f"GLOBAL: '{words[-1]}' keeps its value at {places[i]}"
            if words[:1] == ["namespace"] and tokens.text(end) == "{":
                i = tokens.step(end)
                continue
        depth += (item == "{") - (item == "}")
        depth = max(depth, 0)  # the end of a namespace
        starts = item in (";", "{", "}", ">") or tokens.kind(i) == "attribute"
        i = tokens.step(i)


def _threadgroup_variables(text: str) -> Iterator[str]:
    """Threadgroup variables that are not declared at the top of a kernel."""
    tokens, places = _places(text)
    open_braces: list[int] = []
    for i, (_, item) in enumerate(tokens.items):
        if item == "{":
            open_braces.append(i)
        elif item == "}" and open_braces:
            open_braces.pop()
        if item != "threadgroup" or tokens.text(tokens.step(i, -1)) not in (";", "{", "}"):
            continue
        end, _ = _statement(tokens, i)
        is_pointer = {"*", "&"} & set(tokens.visible(i, end)) or tokens.text(end) == "("
        if not is_pointer and not (open_braces and _opens_kernel(tokens, open_braces[-1])):
            yield f"THREADGROUP: a variable outside the top level of a kernel at {places[i]}"


def _opens_kernel(tokens: Tokens, brace: int) -> bool:
    i = tokens.step(brace, -1)
    if tokens.text(i) != ")":
        return False
    i = tokens.match(i)
    while i >= 0 and tokens.text(i) not in (";", "}", "{"):
        if tokens.text(i) == "kernel" or re.match(r"\[\[.*\bkernel\b", tokens.text(i)):
            return True
        i = tokens.step(i, -1)
    return False


def _clang(text: str, instantiate: Sequence[str]) -> Iterator[str]:
    body = '#include "gate.h"\n# 1 "kernel.metal"\n' + rewrite(text, target="gate").text
    body += "".join(f"template decltype({name}) {name};\n" for name in instantiate)
    command = [toolchain.clang(), *FLAGS, "-I", str(toolchain.HERE / "gate_include")]
    tree = ["-Xclang", "-ast-dump", "-"]
    done = subprocess.run([*command, *tree], input=body, capture_output=True, text=True)
    for line in done.stderr.split("\n"):
        if "error: " in line:
            place, _, what = line.partition(" error: ")
            file, number, *_ = [*place.rsplit("/", 1)[-1].split(":"), ""]
            yield f"COMPILE: {what} at {file}:{number}"
    yield from _unqualified(done.stdout)


def _unqualified(tree: str) -> Iterator[str]:
    """Pointers and references without an address space: clang makes them generic, Metal refuses."""
    file, line, seen, implicit = "", "", set(), -1
    for text in tree.split("\n"):
        places = LOCATION.findall(text)
        if places:
            file, line = places[-1]
        elif number := re.search(r"<line:(\d+)", text):
            line = number.group(1)
        depth = len(text) - len(text.lstrip(" |`-"))
        if depth <= implicit:
            implicit = -1
        if "implicit" in text and implicit < 0:
            implicit = (
                depth  # what lies deeper, nobody wrote: parameters of a copy constructor, say
            )
        match = DECLARATION.search(text)
        if not match or implicit >= 0 or "gate" in file or not file:
            continue
        kind = match.group("type")
        function = "(" in kind or "&&" in kind
        if UNQUALIFIED.search(kind) and not function and match.group("name") not in seen:
            seen.add(match.group("name"))
            place = f"{file.rsplit('/', 1)[-1]}:{line}"
            yield f"ADDRESS-SPACE: '{match.group('name')}' has none ({kind}) at {place}"
