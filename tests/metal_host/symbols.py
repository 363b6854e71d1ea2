"""From program counters in a compiled kernel to lines of Metal text."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HEADERS = "msl_"  # lines of our own library say nothing about the kernel


def _atos(library: Path, addresses: list[int], base: int) -> list[list[str]]:
    command = ["atos", "-i", "-o", str(library), "-l", hex(base)]
    return [
        subprocess.run(
            [*command, hex(base + address)], capture_output=True, text=True
        ).stdout.split("\n")
        for address in addresses
    ]


def _addr2line(library: Path, addresses: list[int]) -> list[list[str]]:
    command = ["addr2line", "-a", "-i", "-e", str(library), *map(hex, addresses)]
    groups: list[list[str]] = []
    for line in subprocess.run(command, capture_output=True, text=True).stdout.split("\n"):
        if line.startswith("0x"):
            groups.append([])
        elif groups:
            groups[-1].append(line)
    return groups


def _place(line: str) -> str:
    """`kernel.metal:12` of a line that addr2line or atos printed."""
    line = line.partition(" (discriminator")[0]  # of addr2line
    if "(" in line:  # atos: function (in library) (kernel.metal:12)
        line = line.rsplit("(", 1)[-1].rstrip(")")
    return line.split(" ")[0].rsplit("/", 1)[-1]


def _describe(lines: list[str]) -> str:
    places = [_place(line) for line in lines if line and "??" not in line]
    known = [place for place in places if place and not place.startswith(HEADERS)]
    return " at " + " < ".join(known[:4]) if known else ""


def source_places(library: Path, counters: list[int], base: int) -> dict[int, str]:
    """Counter → ` at kernel.metal:12 < caller:3`, innermost first; empty where nothing is known."""
    known = sorted({pc for pc in counters if 0 <= pc - base < 1 << 28})
    addresses = [pc - base for pc in known]
    if known and sys.platform == "darwin" and shutil.which("atos"):
        groups = _atos(library, addresses, base)
    elif known and shutil.which("addr2line"):
        groups = _addr2line(library, addresses)
    else:
        return {}
    return {pc: _describe(lines) for pc, lines in zip(known, groups, strict=False)}
