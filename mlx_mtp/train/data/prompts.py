"""User messages by construction, from forms and words that ``words.toml`` lists.

A prompt depends on a seed and its number alone.  Its first message is complete, or the beginning of
one, which the model continues as the user; some have further messages, a dialogue of several turns.
None is copied from a benchmark; ``contamination`` checks what comes out.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from mlx_mtp.train.data.functions import STYLES, Function, draw_function

# Kinds with their shares, in percent.
SHARES = {
    "chat": 16,
    "lists": 12,
    "edits": 13,
    "maths": 9,
    "languages": 5,
    "native": 9,  # written in another language
    "code": 9,
    "snippets": 4,  # about a function that the message contains
    "stubs": 9,  # functions to complete
    "beginnings": 13,
    "free": 1,  # the model writes all of the message
}
FOLLOWED = 0.15  # fraction of complete messages with further ones
WITH_SYSTEM = 0.06
WITH_GREETING, WITH_ENDING, CARELESS = 0.08, 0.2, 0.05
_CODE_KINDS = ("code", "snippets", "stubs")


@dataclass(frozen=True)
class DrawnPrompt:
    """The user's part of a conversation.

    Attributes:
        kind: one of ``SHARES``.
        first: the first message, or its beginning.
        is_complete: whether the first message is complete.
        later: further messages, each after an answer.
        system: a system prompt, or None for the chat template's own.
    """

    kind: str
    first: str
    is_complete: bool
    later: tuple[str, ...] = ()
    system: str | None = None


def draw_prompt(seed: int, number: int) -> DrawnPrompt:
    """Construct the prompt of a number; the same arguments always give the same prompt."""
    draw = _Drawing(random.Random(f"{seed} {number}"))
    kind = draw.weighted(SHARES)
    if kind == "free":
        return DrawnPrompt(kind, "", is_complete=False)
    if kind == "beginnings":
        return DrawnPrompt(kind, draw.beginning(), is_complete=False)
    if kind == "stubs":
        first, is_complete = draw.stub()
        if not is_complete:
            return DrawnPrompt(kind, first, is_complete=False)
    elif kind == "native":
        first = draw.native()
    elif kind == "snippets":
        first = draw.snippet()
    else:
        first = draw.varied(draw.filled(draw.forms[kind]))
    return DrawnPrompt(
        kind,
        first,
        is_complete=True,
        later=draw.follow_ups(kind),
        system=draw.filled(draw.forms["systems"]) if draw.chance(WITH_SYSTEM) else None,
    )


@cache
def _tables() -> dict[str, Any]:
    """The lists of ``words.toml``."""
    return tomllib.loads((files("mlx_mtp.train.data") / "words.toml").read_text(encoding="utf-8"))


class _Drawing:
    """Random choices for one prompt.

    Only ``random()`` is used, whose values for a seed are the same in all versions of Python.
    """

    def __init__(self, generator: random.Random) -> None:
        self._random = generator.random
        self._words: dict[str, list[str]] = _tables()["words"]
        self.forms: dict[str, list[str]] = _tables()["forms"]

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def choose(self, items: Sequence[Any]) -> Any:
        return items[int(self._random() * len(items))]

    def weighted(self, shares: dict[str, int]) -> str:
        rest = self._random() * sum(shares.values())
        for name, share in shares.items():
            rest -= share
            if rest < 0:
                return name
        return next(reversed(shares))  # rounding

    def filled(self, forms: Sequence[str]) -> str:
        """A form with its places filled."""
        form, values = self.choose(forms), self._values()
        if "{text}" in form:
            values["text"] = self._passage(values)
        return form.format(**values)

    def varied(self, message: str) -> str:
        """A message with a greeting, a further demand, or typed carelessly."""
        if self.chance(WITH_ENDING):
            message += self.filled(self.forms["endings"])
        if self.chance(WITH_GREETING):
            message = self.choose(self.forms["greetings"]) + message
        return message.rstrip(".?").lower() if self.chance(CARELESS) else message

    def beginning(self) -> str:
        """The first words of a message."""
        if self.chance(0.4):
            return self.filled(self.forms["beginnings"])
        kind = self.choose(("chat", "lists", "code", "languages"))
        message = self.filled(self.forms[kind]).rstrip(".?")
        return message + self.choose(self.forms["connectors"])

    def native(self) -> str:
        """A message in another language than English."""
        native = _tables()["native"]
        lists = native[self.choose(tuple(native))]
        values = self._values() | {
            "topic": self.choose(lists["topic"]),
            "other_topic": self.choose(lists["topic"]),
        }
        return self.choose(lists["forms"]).format(**values)

    def snippet(self) -> str:
        """A request about a function."""
        function = self._function()
        values = self._values() | {"argument": function.argument, "example": function.example}
        ask = self.choose(self.forms["snippets"]).format(**values)
        code = f"```python\n{function.source()}```" if self.chance(0.6) else function.source()
        return f"{ask}\n\n{code}" if self.chance(0.8) else f"{code}\n\n{ask}"

    def stub(self) -> tuple[str, bool]:
        """A function to complete, and whether it is complete up to its body."""
        function, ask = self._function(), self.choose(self.forms["stubs"])
        doc = function.docstring(self.choose(STYLES))
        if self.chance(0.7):
            return ask + function.header + doc, True
        rest = self.choose((f'    """{function.summary} ', doc[: doc.find(function.name)], ""))
        return ask + function.header + (rest or '    """'), False

    def follow_ups(self, kind: str) -> tuple[str, ...]:
        """Messages after the first one."""
        forms = self.forms["code_follow_ups" if kind in _CODE_KINDS else "follow_ups"]
        count = (1 if self.chance(0.75) else 2) if self.chance(FOLLOWED) else 0
        return tuple(self.filled(forms) for _ in range(count))

    def _function(self) -> Function:
        words = self._words["thing"]
        return draw_function(self.choose, arguments=self._words["argument"], words=words)

    def _values(self) -> dict[str, Any]:
        """A value for every place of a form."""
        values: dict[str, Any] = {}
        for name, words in self._words.items():
            values[name], values[f"other_{name}"] = self.choose(words), self.choose(words)
        if self.chance(0.5):
            values["programming"] = "Python"
        n, m = 2 + int(11 * self._random()), 2 + int(28 * self._random())
        values |= {"n": n, "m": m, "sum": n + m, "next": n + 2 * m}
        values |= {"large": 20 + int(79 * self._random()), "year": 1850 + int(174 * self._random())}
        for name in ("person", "subject"):
            values[name.capitalize()] = values[name][0].upper() + values[name][1:]
        values["Subject"] = "".join(
            word.capitalize() for word in values["subject"].split() if word not in ("a", "an", "of")
        )
        return values

    def _passage(self, values: dict[str, Any]) -> str:
        """One to four sentences; the first one is about the names of the request."""
        sentences = [self.choose(self.forms["sentences"]).format(**values)]
        for _ in range(self.choose((0, 0, 1, 1, 2, 3))):
            sentences.append(self.choose(self.forms["sentences"]).format(**self._values()))
        return ("\n\n" if self.chance(0.3) else "") + " ".join(sentences)
