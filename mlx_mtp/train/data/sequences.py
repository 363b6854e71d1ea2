"""Records to ids: which tokens the model's own turns are, and which sequences are held out.

With a chat template only the assistant's tokens are answers, with the token that ends each turn.
They are found by rendering the conversation up to each of them and comparing ids with those of the
whole; where a border does not tokenise alike, the token across it counts as the answer's.
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
    """Sequences, and what became of the records that are none.

    Attributes:
        sequences: in the order of the records.
        num_cut: sequences that were longer than there was room.
        dropped: records left out, by reason.
    """

    sequences: list[TokenSequence]
    num_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """What to tell the user."""
        tokens = sum(len(each.ids) for each in self.sequences)
        answers = sum(each.num_answer_tokens for each in self.sequences)
        told = [f"{len(self.sequences)} sequences, {tokens} tokens, {answers} of them in answers"]
        if self.num_cut:
            told.append(f"{self.num_cut} sequences were longer than the context and were cut")
        told += [f"{count} records dropped: {why}" for why, count in self.dropped.most_common()]
        return told


def encode(record: Record, tokenizer: TokenizerWrapper, *, max_seq_length: int) -> TokenSequence:
    """Turn a record into ids.

    A conversation is rendered with the chat template; without one its messages are joined by blank
    lines and count as plain text.  Plain text is an answer as a whole, but for the characters in
    front that are marked as ``given``.

    Args:
        record: the text.
        tokenizer: from ``load``.
        max_seq_length: most ids; the rest is cut off.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    if record.messages is not None and tokenizer.has_chat_template:
        ids, answer = _encode_chat(record, tokenizer)
    else:
        ids, answer = _encode_text(record, tokenizer)
    return TokenSequence(
        ids=ids[:max_seq_length], answer=answer[:max_seq_length], cut=len(ids) > max_seq_length
    )


def encode_all(
    records: abc.Iterable[Record], tokenizer: TokenizerWrapper, *, max_seq_length: int
) -> Encoded:
    """Turn records into sequences; those with too short an answer are left out and counted.

    Raises:
        ValueError: fewer than two sequences are left: there must be one to train on and one to
            hold out.
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
        why = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"too little data: {len(sequences)} usable sequences, at least 2 are needed{why}"
        )
    return Encoded(sequences, sum(each.cut for each in sequences), dropped)


def split(
    sequences: abc.Sequence[TokenSequence], *, held_out: float = 0.05
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Divide sequences into those to train on and those to hold out.

    What decides is a hash of what precedes the first answer, so a sequence keeps its side when
    data are added, and the same question is never on both.

    Args:
        sequences: at least two.
        held_out: the share to hold out, above 0 and below 1.

    Raises:
        ValueError: the share is out of range, or there are fewer than two different ones.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, got {held_out}")
    marks = [_mark(each) for each in sequences]
    lowest, highest = (min(marks), max(marks)) if marks else (0.0, 0.0)
    if lowest == highest:
        raise ValueError(f"too little data: {len(set(marks))} different sequences, 2 are needed")
    # Of few sequences at least one is on either side.
    border = min(max(held_out, np.nextafter(lowest, 1.0)), highest)
    sides: tuple[list[TokenSequence], list[TokenSequence]] = ([], [])
    for sequence, mark in zip(sequences, marks, strict=True):
        sides[int(mark < border)].append(sequence)
    return sides


def _mark(sequence: TokenSequence) -> float:
    """A number in [0, 1) from the ids before the first answer; from all where there are none."""
    start = sequence.answer.index(True) if True in sequence.answer else 0
    ids = np.array(sequence.ids[:start] if start > 1 else sequence.ids, dtype="<i8")
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:6], "big") / 2**48


def _encode_text(record: Record, tokenizer: TokenizerWrapper) -> tuple[list[int], list[bool]]:
    text = record.text
    if text is None:
        text = "\n\n".join(message["content"] for message in record.messages or ())
    ids = _ids(tokenizer, text, special=True)
    given = int(record.meta.get("given", 0))
    start = _common(ids, _ids(tokenizer, text[:given], special=True)) if given else 0
    return ids, [at >= start for at in range(len(ids))]


def _encode_chat(record: Record, tokenizer: TokenizerWrapper) -> tuple[list[int], list[bool]]:
    messages = list(record.messages or ())
    text = _render(tokenizer, messages)
    ids = _ids(tokenizer, text)
    answer = [False] * len(ids)
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    searched = 0
    for turn in turns:
        before, searched = _text_before(tokenizer, messages, turn, text=text, searched=searched)
        if before is None:
            continue  # a template may leave a turn out
        start = _common(ids, _ids(tokenizer, before))
        end = _end_of_turn(ids, start, tokenizer, messages[: turn + 1])
        answer[start:end] = [True] * (end - start)
    if record.meta.get("cut") and turns and turns[-1] == len(messages) - 1:
        return _without_end(ids, answer, tokenizer)
    return ids, answer


def _text_before(
    tokenizer: TokenizerWrapper, messages: list[Message], turn: int, *, text: str, searched: int
) -> tuple[str | None, int]:
    """What precedes an answer in the rendered text, and from where to look for the next one.

    Templates may treat an answer inside a conversation differently from one at its end; then the
    answer's own words are looked for.
    """
    content = messages[turn]["content"].strip()
    before = chat_text(tokenizer, messages[:turn]) if turn else ""
    if turn and text.startswith(before):
        return before, len(before)
    at = text.find(content, searched)
    return (text[:at], at + len(content)) if at >= 0 else (None, searched)


def _end_of_turn(
    ids: list[int], start: int, tokenizer: TokenizerWrapper, messages: list[Message]
) -> int:
    """Index behind the token that ends the answer; behind its last words where none does."""
    upto = _common(ids, _ids(tokenizer, _render(tokenizer, messages)))
    ends = (at + 1 for at in range(start, len(ids)) if ids[at] in tokenizer.eos_token_ids)
    end = next(ends, None)
    return max(start, upto) if end is None else end


def _without_end(
    ids: list[int], answer: list[bool], tokenizer: TokenizerWrapper
) -> tuple[list[int], list[bool]]:
    """Leave off the end of a last turn that was cut: the model did not end it there."""
    end = len(answer) - answer[::-1].index(True) if True in answer else len(answer)
    if end and ids[end - 1] in tokenizer.eos_token_ids:
        end -= 1
    return ids[:end], answer[:end]


def _render(tokenizer: TokenizerWrapper, messages: list[Message]) -> str:
    """The conversation with nothing left open.

    Raises:
        ValueError: the template refuses it.
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


def _ids(tokenizer: TokenizerWrapper, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text; ``special`` adds the tokenizer's own, as at the start of a document."""
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _common(ids: list[int], prefix: list[int]) -> int:
    """How many ids two lists have in common at their beginnings."""
    for at, (left, right) in enumerate(zip(ids, prefix, strict=False)):
        if left != right:
            return at
    return min(len(ids), len(prefix))
