"""Costs measured on a busy machine do not last, and what steps teach does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.calibration.step_timer import Round, StepTimer
from mlx_mtp.calibration.stored_costs import (
    SPECULATIONS,
    calibrate,
    curve_lines,
    guessed_costs,
    measured_costs,
    speculation_for,
    store_learned,
)
from mlx_mtp.cli.main import cli
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.generate import stream_generate
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import CPU_GUESS, GPU_GUESS, Corrections, CostCurve, LiveCosts
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import MASK
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
    made, init = Machine(), StepTimer.__init__
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(StepTimer, "_round", lambda _, layout: made.round(layout))

    def counted(bench: StepTimer, model: MTPModel, context: int) -> None:
        made.measured += context == 64
        init(bench, model, context)

    monkeypatch.setattr(StepTimer, "__init__", counted)
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
    """Plain steps, as the decoder reports them to the planner."""
    known = SPECULATIONS.get(model)
    assert known is not None
    for _ in range(steps):
        known.costs.observe(rows=1, largest_group=0, context=70, ms=slower * true_ms(1))


class TestAMachineThatIsBusyWhenMeasured:
    def test_is_planned_for_by_a_guess(self, machine, started) -> None:
        machine.slower = 3.0
        first = calibrate(started())
        assert first.disturbed and plain_ms(first) == 3 * true_ms(1)
        assert measured_costs(started()) == first
        assert speculation_for(started()).costs.curve == guessed_costs()
        machine.slower = 1.0
        second = calibrate(started())
        assert not second.disturbed and plain_ms(second) == true_ms(1)
        assert speculation_for(started()).costs.curve == second
        assert calibrate(started()) == second and machine.measured == 2

    def test_that_stays_busy_keeps_the_shortest_times(self, machine, started) -> None:
        for slower in (4.0, 3.0, 5.0):
            machine.slower = slower
            curve = calibrate(started())
        assert machine.measured == 3
        assert curve.disturbed and plain_ms(curve) == 3 * true_ms(1)

    def test_is_reported_with_the_costs(self, machine, started) -> None:
        machine.slower = 3.0
        curve = calibrate(started())
        assert curve_lines(curve)[-1] == curve.doubt != ""
        machine.slower = 1.0
        curve = calibrate(started())
        assert curve.doubt == "" and "busy" not in "\n".join(curve_lines(curve))

    def test_keeps_an_earlier_good_measurement(self, machine, started) -> None:
        good = calibrate(started())
        machine.slower = 3.0
        assert calibrate(started(), again=True) == good and machine.measured == 2

    def test_plans_anew_after_measuring(self, machine, started) -> None:
        model = started()
        known = speculation_for(model)
        known.acceptance.observe(2, 2)
        chances = list(known.acceptance.draft_probs())
        calibrate(model)
        assert speculation_for(model) is known and plain_ms(known.costs.curve) == true_ms(1)
        assert list(known.acceptance.draft_probs()) == chances


class TestALoadThatCannotBeSeen:
    @pytest.fixture
    def model(self, machine: Machine, started) -> MTPModel:
        """Measured under a load that slowed all steps alike and that no waiting showed."""
        machine.slower, machine.shows = 3.0, False
        model = started()
        assert not calibrate(model).disturbed
        speculation_for(model)
        return model

    def test_is_found_by_the_steps_and_the_measurement_discarded(
        self, machine, model, started
    ) -> None:
        known = speculation_for(model)
        decode_plainly(model, steps=15)
        store_learned(model)
        assert plain_ms(known.costs.curve) == 3 * true_ms(1)
        decode_plainly(model, steps=1)
        store_learned(model)
        assert speculation_for(model) is known and known.costs.curve == guessed_costs()
        assert measured_costs(model) is None and machine.measured == 1
        assert speculation_for(started()).costs.curve == guessed_costs()

    @pytest.mark.parametrize("slower", [0.8, 1.0, 3.0, 30.0])
    def test_is_not_seen_where_steps_take_what_they_should_or_more(self, model, slower) -> None:
        decode_plainly(model, steps=200, slower=3 * slower)
        store_learned(model)
        assert plain_ms(measured_costs(model)) == 3 * true_ms(1)

    def test_needs_most_steps_to_be_too_fast(self, model) -> None:
        for _ in range(100):
            decode_plainly(model, steps=1)
            decode_plainly(model, steps=1, slower=3.0)
        assert not speculation_for(model).costs.is_disproved

    def test_cannot_be_where_costs_are_guessed(self, started) -> None:
        known = speculation_for(started())
        for _ in range(50):
            known.costs.observe(rows=1, largest_group=0, context=70, ms=0.01)
        assert not known.costs.is_disproved

    def test_is_nothing_to_a_seeded_answer(self, model) -> None:
        known = speculation_for(model).repeatable()
        for _ in range(50):
            known.costs.observe(rows=1, largest_group=0, context=70, ms=0.1)
        assert not known.costs.is_disproved
        assert not speculation_for(model).costs.is_disproved


def observe(known: Speculation, rows: int, *, steps: int, ms: float) -> None:
    for _ in range(steps):
        known.costs.observe(rows=rows, largest_group=0, context=70, ms=ms)


class TestWhatStepsTeach:
    def test_is_stored_and_used_by_the_next_start(self, machine, started) -> None:
        model = started()
        known = speculation_for(model)
        for _ in range(20):  # alternating, so that the pace stays that of plain steps
            decode_plainly(model, steps=1)
            observe(known, 4, steps=1, ms=5 * true_ms(1))
        store_learned(model)
        again = speculation_for(started())
        assert again is not known and again.costs.curve == guessed_costs()
        assert again.costs.corrections == known.costs.corrections
        learned = again.costs.forward_ms(70)
        assert learned[4] / learned[1] == pytest.approx(5, rel=0.2)
        assert not again.costs.needs_plain_steps and machine.measured == 0

    def test_is_not_written_after_every_short_answer(self, started, tmp_path) -> None:
        model = started()
        speculation_for(model)
        decode_plainly(model, steps=15)
        store_learned(model)
        assert not (tmp_path / "costs").exists()
        decode_plainly(model, steps=1)
        store_learned(model)
        (file,) = (tmp_path / "costs").iterdir()
        file.unlink()
        decode_plainly(model, steps=15)
        store_learned(model)
        assert not file.exists()

    def test_corrects_a_measurement_too(self, machine, started) -> None:
        calibrate(started())
        model = started()
        known = speculation_for(model)
        observe(known, 4, steps=300, ms=2 * true_ms(4))
        decode_plainly(model, steps=300)
        store_learned(model)
        again = speculation_for(started())
        assert again.costs.curve == measured_costs(model)
        assert again.costs.corrections == known.costs.corrections

    def test_changes_no_seeded_answer(self, started) -> None:
        model = started()
        before = speculation_for(model).repeatable()
        observe(speculation_for(model), 4, steps=50, ms=1000.0)
        store_learned(model)
        for known in (speculation_for(model), speculation_for(started())):
            seeded = known.repeatable()
            assert list(seeded.costs.forward_ms(70)) == list(before.costs.forward_ms(70))
            assert list(seeded.costs.draft_ms(2)) == list(before.costs.draft_ms(2))
            assert not seeded.costs.needs_plain_steps

    def test_leaves_another_process_its_measurement_and_takes_it(self, machine, started) -> None:
        model = started()
        known = speculation_for(model)
        decode_plainly(model, steps=20)
        SPECULATIONS.forget(model)  # another process, which measures
        theirs = calibrate(model)
        SPECULATIONS.set(model, known)
        store_learned(model)
        assert measured_costs(model) == known.costs.curve == theirs

    @pytest.mark.parametrize(
        "change",
        [
            {"pace": 0.0},
            {"pace": "x"},
            {"factors": {}},
            {"factors": {"1": 1.0, "2": float("nan")}},
            {"factors": {"0": 1.0, "1": 1.0}},
            {"factors": None},
            {"num_seen": {"x": 1}},
        ],
    )
    def test_is_ignored_if_its_file_is_damaged(self, change, started, tmp_path) -> None:
        model = started()
        speculation_for(model)
        decode_plainly(model, steps=20)
        store_learned(model)
        (file,) = (tmp_path / "costs").iterdir()
        values = json.loads(file.read_text())
        values["corrections"] |= change
        file.write_text(json.dumps(values))
        assert speculation_for(started()).costs.corrections == Corrections()

    def test_begins_with_plain_steps_only_where_costs_are_guessed(self, machine, started) -> None:
        def num_plain(curve: CostCurve, **options: Any) -> int:
            known = Speculation(LiveCosts(curve, **options), Acceptance([0.9] * 2))
            planner, count = AutoPlanner(known, num_draft_tokens=2), 0
            while count < 20:
                plan = planner.plan(num_pending=1, offers=[Offer(MASK, 0)], room=50, context=9)
                if plan.layout.num_rows > 1:
                    break
                planner.observe(plan, last_node=0, context=9, ms=20.0)
                count += 1
            return count

        assert num_plain(CPU_GUESS) == 6
        assert num_plain(CPU_GUESS, learns=False) == 0
        assert num_plain(CPU_GUESS, corrections=Corrections(num_steps=20)) == 0
        assert num_plain(calibrate(started())) == 0


class TestAnswers:
    """Real steps of a tiny model."""

    @pytest.fixture
    def model(self, machine, started) -> MTPModel:
        """Measured as if a step took a minute."""
        machine.slower, machine.shows = 6000.0, False
        model = started()
        calibrate(model)
        return model

    def test_disprove_the_stored_costs(self, machine, model) -> None:
        def answer(**options: Any) -> None:
            options |= {"max_tokens": 40, "lookup": False, "num_draft_tokens": 0}
            list(stream_generate(model, byte_tokenizer(), [5, 6, 7], **options))

        answer(layout="plain")  # its planner knows no costs
        answer(seed=1, sampling=Sampling(temp=1.0))
        assert measured_costs(model) is not None
        answer()
        assert measured_costs(model) is None and machine.measured == 1
        answer()
        assert machine.measured == 1

    def test_explain_reports_guessed_costs(self, machine, started) -> None:
        for measured in (False, True):
            lines: list[str] = []
            model = started()
            if measured:
                calibrate(model)
            list(
                stream_generate(
                    model, byte_tokenizer(), [5, 6, 7], max_tokens=4, explain=lines.append
                )
            )
            assert lines[0].startswith("costs: estimated, not measured") is not measured
            assert not any("costs" in line for line in lines[1:])


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
        assert GPU_GUESS.least(CostCurve(
            rows=(1,), contexts=(64,), forward_ms=((1.0,),), draft_ms=(0.0,)
        )) == GPU_GUESS  # fmt: skip


@given(st.lists(st.floats(0.76, 50), min_size=1, max_size=60))
def test_no_slow_step_disproves_a_curve(ratios: list[float]) -> None:
    live = LiveCosts(replace(GPU_GUESS, is_guess=False))
    for ratio in ratios:
        live.observe(rows=1, largest_group=0, context=0, ms=ratio)
    assert not live.is_disproved
