"""Plain generation for many prompts at once, by mlx-lm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.text.ending import LOOP, GrowingText

Draw = Callable[[np.ndarray], int]  # logits [V] to an id


def generate_batch(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stops: Iterable[Sequence[int]],
    batch_size: int,
    draws: Sequence[Draw] | None = None,
    loop_length: int | None = None,
    on_step: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, list[int], str]]:
    """Continue prompts together with mlx-lm's batch generation.

    Args:
        model: only its base model is used.
        prompts: ids of the prompts.
        max_tokens: maximum number of ids per prompt.
        stops: sequences of ids that end a text.
        batch_size: number of prompts at a time; the next one starts when one has ended.
        draws: for each prompt, a function that draws an id; None takes the most likely ones.
        loop_length: a run of so many ids that occurs again ends a text; see ``GrowingText``.
        on_step: called after every step with the number of new ids.

    Yields:
        For each prompt that ends: its index, its ids without a stop of one id, and why it ended:
        "stop", "length" or "loop".
    """
    from mlx_lm.generate import BatchGenerator

    stops = [list(stop) for stop in stops]
    generator = BatchGenerator(
        model.base,
        max_tokens=max_tokens,
        stop_tokens=stops,
        completion_batch_size=batch_size,
        prefill_batch_size=min(8, batch_size),
        stream=mx.default_stream(mx.default_device()),
    )
    samplers = [_greedy] * len(prompts) if draws is None else [_sampler(draw) for draw in draws]
    with contextlib.closing(generator):
        numbers = generator.insert([list(prompt) for prompt in prompts], samplers=samplers)
        index_of = {number: index for index, number in enumerate(numbers)}
        texts = [
            GrowingText(max_tokens=max_tokens, stops=stops, loop_length=loop_length)
            for _ in prompts
        ]
        while responses := generator.next_generated():
            on_step(len(responses))
            for response in responses:
                index = index_of[response.uid]
                ended = texts[index].add(response.token)
                if ended == LOOP and not response.finish_reason:
                    generator.remove([response.uid])
                if ended:
                    yield index, texts[index].ids, ended


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def _sampler(draw: Draw) -> Callable[[mx.array], mx.array]:
    """mlx-lm's form of a draw: log-probabilities ``[1, V]`` to ids ``[1]``."""
    return lambda logprobs: mx.array([draw(np.array(logprobs[0].astype(mx.float32)))])
