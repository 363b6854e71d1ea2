"""Made-up answers for the tests of the benchmark's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_mtp.bench.runs import Answer, Timing


def answer(
    *,
    prompt: str = "chat-01",
    kind: str = "chat",
    mode: str = "plain",
    context: int = 0,
    repeat: int = 0,
    number: int = 0,
    tokens: int = 11,
    seconds: float = 10.0,
    steps: int | None = None,
    ids: Sequence[int] | None = None,
    **timing: Any,
) -> Answer:
    """An answer of one id and then ``tokens - 1`` in so many seconds."""
    return Answer(
        prompt=prompt,
        kind=kind,
        context=context,
        mode=mode,
        repeat=repeat,
        number=number,
        prompt_tokens=20,
        timing=Timing(
            ids=list(range(tokens) if ids is None else ids),
            first=1,
            ttft_s=timing.pop("ttft_s", 0.5),
            seconds=seconds,
            steps=tokens if steps is None else steps,
            **timing,
        ),
    )


def pairs(
    speedups: Sequence[float], *, noise: float = 0.0, repeats: int = 1, seed: int = 0
) -> list[Answer]:
    """Plain and auto answers to as many prompts as there are speed-ups, of two kinds in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for repeat in range(repeats):
        for at, speedup in enumerate(speedups):
            for mode, speed in (("plain", 1.0), ("auto", speedup)):
                found.append(
                    answer(
                        prompt=f"p{at}",
                        kind=("chat", "code")[at % 2],
                        mode=mode,
                        repeat=repeat,
                        number=len(found),
                        seconds=10.0 / speed * float(np.exp(noise * rng.standard_normal())),
                        steps=11 if mode == "plain" else 6,
                        verified=[] if mode == "plain" else [5, 4],
                        accepted=[] if mode == "plain" else [4, 1],
                        layouts={(0, 0): (10, 10.0)} if mode == "plain" else {(2, 2): (5, 6.0)},
                        peak_bytes=1000,
                    )
                )
    return found


WEIGHTS = {"plain": 1_000_000, "auto": 1_100_000}
