"""Training text and its sequences.

Three methods: the model writes conversations by itself (``distil``), it answers the prompts of a
user's data (``continue_text``), or it is trained on the data as they are.  Generated text is saved
in the run's folder, and a run that was stopped while generating resumes there.
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
from mlx_mtp.train.data.contamination import (
    BENCHMARKS,
    Contamination,
    benchmarks,
    without_shared,
)
from mlx_mtp.train.data.distil import continue_text, distil
from mlx_mtp.train.data.distil_run import DistilProgress
from mlx_mtp.train.data.records import Record, data_hash, read_jsonl
from mlx_mtp.train.data.sequences import encode_all, split
from mlx_mtp.train.data.sources import read_data
from mlx_mtp.train.settings import NUM_RECORDS, DataSettings

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TEMPLATE_TOKENS = 64  # what a chat template may add to a prompt and its answer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Sequences of a run.

    Attributes:
        train, held_out: the two parts.
        data_hash: of all records.
        contamination: texts left out because they share words with benchmarks; None if the texts
            were not compared.
        lines: facts about them for the user.
    """

    train: list[TokenSequence]
    held_out: list[TokenSequence]
    data_hash: str
    contamination: Contamination | None
    lines: list[str]

    @property
    def longest(self) -> int:
        """TokenSequence of the longest sequence."""
        return max(len(sequence.ids) for sequence in (*self.train, *self.held_out))


def room_for(model: MTPModel, max_seq_length: int, num_draft_tokens: int) -> int:
    """Maximum length of a sequence: the masks after it must fit the context too.

    Raises:
        ValueError: the context is too short.
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
    settings: DataSettings, *, output: Path, log: Callable[[str], None] | None = None
) -> list[Record]:
    """Read a user's data, if any.

    Args:
        settings: of the text.
        output: the run's folder, which must not be inside the data's.
        log: called with a line for the user.

    Raises:
        ValueError: the data cannot be read, or contain ``output``.
    """
    if settings.data is None:
        return []
    source = Path(settings.data).expanduser()
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{output} is inside the data's folder {source}, where it would become data itself"
        )
    return sampled(read_data(settings.data, log=log), settings)


def sampled(records: list[Record], settings: DataSettings) -> list[Record]:
    """At most ``settings.num_records`` of the records, drawn at random, in their order."""
    if settings.num_records is None or settings.num_records >= len(records):
        return records
    chosen = random.Random(settings.seed).sample(range(len(records)), settings.num_records)
    return [records[index] for index in sorted(chosen)]


def make_records(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: Sequence[Record],
    output: Path,
    settings: DataSettings,
    *,
    progress: Callable[[DistilProgress], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Record]:
    """Generate the training text, or clean the data.

    Args:
        model: generates the text.
        tokenizer: from ``load``.
        source: from ``read_source``.
        output: JSONL file for generated text.
        settings: of the text.
        progress: called as texts are completed.
        log: called with a line for the user.

    Raises:
        ValueError: there is nothing to train on; the message has the reason.
        OSError: the file cannot be written; its lines are complete.
    """
    if settings.as_is:
        return _cleaned(model, tokenizer, source, log)
    prompt, answer = settings.token_limits(model)
    shared = {
        "seed": settings.seed,
        "max_prompt_tokens": prompt,
        "max_answer_tokens": answer,
        "batch_size": settings.batch_size,
        "backend": settings.backend,
    }
    if settings.data is not None:
        return continue_text(model, tokenizer, source, output, progress=progress, log=log, **shared)
    return distil(
        model,
        tokenizer,
        output,
        num_records=settings.num_records or NUM_RECORDS,
        topics=settings.topics or (),
        progress=progress,
        log=log,
        **shared,
    )


def saved_records(path: Path, settings: DataSettings, *, data_sha256: str) -> list[Record]:
    """Read the text of a resumed run.

    Raises:
        ValueError: it was changed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, with which the run began")
    records = read_jsonl(path)
    if settings.data is None:
        records = records[: settings.num_records or NUM_RECORDS]
    if data_hash(records) != data_sha256:
        raise ValueError(f"{path} was changed since the run began")
    return records


def prepare(
    records: Sequence[Record],
    tokenizer: TokenizerWrapper,
    *,
    max_seq_length: int,
    held_out: float,
    compare_with: Sequence[str] | None = BENCHMARKS,
) -> Prepared:
    """Leave out records that benchmarks have text of, encode the others and split them.

    Args:
        records: of the run.
        tokenizer: from ``load``.
        max_seq_length: maximum number of ids of a sequence.
        held_out: fraction to hold out.
        compare_with: names of sets of prompts; those that are not installed are reported.  None
            compares with none, as runs of former versions did.

    Raises:
        ValueError: there is too little to train on.
    """
    kept, contamination, lines = list(records), None, []
    if compare_with is not None:
        sets, lines = benchmarks(compare_with)
        kept, contamination = without_shared(records, sets)
        lines.append(str(contamination))
    encoded = encode_all(kept, tokenizer, max_seq_length=max_seq_length)
    train, test = split(encoded.sequences, held_out=held_out)
    lines += [*encoded.lines(), f"{len(test)} of the sequences are held out for evaluation"]
    return Prepared(
        train=train,
        held_out=test,
        data_hash=data_hash(records),
        contamination=contamination,
        lines=lines,
    )


def _cleaned(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    source: Sequence[Record],
    log: Callable[[str], None] | None,
) -> list[Record]:
    if log and not tokenizer.has_chat_template and any(record.messages for record in source):
        log(f"{model.name} has no chat template: conversations become plain text")
    records, dropped = clean(source)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if not records:
        raise ValueError(f"no record can be used for training (dropped: {reasons})")
    if log and dropped:
        log(f"{sum(dropped.values())} records dropped: {reasons}")
    return records
