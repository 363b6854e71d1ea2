"""Schemas that a server must survive, and whether any of them may be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]


def chain(count: int, wrap: Callable[[Schema], Schema] = lambda inner: inner) -> Schema:
    """References one behind the other."""
    steps = {f"a{at}": wrap({"$ref": f"#/$defs/a{at + 1}"}) for at in range(count)}
    return {"$defs": steps | {f"a{count}": {"type": "null"}}, "$ref": "#/$defs/a0"}


def _twice(count: int, key: str) -> Schema:
    """Every definition refers to the next one twice: 2 ** count ways."""
    steps = {f"a{at}": {key: [{"$ref": f"#/$defs/a{at + 1}"}] * 2} for at in range(count)}
    return {"$defs": steps | {f"a{count}": {"type": "null"}}, "$ref": "#/$defs/a0"}


def _text(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def _properties(count: int) -> Schema:
    return {f"p{at}": {"type": "integer"} for at in range(count)}


REFUSED: dict[str, Schema] = {
    "five megabytes": {"enum": ["x" * 100 + str(at) for at in range(45_000)]},
    "a chain of references": chain(4000),
    "a chain of unions": chain(2000, lambda inner: {"anyOf": [inner, {"type": "string"}]}),
    "a chain of allOf": chain(3000, lambda inner: {"allOf": [inner]}),
    "itself": {"$ref": "#"},
    "itself in allOf": {"allOf": [{"$ref": "#"}]},
    "elsewhere": {"$ref": "http://127.0.0.1:9/schema"},
    "a file": {"$id": "file:///etc/passwd", "$ref": "file:///etc/passwd"},
    "a bad pointer": {"$ref": "#/a~9/%zz"},
    "no such type": {"type": "foo"},
    "no type": {"type": ["array", 5]},
    "an empty choice": {"enum": []},
    "required and forbidden": {
        "type": "object", "properties": {"a": False}, "required": ["a"],
    },
    "above and below": {"type": "integer", "minimum": 10, "maximum": 3},
    "not": {"not": {"type": "string"}},
    "unique": {"type": "array", "uniqueItems": True},
    "dynamic": {"$dynamicRef": "#x"},
    "an unknown format": {"type": "string", "format": "foo"},
    "no regex": _text("(((("),
    "look-ahead": _text("^a(?=b)$"),
    "brackets": _text("(" * 20_000 + ")" * 20_000),
    "stars": _text("x*" * 20_000),
    "a large automaton": _text("^(a?){5000}a{5000}$"),
    "many at once": {"allOf": [_text(f".*{chr(97 + at)}.*") for at in range(24)]},
    "a large prime": {"type": "integer", "multipleOf": 999_983},
    "all of many unions": {
        "allOf": [
            {"anyOf": [{"type": "object", "required": [f"p{at}{each}"]} for each in range(8)]}
            for at in range(8)
        ]
    },
    "patterns that meet": {"patternProperties": {"^a.*": {"type": "null"}, "^ab.*": {}}},
    "20000 properties": {"type": "object", "properties": _properties(20_000)},
    "settings": {"type": "object", "x-guidance": {"whitespace_flexible": True}},
}  # fmt: skip
EITHER: dict[str, Schema] = {
    "nothing": {},
    "stars of stars": _text("(a*)*$"),
    "repeats of repeats": _text("^((a{1,1000}){1,1000}){1,1000}$"),
    "many letters": _text("\\p{L}{1,5000}"),
    "a billion letters": {"type": "string", "minLength": 10**9, "maxLength": 10**9},
    "a billion items": {"type": "array", "minItems": 10**9},
    "a billion properties": {"type": "object", "minProperties": 10**9},
    "a billion nested": {
        "type": "array", "minItems": 1000,
        "items": {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000}},
    },
    "two to the twentieth": _twice(20, "anyOf"),
    "all of two to the twentieth": _twice(20, "allOf"),
    "without end": {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
    "zero bytes": {"const": "\x00\ud7ff"},
    "large numbers": {"type": "integer", "minimum": 10**300, "maximum": 10**301},
}  # fmt: skip
