"""What holding an answer to a schema costs: ``python -m mlx_mtp.lab.grammar``.

Times, without a model, what a constrained answer adds: the first grammar of a tokenizer, a new
schema (tried out in another process), one that is known, and the mask of every verify row while a
JSON text is followed with drafts that are refused.  The last line is one JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from mlx_mtp.apps.engine.grammar import Grammars, json_grammar

_NAMES = {"type": "array", "items": {"type": "string"}, "maxItems": 20}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": "integer", "minimum": 1800, "maximum": 2100},
        "kind": {"enum": ["book", "film", "song"]},
        "names": _NAMES,
        "notes": {"anyOf": [{"type": "string", "maxLength": 200}, {"type": "null"}]},
    },
    "required": ["title", "year", "kind", "names", "notes"],
    "additionalProperties": False,
}
TEXT = json.dumps(
    {
        "title": "The rain that fell on the old harbour town",
        "year": 1923,
        "kind": "book",
        "names": ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Edsger Dijkstra"],
        "notes": "Found in a drawer; the last chapter is missing.",
    },
    indent=2,
)


def measure(tokenizer: Any, *, num_drafts: int = 4) -> dict[str, float]:
    """Times in ms; of rows the median and the largest, masking on the device included.

    A refused row stands behind a wrong draft (a few of these happen to be right).

    Args:
        tokenizer: a model's.
        num_drafts: wrong drafts that are shown behind every id, and refused.
    """
    grammars, size = Grammars(tokenizer), len(tokenizer)
    found = {"first_ms": _ms(lambda: grammars.processor(json_grammar(SCHEMA), num_prompt=0))}
    found["new_schema_ms"] = _ms(lambda: grammars.processor(json_grammar(_NAMES), num_prompt=0))
    found["known_schema_ms"] = _ms(lambda: grammars.processor(json_grammar(SCHEMA), num_prompt=0))
    processor = grammars.processor(json_grammar(SCHEMA), num_prompt=0)
    ids, logits = tokenizer.encode(TEXT, add_special_tokens=False), mx.zeros((1, size))
    rows, refused = [], []
    for at in range(len(ids) + 1):
        context = [*ids[:at], *ids[:num_drafts]]
        for count in range(num_drafts + 1):
            seen = mx.array(context[: at + count], mx.int32)
            took = _ms(lambda seen=seen: mx.eval(processor(seen, logits)))
            (refused if count else rows).append(took)
    return found | {
        "row_ms": statistics.median(rows),
        "largest_row_ms": max(rows),
        "refused_row_ms": statistics.median(refused),
    }


def _ms(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


@click.command()
@click.option("--model", type=click.Path(exists=True), help="Model folder; else the default one.")
def main(model: str | None) -> None:
    """Time grammars with a model's tokenizer."""
    from mlx_lm.tokenizer_utils import load

    from mlx_mtp.storage.default_model import default_model_path

    tokenizer = load(Path(model) if model else default_model_path())
    times = {name: round(value, 3) for name, value in measure(tokenizer).items()}
    print(json.dumps(times | {"vocab_size": len(tokenizer)}))


if __name__ == "__main__":
    main()
