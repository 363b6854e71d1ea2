"""Processor time of suffix lookup: ``python -m mlx_mtp.lab.lookup_time``.

Real texts are cut at a length.  The text before is indexed at once, as a prompt is.  The text after
is added step by step, as an answer is: each step looks up what follows and adds as many ids as were
right, and one more.  All times are processor time of the thread, which other programs do not
lengthen.  The last line of the output is one JSON line.
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mtp.bench.contexts import sections
from mlx_mtp.cli.options import option
from mlx_mtp.drafting.suffix_lookup import SuffixLookup
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.planning.lookup import MAX_LOOKUP_TOKENS

_LOG_LINES = 20_000


@dataclass(frozen=True)
class LookupTime:
    """Times and yield of lookup in one text.

    Attributes:
        index_ms: milliseconds to index the text before the cut.
        index_ns_per_id: the same per id.
        step_us_p50, step_us_p99, step_us_mean: microseconds of a step.
        after_us_mean: microseconds of a search for what would follow four more ids.
        found: share of steps in which something was found.
        tokens_per_step: ids added per step, if all that is found is verified.
    """

    index_ms: float
    index_ns_per_id: float
    step_us_p50: float
    step_us_p99: float
    step_us_mean: float
    after_us_mean: float
    found: float
    tokens_per_step: float


def time_lookup(before: Sequence[int], after: Sequence[int]) -> LookupTime:
    """Time lookup in a text.

    Args:
        before: ids that are indexed at once, at least one.
        after: ids that are added step by step, at least one.
    """
    began = time.thread_time_ns()
    text = SuffixLookup(before)
    index_ns = time.thread_time_ns() - began
    match = text.find(MAX_LOOKUP_TOKENS)
    found, step_ns, after_ns = 0, [], []
    done = 0
    while done < len(after):
        emitted = after[done : done + match.num_right(after[done:]) + 1]
        found += bool(match.tokens)
        began = time.thread_time_ns()
        text.extend(emitted)
        match = text.find(MAX_LOOKUP_TOKENS)
        step_ns.append(time.thread_time_ns() - began)
        text.find_after(after[done : done + 4], MAX_LOOKUP_TOKENS)
        after_ns.append(time.thread_time_ns() - began - step_ns[-1])
        done += len(emitted)
    p50, p99 = np.percentile(step_ns, [50, 99]) / 1e3
    return LookupTime(
        index_ms=index_ns / 1e6,
        index_ns_per_id=index_ns / len(before),
        step_us_p50=float(p50),
        step_us_p99=float(p99),
        step_us_mean=float(np.mean(step_ns)) / 1e3,
        after_us_mean=float(np.mean(after_ns)) / 1e3,
        found=found / len(step_ns),
        tokens_per_step=len(after) / len(step_ns),
    )


def texts(encode: Callable[[str], list[int]], length: int) -> Iterator[tuple[str, list[int]]]:
    """Yield kinds of text and at least this many ids of each, as far as there are so many."""
    yield "manual", encode("\n\n".join(sections()))
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    yield "code", _joined(library, encode, length)
    yield "log", encode("".join(_log_lines()))
    yield "equal", [1] * length


def _joined(files: Sequence[Path], encode: Callable[[str], list[int]], length: int) -> list[int]:
    ids: list[int] = []
    for path in files:
        if len(ids) >= length:
            break
        ids += encode(path.read_text(errors="replace"))
    return ids


def _log_lines() -> Iterator[str]:
    """Lines like those of a server's log, which repeat without being equal."""
    rng, second = random.Random(0), 0
    messages = ("started", "cannot reach mail.example.org", "sent 12 messages", "ran out of memory")
    for _ in range(_LOG_LINES):
        second += rng.randrange(20)
        clock = f"{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        service, message = rng.choice(("mailer", "indexer", "backup")), rng.choice(messages)
        yield f"{clock} {rng.choice(('INFO', 'ERROR'))} {service} {message}\n"


@command
@option("--length", default=100_000, help="Number of ids before the cut.")
@option("--steps", "num_after", default=5000, help="Number of ids after it.")
def main(*, length: int, num_after: int) -> dict[str, Any]:
    """Measure the processor time of suffix lookup on long texts."""
    from mlx_mtp.generate import encode_prompt
    from mlx_mtp.loading import load

    _, tokenizer = load(None, mtp=False)
    results = {}
    print("text    index ms  ns per id  step us: p50    p99   mean  after  found  tokens/step")
    for name, ids in texts(lambda text: encode_prompt(tokenizer, text), length + num_after):
        if len(ids) < length + num_after:
            raise ValueError(f"text {name} has only {len(ids)} ids, not {length + num_after}")
        times = time_lookup(ids[:length], ids[length : length + num_after])
        results[name] = asdict(times)
        print(
            f"{name:<8}{times.index_ms:8.1f}{times.index_ns_per_id:11.0f}{times.step_us_p50:14.1f}"
            f"{times.step_us_p99:7.1f}{times.step_us_mean:7.1f}{times.after_us_mean:7.1f}"
            f"{times.found:7.2f}{times.tokens_per_step:13.2f}"
        )
    return {"length": length, "after": num_after, "texts": results} | machine_info()


if __name__ == "__main__":
    main()
