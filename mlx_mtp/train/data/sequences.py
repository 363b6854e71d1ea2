"""Records to token sequences: which tokens are answers, and which sequences are held out.

With a chat template only the assistant's tokens are answers, including the token that ends a turn.
Their borders come from the rendered conversation up to each turn, whose ids are compared with those
of the whole; a token across a border counts as part of the answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter, abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.generate import chat_text
from mlx_mtp.train.data.records import Message, Record

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MIN_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Encoded:
    """Sequences of records.

    Attributes:
        sequences: in the order of the records.
        num_cut: number of truncated sequences.
        dropped: dropped records, by reason.
    """

    sequences: list[TokenSequence]
    num_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Facts for the user, a line each."""
        tokens = sum(len(sequence.ids) for sequence in self.sequences)
        answers = sum(sequence.num_answer_tokens for sequence in self.sequences)
        lines = [f"{len(self.sequences)} sequences, {tokens} tokens, {answers} of them in answers"]
        if self.num_cut:
            lines.append(
                f"{self.num_cut} sequences were longer than the context and were truncated"
            )
        lines += [
            f"{count} records dropped: {reason}" for reason, count in self.dropped.most_common()
        ]
        return lines


def encode(record: Record, tokenizer: TokenizerWrapper, *, max_seq_length: int) -> TokenSequence:
    """Turn a record into ids.

    A conversation is rendered with the chat template; without one its messages are joined by blank
    lines and count as plain text.  All of a plain text is an answer, except the leading characters
    marked as ``given``.

    Args:
        record: the text.
        tokenizer: from ``load``.
        max_seq_length: maximum number of ids; longer texts are truncated.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    if record.messages is not None and tokenizer.has_chat_template:
        ids, answer = _encode_chat(record, tokenizer)
    else:
        ids, answer = _encode_text(record, tokenizer)
    kind = record.meta.get("kind")
    return TokenSequence(
        ids=ids[:max_seq_length],
        answer=answer[:max_seq_length],
        cut=len(ids) > max_seq_length,
        kind=kind if isinstance(kind, str) else "",
    )


def encode_all(
    records: abc.Iterable[Record], tokenizer: TokenizerWrapper, *, max_seq_length: int
) -> Encoded:
    """Turn records into sequences; those with too short an answer are dropped and counted.

    Raises:
        ValueError: fewer than two sequences remain, one to train on and one to hold out.
    """
    sequences: list[TokenSequence] = []
    dropped: Counter[str] = Counter()
    for record in records:
        try:
            sequence = encode(record, tokenizer, max_seq_length=max_seq_length)
        except ValueError:
            dropped["the chat template refuses the conversation"] += 1
            continue
        if sequence.num_answer_tokens < MIN_ANSWER_TOKENS:
            dropped[f"fewer than {MIN_ANSWER_TOKENS} tokens of answer"] += 1
        else:
            sequences.append(sequence)
    if len(sequences) < 2:
        reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"too little data: {len(sequences)} usable sequences, at least 2 are needed{reasons}"
        )
    return Encoded(sequences, sum(sequence.cut for sequence in sequences), dropped)


def split(
    sequences: abc.Sequence[TokenSequence], *, held_out: float = 0.05
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Split sequences into those to train on and those to hold out.

    The split depends on a hash of the ids before the first answer, so that a sequence stays in its
    part when data are added, and the same question is never in both.

    Args:
        sequences: at least two.
        held_out: fraction to hold out, above 0 and below 1.

    Raises:
        ValueError: the fraction is out of range, or there are fewer than two different ones.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {held_out}")
    marks = [_mark(sequence) for sequence in sequences]
    lowest, highest = (min(marks), max(marks)) if marks else (0.0, 0.0)
    if lowest == highest:
        raise ValueError(f"too little data: {len(set(marks))} different sequences, 2 are needed")
    # Each part has at least one sequence.
    border = min(max(held_out, np.nextafter(lowest, 1.0)), highest)
    parts: tuple[list[TokenSequence], list[TokenSequence]] = ([], [])
    for sequence, mark in zip(sequences, marks, strict=True):
        parts[int(mark < border)].append(sequence)
    return parts


def _mark(sequence: TokenSequence) -> float:
    """A number in [0, 1) from the ids before the first answer, or from all if there are none."""
    start = sequence.answer.index(True) if True in sequence.answer else 0
    ids = np.array(sequence.ids[:start] if start > 1 else sequence.ids, dtype="<i8")
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:6], "big") / 2**48


def _encode_text(record: Record, tokenizer: TokenizerWrapper) -> tuple[list[int], list[bool]]:
    text = record.text
    if text is None:
        text = "\n\n".join(message["content"] for message in record.messages or ())
    ids = token_ids(tokenizer, text, special=True)
    num_given = int(record.meta.get("given", 0))
    start = _common(ids, token_ids(tokenizer, text[:num_given], special=True)) if num_given else 0
    return ids, [index >= start for index in range(len(ids))]


def _encode_chat(record: Record, tokenizer: TokenizerWrapper) -> tuple[list[int], list[bool]]:
    messages = list(record.messages or ())
    text = _render(tokenizer, messages)
    ids = token_ids(tokenizer, text)
    answer = [False] * len(ids)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    searched = 0
    for turn in turns:
        before, searched = _text_before(tokenizer, messages, turn, text=text, searched=searched)
        if before is None:
            continue  # a template may omit a turn
        start = _common(ids, token_ids(tokenizer, before))
        end = _end_of_turn(ids, start, tokenizer, messages[: turn + 1])
        answer[start:end] = [True] * (end - start)
    if record.meta.get("cut") and turns and turns[-1] == len(messages) - 1:
        return _without_end(ids, answer, tokenizer)
    return ids, answer


def _text_before(
    tokenizer: TokenizerWrapper, messages: list[Message], turn: int, *, text: str, searched: int
) -> tuple[str | None, int]:
    """The rendered text before an answer, and where to search for the next one.

    Templates may render an answer inside a conversation differently from one at its end; then the
    answer itself is searched for.
    """
    content = messages[turn]["content"].strip()
    before = chat_text(tokenizer, messages[:turn]) if turn else ""
    if turn and text.startswith(before):
        return before, len(before)
    start = text.find(content, searched)
    return (text[:start], start + len(content)) if start >= 0 else (None, searched)


def _end_of_turn(
    ids: list[int], start: int, tokenizer: TokenizerWrapper, messages: list[Message]
) -> int:
    """Index after the token that ends the answer, or after its last token if there is none."""
    limit = _common(ids, token_ids(tokenizer, _render(tokenizer, messages)))
    ends = (i + 1 for i in range(start, len(ids)) if ids[i] in tokenizer.eos_token_ids)
    end = next(ends, None)
    return max(start, limit) if end is None else end


def _without_end(
    ids: list[int], answer: list[bool], tokenizer: TokenizerWrapper
) -> tuple[list[int], list[bool]]:
    """Remove the end token of a truncated last turn, which the model did not end there."""
    end = len(answer) - answer[::-1].index(True) if True in answer else len(answer)
    if end and ids[end - 1] in tokenizer.eos_token_ids:
        end -= 1
    return ids[:end], answer[:end]


def _render(tokenizer: TokenizerWrapper, messages: list[Message]) -> str:
    """Render a complete conversation.

    Raises:
        ValueError: the template rejects it.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False, continue_final_message=False
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    assert isinstance(text, str)
    return text


def token_ids(tokenizer: TokenizerWrapper, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text; ``special`` adds the tokenizer's own, as at the start of a document."""
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _common(ids: list[int], prefix: list[int]) -> int:
    """Length of the common prefix of two lists of ids."""
    for index, (left, right) in enumerate(zip(ids, prefix, strict=False)):
        if left != right:
            return index
    return min(len(ids), len(prefix))
