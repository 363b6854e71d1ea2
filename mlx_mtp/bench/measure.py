"""The schedule of a benchmark: every prompt is answered in each mode before the next prompt begins.

The modes take turns in going first, so that disturbances affect all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mlx_mtp.bench.contexts import Question
from mlx_mtp.bench.machine_state import PowerMeter
from mlx_mtp.bench.modes import Mode
from mlx_mtp.bench.runs import Answer, Check, Timing, num_repeated, time_answer
from mlx_mtp.bench.settings import Settings
from mlx_mtp.terminal import progress

_NAP_S = 0.1


@dataclass
class Measurement:
    """Results of a measurement.

    Attributes:
        answers: in the order of their measurement; every prompt is answered in all modes.
        interrupted: whether the measurement was interrupted.
        warmups: number of answers that were not counted.
        seconds: duration of the measurement, including warm-ups and pauses.
    """

    answers: list[Answer] = field(default_factory=list)
    interrupted: bool = False
    warmups: int = 0
    seconds: float = 0.0


def schedule(num_questions: int, num_modes: int, repeats: int) -> Iterator[tuple[int, int, int]]:
    """Yield the indices (repeat, question, mode) of all answers, in order.

    The mode that goes first moves on by one from prompt to prompt and from pass to pass.
    """
    for repeat in range(repeats):
        for question in range(num_questions):
            for turn in range(num_modes):
                yield repeat, question, (question + repeat + turn) % num_modes


def measure(
    questions: Sequence[Question],
    modes: Sequence[Mode],
    settings: Settings,
    *,
    power: PowerMeter | None = None,
    check: Check = lambda: None,
) -> Measurement:
    """Answer all questions in all modes.

    Args:
        questions: the prompts with their contexts.
        modes: the modes; every question is answered in each of them.
        settings: repeats, warm-ups and pauses.
        power: measures energy; None for no energy.
        check: called after every step; if it raises KeyboardInterrupt, the measurement ends with
            the results so far.
    """
    measurement = Measurement()
    began = time.perf_counter()
    pending: list[Answer] = []  # answers to one question, until all modes have answered it
    total = settings.repeats * len(questions) * len(modes)
    order = schedule(len(questions), len(modes), settings.repeats)
    try:
        measurement.warmups = _warm_up(questions, modes, settings.warmup, check)
        bar = progress(order, total=total, desc="Measuring", unit="answer")
        for number, (repeat, question, mode) in enumerate(bar):
            _rest(settings.cooldown_s if number else 0.0, check)
            answer = _answer(questions[question], modes[mode], repeat, number, power, check)
            pending.append(answer)
            if len(pending) == len(modes):
                measurement.answers += pending
                pending = []
    except KeyboardInterrupt:
        measurement.interrupted = True
    measurement.seconds = time.perf_counter() - began
    return measurement


def _answer(
    question: Question,
    mode: Mode,
    repeat: int,
    number: int,
    power: PowerMeter | None,
    check: Check,
) -> Answer:
    if power:
        power.joules()  # energy used before does not count
    timing = _time(question, mode, check)
    return Answer(
        prompt=question.prompt.id,
        kind=question.prompt.kind,
        context=question.context,
        mode=mode.name,
        repeat=repeat,
        number=number,
        prompt_tokens=len(question.ids),
        timing=timing,
        repeated=num_repeated(timing.ids, question.ids),
        joules=power.joules() if power else None,
    )


def _time(question: Question, mode: Mode, check: Check) -> Timing:
    return time_answer(lambda: mode.begin(question.ids, check), check=check)


def _warm_up(questions: Sequence[Question], modes: Sequence[Mode], count: int, check: Check) -> int:
    """Answer the first question of each context in each mode; returns the number of answers."""
    firsts = {question.context: question for question in reversed(questions)}
    order = [(q, mode) for q in firsts.values() for mode in modes for _ in range(count)]
    for question, mode in progress(order, desc="Warming up", unit="answer"):
        _time(question, mode, check)
    return len(order)


def _rest(seconds: float, check: Check) -> None:
    """Sleep, but stop at Ctrl-C."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(min(left, _NAP_S))
        check()
