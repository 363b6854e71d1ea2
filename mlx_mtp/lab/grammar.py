"""The cost of an answer that follows a JSON schema: ``python -m mlx_mtp.lab.grammar``.

Times, without a model, what a constrained answer adds: the first grammar of a tokenizer, a new
schema (compiled in another process first), a known one, and the mask of every verified row while a
JSON text is generated with drafts that are rejected.
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
from mlx_mtp.cli.options import option
from mlx_mtp.lab.commands import command, machine_info

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
    """Times in ms; of rows the median and the largest, with the mask on the device.

    A rejected row comes after a wrong draft (a few of these happen to be right).

    Args:
        tokenizer: a model's tokenizer.
        num_drafts: number of wrong drafts after every id.
    """
    grammars, size = Grammars(tokenizer), len(tokenizer)
    schemas = {"first_ms": SCHEMA, "new_schema_ms": _NAMES, "known_schema_ms": SCHEMA}
    times = {
        name: _ms(lambda schema=schema: grammars.processor(json_grammar(schema), num_prompt=0))
        for name, schema in schemas.items()
    }
    processor = grammars.processor(json_grammar(SCHEMA), num_prompt=0)
    ids, logits = tokenizer.encode(TEXT, add_special_tokens=False), mx.zeros((1, size))
    rows, rejected = [], []
    for end in range(len(ids) + 1):
        context = [*ids[:end], *ids[:num_drafts]]
        for count in range(num_drafts + 1):
            history = mx.array(context[: end + count], mx.int32)
            ms = _ms(lambda history=history: mx.eval(processor(history, logits)))
            (rejected if count else rows).append(ms)
    return times | {
        "row_ms": statistics.median(rows),
        "largest_row_ms": max(rows),
        "refused_row_ms": statistics.median(rejected),
    }


def _ms(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


@command
@option(
    "--model",
    type=click.Path(exists=True),
    help="Folder of the model.",
    show_default="the embedded one",
)
def main(model: str | None) -> dict[str, Any]:
    """Time grammars with a model's tokenizer and print one JSON line."""
    from mlx_lm.tokenizer_utils import load

    from mlx_mtp.storage.default_model import default_model_path

    tokenizer = load(Path(model) if model else default_model_path())
    times = {name: round(value, 3) for name, value in measure(tokenizer).items()}
    return times | {"vocab_size": len(tokenizer)} | machine_info()


if __name__ == "__main__":
    main()
