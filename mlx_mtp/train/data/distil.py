"""Training text that the model generates itself.

``distil`` needs no data.  A model with a chat template answers messages that are made by
construction (``prompts``), greedily by default; some of them are beginnings, which it first
continues as the user, at temperature 1 (Magpie, arXiv 2406.08464).  A model without one continues
its own beginnings.  ``continue_text`` takes the user messages, or the beginnings of texts, from
existing records.

Records are appended to a JSONL file as they are completed; a run that was interrupted can be
resumed and ends with the same file (``distil_run``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_mtp.generate import chat_text
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.text.ending import LOOP, STOP
from mlx_mtp.train.data.clean import why_degenerate
from mlx_mtp.train.data.distil_run import (
    CONTINUE,
    MAGPIE,
    PLAIN,
    PROMPTS,
    DistilProgress,
    Job,
    Run,
    Settings,
    around_user,
    decoded,
)
from mlx_mtp.train.data.generators import AUTO, choose_generator
from mlx_mtp.train.data.prompts import DrawnPrompt, draw_prompt
from mlx_mtp.train.data.records import Record, data_hash
from mlx_mtp.train.data.sequences import token_ids

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

OPEN_END = "..."
MAX_TRIES = 20  # candidates per record before giving up
# First words of plain texts, the kinds in turn; "" leaves them to the model.
_OPENINGS = {
    "prose": ("", "The ", "In ", "A ", "When ", '"', "I ", "Once upon a time, "),
    "code": ("def ", "import ", "class ", "#include <", "function ", "class A {", "SELECT ", "<"),
    "lists": ("How to ", "1. ", "# ", "- ", "Ingredients:\n", "Step 1: ", "| ", "Table 1: "),
    "questions": ("Question: ", "Q: ", "What is ", "Why do ", "Problem: ", "Dear ", "To: ", "A: "),
    "languages": ("El ", "Die ", "La ", "Le ", "Il ", "Os ", "В ", "日本"),
}


def distil(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    output: Path,
    *,
    num_records: int,
    topics: Sequence[str] = (),
    seed: int = 0,
    max_prompt_tokens: int = 256,
    max_answer_tokens: int = 512,
    batch_size: int | None = None,
    prompt_temp: float = 1.0,
    answer_temp: float = 0.0,
    backend: str = AUTO,
    progress: Callable[[DistilProgress], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Record]:
    """Generate conversations, or plain text if the model has no chat template.

    Args:
        model: from ``load``; an adapter of it is not used.
        tokenizer: from ``load``.
        output: JSONL file; its records count.
        num_records: number of records; may be raised later.
        topics: used in turn instead of constructed messages, in a system prompt for the user
            message only; a topic that ends in "..." is the beginning of the user message itself,
            which small models follow better.
        seed: random seed.
        max_prompt_tokens: longer user messages are dropped.
        max_answer_tokens: longer answers are truncated and marked ``cut``.
        batch_size: number of sequences generated together; None is the generator's own.
        prompt_temp: temperature of the user messages, with top-p 0.95.
        answer_temp: temperature of the answers; 0 is greedy.
        backend: what generates; see ``choose_generator``.
        progress: called as texts are completed.
        log: called with a line for the user.

    Returns:
        The records of the file, at most ``num_records``; fewer when too many were dropped.

    Raises:
        ValueError: a setting is out of range or differs from the file's, the template accepts no
            system prompt for a topic, or no record could be generated.
        OSError: the file cannot be written; its lines are complete.
    """
    if num_records < 1:
        raise ValueError(f"num_records must be at least 1, got {num_records}")
    plain = not tokenizer.has_chat_template
    generator = choose_generator(model, backend, max_tokens=max_prompt_tokens + max_answer_tokens)
    settings = Settings(
        method=PLAIN if plain else MAGPIE if topics else PROMPTS,
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        batch_size=generator.batch_size if batch_size is None else batch_size,
        prompt_temp=prompt_temp,
        answer_temp=answer_temp,
        topics=list(topics),
        generator=generator.name,
    )
    if plain and log:
        log(f"{model.name} has no chat template: it continues plain text instead")
    with Run(model, tokenizer, output, settings, generator=generator, progress=progress) as run:
        run.total = num_records
        draw = _plain_beginnings if plain else _user_messages
        for group in itertools.count(run.first_group):
            first = group * run.group_size
            if len(run.records) >= num_records or first >= MAX_TRIES * num_records:
                break
            run.fill(first, draw(run, range(first, first + run.group_size)), _complete)
        return run.result(log)


def continue_text(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    records: Sequence[Record],
    output: Path,
    *,
    seed: int = 0,
    max_prompt_tokens: int = 512,
    max_answer_tokens: int = 512,
    batch_size: int | None = None,
    answer_temp: float = 0.0,
    backend: str = AUTO,
    progress: Callable[[DistilProgress], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> list[Record]:
    """Generate answers to conversations, and continuations of texts.

    Of a conversation the user messages and the system prompt are kept and every answer is the
    model's; of a text the first half is kept, at most ``max_prompt_tokens``.  Other arguments, the
    result and the errors are those of ``distil``.
    """
    if not records:
        raise ValueError("there are no records to continue")
    generator = choose_generator(model, backend, max_tokens=max_prompt_tokens + max_answer_tokens)
    settings = Settings(
        method=CONTINUE,
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        batch_size=generator.batch_size if batch_size is None else batch_size,
        prompt_temp=0.0,
        answer_temp=answer_temp,
        topics=[],
        generator=generator.name,
        data=data_hash(records),
    )
    if log and not tokenizer.has_chat_template and any(record.messages for record in records):
        log(f"{model.name} has no chat template: conversations are continued as plain text")
    with Run(model, tokenizer, output, settings, generator=generator, progress=progress) as run:
        run.total = len(records)
        for first in range(run.first_group * run.group_size, len(records), run.group_size):
            numbers = range(first, min(first + run.group_size, len(records)))
            jobs = [_job(run, number, records[number]) for number in numbers]
            run.fill(first, [job for job in jobs if job is not None], _complete)
        return run.result(log)


def _user_messages(run: Run, numbers: range) -> list[Job]:
    """The user's part of conversations; the model continues the messages that are incomplete."""
    topics, longest = run.settings.topics, run.settings.max_prompt_tokens
    jobs, texts = [], {}  # what is around a message that the model writes, by number
    for number in numbers:
        if topics:
            topic = topics[number % len(topics)]
            texts[number] = _around(run, topic), {"topic": topic}
            continue
        prompt = draw_prompt(run.settings.seed, number)
        if prompt.is_complete and len(token_ids(run.tokenizer, prompt.first)) > longest:
            run.drop("prompt: too long")
        elif prompt.is_complete:
            jobs.append(_prompt_job(run, number, prompt))
        else:
            texts[number] = _around(run, prompt.first + OPEN_END), {"kind": prompt.kind}
    written = list(texts)
    prompts = [
        token_ids(run.tokenizer, before + opening) for (before, opening, _), _ in texts.values()
    ]
    for index, ids, reason in run.generate(prompts, written, part="prompt"):
        (_, opening, end), meta = texts[written[index]]
        text = opening + decoded(run.tokenizer, ids)
        text = (text.split(end)[0] if end else text).strip()
        defect = why_degenerate(text) or ("unreadable" if "\ufffd" in text else None)
        if defect or reason != STOP:
            run.drop(f"prompt: {defect or 'too long'}")
            continue
        message = {"role": "user", "content": text}
        jobs.append(Job(written[index], messages=[message], meta=meta))
    return sorted(jobs, key=lambda job: job.number)


def _prompt_job(run: Run, number: int, prompt: DrawnPrompt) -> Job:
    """A conversation that begins with a complete message."""
    messages = [{"role": "user", "content": prompt.first}]
    if prompt.system is not None and run.accepts_system:
        messages.insert(0, {"role": "system", "content": prompt.system})
    return Job(number, messages, later=list(prompt.later), meta={"kind": prompt.kind})


def _around(run: Run, topic: str) -> tuple[str, str, str]:
    """Text before a user message, the beginning of the message, and the text after it."""
    if topic.endswith(OPEN_END):
        before, after = around_user(run.tokenizer)
        return before, topic.removesuffix(OPEN_END).rstrip(), after
    before, after = around_user(run.tokenizer, topic)
    return before, "", after


def _plain_beginnings(run: Run, numbers: range) -> list[Job]:
    """Generate beginnings of texts with a model that has no chat template."""
    tokenizer, topics = run.tokenizer, run.settings.topics
    bos = tokenizer.bos_token_id
    openings = [(topic, _heading(topic)) for topic in topics] or _mixed_openings()
    kinds, chosen = zip(*(openings[number % len(openings)] for number in numbers), strict=True)
    if bos is None:  # an empty beginning needs a BOS token
        chosen = [text or "The " for text in chosen]
    prompts = [
        token_ids(tokenizer, text, special=True) if text else [int(bos or 0)] for text in chosen
    ]
    jobs = []
    for index, ids, reason in run.generate(prompts, numbers, part="prompt"):
        text = chosen[index] + decoded(tokenizer, ids).rstrip("\ufffd")
        if reason == STOP or not text.strip() or "\ufffd" in text:
            run.drop("prompt: unreadable" if "\ufffd" in text else "prompt: too short")
        else:
            meta = {"topic" if topics else "kind": kinds[index], "beginning": len(text)}
            jobs.append(Job(numbers[index], text=text, meta=meta))
    return sorted(jobs, key=lambda job: job.number)


def _mixed_openings() -> list[tuple[str, str]]:
    """First words of texts with their kinds, one of each kind after the other."""
    columns = ([(kind, text) for text in texts] for kind, texts in _OPENINGS.items())
    return [pair for row in zip(*columns, strict=True) for pair in row]


def _heading(topic: str) -> str:
    """A topic as the beginning of a plain text."""
    is_open = topic.endswith(OPEN_END)
    return topic.removesuffix(OPEN_END).rstrip() if is_open else f"{topic}\n\n"


def _job(run: Run, number: int, record: Record) -> Job | None:
    """The part of a record that the model continues; None if there is no user message."""
    tokenizer = run.tokenizer
    if record.messages is not None and tokenizer.has_chat_template:
        users = [item["content"] for item in record.messages if item["role"] == "user"]
        system = [dict(item) for item in record.messages[:1] if item["role"] == "system"]
        if not users:
            run.drop("prompt: no user message")
            return None
        job = Job(number, [*system, {"role": "user", "content": users[0]}], later=users[1:])
        if len(token_ids(tokenizer, users[0])) > run.settings.max_prompt_tokens:
            run.drop("prompt: too long")
            return None
        return job
    text = record.text if record.text is not None else record.prompt
    ids = token_ids(tokenizer, text)
    if record.text is not None:
        ids = ids[: max(1, len(ids) // 2)]
    text = decoded(tokenizer, ids[: run.settings.max_prompt_tokens]).rstrip("\ufffd")
    return Job(number, text=text, meta={"given": len(text)})


def _complete(run: Run, jobs: list[Job]) -> Generator[Record, None, None]:
    """Generate the answers, in rounds for conversations of several turns."""
    while jobs:
        fitting: list[tuple[Job, list[int]]] = []
        for job in jobs:
            ids, reason = _job_ids(run, job)
            if reason is None:
                fitting.append((job, ids))
            elif job.is_answered:
                yield _record(run, job)  # without its last message
            else:
                run.drop(f"prompt: {reason}")
        jobs = []
        numbers = [job.number for job, _ in fitting]
        prompts = [ids for _, ids in fitting]
        for index, ids, reason in run.generate(prompts, numbers, part="answer"):
            job, stopped = fitting[index][0], reason == STOP
            answer = _answer_text(run, ids, stopped=stopped)
            if answer is None:
                continue
            job.add_answer(answer, cut=not stopped)
            if reason == LOOP:
                job.meta["loop"] = True
            if job.later and stopped:
                job.ask(job.later.pop(0))
                jobs.append(job)
            else:
                yield _record(run, job)


def _job_ids(run: Run, job: Job) -> tuple[list[int], str | None]:
    """Ids that the model continues, and the reason if it cannot."""
    tokenizer, context = run.tokenizer, run.model.max_context
    if job.text is not None:
        ids = token_ids(tokenizer, job.text, special=True)
    else:
        try:
            ids = token_ids(tokenizer, chat_text(tokenizer, job.messages))
        except ValueError:
            return [], "rejected by the chat template"
    if context is not None and len(ids) + run.settings.max_answer_tokens > context:
        return [], "too long"
    return ids, None if ids else "empty"


def _answer_text(run: Run, ids: list[int], *, stopped: bool) -> str | None:
    """The text of an answer; None, and counted as dropped, if it is unusable."""
    text = decoded(run.tokenizer, ids)
    text = text if stopped else text.rstrip("\ufffd")
    reason = why_degenerate(text)
    if run.specials.intersection(ids) - set(run.tokenizer.eos_token_ids):
        reason = "special token"
    elif "\ufffd" in text:
        reason = "unreadable"
    if reason:
        run.drop(f"answer: {reason}")
    return None if reason else text


def _record(run: Run, job: Job) -> Record:
    meta = {"number": job.number, **job.meta} | ({"cut": True} if job.cut else {})
    source = run.settings.method
    if job.text is not None:
        return Record(text=job.text, source=source, meta=meta)
    messages = job.messages if job.messages[-1]["role"] == "assistant" else job.messages[:-1]
    return Record(tuple(messages), source=source, meta=meta)
