"""Plain generation for many prompts at once, by mlx-lm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx

from mlx_mtp.model.mtp_model import MTPModel


def generate_batch(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stops: Iterable[Sequence[int]],
    samplers: Sequence[Callable[[mx.array], mx.array]],
    batch_size: int,
    on_step: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, list[int], bool]]:
    """Continue prompts together with mlx-lm's batch generation.

    Args:
        model: only its base model is used.
        prompts: ids of the prompts.
        max_tokens: maximum number of ids per prompt.
        stops: sequences of ids that end a text.
        samplers: for each prompt, log-probabilities ``[1, V]`` to ids ``[1]``; a sampler that all
            share is called once per step with all rows.
        batch_size: number of prompts at a time; the next one starts when one has ended.
        on_step: called after every step with the number of new ids.

    Yields:
        For each prompt that ends: its index, its ids without a stop of one id, whether it stopped.
    """
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model.base,
        max_tokens=max_tokens,
        stop_tokens=[list(stop) for stop in stops],
        completion_batch_size=batch_size,
        prefill_batch_size=min(8, batch_size),
        stream=mx.default_stream(mx.default_device()),
    )
    with contextlib.closing(generator):
        numbers = generator.insert([list(prompt) for prompt in prompts], samplers=list(samplers))
        index_of = {number: index for index, number in enumerate(numbers)}
        texts: list[list[int]] = [[] for _ in prompts]
        while responses := generator.next_generated():
            on_step(len(responses))
            for response in responses:
                index, ended = index_of[response.uid], response.finish_reason
                texts[index].append(response.token)
                if ended:
                    ids = texts[index]
                    yield index, ids[:-1] if ended == "stop" else ids, ended == "stop"
