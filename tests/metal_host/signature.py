"""A kernel's parameters: which argument of a launch each of them takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from .errors import MslError
from .tokens import Tokens

# The number is the case in msl_launch.h that computes the value.
BUILTINS = {
    "thread_position_in_grid": 0,
    "thread_position_in_threadgroup": 1,
    "threadgroup_position_in_grid": 2,
    "threads_per_threadgroup": 3,
    "dispatch_threads_per_threadgroup": 4,
    "threads_per_grid": 5,
    "grid_size": 5,
    "threadgroups_per_grid": 6,
    "thread_index_in_threadgroup": 7,
    "simdgroup_index_in_threadgroup": 8,
    "thread_index_in_simdgroup": 9,
    "simdgroups_per_threadgroup": 10,
    "threads_per_simdgroup": 11,
    "thread_execution_width": 11,
    "quadgroup_index_in_threadgroup": 12,
    "thread_index_in_quadgroup": 13,
    "quadgroups_per_threadgroup": 14,
    "grid_origin": 15,
    "dispatch_simdgroups_per_threadgroup": 16,
    "dispatch_quadgroups_per_threadgroup": 17,
}
ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?")
MAX_THREADS = re.compile(r"max_total_threads_per_threadgroup\s*\(\s*(\d+)")
MAX_BUFFER = 30


class Kind(IntEnum):
    BUFFER = 0
    THREADGROUP = 1
    BUILTIN = 2


@dataclass(frozen=True)
class Parameter:
    """index: of the buffer, of the threadgroup argument, or into BUILTINS."""

    kind: Kind
    index: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[-1]

    @property
    def is_pointer(self) -> bool:
        return "*" in self.words

    @property
    def is_writable(self) -> bool:
        """A pointer or reference to something that is neither const nor constant."""
        end = self.words.index("*" if self.is_pointer else "&")
        return not {"const", "constant"} & set(self.words[:end])


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    max_threads: int | None  # of the attribute, where the kernel has it


def _split(tokens: Tokens, start: int, end: int) -> list[list[tuple[str, str]]]:
    parameters: list[list[tuple[str, str]]] = [[]]
    depth = 0
    for kind, text in tokens.items[start:end]:
        if kind in ("space", "line"):
            continue
        depth += (text in ("(", "[", "<")) - (text in (")", "]", ">"))
        if text == "," and depth == 0:
            parameters.append([])
        else:
            parameters[-1].append((kind, text))
    return [parameter for parameter in parameters if parameter]


def _parameter(items: list[tuple[str, str]], free: dict[Kind, int], kernel: str) -> Parameter:
    attributes = "".join(text for kind, text in items if kind == "attribute")
    words = tuple(text for kind, text in items if kind != "attribute")
    match = ATTRIBUTE.match(attributes)
    attribute, number = match.groups() if match else (None, None)
    pointer = "*" in words or "&" in words
    if attribute in BUILTINS:
        return Parameter(Kind.BUILTIN, BUILTINS[attribute], words)
    if attribute == "threadgroup" or (attribute is None and "threadgroup" in words):
        kind = Kind.THREADGROUP
    elif attribute == "buffer" or (attribute is None and pointer):
        kind = Kind.BUFFER
    else:
        raise MslError(f"kernel {kernel}: parameter without a known attribute: {' '.join(words)}")
    index = int(number) if number else free[kind]
    free[kind] = index + 1
    if index > MAX_BUFFER:
        raise MslError(f"kernel {kernel}: index {index} of {words[-1]} is above {MAX_BUFFER}")
    return Parameter(kind, index, words)


def read_signature(text: str, kernel: str) -> Signature:
    """The signature of `kernel` in preprocessed text; MslError where there is none."""
    tokens = Tokens(text)
    for i in range(len(tokens)):
        opening = tokens.step(i)
        follows_void = tokens.text(tokens.step(i, -1)) == "void"
        if tokens.text(i) != kernel or tokens.text(opening) != "(" or not follows_void:
            continue
        free = {Kind.BUFFER: 0, Kind.THREADGROUP: 0}
        parts = _split(tokens, opening + 1, tokens.match(opening))
        parameters = tuple(_parameter(part, free, kernel) for part in parts)
        head = "".join(text for _, text in tokens.items[max(0, i - 60) : i])
        limits = MAX_THREADS.findall(head)
        return Signature(parameters, int(limits[-1]) if limits else None)
    raise MslError(f"kernel {kernel} not found")
