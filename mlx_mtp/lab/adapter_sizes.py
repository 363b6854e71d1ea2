"""File size of an adapter against its tokens per step: ``python -m mlx_mtp.lab.adapter_sizes``.

One adapter is compressed in several ways (``train.compress``), and each result is evaluated on the
same greedy answers (``evaluation.acceptance``).  The difference in accepted drafts per anchor to
the first variant is paired: its standard error is that of the mean over the prompts.
"""

from __future__ import annotations

import re
import time
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_mtp.cli.options import option
from mlx_mtp.evaluation.acceptance import Answer, count_answers, summarise
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.lab.commands import answer_prompts, command, counting, machine_info, text_options
from mlx_mtp.model.adapter_file import rounded
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.compress import Compression, compress
from mlx_mtp.train.run.checkpoint import adapter_file_bytes

VARIANTS = "16/16,8/8,4/8,4/4,4/8g32,3/8,3/3,16/16r16,16/16r8,8/8r16,4/8r16"
_VARIANT = re.compile(r"(\d+)/(\d+)(?:g(\d+))?(?:r(\d+))?(?:e([\d.]+))?")


def parse_variant(text: str) -> Compression:
    """Parse ``LORA/SAMPLER``, bits of both with 16 for float16, then g, r and e with numbers.

    Raises:
        ValueError: the text is of another form, or a value is out of range.
    """
    match = _VARIANT.fullmatch(text)
    if match is None:
        raise ValueError(f"variant {text!r} must be BITS/BITS, then gGROUP, rRANK and eENERGY")
    bits, sampler, group, rank, energy = match.groups()
    return Compression(
        bits=int(bits) % 16,
        sampler_bits=int(sampler) % 16,
        group_size=int(group or 64),
        max_rank=None if rank is None else int(rank),
        energy=float(energy or 1),
    )


def use(model: MTPModel, config: MTPConfig, weights: dict[str, mx.array]) -> None:
    """Give a model the low-rank weights and the sampler head that are loaded from a file of these.

    Args:
        model: with the adapter that the weights are made from, and without kernels.
        config: of the compressed adapter.
        weights: from ``compress``.
    """
    values = [
        (name if name.startswith("sampler_head.") else f"base.{name}", value.astype(model.dtype))
        for name, value in rounded(weights, config).items()
        if name.startswith("sampler_head.") or name.endswith((".lora_a", ".lora_b"))
    ]
    model.update(tree_unflatten(values))
    mx.eval(model.parameters())


def difference(answers: list[Answer], first: list[Answer]) -> tuple[float, float]:
    """Mean difference in accepted drafts per anchor, and its standard error over the answers."""
    pairs = zip(answers, first, strict=True)
    means = np.array([(a.counts - b.counts).mean() for a, b in pairs if len(a.counts)])
    return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5)


@command
@text_options
@option("--adapter-path", help="Folder or hub id of the adapter.", show_default="the model's own")
@option("--variants", default=VARIANTS, help="Variants, as BITS/BITS for LoRA and sampler head.")
@option("--batch-size", default=16, help="Number of prompts answered together.")
def main(*, model: str | None, adapter_path: str | None, variants: str, **options: Any) -> Any:
    """Compare compressed forms of an adapter in size and tokens per step."""
    from mlx_mtp.loading import load, locate, read_adapter

    chosen = {name.strip(): parse_variant(name.strip()) for name in variants.split(",")}
    start = time.perf_counter()
    _, folder = locate(model, adapter_path)
    if folder is None:
        raise ValueError("the model has no adapter: name one with --adapter-path")
    config, weights = read_adapter(folder)
    loaded, tokenizer = load(model, adapter_path=adapter_path, kernels=False)
    texts = answer_prompts(loaded, tokenizer, **options)
    sequences: list[TokenSequence] = [text.sequence for text in texts]
    results: dict[str, dict[str, float]] = {}
    first: list[Answer] = []
    click.echo("variant        megabytes  tokens per step  accepted drafts per anchor")
    for name, how in chosen.items():
        made, tensors = compress(config, weights, how)
        shapes = {key: value.shape for key, value in tensors.items()}
        use(loaded, made, tensors)
        with counting(f"Evaluating {name}") as progress:
            max_tokens = options["max_tokens"]
            answers = list(
                count_answers(loaded, sequences, max_tokens=max_tokens, progress=progress)
            )
        first = first or answers
        mean, error = difference(answers, first)
        found = summarise(answers, num_draft_tokens=config.num_draft_tokens)
        results[name] = {
            "bytes": adapter_file_bytes(shapes, made),
            "tokens_per_step": found.tokens_per_step,
            "accepted": float(np.concatenate([answer.counts for answer in answers]).mean()),
            "difference": mean,
            "standard_error": error,
        }
        row = results[name]
        click.echo(
            f"{name:<14} {row['bytes'] / 1e6:9.2f}  {found.tokens_per_step:15.3f}  "
            f"{row['accepted']:.3f} ({mean:+.3f} ± {error:.3f})"
        )
    return {
        "adapter": config.base_model,
        "num_prompts": len(texts),
        "max_tokens": options["max_tokens"],
        "results": results,
        "seconds": round(time.perf_counter() - start, 1),
    } | machine_info()


if __name__ == "__main__":
    main()
