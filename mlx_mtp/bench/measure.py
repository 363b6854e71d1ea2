"""The schedule of a benchmark: every prompt is answered in each mode before the next prompt begins.

The modes take turns in going first, so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlx_mtp.bench.contexts import Question
from mlx_mtp.bench.machine_state import PowerMeter
from mlx_mtp.bench.modes import Mode
from mlx_mtp.bench.runs import Answer, Check, Timing, num_repeated, timed
from mlx_mtp.bench.settings import Settings

_NAP_S = 0.1


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        answers: in the order in which they came; every prompt that occurs has all its modes.
        interrupted: whether it was broken off.
        warmups: answers that were not counted.
        seconds: of everything, warm-ups and rests included.
    """

    answers: list[Answer] = field(default_factory=list)
    interrupted: bool = False
    warmups: int = 0
    seconds: float = 0.0


def schedule(num_questions: int, num_modes: int, repeats: int) -> Iterator[tuple[int, int, int]]:
    """All (repeat, question, mode) by number, in order.

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
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Answer all questions in all modes.

    Args:
        questions: what is asked.
        modes: how; every question is answered in each.
        settings: how often.
        power: reads energy; None leaves it out.
        check: called after every step; KeyboardInterrupt out of it ends with what is there.
        say: called with a line about what is going on.
    """
    found = Measurement()
    began = time.perf_counter()
    turn: list[Answer] = []
    try:
        found.warmups = _warm_up(questions, modes, settings.warmup, check=check, say=say)
        total = settings.repeats * len(questions) * len(modes)
        clock = time.perf_counter()
        for number, (repeat, at, which) in enumerate(
            schedule(len(questions), len(modes), settings.repeats)
        ):
            say(_line(number, total, time.perf_counter() - clock))
            _rest(settings.cooldown_s if number else 0.0, check)
            turn.append(_answer(questions[at], modes[which], repeat, number, power, check))
            if len(turn) == len(modes):
                found.answers += turn
                turn = []
    except KeyboardInterrupt:
        found.interrupted = True
    found.seconds = time.perf_counter() - began
    return found


def _answer(
    question: Question,
    mode: Mode,
    repeat: int,
    number: int,
    power: PowerMeter | None,
    check: Check,
) -> Answer:
    if power:
        power.joules()  # what was taken before does not count
    timing = _timed(question, mode, check)
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


def _timed(question: Question, mode: Mode, check: Check) -> Timing:
    return timed(lambda: mode.begin(question.ids, check), check=check)


def _warm_up(
    questions: Sequence[Question],
    modes: Sequence[Mode],
    count: int,
    *,
    check: Check,
    say: Callable[[str], None],
) -> int:
    """Answer the first question of each context in each mode; returns how many answers it were."""
    firsts = {each.context: each for each in reversed(questions)}
    done = 0
    for question in firsts.values():
        for mode in modes:
            for _ in range(count):
                say(f"Warming up: {mode.name} behind {question.context} tokens of text")
                _timed(question, mode, check)
                done += 1
    return done


def _rest(seconds: float, check: Check) -> None:
    """Sleep, but not through Ctrl-C."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(min(left, _NAP_S))
        check()


def _line(done: int, total: int, seconds: float) -> str:
    if done == 0:
        return f"Measured 0/{total}"
    left = seconds / done * (total - done)
    return f"Measured {done}/{total}, about {left / 60:.0f} min left"
