"""Host time of a step: ``python -m mlx_mtp.lab.host_time``.

A random model of many layers and tiny widths leaves a device little to do, so nearly all of a step
is Python, graphs and their submission.  Stock mlx-lm and our layouts take turns; every round
decodes some tokens with each of them.  Two times of a step are reported, with their quartiles: the
wall clock, and the processor time of the host's thread, which other programs lengthen much less.
Steps of ``linear`` and ``quadratic`` count if they verify and propose all k drafts.

With ``--device-ms`` each forward also has products of matrices that take about so long on the
device, which runs aside from the host's thread.  What a step takes beyond that is the bubble: time
in which the device waits for the host.  The last line of the output is one JSON line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from mlx_mtp.cli.options import field_option, option
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.loop import decode
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.lab.tiny_models import tiny_model, with_adapter
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import Wrapper

MODES = ("stock", "plain", "plain, no adapter", "linear", "quadratic", "auto")
SIZE = 512  # of the square matrices that keep the device busy
_FIRST = 6  # steps of an answer that are not counted: the prompt, and what is not a steady state
_WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
}


class BusyNorm(Wrapper):
    """The final norm of a model, for which the device multiplies ``num_products`` matrices."""

    def __init__(self, norm: nn.Module, num_products: int) -> None:
        super().__init__(norm)
        self._matrix = mx.eye(SIZE)
        self._num_products = num_products
        mx.eval(self._matrix)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the norm of ``[B, L, D]``, after the products."""
        product = mx.zeros((SIZE, SIZE)) + 0 * x.reshape(-1)[0]
        for _ in range(self._num_products):
            product = product @ self._matrix
        return self.wrapped(x) + product[0, 0]


def base_model(num_layers: int, num_products: int) -> Any:
    """A random llama of tiny widths, the same in every call."""
    base = tiny_model(
        "llama",
        num_hidden_layers=num_layers,
        layer_types=["full_attention"] * num_layers,
        **_WIDTHS,
    )
    if num_products:
        base.model.norm = BusyNorm(base.model.norm, num_products)
    return base


def product_ms(count: int = 100) -> float:
    """Milliseconds of one of the products that keep the device busy."""
    norm = BusyNorm(nn.RMSNorm(8), count)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(norm(mx.zeros((1, 1, 8))))
        times.append(time.perf_counter() - began)
    return 1e3 * min(times) / count


def steps_of(
    base: Any, bare: MTPModel, model: MTPModel, prompt: list[int], max_tokens: int
) -> dict[str, Callable[[], Iterator[bool]]]:
    """For each mode a function that decodes; it yields, per step, whether the step counts."""
    k = model.num_draft_tokens

    def stock() -> Iterator[bool]:
        for _ in generate_step(mx.array(prompt), base, max_tokens=max_tokens):
            yield True

    def ours(model: MTPModel, layout: str) -> Iterator[bool]:
        has_drafts = layout in ("linear", "quadratic")
        for step in decode(model, prompt, layout=layout, max_tokens=max_tokens):
            yield not has_drafts or step.num_draft_tokens == k

    return {
        "stock": stock,
        "plain": lambda: ours(model, "plain"),
        "plain, no adapter": lambda: ours(bare, "plain"),
        **{name: lambda name=name: ours(model, name) for name in ("linear", "quadratic", "auto")},
    }


def step_times(steps: Iterator[bool]) -> list[tuple[float, float]]:
    """Milliseconds of the steps that count: wall clock, and processor time of this thread."""
    times, before = [], (time.perf_counter(), time.thread_time())
    for index, counts in enumerate(steps):
        now = time.perf_counter(), time.thread_time()
        if counts and index >= _FIRST:
            times.append((1e3 * (now[0] - before[0]), 1e3 * (now[1] - before[1])))
        before = now
    return times


@command
@option("--layers", default=32, help="Number of layers.")
@option("--device-ms", default=0.0, help="Time that each forward takes the device in addition.")
@option("--rounds", default=10, help="Number of rounds; each mode decodes once per round.")
@field_option(GenerationConfig, "max_tokens", default=40)
@option("--modes", default=",".join(MODES), help="Modes to compare, separated by commas.")
def main(
    *, layers: int, device_ms: float, rounds: int, max_tokens: int, modes: str
) -> dict[str, Any]:
    """Measure what a step costs the host, against stock mlx-lm."""
    num_products = round(device_ms / product_ms()) if device_ms else 0
    base = base_model(layers, num_products)
    bare = MTPModel(base_model(layers, num_products))
    model = with_adapter(base_model(layers, num_products), num_draft_tokens=4)
    known = steps_of(base, bare, model, list(range(1, 33)), max_tokens)
    names = modes.split(",") if modes != ",".join(MODES) else list(MODES)
    if unknown := sorted(set(names) - set(MODES)):
        raise ValueError(f"modes must be of {'; '.join(MODES)}, got {unknown[0]!r}")
    times: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for _ in range(rounds + 1):  # the first one warms up
        for name in names:
            times[name].append(np.array(step_times(known[name]())))
    print(f"{layers} layers, {num_products} products of matrices in each forward")
    print("ms per step: quartiles of the wall clock; of the host's processor time")
    results = {}
    for name, parts in times.items():
        wall, host = np.percentile(np.concatenate(parts[1:]), [25, 50, 75], axis=0).T
        ratios = [np.median(a, axis=0) / np.median(b, axis=0) for a, b in _pairs(parts, times)]
        wall_ratio, host_ratio = np.median(ratios, axis=0)
        print(
            f"{name:<18}{_text(wall)}  {_text(host)}  of stock: {wall_ratio:.2f}, {host_ratio:.2f}"
        )
        results[name] = {
            "wall_ms": wall.round(3).tolist(),
            "host_ms": host.round(3).tolist(),
            "wall_of_stock": round(float(wall_ratio), 3),
            "host_of_stock": round(float(host_ratio), 3),
            "steps": sum(map(len, parts[1:])),
        }
    return {
        "layers": layers,
        "device_ms": device_ms,
        "num_products": num_products,
        "rounds": rounds,
        "max_tokens": max_tokens,
        "results": results,
    } | machine_info()


def _pairs(
    parts: list[np.ndarray], times: dict[str, list[np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The times of a mode and of the first mode, round by round."""
    first = next(iter(times.values()))
    return zip(parts[1:], first[1:], strict=True)


def _text(quartiles: np.ndarray) -> str:
    return "".join(f"{ms:8.2f}" for ms in quartiles)


if __name__ == "__main__":
    main()
