"""Metal text as tokens that can be walked and replaced without losing a line.

A token is a pair (kind, text); the kinds are `word`, `number`, `string`, `symbol`, `space`, `line`
(a preprocessor line) and `attribute` (a whole `[[...]]`).  Joining the texts gives the source back.
"""

from __future__ import annotations

import re

from .errors import MslError

TOKEN = re.compile(
    r"""(?P<line>(?m:^)[ \t]*\#[^\n]*)
      |(?P<space>\s+)
      |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
      |(?P<word>[A-Za-z_]\w*)
      |(?P<symbol>::|->|<<=|>>=|&&|\|\||[-+*/%&|^<>=!]=|<<|\+\+|--|\.\.\.|.)""",
    re.S | re.X,
)
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
OPENING = {close: opening for opening, close in BRACKETS.items() if close != ">"}
INVISIBLE = {"space", "line"}


def _attribute_end(texts: list[str], start: int) -> int:
    depth, i = 0, start
    while i < len(texts):
        depth += (texts[i] == "[") - (texts[i] == "]")
        i += 1
        if depth == 0:
            return i
    raise MslError("unbalanced [[")


def tokenize(text: str) -> list[tuple[str, str]]:
    raw = [(match.lastgroup or "symbol", match.group()) for match in TOKEN.finditer(text)]
    texts, result, i = [text for _, text in raw], [], 0
    while i < len(raw):
        if texts[i] == "[" and texts[i + 1 : i + 2] == ["["]:
            end = _attribute_end(texts, i)
            result.append(("attribute", "".join(texts[i:end])))
            i = end
        else:
            result.append(raw[i])
            i += 1
    return result


class Tokens:
    """A list of tokens with the moves that the rewriting rules are written in."""

    def __init__(self, text: str) -> None:
        self.items = tokenize(text)

    def __len__(self) -> int:
        return len(self.items)

    def kind(self, i: int) -> str:
        return self.items[i][0] if 0 <= i < len(self.items) else ""

    def text(self, i: int) -> str:
        """The token's text; empty outside the list."""
        return self.items[i][1] if 0 <= i < len(self.items) else ""

    def step(self, i: int, direction: int = 1) -> int:
        """The next token (direction -1: the one before) that is neither space nor directive."""
        i += direction
        while 0 <= i < len(self.items) and self.items[i][0] in INVISIBLE:
            i += direction
        return i

    def visible(self, start: int, end: int, *, attributes: bool = False) -> list[str]:
        """The texts in [start, end) that a compiler sees."""
        hidden = INVISIBLE if attributes else INVISIBLE | {"attribute"}
        return [text for kind, text in self.items[start:end] if kind not in hidden]

    def match(self, i: int) -> int:
        """The bracket that closes the one at i, or opens it."""
        text = self.text(i)
        if text in OPENING:
            return self._scan(i, text, OPENING[text], -1)
        if text == "<":
            return self._match_angle(i)
        return self._scan(i, text, BRACKETS[text], 1)

    def _scan(self, i: int, near: str, far: str, direction: int) -> int:
        depth = 0
        while 0 <= i < len(self.items):
            depth += (self.text(i) == near) - (self.text(i) == far)
            if depth == 0:
                return i
            i += direction
        raise MslError(f"unbalanced {near}")

    def _is_less_than(self, i: int) -> bool:
        """`sizeof(T) < 8` within template brackets: not a bracket."""
        before = self.step(i, -1)
        spaced = self.kind(i - 1) == "space" and self.text(before) == ")"
        return spaced or self.kind(before) == "number"

    def _match_angle(self, i: int) -> int:
        depth, start = 0, i
        while i < len(self.items):
            text = self.text(i)
            if text in ("(", "["):
                i = self.match(i) + 1
                continue
            if text == "<" and not (i > start and self._is_less_than(i)):
                depth += 1
            depth -= {">": 1, ">>": 2}.get(text, 0)
            if depth <= 0:
                return i
            i += 1
        raise MslError("unbalanced <")

    def replace(self, start: int, end: int, text: str) -> None:
        """Put `text` in the place of [start, end), and keep the number of lines."""
        lost = sum(old.count("\n") for _, old in self.items[start:end]) - text.count("\n")
        self.items[start:end] = [("space", text + "\n" * max(lost, 0))]

    def blank(self, i: int) -> None:
        self.items[i] = ("space", " ")

    def source(self) -> str:
        """The text, attributes left out."""
        return "".join(
            " " + "\n" * text.count("\n") if kind == "attribute" else text
            for kind, text in self.items
        )
