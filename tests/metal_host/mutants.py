"""Each barrier of a kernel removed or weakened, one at a time, from a single compilation.

`switchable_barriers` turns every barrier into a switch on a function constant; a launch with
`constants=mutant(i, how)` then runs without barrier i, or with a weaker one.  A kernel's tests show
that mode check sees each of these: a barrier whose loss nobody notices is either not needed or not
tested.
"""

from __future__ import annotations

import re

import numpy as np

CONSTANT = 900  # its id; a kernel has no constants of its own up here
HOWS = ("removed", "mem_none", "simdgroup")
BARRIER = re.compile(r"\b(?P<scope>threadgroup|simdgroup)_barrier\s*\((?P<flags>[^()]*)\)\s*;")
DECLARATION = f"constant int msl_mutant [[function_constant({CONSTANT})]];\n#line 1\n"


def switchable_barriers(
    source: str, *, start: int = 0, end: int | None = None
) -> tuple[str, list[str]]:
    """The text with its barriers in source[start:end] switchable, and their scopes in order."""
    scopes: list[str] = []

    def replace(match: re.Match[str]) -> str:
        number = len(scopes)
        scopes.append(match.group("scope"))
        weaker = f"simdgroup_barrier({match.group('flags')});"
        none = f"{match.group('scope')}_barrier(mem_flags::mem_none);"
        cases = dict(zip(HOWS, ("", none, weaker), strict=True))
        lines = [f"case {_number(number, how)}: {text} break;" for how, text in cases.items()]
        return f"{{ switch (msl_mutant) {{ {' '.join(lines)} default: {match.group()} }} }}"

    end = len(source) if end is None else end
    changed = BARRIER.sub(replace, source[start:end])
    return DECLARATION + source[:start] + changed + source[end:], scopes


def _number(barrier: int, how: str) -> int:
    return 1 + barrier * len(HOWS) + HOWS.index(how)


def mutant(barrier: int, how: str) -> dict[int, np.int32]:
    """Function constants of the kernel in which this barrier is gone or weaker."""
    return {CONSTANT: np.int32(_number(barrier, how))}


def original() -> dict[int, np.int32]:
    """Function constants of the kernel as it was written."""
    return {CONSTANT: np.int32(0)}


def mutants(scopes: list[str]) -> list[tuple[int, str]]:
    """All of them; a simdgroup_barrier has nothing weaker of its kind but mem_none."""
    return [
        (i, how)
        for i, scope in enumerate(scopes)
        for how in HOWS
        if not (scope == "simdgroup" and how == "simdgroup")
    ]
