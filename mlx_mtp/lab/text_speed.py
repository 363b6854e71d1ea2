"""Speed of PyTorch's and MLX's text generation: ``python -m mlx_mtp.lab.text_speed``.

Both answer constructed prompts greedily, in alternating order, each in its own batch size; MLX gets
fewer prompts, because it is slower.  Speeds are tokens per second of wall clock and of processor
time; ratios are those of pairs, PyTorch over MLX.  ``OMP_NUM_THREADS`` limits both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from mlx_mtp.cli.options import MODEL, option
from mlx_mtp.generate import chat_text
from mlx_mtp.lab.commands import command, counting, machine_info
from mlx_mtp.train.data.generators import MLX, TORCH, TextGenerator, choose_generator
from mlx_mtp.train.data.prompts import draw_prompt
from mlx_mtp.train.data.sequences import token_ids


@command
@MODEL
@option("--pairs", default=3, help="Number of pairs.")
@option("--num-torch", default=256, help="Number of prompts for PyTorch.")
@option("--num-mlx", default=32, help="Number of prompts for MLX, the first ones.")
@option("--max-tokens", default=128, help="Maximum number of tokens of an answer.")
def main(
    *, model: str | None, pairs: int, num_torch: int, num_mlx: int, max_tokens: int
) -> dict[str, Any]:
    """Compare the speed of both ways to generate training text."""
    from mlx_mtp.loading import load

    loaded, tokenizer = load(model, mtp=False, kernels=False)
    prompts: list[list[int]] = []
    drawn = (draw_prompt(0, number) for number in range(100 * (num_torch + num_mlx)))
    for prompt in drawn:
        if len(prompts) == max(num_torch, num_mlx):
            break
        if prompt.is_complete:
            message = {"role": "user", "content": prompt.first}
            prompts.append(token_ids(tokenizer, chat_text(tokenizer, [message])))
    stops = [[token] for token in sorted(tokenizer.eos_token_ids)]

    def run(generator: TextGenerator, count: int) -> tuple[float, float, dict[int, list[int]]]:
        """Tokens per second of wall clock and of processor time, and the texts by prompt."""
        tokens, texts = 0, {}

        def on_step(new: int) -> None:
            nonlocal tokens
            tokens += new

        start = time.perf_counter(), time.process_time()
        for index, ids, _ in generator.generate(
            prompts[:count],
            max_tokens=max_tokens,
            stops=stops,
            batch_size=generator.batch_size,
            on_step=on_step,
        ):
            texts[index] = ids
        return (
            tokens / (time.perf_counter() - start[0]),
            tokens / (time.process_time() - start[1]),
            texts,
        )

    length = max(map(len, prompts)) + max_tokens
    torch = choose_generator(loaded, TORCH, max_tokens=length)
    mlx = choose_generator(loaded, MLX, max_tokens=length)
    results: list[dict[str, float]] = []
    same = 0
    with counting("Pair") as progress:
        for pair in range(pairs):
            progress(pair, pairs)
            counts = {torch.name: num_torch, mlx.name: num_mlx}
            done = {}
            for generator in (torch, mlx)[:: -1 if pair % 2 else 1]:
                done[generator.name] = run(generator, counts[generator.name])
            a, a_cpu, torch_texts = done[torch.name]
            b, b_cpu, mlx_texts = done[mlx.name]
            shared = torch_texts.keys() & mlx_texts.keys()
            same = sum(torch_texts[index] == mlx_texts[index] for index in shared)
            results.append({"torch": a, "mlx": b, "torch_cpu": a_cpu, "mlx_cpu": b_cpu})
            print(
                f"pair {pair + 1}: {torch.name} {a:.0f} tokens/s ({a_cpu:.0f} per CPU second), "
                f"{mlx.name} {b:.0f} ({b_cpu:.0f})"
            )
    medians = {name: statistics.median(each[name] for each in results) for name in results[0]}
    ratios = [each["torch"] / each["mlx"] for each in results]
    cpu_ratios = [each["torch_cpu"] / each["mlx_cpu"] for each in results]
    return {
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "ratio": round(statistics.median(ratios), 2),
        "cpu_ratio": round(statistics.median(cpu_ratios), 2),
        "cpu_ratios": [round(ratio, 2) for ratio in cpu_ratios],
        "same_texts": [same, min(num_torch, num_mlx)],
        "max_tokens": max_tokens,
        "num_prompts": {"torch": num_torch, "mlx": num_mlx},
        "batch_sizes": {"torch": torch.batch_size, "mlx": mlx.batch_size},
    } | machine_info("torch", "transformers")


if __name__ == "__main__":
    main()
