"""Greedy answers to prompts, written once by the base model and kept for every adapter.

An adapter changes nothing on ordinary rows, so all adapters of a model have the same greedy texts,
and what a decode would do on them can be counted instead of run (``train.evaluate``).  Answers are
generated in batches, whose matrix products may round otherwise than single decoding does; where
two tokens tie but for that, a text may differ from the one that ``decode`` emits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.train.data.distil_run import generate_batch
from mlx_mtp.train.data.sequences import Sequence as Text

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class GreedyText:
    """A prompt and its greedy answer, as ids; a stop id that ended the answer is its last."""

    id: str
    kind: str
    prompt: list[int]
    answer: list[int]

    @property
    def sequence(self) -> Text:
        """As evaluation takes it."""
        flags = [False] * len(self.prompt) + [True] * len(self.answer)
        return Text(self.prompt + self.answer, flags)


def greedy_texts(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    path: Path | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[GreedyText]:
    """Answer every prompt greedily, or take the answers that a file holds.

    Args:
        model: its adapter, if any, plays no part.
        tokenizer: of the model.
        prompts: in the order of the result.
        max_tokens: most ids of an answer.
        path: JSONL file to keep the answers in; what it lacks is generated and added.
        batch_size: prompts answered at a time.
        progress: called with (answers there, answers wanted).

    Raises:
        ValueError: the file is damaged, or was made with another model or ``max_tokens``.
    """
    header = {"fingerprint": fingerprint(model.base), "max_tokens": max_tokens}
    done = _read(path, header) if path and path.exists() else {}
    asked = {each.id: prompt_ids(tokenizer, each.text) for each in prompts}
    missing = [
        each for each in prompts if each.id not in done or done[each.id].prompt != asked[each.id]
    ]
    missing.sort(key=lambda each: len(asked[each.id]))  # alike in length, so little padding
    group = 2 * batch_size
    for start in range(0, len(missing), group):
        if progress:
            progress(len(prompts) - len(missing) + start, len(prompts))
        some = missing[start : start + group]
        answers = _answers(
            model,
            tokenizer,
            [asked[each.id] for each in some],
            max_tokens=max_tokens,
            batch_size=batch_size,
        )
        for each, answer in zip(some, answers, strict=True):
            done[each.id] = GreedyText(each.id, each.kind, asked[each.id], answer)
        if path:
            _write(path, header, done.values())
    return [done[each.id] for each in prompts]


def texts_hash(texts: Sequence[GreedyText]) -> str:
    """Tells one set of texts from another."""
    lines = "\n".join(json.dumps([each.prompt, each.answer]) for each in texts)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _answers(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """Greedy answers, stop ids included."""
    answers: list[list[int]] = [[] for _ in prompts]
    stops = sorted(tokenizer.eos_token_ids)
    for index, ids, stopped in generate_batch(
        model,
        prompts,
        max_tokens=max_tokens,
        stops=[[each] for each in stops],
        samplers=[_greedy] * len(prompts),
        batch_size=batch_size,
    ):
        ending = [_likeliest(model, prompts[index] + ids, stops)] if stopped else []
        answers[index] = ids + ending
    return answers


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def _likeliest(model: MTPModel, ids: list[int], stops: list[int]) -> int:
    """Which of the stop ids ended a text."""
    if len(stops) == 1:
        return stops[0]
    hidden = model(mx.array([ids]), cache=model.make_cache())[:, -1:]
    logits = model.logits(hidden)[0, 0, mx.array(stops)]
    return stops[cast(int, mx.argmax(logits).item())]


def _read(path: Path, header: dict[str, Any]) -> dict[str, GreedyText]:
    try:
        first, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts = [GreedyText(**line) for line in lines]
        begun = {key: first[key] for key in header}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no greedy texts, or is damaged") from None
    for key, value in header.items():
        if begun[key] != value:
            raise ValueError(f"{path} was made with {key} {begun[key]!r}, not {value!r}")
    return {each.id: each for each in texts}


def _write(path: Path, header: dict[str, Any], texts: Any) -> None:
    lines = [header, *(asdict(each) for each in texts)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, content)
