"""Verification tells equal bits, rounding and larger differences of rows apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.cli.verify import table
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.verify.near_tie import EPS, NEAR_TIE_EPS
from mlx_mtp.verify.report import VerifyReport
from mlx_mtp.verify.rows import compare_rows, have_same_bits, nearest_tie
from mlx_mtp.verify.run import verify
from mlx_mtp.verify.settings import VerifySettings
from mlx_mtp.verify.steps import compare_steps
from tests.helpers.tiny import tiny_mtp
from tests.verify.test_verify import VOCAB, LetterTokenizer
from tests.verify.verify_faults import accept_first_draft, make_row_exact, plant_row_dependence

SETTINGS = VerifySettings(layouts=("quadratic", "copy"), depths=(2,), max_tokens=8, sampling=())


def run(model: MTPModel, settings: VerifySettings = SETTINGS, **options: Any) -> VerifyReport:
    tokenizer: Any = LetterTokenizer()
    prompts = [Prompt(id="p0", kind="user", text="fjord")]
    return verify(model, tokenizer, prompts, settings=settings, **options)


def model_with(error: float) -> MTPModel:
    model = tiny_mtp(vocab_size=VOCAB, k=2)
    plant_row_dependence(model, error)
    return model


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> MTPModel:
    """A model whose rows have the same bits however many there are."""
    model = tiny_mtp(vocab_size=VOCAB, k=2)
    make_row_exact(model, monkeypatch)
    return model


def test_equal_bits_are_exact(exact: MTPModel) -> None:
    report = run(exact)
    assert report.steps.verdict == report.rows_against("plain").verdict == "exact"
    assert report.steps.compared > 2 and report.rows_against("plain").compared == 16
    text = "\n".join(table(report))
    assert f"Steps: exact: all {report.steps.compared} rows have the same bits" in text
    assert "Answers: exact: all 16 rows have the same bits as plain decoding" in text


def test_a_trees_first_path_has_equal_bits(exact: MTPModel) -> None:
    tally = compare_steps(exact, [1, 2, 3], [("tree", 2)])
    assert tally.verdict == "exact" and tally.compared == 3


def test_a_layer_that_rounds_by_the_number_of_rows() -> None:
    report = run(model_with(2e-7))
    assert report.passed and report.steps.verdict == "within rounding"
    assert 0 < report.steps.differing <= report.steps.compared
    tie = report.nearest_tie
    assert tie is not None and tie.relative_margin > report.steps.largest_change > 0
    text = "\n".join(table(report))
    assert "Steps: within rounding: " in text and "rows differ in their last bits" in text
    assert "no token differs" in text and "times the largest change" in text


def test_a_larger_difference_is_no_rounding() -> None:
    report = run(model_with(1e-3))
    assert report.steps.verdict == "beyond rounding" and report.steps.beyond_rounding > 0
    assert "by more than rounding explains" in "\n".join(table(report))


def test_a_divergence_says_whether_the_logits_are_the_cause(
    exact: MTPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(model_with(-3.0), dataclasses.replace(SETTINGS, against_stock=False))
    found = report.runs[1].against["plain"].divergences[0]
    assert not report.passed and found.same_bits is False and "their bits differ" in str(found)
    accept_first_draft(monkeypatch)
    report = run(exact)
    found = report.runs[1].against["plain"].divergences[0]
    assert found.same_bits is True and "the logits have the same bits" in str(found)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_comparing_rows(dtype: mx.Dtype) -> None:
    rows = mx.array([[4.0, 2.0, -8.0], [1.0, 3.0, 0.5], [2.0, 2.0, 1.0]]).astype(dtype)
    assert compare_rows(rows, rows, dtype).verdict == "exact"
    bound = NEAR_TIE_EPS[dtype] * EPS[dtype] * 8
    for change, verdict in ((0.5 * bound, "within rounding"), (3 * bound, "beyond rounding")):
        moved = rows.astype(mx.float32) + change * mx.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
        tally = compare_rows(rows.astype(mx.float32), moved, dtype)
        assert (tally.compared, tally.differing, tally.verdict) == (3, 1, verdict)
        assert tally.largest_change == pytest.approx(change / 8, rel=0.1)
    tie = nearest_tie(rows, dtype, prompt_id="p")
    assert tie is not None and (tie.position, tie.margin) == (2, 0)
    assert compare_rows(rows[:0], rows[:0], dtype).verdict is None
    assert nearest_tie(rows[:0], dtype, prompt_id="p") is None


def test_bits_are_compared_not_values() -> None:
    zero, nan = mx.array([0.0, 1.0]), mx.array([float("nan"), 1.0])
    assert not have_same_bits(zero, mx.array([-0.0, 1.0])).item()
    assert have_same_bits(nan, nan).item()


def test_progress_counts_up_to_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    settings = VerifySettings.quick(max_tokens=4, num_draws=2)
    report = run(
        tiny_mtp(vocab_size=VOCAB, k=2), settings, progress=lambda *call: calls.append(call)
    )
    assert report.settings.is_quick
    dones = [done for _, done, _ in calls]
    assert dones == sorted(dones) and {total for _, _, total in calls} == {dones[-1]}
    assert list(dict.fromkeys(phase for phase, _, _ in calls)) == ["rows", "greedy", "sampling"]
