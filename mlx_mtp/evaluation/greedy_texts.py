"""Greedy answers to prompts, generated once by the base model and reused for every adapter.

An adapter changes nothing on ordinary rows, so all adapters of a model have the same greedy texts,
and the steps of a decode can be counted from them instead of run (``acceptance``).  Answers are
generated in batches, whose matrix products may round differently from single decoding; where two
tokens are tied up to rounding, a text may differ from the one that ``decode`` emits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from mlx_mtp.evaluation.batch_generation import generate_batch
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.fingerprint import fingerprint, is_fingerprint_of
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.text.ending import STOP

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class GreedyText:
    """A prompt and its greedy answer, as ids; the answer includes the stop id that ended it."""

    id: str
    kind: str
    prompt: list[int]
    answer: list[int]

    @property
    def sequence(self) -> TokenSequence:
        """The text with its answer marked, for ``acceptance.evaluate``."""
        flags = [False] * len(self.prompt) + [True] * len(self.answer)
        return TokenSequence(self.prompt + self.answer, flags, kind=self.kind)


def greedy_texts(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    encode: Callable[[TokenizerWrapper, str], list[int]],
    max_tokens: int = 64,
    path: Path | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[GreedyText]:
    """Answer every prompt greedily, or read the answers from a file.

    Args:
        model: its adapter, if any, is not used.
        tokenizer: of the model.
        prompts: in the order of the result.
        encode: turns a user message into ids, such as ``bench.contexts.prompt_ids``.
        max_tokens: maximum number of ids of an answer.
        path: JSONL file of answers; missing ones are generated and added.
        batch_size: prompts answered together.
        progress: called with (answers done, number of prompts).

    Raises:
        ValueError: the file is damaged, or was made with another model or ``max_tokens``.
    """
    header = {"fingerprint": fingerprint(model.base), "max_tokens": max_tokens}
    done = _read(path, header, model) if path and path.exists() else {}
    ids = {prompt.id: encode(tokenizer, prompt.text) for prompt in prompts}
    missing = [
        prompt
        for prompt in prompts
        if prompt.id not in done or done[prompt.id].prompt != ids[prompt.id]
    ]
    missing.sort(key=lambda prompt: len(ids[prompt.id]))  # similar lengths need little padding
    size = 2 * batch_size
    for start in range(0, len(missing), size):
        if progress:
            progress(len(prompts) - len(missing) + start, len(prompts))
        group = missing[start : start + size]
        answers = _answers(
            model,
            tokenizer,
            [ids[prompt.id] for prompt in group],
            max_tokens=max_tokens,
            batch_size=batch_size,
        )
        for prompt, answer in zip(group, answers, strict=True):
            done[prompt.id] = GreedyText(prompt.id, prompt.kind, ids[prompt.id], answer)
        if path:
            _write(path, header, done.values())
    return [done[prompt.id] for prompt in prompts]


def texts_hash(texts: Sequence[GreedyText]) -> str:
    """A hash of the ids of texts, 16 hexadecimal digits."""
    lines = "\n".join(json.dumps([text.prompt, text.answer]) for text in texts)
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
    for index, ids, reason in generate_batch(
        model,
        prompts,
        max_tokens=max_tokens,
        stops=[[stop] for stop in stops],
        batch_size=batch_size,
    ):
        ending = [_likeliest(model, prompts[index] + ids, stops)] if reason == STOP else []
        answers[index] = ids + ending
    return answers


def _likeliest(model: MTPModel, ids: list[int], stops: list[int]) -> int:
    """Which of the stop ids ended a text."""
    if len(stops) == 1:
        return stops[0]
    hidden = model(mx.array([ids]), cache=model.make_cache())[:, -1:]
    logits = model.logits(hidden)[0, 0, mx.array(stops)]
    return stops[cast(int, mx.argmax(logits).item())]


def _read(path: Path, header: dict[str, Any], model: MTPModel) -> dict[str, GreedyText]:
    try:
        first, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts = [GreedyText(**line) for line in lines]
        values = {key: first[key] for key in header}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged, or is not a file of greedy texts") from None
    for key, value in header.items():
        former = key == "fingerprint" and is_fingerprint_of(model.base, values[key])
        if values[key] != value and not former:
            raise ValueError(f"{path} was made with {key} {values[key]!r}, not {value!r}")
    return {text.id: text for text in texts}


def _write(path: Path, header: dict[str, Any], texts: Any) -> None:
    lines = [header, *(asdict(text) for text in texts)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, content)
