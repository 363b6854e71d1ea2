"""Metal text → shared library, kept by everything that it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import toolchain
from .counting import instrument
from .errors import MslError
from .rewriter import rewrite
from .signature import Kind, Parameter, Signature, read_signature

METAL_VERSION = 310
METAL_HEADERS = [
    *("metal_stdlib", "metal_types", "metal_math", "metal_common", "metal_integer", "metal_limits"),
    *("metal_atomic", "metal_compute", "metal_simdgroup", "metal_simdgroup_matrix"),
    *("metal_quadgroup", "metal_geometric", "metal_relational", "metal_pack", "metal_logging"),
    *("metal_type_traits", "metal_array", "metal_numeric"),
]
CHECKS = ["-fsanitize=thread", "-fsanitize=bounds,alignment,integer-divide-by-zero"]
COMMON = [
    *("-std=c++17", "-fPIC", "-w", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"),
    *("-fno-strict-aliasing",),  # kernels read buffers through pointers of other types
]
FLAGS = {
    "fast": ["-O2", "-ffp-contract=off"],
    "check": ["-O1", "-gdwarf-4", "-ffp-contract=off", *CHECKS],
    "check0": ["-O0", "-gdwarf-4", "-ffp-contract=off", *CHECKS],
    # What a GPU would run, roughly: scalar code, a * b + c contracted within an expression.
    "count": [
        *("-O2", "-ffp-contract=on", "-fno-vectorize", "-fno-slp-vectorize"),
        *("-mllvm", "-unroll-runtime=false", "-mllvm", "-disable-vector-combine", "-DMSL_COUNT=1"),
    ],
}


@dataclass(frozen=True)
class Program:
    """A compiled kernel; blocks: what one run of each of its basic blocks costs (mode count)."""

    library: Path
    signature: Signature
    function_constants: tuple[tuple[int, str], ...]
    blocks: tuple[dict[str, int], ...]


def _stubs() -> Path:
    """Empty headers of Metal's names: the real ones come in with msl.h after preprocessing."""
    folder = toolchain.cache_folder() / "stubs"
    folder.mkdir(exist_ok=True)
    for name in METAL_HEADERS:
        if not (folder / name).exists():
            (folder / name).write_text("")
    return folder


def preprocess(
    source: str, *, include: Iterable[str | Path] = (), defines: Iterable[str] = ()
) -> str:
    """The text with its includes, macros replaced, line numbers of the source kept."""
    folders = [word for folder in [_stubs(), *include] for word in ("-I", folder)]
    words = [f"-D{name}" for name in (f"__METAL_VERSION__={METAL_VERSION}", *defines)]
    compiler = toolchain.cxx()
    command = [compiler, "-E", "-x", "c++", "-undef", "-nostdinc", "-w", "-D__METAL__=1"]
    text = toolchain.run([*command, *folders, *words, "-"], text=source)
    # Without their flags (entering, returning) the markers read the same to every debugger.
    markers = re.compile(r'^(# \d+ "[^"\n]*").*$', re.M)
    return markers.sub(r"\1", text).replace('"<stdin>"', '"kernel.metal"')


def _compiler(mode: str) -> list[str]:
    compiler = toolchain.clang() if mode == "count" else toolchain.cxx()
    half = "-fexcess-precision=16"  # every operation on half rounds to half
    if not toolchain.is_gcc(compiler):
        half = "-ffloat16-excess-precision=none"
    words = [compiler, *COMMON, *FLAGS[mode], *toolchain.cpu_flags(), "-I"]
    words.append(str(toolchain.HERE / "include"))
    if toolchain.is_gcc(compiler):
        return [*words, half]
    words += ["-Xclang", half]
    if "-fsanitize=thread" in words:  # clang leaves out a load that a store of the same follows
        words += ["-mllvm", "-tsan-instrument-read-before-write"]
    return words


def _unit(text: str, name: str, signature: Signature, constants: Iterable[tuple[int, str]]) -> str:
    """The C++ file: the library, the kernel, and the two functions that the host calls."""
    table = ", ".join(f"{{{p.kind}, {p.index}}}" for p in signature.parameters)
    cases = "".join(
        f" case {number}: __builtin_memcpy((void*)&{variable}, value, sizeof({variable})); break;"
        for number, variable in constants
    )
    return f"""#include "msl.h"
{text}
extern "C" void msl_entry(void* const* buffers) {{
  static const ::msl::parameter parameters[] = {{ {table} }};
  ::msl::invoke(&{name}, parameters, buffers);
}}
extern "C" void msl_set_constant(int number, const void* value) {{ switch (number) {{{cases} }} }}
"""


def _key(parts: Sequence[str]) -> str:
    headers = sorted((toolchain.HERE / "include").glob("*.h"))
    headers.append(toolchain.HERE / "runtime/abi.h")
    own = [toolchain.HERE / f"{name}.py" for name in ("rewriter", "tokens", "signature")]
    own += [toolchain.HERE / f"{name}.py" for name in ("compiler", "counting")]
    texts = [path.read_text() for path in [*headers, *own]]
    return hashlib.sha256("\0".join([*parts, *texts]).encode()).hexdigest()[:24]


def build(
    source: str,
    name: str,
    template_args: str = "",
    *,
    mode: str = "fast",
    defines: Sequence[str] = (),
    include: Sequence[str | Path] = (),
) -> Program:
    """Compile, or take from the cache.  MslError where the text is not valid."""
    if mode not in FLAGS:
        raise ValueError(f"mode must be one of {sorted(FLAGS)}, not {mode!r}")
    text = preprocess(source, include=include, defines=defines)
    command = _compiler(mode)
    version = toolchain.version_of(command[0])
    key = _key([text, name, template_args, mode, version, sys.platform, *command])
    library = toolchain.cache_folder() / f"{name}-{key}.so"
    facts = library.with_suffix(".json")
    if not facts.exists():
        _compile(text, name, template_args, command, library)
    return _read_facts(library, json.loads(facts.read_text()))


def _compile(text: str, name: str, args: str, command: list[str], library: Path) -> None:
    signature = read_signature(text, name)
    rewritten = rewrite(text)
    unit = _unit(rewritten.text, name + args, signature, rewritten.function_constants)
    beside = library.with_suffix(f".{os.getpid()}")
    files = [beside.with_name(beside.name + end) for end in (".cpp", ".o", ".so", ".ll", ".json")]
    cpp, obj, so, ir, facts = files
    cpp.write_text(unit)
    try:
        blocks = _compile_unit(command, cpp, obj, ir)
        link = [command[0], *toolchain.shared_library_flags(), obj, "-o", so, "-lm"]
        toolchain.run(link)
        if sys.platform == "darwin":  # debug lines live in the object until this collects them
            toolchain.run(["dsymutil", so, "-o", f"{library}.dSYM"])
        facts.write_text(json.dumps(_facts(signature, rewritten.function_constants, blocks)))
        so.rename(library)
        facts.rename(library.with_suffix(".json"))
    finally:
        for path in files:
            path.unlink(missing_ok=True)
        for path in beside.parent.glob(beside.name + "*.ci"):
            path.unlink()


def _compile_unit(command: list[str], cpp: Path, obj: Path, ir: Path) -> list[dict[str, int]]:
    if "-DMSL_COUNT=1" in command:
        toolchain.run([*command, "-x", "c++", "-S", "-emit-llvm", cpp, "-o", ir])
        text, blocks = instrument(ir.read_text())
        ir.write_text(text)
        toolchain.run(
            [command[0], "-w", "-O1", "-fPIC", *toolchain.cpu_flags(), "-c", ir, "-o", obj]
        )
        return blocks
    # Only gcc prints a call graph; elsewhere a recursion is seen when it runs.
    graph = "-gdwarf-4" in command and toolchain.is_gcc(command[0])
    extra = ["-fcallgraph-info"] if graph else []
    toolchain.run([*command, *extra, "-x", "c++", "-c", cpp, "-o", obj])
    for path in obj.parent.glob(obj.name.removesuffix(".o") + "*.ci"):
        cycle = _recursion(path.read_text())
        if cycle:
            raise MslError("RECURSION: MSL forbids recursive calls: " + " -> ".join(cycle))
    return []


def _recursion(graph: str) -> list[str]:
    """A cycle of calls in gcc's call graph; clones that the optimiser makes count as one."""
    calls: dict[str, set[str]] = {}
    clone = re.compile(r"\.(localalias|part\.\d+|isra\.\d+|constprop\.\d+)")
    for pair in re.findall(r'edge: \{ sourcename: "([^"]*)" targetname: "([^"]*)"', graph):
        caller, callee = (clone.sub("", name.split(":")[-1]) for name in pair)
        calls.setdefault(caller, set()).add(callee)
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for callee in sorted(calls.get(name, ())):
                cycle = walk(callee, [*path, name])
                if cycle:
                    return cycle
            done.add(name)
        return []

    return next((cycle for cycle in (walk(name, []) for name in sorted(calls)) if cycle), [])


def _facts(signature: Signature, constants, blocks) -> dict:
    parameters = [[int(p.kind), p.index, list(p.words)] for p in signature.parameters]
    limit = signature.max_threads
    return {
        "parameters": parameters,
        "max_threads": limit,
        "function_constants": constants,
        "blocks": blocks,
    }


def _read_facts(library: Path, facts: dict) -> Program:
    parameters = tuple(
        Parameter(Kind(kind), index, tuple(words)) for kind, index, words in facts["parameters"]
    )
    constants = tuple((number, name) for number, name in facts["function_constants"])
    signature = Signature(parameters, facts["max_threads"])
    return Program(library, signature, constants, tuple(facts["blocks"]))
