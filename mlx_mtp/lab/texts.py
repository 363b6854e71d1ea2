"""Conversations of a model from prompts and a seed: ``python -m mlx_mtp.lab.texts --output FILE``.

Without ``--prompts`` the messages are made by construction, as in ``mlx-mtp train``; a run that was
interrupted is resumed.  ``--prompts FILE`` answers stored messages instead, and ``--ids FILE``
takes the messages of texts that are stored as ids.  ``--store FILE`` writes the users' messages and
system prompts alone, without those that share words with benchmarks.  Stored files are JSONL,
compressed if their name ends in ``.xz``; ``xz -d`` makes data for ``mlx-mtp train --data``.

The same seed on the same kind of machine gives the same texts.  Stored messages are answered in
other batches, and other machines round differently, so a text may differ from where two tokens were
nearly tied.
"""

from __future__ import annotations

import json
import lzma
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.cli.options import MODEL, option
from mlx_mtp.evaluation.jsonl import check_object, read_lines
from mlx_mtp.generate import chat_text
from mlx_mtp.lab.commands import command, machine_info
from mlx_mtp.storage.files import write_atomically
from mlx_mtp.terminal import Status
from mlx_mtp.train.data.contamination import benchmarks, without_shared
from mlx_mtp.train.data.distil import continue_text, distil
from mlx_mtp.train.data.distil_run import DistilProgress, around_user
from mlx_mtp.train.data.generators import AUTO, MLX, TORCH
from mlx_mtp.train.data.records import Message, Record, parse_record
from mlx_mtp.train.data.sequences import encode_all

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_FILE = click.Path(path_type=Path, dir_okay=False)
_LONGEST = 1 << 20  # ids of a text, for counting


def users_part(record: Record) -> Record:
    """The messages of a conversation that the model did not write.

    A user's last message without an answer is left out.
    """
    messages = list(record.messages or ())
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    kept = tuple(message for message in messages if message["role"] != "assistant")
    meta = {key: record.meta[key] for key in ("number", "kind") if key in record.meta}
    return Record(kept, meta=meta)


def write_prompts(path: Path, records: Sequence[Record]) -> None:
    """Store the users' part of conversations.

    Raises:
        OSError: the file cannot be written.
    """
    lines = (json.dumps(users_part(record).to_dict(), ensure_ascii=False) for record in records)
    data = "".join(line + "\n" for line in lines).encode()
    write_atomically(path, [lzma.compress(data, preset=9) if path.suffix == ".xz" else data])


def read_prompts(path: Path) -> list[Record]:
    """Read what ``write_prompts`` stored, or other conversations.

    Raises:
        ValueError: the file is damaged, or contains no conversation.
        OSError: it cannot be read.
    """
    records = read_lines(_content(path), lambda values, _: parse_record(values), name=str(path))
    if not records:
        raise ValueError(f"{path} contains no conversations")
    return records


def read_ids(path: Path, tokenizer: TokenizerWrapper) -> list[Record]:
    """Read conversations that are stored as ids: objects ``{"ids": [...]}``.

    Raises:
        ValueError: a line is bad, or is not rendered by a chat template with ChatML's borders.
        OSError: the file cannot be read.
    """

    def parse(values: Any, number: int) -> Record:
        ids = check_object(values).get("ids")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError("expected a list of numbers under 'ids'")
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return Record(_messages(tokenizer, text), meta={"number": number})

    return read_lines(_content(path), parse, name=str(path))


def _messages(tokenizer: TokenizerWrapper, text: str) -> tuple[Message, ...]:
    """The messages of a rendered conversation, without the template's own system prompt."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", text, re.DOTALL)
    messages = [{"role": role, "content": content} for role, content in turns]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the text is not a conversation in ChatML")
    if messages[0]["role"] == "system" and text.startswith(around_user(tokenizer)[0]):
        messages = messages[1:]
    if not text.startswith(chat_text(tokenizer, messages[:1]).split(messages[0]["content"])[0]):
        raise ValueError("the model's chat template does not give this text")
    return tuple(messages)


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        return lzma.decompress(data) if path.suffix == ".xz" else data
    except lzma.LZMAError:
        raise ValueError(f"{path} is damaged, or not compressed by xz") from None


@command
@MODEL
@option("--output", type=_FILE, help="JSONL file for the conversations.")
@option("--num", default=1000, help="Number of conversations.")
@option("--seed", default=0, help="Random seed of the messages.")
@option("--prompts", type=_FILE, help="Answer the messages in this file.")
@option("--ids", type=_FILE, multiple=True, help="File of texts as ids; repeatable.")
@option("--store", type=_FILE, help="Write the users' messages to this file.")
@option("--max-answer-tokens", default=512, help="Maximum number of tokens of an answer.")
@option("--batch-size", type=int, help="Texts generated together.", show_default="by memory")
@option("--backend", type=click.Choice((AUTO, MLX, TORCH)), default=AUTO, help="What generates.")
def main(
    *,
    model: str | None,
    output: Path | None,
    num: int,
    seed: int,
    prompts: Path | None,
    ids: Sequence[Path],
    store: Path | None,
    **options: Any,
) -> dict[str, Any]:
    """Write conversations of a model, or store the messages of its users."""
    from mlx_mtp.loading import load

    if bool(ids) == (output is not None) or (ids and (prompts or store is None)):
        raise ValueError("expected --output, or --ids with --store")
    given = read_prompts(prompts) if prompts else []
    loaded, tokenizer = load(model, mtp=False, kernels=False)
    if output is None:
        records, facts = [record for path in ids for record in read_ids(path, tokenizer)], {}
    else:
        progress = _Counter()
        with progress.status:
            if given:
                records = continue_text(
                    loaded, tokenizer, given, output, seed=seed, progress=progress, **options
                )
            else:
                records = distil(
                    loaded,
                    tokenizer,
                    output,
                    num_records=num,
                    seed=seed,
                    progress=progress,
                    **options,
                )
        encoded = encode_all(records, tokenizer, max_seq_length=_LONGEST)
        saved = json.loads(output.with_suffix(".settings.json").read_text(encoding="utf-8"))
        facts = progress.facts() | {
            "generator": saved["generator"],
            "answer_tokens": sum(sequence.num_answer_tokens for sequence in encoded.sequences),
        }
    sets, missing = benchmarks()
    kept, contamination = without_shared(records, sets)
    print("\n".join([*missing, str(contamination)]))
    if store is not None:
        write_prompts(store, kept)
    return {
        "records": len(records),
        "turns": sum(len(record.answers) for record in records),
        "kinds": dict(Counter(str(record.meta.get("kind", "")) for record in records)),
        "loops_cut": sum(bool(record.meta.get("loop")) for record in records),
        "shared_with_benchmarks": dict(contamination.counts),
        **facts,
    } | machine_info()


class _Counter:
    """Counts tokens and dropped candidates, and shows the progress."""

    def __init__(self) -> None:
        self.status = Status("Generating ...", delay_s=0)
        self._started = time.perf_counter(), time.process_time()
        self._last: DistilProgress | None = None

    def __call__(self, progress: DistilProgress) -> None:
        if self._last is None:  # loading and building the model are not counted
            self._started = time.perf_counter(), time.process_time()
        self._last = progress
        seconds = time.perf_counter() - self._started[0]
        speed = f"{progress.num_tokens / max(seconds, 1e-9):.0f} tokens/s"
        self.status.update(f"Generating {progress.num_records}/{progress.total}, {speed} ...")

    def facts(self) -> dict[str, Any]:
        """Tokens per second of wall clock and of processor time, and what was dropped."""
        wall = time.perf_counter() - self._started[0]
        cpu = time.process_time() - self._started[1]
        tokens = 0 if self._last is None else self._last.num_tokens
        return {
            "generated_tokens": tokens,
            "seconds": round(wall, 1),
            "tokens_per_s": round(tokens / wall, 1),
            "tokens_per_cpu_s": round(tokens / cpu, 1),
            "dropped": {} if self._last is None else dict(self._last.dropped),
        }


if __name__ == "__main__":
    main()
