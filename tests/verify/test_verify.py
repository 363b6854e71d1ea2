"""Verification finds what it should find: planted mistakes, near-ties and biases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

import mlx_mtp.decoding.accept
import mlx_mtp.decoding.loop
from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.cli.verify import table
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.evaluation.prompts import Prompt, hash_prompts
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.verify.chi_square import (
    Group,
    chi_square,
)
from mlx_mtp.verify.near_tie import EPS, NEAR_TIE_EPS, measure
from mlx_mtp.verify.receipt import build_receipt, receipt_json, write_receipt
from mlx_mtp.verify.report import VerifyReport
from mlx_mtp.verify.run import verify
from mlx_mtp.verify.sampling import _Source, check_sampling
from mlx_mtp.verify.settings import VerifySettings
from tests.helpers.tiny import tiny_base, tiny_mtp
from tests.verify.verify_faults import accept_first_draft

VOCAB = 12
PROMPTS = [Prompt(id=f"p{i}", kind="user", text=text) for i, text in enumerate(("abc", "fjord"))]
GREEDY = VerifySettings(layouts=("quadratic",), depths=(2,), max_tokens=10, sampling=())


class LetterTokenizer:
    """Letters to ids below ``VOCAB``; no chat template; one id ends an answer."""

    has_chat_template = False
    bos_token = None

    def __init__(self, *eos: int) -> None:
        self.eos_token_ids = set(eos)

    def encode(self, text: str, **options: bool) -> list[int]:
        del options
        return [ord(letter) % VOCAB for letter in text]


def run(model: MTPModel, settings: VerifySettings = GREEDY, *, eos: int = -1) -> VerifyReport:
    tokenizer: Any = LetterTokenizer(eos)
    return verify(model, tokenizer, PROMPTS, settings=settings)


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return tiny_mtp(vocab_size=VOCAB, k=2)


def test_every_layout_and_depth_is_held_against_plain_and_stock(model: MTPModel) -> None:
    settings = dataclasses.replace(GREEDY, layouts=("linear", "quadratic", "auto"), depths=())
    report = run(model, settings)
    assert report.verdict == "identical" and report.passed
    ways = [(run.layout, run.num_draft_tokens) for run in report.runs]
    layouts = ("linear", "quadratic", "auto")
    assert ways == [("plain", 0), *((layout, d) for layout in layouts for d in (1, 2))]
    assert set(report.runs[0].against) == {"stock"}
    for result in report.runs[1:]:
        assert set(result.against) == {"plain", "stock"}
        assert all(tally.identical == len(PROMPTS) for tally in result.against.values())
        assert result.num_tokens == report.num_tokens == 20
        assert 0 < result.num_steps <= 20 and result.num_drafts > 0
    assert sum(result.num_accepted for result in report.runs) > 0
    assert "Verdict: identical." in table(report)


def test_references_are_decoded_once(model: MTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[str] = []
    real = mlx_mtp.decoding.loop.decode

    def counted(*args: Any, **options: Any) -> Any:
        layouts.append(options["layout"])
        return real(*args, **options)

    monkeypatch.setattr("mlx_mtp.verify.run.decode", counted)
    run(model, dataclasses.replace(GREEDY, layouts=("linear", "quadratic"), depths=(1, 2)))
    assert layouts.count("plain") == len(PROMPTS)
    assert layouts.count("linear") == layouts.count("quadratic") == 2 * len(PROMPTS)


def test_stop_ids_end_all_runs(model: MTPModel) -> None:
    ids = [step.tokens[0] for step in mlx_mtp.decoding.loop.decode(
        model, [ord(letter) % VOCAB for letter in "abc"], max_tokens=10, layout="plain"
    )]  # fmt: skip
    stop = ids[4]
    report = run(model, eos=stop)
    assert report.passed
    assert report.num_tokens == ids.index(stop) + 1 + 10 or report.num_tokens < 20


def test_without_stock(model: MTPModel) -> None:
    report = run(model, dataclasses.replace(GREEDY, against_stock=False))
    assert report.runs[0].against == {} and set(report.runs[1].against) == {"plain"}
    assert report.passed


def test_num_tokens_are_shared_out(model: MTPModel) -> None:
    report = run(model, dataclasses.replace(GREEDY, max_tokens=None, num_tokens=25))
    assert report.num_tokens == 13 + 12
    capped = run(model, dataclasses.replace(GREEDY, max_tokens=5, num_tokens=25))
    assert capped.num_tokens == 10
    assert "fewer than the requested 25" in table(capped)[0]


def test_broken_acceptance_is_a_mismatch(model: MTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_first_draft(monkeypatch)
    report = run(model)
    assert not report.passed and report.verdict == "mismatch"
    tally = report.runs[1].against["plain"]
    assert tally.mismatches == len(PROMPTS) and tally.identical == tally.near_ties == 0
    found = tally.divergences[0]
    assert not found.near_tie and found.gap is not None and found.gap > found.bound
    assert found.expected == found.top_two[0] != found.actual
    assert report.runs[0].against["stock"].identical == len(PROMPTS)
    text = "\n".join(table(report))
    assert "MISMATCH: p0, token 2" in text and "NOT identical: 4 mismatches" in text


def test_a_run_that_ends_early_is_a_mismatch(
    model: MTPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mlx_mtp.decoding.loop.decode

    def short(*args: Any, **options: Any) -> Any:
        less = 0 if options["layout"] == "plain" else 3
        return real(*args, **options | {"max_tokens": options["max_tokens"] - less})

    monkeypatch.setattr("mlx_mtp.verify.run.decode", short)
    tally = run(model).runs[1].against["plain"]
    assert tally.mismatches == len(PROMPTS)
    assert tally.divergences[0].actual is None and tally.divergences[0].gap is None


@pytest.fixture(scope="module")
def twins() -> MTPModel:
    """A model whose ids 2i and 2i + 1 are always exactly tied."""
    base = tiny_base(vocab_size=VOCAB)
    table = base.model.embed_tokens.weight
    base.model.embed_tokens.weight = mx.repeat(table[::2], 2, axis=0)
    from tests.helpers.tiny import random_adapter

    config, weights = random_adapter(base, k=2)
    return MTPModel(base, name="twins", config=config, weights=weights)


def prefer_the_other_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break ties the other way in steps that have drafts."""
    real = mlx_mtp.decoding.accept.accept_greedy

    def other(logits: mx.array, drafts: mx.array, *tree: Any) -> tuple[mx.array, mx.array]:
        tokens, num_accepted = real(logits, drafts, *tree)
        if drafts.size == 0:
            return tokens, num_accepted
        return tokens + 1 - 2 * (tokens % 2), mx.zeros_like(num_accepted)

    monkeypatch.setattr("mlx_mtp.decoding.accept.accept_greedy", other)


def test_near_ties_are_told_apart_and_nothing_behind_them_is_hidden(
    twins: MTPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_the_other_twin(monkeypatch)
    report = run(twins)
    assert report.passed and report.verdict == "near-ties"
    tally = report.runs[1].against["plain"]
    assert (tally.identical, tally.near_ties, tally.mismatches) == (0, len(PROMPTS), 0)
    first = [found for found in tally.divergences if found.prompt_id == "p0"]
    assert len(first) > 1, "the run goes on behind the reference's token"
    assert all(found.gap == 0 == found.margin and found.are_top_two for found in first)
    assert [found.position for found in first] == sorted({found.position for found in first})
    text = "\n".join(table(report))
    assert "near-tie: p0, token 2" in text and "identical but for 4 near-ties" in text


def test_a_mismatch_behind_a_near_tie_is_found(
    twins: MTPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_the_other_twin(monkeypatch)
    twin_of = mlx_mtp.decoding.accept.accept_greedy
    calls = {"drafted": 0}

    def worse(logits: mx.array, drafts: mx.array, *tree: Any) -> tuple[mx.array, mx.array]:
        tokens, num_accepted = twin_of(logits, drafts, *tree)
        calls["drafted"] += bool(drafts.size)
        if drafts.size and calls["drafted"] > 3:
            tokens = mx.argmin(logits, axis=-1).astype(tokens.dtype)
        return tokens, num_accepted

    monkeypatch.setattr("mlx_mtp.decoding.accept.accept_greedy", worse)
    report = run(twins)
    tally = report.runs[1].against["plain"]
    assert tally.mismatches >= 1 and not report.passed
    assert tally.divergences[0].near_tie and not tally.divergences[-1].near_tie


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_bound_follows_the_dtype_and_the_size_of_the_logits(dtype: mx.Dtype) -> None:
    unit = NEAR_TIE_EPS[dtype] * EPS[dtype]
    for gap, near in ((0.9 * unit * 20, True), (1.1 * unit * 20, False)):
        row = mx.array([1.0, 1.0 + gap, -20.0, 0.5])
        found = measure(row, dtype=dtype, prompt_id="p", position=3, expected=1, actual=0)
        assert found.near_tie is near and found.top_two == (1, 0) and found.are_top_two
        assert found.margin == found.gap == pytest.approx(gap, rel=0.1)
        assert found.relative_margin == pytest.approx(found.margin / 20)
        assert found.bound == pytest.approx(unit * 20)


def test_a_third_token_is_judged_by_its_own_gap() -> None:
    row = mx.array([5.0, 5.0, 1.0])
    found = measure(row, dtype=mx.bfloat16, prompt_id="p", position=0, expected=0, actual=2)
    assert found.margin == 0 and found.gap == 4 and not found.near_tie and not found.are_top_two


def test_logits_that_are_not_finite_still_make_a_receipt() -> None:
    row = mx.array([float("nan"), 1.0, -float("inf")])
    found = measure(row, dtype=mx.float32, prompt_id="p", position=0, expected=0, actual=2)
    assert not found.near_tie
    assert json.loads(receipt_json(found.to_dict()))["gap"] is None


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temp=0.6),
        Sampling(temp=1.3, top_p=0.7),
        Sampling(temp=1.0, top_k=4),
        Sampling(temp=0.8, min_p=0.1),
    ],
)
def test_targets_are_what_mlx_lms_sampler_draws_from(model: MTPModel, sampling: Sampling) -> None:
    source = _Source(model, [1, 2, 3])
    target = source.targets(sampling, [(4, 5)])[(4,)]
    logits = model.logits(model(mx.array([[1, 2, 3, 4]]), cache=model.make_cache()))[0, -1]
    sampler = make_sampler(
        temp=sampling.temp, top_p=sampling.top_p, min_p=sampling.min_p, top_k=sampling.top_k
    )
    mx.random.seed(0)
    logprobs = logits - mx.logsumexp(logits)
    drawn = np.array(sampler(mx.broadcast_to(logprobs, (3000, VOCAB))))
    counts = np.bincount(drawn, minlength=VOCAB)[target.ids].astype(float)
    assert counts[target.probs == 0].sum() == 0
    result = chi_square([Group(counts, target.probs)])
    assert result is not None and result.p_value > 0.001


def test_draws_leave_the_prompt_in_the_cache(model: MTPModel) -> None:
    source = _Source(model, [1, 2, 3, 4])
    sampling = Sampling(temp=1.0)
    first = source.draw(("quadratic", 2), sampling, seed=7)
    assert len(first) == 3 and source.cache.offset == 3
    source.draw(("linear", 1), sampling, seed=8)
    assert source.draw(("quadratic", 2), sampling, seed=7) == first


def test_a_sliding_window_is_prefilled_again() -> None:
    model = tiny_mtp("gemma3_text", k=2)
    source = _Source(model, [int(i) % 60 for i in range(300)])
    for seed in range(2):
        assert len(source.draw(("quadratic", 2), Sampling(temp=1.0), seed=seed)) == 3
        assert source.cache.offset == 299


@pytest.mark.slow
def test_honest_sampling_passes(model: MTPModel) -> None:
    tests = check_sampling(
        model,
        [1, 2, 3],
        ways=[("quadratic", 2), ("linear", 1)],
        settings=[Sampling(temp=0.8, top_k=6)],
        num_draws=150,
    )
    assert [test.token for test in tests] == [1, 2, 2, 3, 3] * 2
    assert all(test.passed and test.p_value is not None for test in tests)
    assert all(test.num_draws == 150 and test.num_impossible == 0 for test in tests)
    assert tests[0].num_contexts == 1 < tests[1].num_contexts < tests[3].num_contexts


@pytest.mark.slow
def test_biased_sampling_fails(model: MTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mlx_mtp.decoding.accept.accept_sampled

    def biased(probs: mx.array, drafts: mx.array, *args: Any, **kwargs: Any) -> Any:
        tokens, num_accepted = real(probs, drafts, *args, **kwargs)
        if drafts.size == 0:
            return tokens, num_accepted
        return mx.concatenate([drafts.astype(tokens.dtype), tokens[-1:]]), mx.array(drafts.size)

    monkeypatch.setattr("mlx_mtp.decoding.accept.accept_sampled", biased)
    settings = VerifySettings(
        layouts=("quadratic",), depths=(2,), max_tokens=2, num_draws=150,
        sampling=(Sampling(temp=1.0),),
    )  # fmt: skip
    report = run(model, settings)
    assert report.num_mismatches == 0 and report.num_failed_tests > 0 and not report.passed
    failed = {test.token for test in report.sampling if not test.passed}
    assert failed & {2, 3} and 1 not in failed
    assert any(line.startswith("FAILED: temp 1; quadratic 2, token") for line in table(report))


def test_an_impossible_draw_fails_at_once(model: MTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [("quadratic", 2)]
    setting = Sampling(temp=1.0, top_k=2)
    unlikely = _Source(model, [1, 2, 3]).targets(setting, [(0,)])[()].ids[-1]
    monkeypatch.setattr(_Source, "draw", lambda self, *args, **kwargs: (int(unlikely), 0, 0))
    first = check_sampling(model, [1, 2, 3], ways=ways, settings=[setting], num_draws=3)[0]
    assert first.num_impossible == 3 and first.adjusted_p_value == 0 and not first.passed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layouts": ("quadratic", "cubic")}, "cubic"),
        ({"layouts": ("plain",)}, "plain"),
        ({"layouts": ()}, "none"),
        ({"depths": (0, 1)}, "got 0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"num_tokens": -5}, "-5"),
        ({"num_draws": 0}, "num_draws"),
        ({"sampling": (Sampling(),)}, "temp above 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VerifySettings(**changes)


def test_bad_models_and_prompts_are_refused_before_any_work(model: MTPModel) -> None:
    tokenizer: Any = LetterTokenizer()
    plain = MTPModel(tiny_base(vocab_size=VOCAB), name="bare")
    with pytest.raises(ValueError, match="bare has no MTP adapter, which layout quadratic needs"):
        verify(plain, tokenizer, PROMPTS, settings=GREEDY)
    with pytest.raises(ValueError, match="depth 3 exceeds the adapter.s number of mask tokens, 2"):
        run(model, dataclasses.replace(GREEDY, depths=(1, 3)))
    with pytest.raises(ValueError, match="no prompts"):
        verify(model, tokenizer, [], settings=GREEDY)
    long = Prompt(id="long", kind="user", text="x" * 5000)
    with pytest.raises(ValueError, match="prompt long: the prompt has 5000 tokens"):
        verify(model, tokenizer, [long], settings=GREEDY)


def test_a_receipt_holds_what_is_needed_to_repeat_it(model: MTPModel) -> None:
    report = run(model)
    receipt = json.loads(receipt_json(build_receipt(report, model)))
    assert receipt["verdict"] == "identical" and receipt["passed"] is True
    assert receipt["versions"].keys() == {"mlx-mtp", "mlx", "mlx-lm", "python", "platform"}
    assert receipt["device"]["blas"] == BLAS and receipt["device"]["name"]
    assert receipt["model"]["fingerprint"] == receipt["adapter"]["config"]["base_fingerprint"]
    assert receipt["model"]["dtype"] == "float32"
    assert receipt["prompts"]["sha256"] == hash_prompts(PROMPTS)
    assert receipt["settings"]["layouts"] == ["quadratic"]
    assert receipt["greedy"]["runs"][1]["against"]["plain"]["identical"] == len(PROMPTS)
    assert receipt["sampling"]["tests"] == []


def test_prompt_hashes_differ_with_text_and_order() -> None:
    other = [dataclasses.replace(PROMPTS[0], text="abd"), PROMPTS[1]]
    hashes = {hash_prompts(PROMPTS), hash_prompts(other), hash_prompts(PROMPTS[::-1])}
    assert len(hashes) == 3


def test_a_receipt_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "receipt.json"
    write_receipt({"a": 1}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_receipt({"a": 2}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["receipt.json"]


def _umask() -> int:
    import os

    umask = os.umask(0)
    os.umask(umask)
    return umask
