"""From a program counter in a compiled kernel to the line of Metal text."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HEADERS = "msl_"  # lines of our own library say nothing about the kernel


def _command(library: Path, address: int, base: int) -> list[str] | None:
    if sys.platform == "darwin" and shutil.which("atos"):
        return ["atos", "-i", "-o", str(library), "-l", hex(base), hex(base + address)]
    if shutil.which("addr2line"):
        return ["addr2line", "-i", "-e", str(library), hex(address)]
    return None


def _place(line: str) -> str:
    """`kernel.metal:12` of a line that addr2line or atos printed."""
    if "(" in line:  # atos: function (in library) (kernel.metal:12)
        line = line.rsplit("(", 1)[-1].rstrip(")")
    return line.split(" ")[0].rsplit("/", 1)[-1]


def source_place(library: Path, pc: int, base: int) -> str:
    """` at kernel.metal:12 < caller:3`, innermost first; empty where nothing is known."""
    address = pc - base
    if not 0 <= address < 1 << 28:
        return ""
    command = _command(library, address, base)
    if command is None:
        return ""
    output = subprocess.run(command, capture_output=True, text=True).stdout
    places = [_place(line) for line in output.split("\n") if line and "??" not in line]
    known = [place for place in places if place and not place.startswith(HEADERS)]
    return " at " + " < ".join(known[:4]) if known else ""
