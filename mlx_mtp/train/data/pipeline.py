"""From nothing, or from a user's data, to sequences that a run trains on.

Three ways: the model writes conversations by itself (``distil``), it answers a user's data in its
own words (``continue_text``), or the data are taken as they are.  Text that the model wrote is kept
beside the adapter, and a run that was stopped while writing goes on where it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.data.clean import clean
from mlx_mtp.train.data.distil import continue_text, distil
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.data.records import Record, data_hash, read_jsonl
from mlx_mtp.train.data.sequences import encode_all, split
from mlx_mtp.train.data.sources import read_data
from mlx_mtp.train.data.topics import default_topics
from mlx_mtp.train.settings import NUM_RECORDS, DataSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TEMPLATE_TOKENS = 64  # what a chat template may add to a prompt and its answer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What there is to train on.

    Attributes:
        train, held_out: the two sides.
        data_hash: of the records, whichever side they are on.
        lines: what to tell the user about them.
    """

    train: list[TokenSequence]
    held_out: list[TokenSequence]
    data_hash: str
    lines: list[str]

    @property
    def longest(self) -> int:
        """TokenSequence of the longest sequence."""
        return max(len(each.ids) for each in (*self.train, *self.held_out))


def room_for(model: MTPModel, max_seq_length: int, num_draft_tokens: int) -> int:
    """Most ids of a sequence: the masks behind the last one must fit the context too.

    Raises:
        ValueError: there is no room for text.
    """
    if model.max_context is None:
        return max_seq_length
    room = min(max_seq_length, model.max_context - num_draft_tokens)
    if room <= num_draft_tokens:
        raise ValueError(
            f"{model.name} takes at most {model.max_context} positions, "
            f"too few for {num_draft_tokens} mask tokens"
        )
    return room


def expected_length(model: MTPModel, settings: DataSettings, *, max_seq_length: int) -> int:
    """TokenSequence of the longest sequence that is likely, before there is any text."""
    if settings.as_is:
        return max_seq_length
    return min(max_seq_length, sum(settings.token_limits(model)) + TEMPLATE_TOKENS)


def read_source(
    settings: DataSettings, *, output: Path, tell: Callable[[str], None] | None = None
) -> list[Record]:
    """Read a user's data, if there are any, before anything slow is done.

    Args:
        settings: where they are.
        output: the run's folder, which must not be among them.
        tell: called with a line for the user.

    Raises:
        ValueError: they cannot be read, or ``output`` lies in their folder.
    """
    if settings.data is None:
        return []
    source = Path(settings.data).expanduser()
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{output} lies in the data's folder {source}, where it would become data itself"
        )
    records = read_data(settings.data, progress=tell)
    if settings.num_records is not None and settings.num_records < len(records):
        chosen = random.Random(settings.seed).sample(range(len(records)), settings.num_records)
        records = [records[at] for at in sorted(chosen)]
    return records


def make_records(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: Sequence[Record],
    output: Path,
    settings: DataSettings,
    *,
    progress: Callable[[DistilProgress], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Record]:
    """Make the text to train on.

    Args:
        model: its own words are wanted.
        tokenizer: from ``load``.
        source: from ``read_source``.
        output: JSONL file for what the model writes; not touched where data are taken as they are.
        settings: the way to do it.
        progress: called as texts are finished.
        tell: called with a line for the user.

    Raises:
        ValueError: there is nothing to train on; the message says why.
        OSError: the file cannot be written; it holds whole lines.
    """
    if settings.as_is:
        return _cleaned(model, tokenizer, source, tell)
    prompt, answer = settings.token_limits(model)
    shared = {
        "seed": settings.seed,
        "max_prompt_tokens": prompt,
        "max_answer_tokens": answer,
        "batch_size": settings.batch_size,
    }
    if settings.data is not None:
        return continue_text(
            model, tokenizer, source, output, progress=progress, tell=tell, **shared
        )
    topics = settings.topics
    if topics is None:  # they begin messages to an assistant, not texts
        topics = default_topics() if tokenizer.has_chat_template else ()
    return distil(
        model,
        tokenizer,
        output,
        num_records=settings.num_records or NUM_RECORDS,
        topics=topics,
        progress=progress,
        tell=tell,
        **shared,
    )


def kept_records(path: Path, settings: DataSettings, *, wanted_hash: str) -> list[Record]:
    """Read text that is complete again, without a model.

    Raises:
        ValueError: it is not what the run began with.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run was begun with it")
    records = read_jsonl(path)
    if settings.data is None:
        records = records[: settings.num_records or NUM_RECORDS]
    if data_hash(records) != wanted_hash:
        raise ValueError(f"{path} was changed since the run began")
    return records


def prepare(
    records: Sequence[Record],
    tokenizer: TokenizerWrapper,
    *,
    max_seq_length: int,
    held_out: float,
) -> Prepared:
    """Encode records and divide them.

    Raises:
        ValueError: there is too little to train on.
    """
    encoded = encode_all(records, tokenizer, max_seq_length=max_seq_length)
    train, held = split(encoded.sequences, held_out=held_out)
    lines = [*encoded.lines(), f"{len(held)} of the sequences are held out for evaluation"]
    return Prepared(train=train, held_out=held, data_hash=data_hash(records), lines=lines)


def _cleaned(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: Sequence[Record],
    tell: Callable[[str], None] | None,
) -> list[Record]:
    if tell and not tokenizer.has_chat_template and any(each.messages for each in source):
        tell(f"{model.name} has no chat template: conversations become plain text")
    records, dropped = clean(source)
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if not records:
        raise ValueError(f"nothing of the data can be trained on (dropped: {why})")
    if tell and dropped:
        tell(f"{sum(dropped.values())} records dropped: {why}")
    return records
