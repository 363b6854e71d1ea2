"""What drafting from mask rows costs by draft vocabulary: ``python -m mlx_mtp.lab.draft_cost``.

Counts the bytes and multiply-adds of a draft head, which no other work on the machine changes, and
times drafting next to plain steps, in turn: processor time of the process, the least of all rounds.
Weights are random where there is no adapter, which changes no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click
import mlx.core as mx

from mlx_mtp.cli.options import AS_JSON, option
from mlx_mtp.drafting.mask_tokens import draft_tokens
from mlx_mtp.drafting.vocabulary import ConversationVocabulary, RowLogits, by_frequency
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.model.head import PartialHead
from mlx_mtp.model.layout import plain_layout
from mlx_mtp.model.mtp_model import MTPModel

SIZES = (2048, 4096, 8192, 16384)
_CONTEXT = 64


class Drafting:
    """Drafting from random hidden states ``[m, D]``.

    Args:
        model: the model with its adapter.
        rows: m.
        size: number of frequent tokens; None drafts from all tokens.
    """

    def __init__(self, model: MTPModel, rows: int, size: int | None) -> None:
        self._model = model
        self._hidden = mx.random.normal((rows, model.hidden_size)).astype(model.dtype)
        self._head: MTPModel | PartialHead = model
        self._words: ConversationVocabulary | None = None
        if size is not None:
            counted = model.statistics.vocabulary if model.statistics else None
            order = by_frequency(counted.ids if counted else (), model.vocab_size)
            self._head = PartialHead(model.base, model.parts, mx.array(order[:size]))
            own = order[size : size + _CONTEXT].tolist()
            self._words = ConversationVocabulary(model, self._head, own)

    def __call__(self) -> None:
        """Draft once."""
        logits: Any = self._head.logits(self._hidden[None])[0]
        rows = RowLogits(logits)
        if self._words is not None:
            rows = self._words.rate(self._hidden, logits)
        previous, key = mx.array(3), mx.random.key(0)
        mx.eval(draft_tokens(self._model, self._hidden, rows, previous, key=key).tokens)


def plain_step(model: MTPModel) -> Callable[[], None]:
    """Make a function that runs a plain step."""
    cache = model.make_cache()
    cache.begin_step()
    mx.eval(model(mx.arange(_CONTEXT)[None], cache=cache))

    def run() -> None:
        cache.begin_step()
        hidden = model(mx.array([[5]]), cache=cache, layout=plain_layout())
        mx.eval(mx.argmax(model.logits(hidden)))
        cache.rewind(1)

    return run


def least_ms(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Least processor time of each function, in ms; one round before them does not count."""
    least = [float("inf")] * len(runs)
    for turn in range(rounds + 1):
        for index, run in enumerate(runs):
            began = time.process_time()
            run()
            ms = (time.process_time() - began) * 1e3
            least[index] = min(least[index], ms) if turn else least[index]
    return least


@command
@option("--model", help="Model folder or name; the default model otherwise.")
@option("--adapter-path", help="Adapter folder.")
@option("--num-masks", type=int, multiple=True, default=(1, 4, 8), help="Mask rows; repeatable.")
@option("--rounds", type=click.IntRange(1), default=15, help="Rounds of each.")
@AS_JSON
def main(
    *,
    model: str | None,
    adapter_path: str | None,
    num_masks: Sequence[int],
    rounds: int,
    as_json: bool,
) -> dict[str, Any]:
    """Time and count drafting by draft vocabulary."""
    from mlx_mtp.loading import load

    loaded, _ = load(model, adapter_path=adapter_path)
    sizes = [*(size for size in SIZES if size < loaded.vocab_size), None]
    names = [(count, size) for count in num_masks for size in sizes]
    runs = [plain_step(loaded), *(Drafting(loaded, *name) for name in names)]
    plain, *times = least_ms(runs, rounds)
    head = partial(PartialHead, loaded.base, loaded.parts)
    results: list[dict[str, Any]] = []
    for (count, size), ms in zip(names, times, strict=True):
        num_tokens = loaded.vocab_size if size is None else size
        results.append(
            {
                "num_masks": count,
                "frequent_tokens": size,
                "head_bytes": head(mx.arange(num_tokens)).nbytes,
                "head_multiply_adds": count * num_tokens * loaded.hidden_size,
                "cpu_ms": round(ms, 2),
                "share_of_plain": round(ms / plain, 4),
            }
        )
    if not as_json:
        print(f"plain step {plain:.1f} ms of processor time")
        for row in results:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    return {"plain_cpu_ms": round(plain, 2), "results": results} | machine_info()


if __name__ == "__main__":
    main()
