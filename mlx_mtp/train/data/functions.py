"""Small Python functions by construction: a signature, a docstring with true examples, a body.

A function takes a list or a text, keeps some items, changes each, and reduces the results.  The
parts are source text, so that the value of an example is computed from what the docstring says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Choose = Callable[[Sequence[Any]], Any]  # draws an item of a list

# What is done, as words and as an expression of x; {n} is a small number, {c} a letter.
_NUMBER_FILTERS = (
    ("", ""),
    ("that are even", "x % 2 == 0"),
    ("that are odd", "x % 2 == 1"),
    ("that are positive", "x > 0"),
    ("that are negative", "x < 0"),
    ("above {n}0", "x > {n}0"),
    ("below {n}", "x < {n}"),
    ("with two digits", "10 <= abs(x) <= 99"),
    ("that are not divisible by {n}", "x % {n} != 0"),
)
_NUMBER_MAPS = (
    ("numbers", "x", "int"),
    ("squares", "x * x", "int"),
    ("doubles", "2 * x", "int"),
    ("absolute values", "abs(x)", "int"),
    ("last digits", "abs(x) % 10", "int"),
    ("remainders modulo {n}", "x % {n}", "int"),
    ("sums with {n}", "x + {n}", "int"),
    ("opposites", "-x", "int"),
    ("decimal strings", "str(x)", "str"),
    ("binary strings", "bin(x)", "str"),
)
_WORD_FILTERS = (
    ("", ""),
    ("with more than {n} letters", "len(x) > {n}"),
    ("of at most {n} letters", "len(x) <= {n}"),
    ("containing '{c}'", "'{c}' in x"),
    ("that do not begin with '{c}'", "not x.startswith('{c}')"),
    ("that are capitalised", "x[:1].isupper()"),
    ("that are palindromic", "x == x[::-1]"),
)
_WORD_MAPS = (
    ("words", "x", "str"),
    ("lengths", "len(x)", "int"),
    ("upper-case forms", "x.upper()", "str"),
    ("reversed forms", "x[::-1]", "str"),
    ("first letters", "x[:1]", "str"),
    ("last {n} letters", "x[-{n}:]", "str"),
    ("counts of '{c}'", "x.count('{c}')", "int"),
    ("forms without vowels", "''.join(c for c in x if c not in 'aeiou')", "str"),
    ("capitalised forms", "x.capitalize()", "str"),
)
# What is returned, as words, an expression of {items}, and the type of the result.
_REDUCTIONS = {
    "int": (
        ("the list of", "{items}", "List[int]"),
        ("the sum of", "sum({items})", "int"),
        ("the largest of", "max({items}, default=0)", "int"),
        ("the smallest of", "min({items}, default=0)", "int"),
        ("the sorted list of", "sorted({items})", "List[int]"),
        ("the number of different", "len(set({items}))", "int"),
        ("the reversed list of", "{items}[::-1]", "List[int]"),
        ("whether zero is among the", "0 in {items}", "bool"),
    ),
    "str": (
        ("the list of", "{items}", "List[str]"),
        ("the sorted list of", "sorted({items})", "List[str]"),
        ("the joined", "'-'.join({items})", "str"),
        ("the first of", "next(iter({items}), '')", "str"),
        ("the longest of", "max({items}, key=len, default='')", "str"),
        ("the number of different", "len(set({items}))", "int"),
        (
            "how often each occurs among",
            "{{x: {items}.count(x) for x in {items}}}",
            "Dict[str, int]",
        ),
        ("the list without repetitions of", "list(dict.fromkeys({items}))", "List[str]"),
    ),
}
_SOURCES = {
    "List[int]": ("numbers", _NUMBER_FILTERS, _NUMBER_MAPS, "{argument}"),
    "List[str]": ("words", _WORD_FILTERS, _WORD_MAPS, "{argument}"),
    "str": ("words", _WORD_FILTERS, _WORD_MAPS, "{argument}.split()"),
}
_SMALL_WORDS = ("the", "of", "is", "among", "a", "that", "are", "do", "any", "whether")
_NAMES = ("", "get_", "compute_", "find_", "make_", "select_")


@dataclass(frozen=True)
class Function:
    """A Python function.

    Attributes:
        name: of the function.
        argument: name of its only argument.
        header: imports, if any, and the line with ``def``.
        summary: one sentence: what it returns.
        examples: calls and their values, as source text.
        body: an indented return statement.
        result: type of the value.
    """

    name: str
    argument: str
    header: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    body: str
    result: str

    @property
    def example(self) -> str:
        """The first call."""
        return self.examples[0][0]

    def docstring(self, style: str) -> str:
        """The docstring: "plain", "doctest", "sentence" or "sections"."""
        (call, value), *more = self.examples
        if style == "doctest":
            rest = "".join(f"\n    >>> {c}\n    {v}" for c, v in self.examples)
            return f'    """{self.summary}{rest}\n    """\n'
        if style == "sentence":
            return f'    """\n    {self.summary} For example, {call} returns {value}.\n    """\n'
        if style == "sections":
            sections = (
                f"Args:\n        {self.argument}: the input.\n\n    Returns:\n        {value}"
            )
            return f'    """{self.summary}\n\n    {sections} for {call}.\n    """\n'
        return f'    """{self.summary}"""\n'

    def source(self) -> str:
        """The whole function with a short docstring."""
        return self.header + self.docstring("plain") + self.body


STYLES = ("plain", "doctest", "doctest", "sentence", "sections")


def draw_function(choose: Choose, *, arguments: Sequence[str], words: Sequence[str]) -> Function:
    """Construct a function.

    Args:
        choose: draws an item of a list.
        arguments: names for the argument.
        words: words of which examples are made.
    """
    source = choose(tuple(_SOURCES))
    noun, filters, maps, iterated = _SOURCES[source]
    small, letter = choose(range(2, 8)), choose("aeinorst")
    (which, condition), (what, change, kind) = choose(filters), choose(maps)
    reduced, expression, result = choose(_REDUCTIONS[kind])
    which, what, condition, change = (
        text.format(n=small, c=letter) for text in (which, what, condition, change)
    )
    argument = choose(arguments)
    items = f"[{change} for x in {iterated.format(argument=argument)}"
    items += f" if {condition}]" if condition else "]"
    code = expression.format(items=items)
    plain = what if what == noun else f"{what} of {noun}"
    summary = f"Return {reduced} {plain} in {argument}" + (f" {which}." if which else ".")
    name = choose(_NAMES) + _identifier(reduced, what, which, num_words=choose(range(2, 6)))
    calls = []
    for _ in range(choose((1, 2, 2, 3))):
        value = _example(source, choose, words)
        calls.append((f"{name}({value!r})", repr(eval(code, {argument: value}))))
    annotation, used = f"{argument}: {source}", {source, result}
    imports = sorted({text.partition("[")[0] for text in used if "[" in text})
    header = f"from typing import {', '.join(imports)}\n\n\n" if imports and choose((0, 1)) else ""
    header += f"def {name}({annotation}) -> {result}:\n"
    return Function(
        name=name,
        argument=argument,
        header=header,
        summary=summary,
        examples=tuple(calls),
        body=f"    return {code}\n",
        result=result,
    )


def _identifier(*texts: str, num_words: int) -> str:
    """A name from the first words of texts, without articles."""
    cleaned = "".join(c if c.isalnum() else " " for text in texts for c in f"{text} ").lower()
    words = [word for word in cleaned.split() if word not in _SMALL_WORDS]
    return "_".join(words[:num_words])


def _example(source: str, choose: Choose, words: Sequence[str]) -> Any:
    """A value of an argument's type."""
    if source == "List[int]":
        return [choose(range(-20, 100)) for _ in range(choose(range(2, 7)))]
    drawn = [choose((str, str, str.capitalize))(choose(words)) for _ in range(choose(range(2, 6)))]
    return drawn if source == "List[str]" else " ".join(drawn)
