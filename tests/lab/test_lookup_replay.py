"""Replays of lookup count the steps that the decoder takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation.greedy_texts import GreedyText
from mlx_mtp.lab.lookup_replay import replay_text, replay_texts
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.simulate.replay import StepCosts
from tests.helpers.tiny import tiny_base

CURVE = CostCurve(rows=(1, 8, 32), contexts=(0,), forward_ms=((1.0, 1.4, 4.0),), draft_ms=(0.0,))


def knowing() -> Speculation:
    return Speculation(LiveCosts(CURVE, learns=False), Acceptance.unknown(0))


@pytest.mark.parametrize("num", [2, 40, 64])
def test_a_replay_takes_the_steps_of_the_decoder(num: int) -> None:
    model = MTPModel(tiny_base("llama"), name="tiny")
    prompt = [3, 17, 42, 8, 29, 55, 1, 33, 20]
    plain = [t for step in decode(model, prompt, layout="plain", max_tokens=num)
             for t in step.tokens]  # fmt: skip
    prompt = [*prompt, *plain[: num // 2], 5, *prompt]  # a part of the answer is in the prompt
    steps = list(decode(model, prompt, max_tokens=num, speculation=knowing()))
    answer = [token for step in steps for token in step.tokens]
    tally = replay_text(GreedyText("a", "chat", prompt, answer), knowing(), StepCosts(CURVE))
    assert (tally.tokens, tally.clocked) == (num, num - 1)
    assert tally.steps == pytest.approx(len(steps), abs=1)  # the decoder has less room at the end
    assert tally.rows >= tally.clocked and tally.ms >= tally.steps - 1


def test_speed_follows_the_repetition_of_a_kind() -> None:
    line = list(range(10, 40))
    copy = GreedyText("a", "copy", [*line, 1, 2, 3], line * 2)
    other = replace(copy, id="b", kind="other", answer=list(range(100, 160)))
    figures = replay_texts([copy, other], CURVE)
    assert figures["other"] == {"tokens_per_step": 1.0, "speedup": 1.0}
    assert figures["copy"]["tokens_per_step"] > 4 and figures["copy"]["speedup"] > 2
