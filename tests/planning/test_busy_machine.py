"""Costs that were measured on a busy machine do not stick: measured again, disproved, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.calibration.step_timer import Round, StepBench
from mlx_mtp.calibration.stored_costs import (
    MOST_MEASUREMENTS,
    SPECULATIONS,
    curve_lines,
    doubt_disproved,
    kept_costs,
    speculation_for,
)
from mlx_mtp.chat import Conversation
from mlx_mtp.cli.main import cli
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.generate import stream_generate
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.costs import UNMEASURED, CostCurve, LiveCosts
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, save_tiny_pair, tiny_mtp

ROW_MS, PLAIN_MS = 1.0, 9.0  # a step takes 9 ms and 1 ms a row


def true_ms(rows: int) -> float:
    return PLAIN_MS + ROW_MS * rows


class Machine:
    """How busy it is, and what steps are measured to take there.

    Attributes:
        slower: by which steps are slowed down.
        shows: whether they can be seen to wait.
        measured: contexts at which steps were measured.
    """

    def __init__(self) -> None:
        self.slower, self.shows, self.measured = 1.0, True, 0

    def round(self, layout: StepLayout) -> Round:
        ms = true_ms(layout.num_rows) * self.slower
        return Round(ms, ms - ms / self.slower if self.shows else 0.0)


@pytest.fixture(scope="module")
def weights() -> MTPModel:
    return tiny_mtp(
        "llama", k=2, num_hidden_layers=1, vocab_size=BYTE_VOCAB, max_position_embeddings=512
    )


@pytest.fixture
def machine(monkeypatch, tmp_path: Path) -> Machine:
    made, init = Machine(), StepBench.__init__
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(StepBench, "_round", lambda _, layout: made.round(layout))

    def counted(bench: StepBench, model: MTPModel, context: int) -> None:
        made.measured += context == 64
        init(bench, model, context)

    monkeypatch.setattr(StepBench, "__init__", counted)
    return made


@pytest.fixture
def started(weights: MTPModel, machine: Machine) -> Callable[[], MTPModel]:
    """Starts the program anew: a model whose planner knows nothing yet."""
    del machine

    def start() -> MTPModel:
        SPECULATIONS.forget(weights)
        return weights

    return start


def plain_ms(curve: CostCurve | None) -> float:
    assert curve is not None
    return curve.forward_ms[0][0]


def decode_plainly(model: MTPModel, *, steps: int, slower: float = 1.0) -> None:
    """Plain steps, as the decoder tells the planner of them."""
    known = SPECULATIONS.get(model)
    assert known is not None
    for _ in range(steps):
        known.costs.observe(rows=1, largest_group=0, context=70, ms=slower * true_ms(1))


class TestAMachineThatIsBusyAtFirst:
    def test_measures_again_at_the_next_start_and_then_no_more(self, machine, started) -> None:
        machine.slower, told = 3.0, []
        first = kept_costs(started())
        assert first and first.disturbed and plain_ms(first) == 3 * true_ms(1)
        assert kept_costs(started(), measure=False) == first  # used meanwhile
        machine.slower = 1.0
        second = kept_costs(started(), say=told.append)
        assert second and not second.disturbed and plain_ms(second) == true_ms(1)
        assert "busy" in told[0] and "measuring again" in told[0]
        assert kept_costs(started()) == second and machine.measured == 2

    def test_that_stays_busy_measures_a_few_times_and_takes_the_least(
        self, machine, started
    ) -> None:
        for slower in (4.0, 5.0, 3.0, 1.0, 1.0):
            machine.slower = slower
            curve = kept_costs(started())
        assert machine.measured == MOST_MEASUREMENTS == 3
        assert curve and curve.disturbed and plain_ms(curve) == 3 * true_ms(1)
        again = kept_costs(started(), again=True)  # but when asked
        assert again and not again.disturbed and plain_ms(again) == true_ms(1)

    def test_tells_it_where_the_curve_is_shown(self, machine, started) -> None:
        machine.slower = 3.0
        curve = kept_costs(started())
        assert curve and curve_lines(curve)[-1] == curve.doubt != ""
        machine.slower = 1.0
        curve = kept_costs(started())
        assert curve and curve.doubt == "" and "busy" not in "\n".join(curve_lines(curve))

    def test_asked_in_vain_keeps_what_was_better(self, machine, started) -> None:
        good = kept_costs(started())
        machine.slower = 3.0
        worse = kept_costs(started(), again=True)
        assert good and worse == good and machine.measured == 2


class TestALoadThatCannotBeSeen:
    @pytest.fixture
    def model(self, machine: Machine, started) -> MTPModel:
        """Measured amid a load that slowed all alike and that no waiting showed."""
        machine.slower, machine.shows = 3.0, False
        model = started()
        assert not speculation_for(model).costs.curve.disturbed
        machine.slower = 1.0
        return model

    def test_is_found_by_the_steps_and_measured_before_the_next_answer(
        self, machine, model
    ) -> None:
        told: list[str] = []
        known = speculation_for(model)
        known.acceptance.observe(2, 2)
        chances = known.acceptance.chances()
        decode_plainly(model, steps=15)
        assert not doubt_disproved(model) and machine.measured == 1
        decode_plainly(model, steps=1)
        assert doubt_disproved(model)
        again = speculation_for(model, measure=False, say=told.append)
        assert again is known and machine.measured == 2 and "busy" in told[0]
        assert plain_ms(known.costs.curve) == true_ms(1) and not known.costs.is_disproved
        assert list(known.acceptance.chances()) == list(chances)
        decode_plainly(model, steps=50)
        assert speculation_for(model) is known and machine.measured == 2

    def test_or_at_the_next_start(self, machine, model, started) -> None:
        decode_plainly(model, steps=16)
        doubt_disproved(model)
        assert speculation_for(started(), measure=False).costs.curve.disturbed
        assert machine.measured == 1
        assert plain_ms(speculation_for(started()).costs.curve) == true_ms(1)
        assert machine.measured == 2

    def test_is_measured_by_nobody_who_was_not_asked_to(self, machine, model, started) -> None:
        model = started()
        speculation_for(model, measure=False)
        decode_plainly(model, steps=16)
        assert doubt_disproved(model)
        for _ in range(3):
            assert speculation_for(model, measure=False).costs.is_disproved
        assert machine.measured == 1

    def test_ends_if_each_measurement_is_disproved(self, machine, model) -> None:
        machine.slower = 3.0
        for _ in range(9):
            decode_plainly(model, steps=16)
            speculation_for(model)
        assert machine.measured == 1 + MOST_MEASUREMENTS

    def test_leaves_another_process_its_measurement(self, machine, model, tmp_path) -> None:
        (file,) = (tmp_path / "costs").iterdir()
        values = json.loads(file.read_text())
        theirs = values | {"forward_ms": [[10.0] * len(values["rows"])] * 2}
        file.write_text(json.dumps(theirs))
        decode_plainly(model, steps=16)
        assert doubt_disproved(model)
        assert json.loads(file.read_text()) == theirs
        assert plain_ms(speculation_for(model).costs.curve) == 10.0 and machine.measured == 1

    @pytest.mark.parametrize("slower", [0.8, 1.0, 3.0, 30.0])
    def test_is_not_seen_where_steps_take_what_they_should_or_more(self, model, slower) -> None:
        decode_plainly(model, steps=200, slower=3 * slower)
        assert not doubt_disproved(model)

    def test_needs_most_steps_to_be_too_fast(self, model) -> None:
        for _ in range(100):
            decode_plainly(model, steps=1)
            decode_plainly(model, steps=1, slower=3.0)
        assert not doubt_disproved(model)

    def test_cannot_be_where_costs_are_guessed(self, machine, started) -> None:
        model = started()
        known = speculation_for(model, measure=False)
        for _ in range(50):
            known.costs.observe(rows=1, largest_group=0, context=70, ms=0.01)
        assert not doubt_disproved(model) and known.costs.curve is UNMEASURED
        assert speculation_for(model).costs.curve.num_measurements == machine.measured == 1

    def test_is_nothing_to_a_seeded_answer(self, model) -> None:
        known = speculation_for(model).repeatable()
        for _ in range(50):
            known.costs.observe(rows=1, largest_group=0, context=70, ms=0.1)
        assert not known.costs.is_disproved
        assert not speculation_for(model).costs.is_disproved


class TestAnswers:
    """Real steps of a tiny model, against a curve that says a step takes a minute."""

    @pytest.fixture
    def model(self, machine, started) -> MTPModel:
        machine.slower, machine.shows = 6000.0, False
        model = started()
        speculation_for(model)
        machine.slower = 1.0
        return model

    def test_disprove_the_kept_costs(self, machine, model, tmp_path) -> None:
        def answer(**options: Any) -> None:
            options |= {"max_tokens": 40, "lookup": False, "num_draft_tokens": 0}
            list(stream_generate(model, byte_tokenizer(), [5, 6, 7], **options))

        (file,) = (tmp_path / "costs").iterdir()
        answer(layout="plain")  # its planner knows no costs
        answer(seed=1, sampling=Sampling(temp=1.0))
        assert not json.loads(file.read_text())["disturbed"]
        answer()
        assert json.loads(file.read_text())["disturbed"] and machine.measured == 1
        machine.slower = 1e-6  # no real step is faster
        answer()
        assert not json.loads(file.read_text())["disturbed"] and machine.measured == 2

    def test_a_conversation_says_what_takes_so_long(self, machine, model) -> None:
        told: list[str] = []
        talk = Conversation(model, byte_tokenizer())
        talk.settle(told.append)
        assert not told
        decode_plainly(model, steps=16)
        talk.settle(told.append)
        assert "measuring again" in told[0] and machine.measured == 2

    def test_explain_tells_of_doubtful_costs(self, machine, started) -> None:
        machine.slower = 3.0
        for again in (False, True):
            lines: list[str] = []
            model = started()
            speculation_for(model)
            list(
                stream_generate(
                    model, byte_tokenizer(), [5, 6, 7], max_tokens=4, explain=lines.append
                )
            )
            assert lines[0].startswith("costs: the machine was busy") is not again
            assert not any("busy" in line for line in lines[1:])
            machine.slower = 1.0


@pytest.mark.slow
def test_tune_says_that_it_was_disturbed(machine, tmp_path) -> None:
    model, adapter = save_tiny_pair(tmp_path / "files", num_hidden_layers=1)
    args = ["tune", "--model", str(model), "--adapter-path", str(adapter)]
    machine.slower = 3.0
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and "the machine was busy" in done.stdout.splitlines()[-1]
    machine.slower = 1.0
    done = CliRunner().invoke(cli, [*args, "--json"])
    assert json.loads(done.stdout)["disturbed"] is False


TIMES = st.floats(0.1, 100)


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    rows = (1, 2, 3, 4, 8, 16)[: draw(st.integers(1, 6))]
    line = st.tuples(*[TIMES] * len(rows))
    return CostCurve(
        rows=rows,
        contexts=(64, 1024),
        forward_ms=(draw(line), draw(line)),
        draft_ms=(0.0, draw(TIMES), draw(TIMES)),
        disturbed=draw(st.booleans()),
    )


class TestTheLeastOfTwo:
    @given(curves(), curves())
    def test_has_the_smaller_times(self, one, other) -> None:
        least = one.least(other)
        final = [each.rows for each in (one, other) if not each.disturbed]
        assert least.rows == (min(final, key=len) if final else max(one.rows, other.rows, key=len))
        for at, rows in enumerate(least.rows):
            for line, (mine, theirs) in enumerate(
                zip(one.forward_ms, other.forward_ms, strict=True)
            ):
                times = [each[at] for each in (mine, theirs) if at < len(each)]
                assert least.forward_ms[line][at] == min(times), rows
        assert least.disturbed == (one.disturbed and other.disturbed)
        assert CostCurve.from_dict(least.to_dict()) == least

    def test_of_another_adapter_is_this_one(self) -> None:
        assert UNMEASURED.least(CostCurve(
            rows=(1,), contexts=(64,), forward_ms=((1.0,),), draft_ms=(0.0,)
        )) == UNMEASURED  # fmt: skip

    def test_counts_its_measurements(self) -> None:
        with pytest.raises(ValueError, match="num_measurements must be at least 1, got 0"):
            CostCurve.from_dict(UNMEASURED.to_dict() | {"num_measurements": 0})


@given(st.lists(st.floats(0.76, 50), min_size=1, max_size=60))
def test_no_slow_step_disproves_a_curve(ratios: list[float]) -> None:
    live = LiveCosts(UNMEASURED)
    for ratio in ratios:
        live.observe(rows=1, largest_group=0, context=0, ms=ratio)
    assert not live.is_disproved
