"""Evaluating a text tells what decoding it reports, for both layouts and every number of masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.loop import StepResult, decode
from mlx_mtp.drafting.mask_tokens import draft_tokens
from mlx_mtp.drafting.vocabulary import RowLogits
from mlx_mtp.evaluation import acceptance as room
from mlx_mtp.evaluation.acceptance import (
    LAYOUTS,
    Evaluation,
    accepted_counts,
    count_answers,
    draft_ranks,
    evaluate,
    summarise,
    walk,
)
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.loading import load
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.scripted import ScriptedModel, right, wrong
from tests.helpers.tiny import KINDS, tiny_base, tiny_mtp

FEW = 5  # ids of a vocabulary: random drafts over it hold often


def random_ids(seed: int, size: int, vocab: int = FEW) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, size).tolist()


def text_of(prompt: Sequence[int], steps: Sequence[StepResult]) -> TokenSequence:
    emitted = [token for step in steps for token in step.tokens]
    return TokenSequence([*prompt, *emitted], [False] * len(prompt) + [True] * len(emitted))


def answer_only(size: int, *, seed: int = 0, given: int = 1, vocab: int = FEW) -> TokenSequence:
    return TokenSequence(random_ids(seed, size, vocab), [at >= given for at in range(size)])


@pytest.mark.parametrize("kind", [*KINDS, "no sampler"])
def test_it_tells_what_decoding_reports(kind: str) -> None:
    kind, sampler = ("llama", False) if kind == "no sampler" else (kind, True)
    model = tiny_mtp(kind, sampler=sampler, vocab_size=FEW - 2, scale_of_weights=0.1)
    fewest = 24
    for seed in range(2):
        prompt = random_ids(seed, 7, FEW - 2)
        for layout, k in (("quadratic", 4), ("linear", 4), ("quadratic", 2), ("linear", 1)):
            options: dict[str, Any] = {"layout": layout, "num_draft_tokens": k}
            steps = list(decode(model, prompt, max_tokens=24, **options))
            found = evaluate(model, [text_of(prompt, steps)], **options)
            assert found.num_steps == len(steps), (seed, layout, k)
            assert found.tokens_per_step == 24 / len(steps)
            assert (found.num_tokens, found.num_sequences) == (24, 1)
            fewest = min(fewest, len(steps))
    assert fewest < 20  # there was something to count


def test_a_stop_id_ends_a_text_as_it_ends_a_decode() -> None:
    ended = 0
    for seed in range(5):
        model = tiny_mtp(vocab_size=8, scale_of_weights=0.1, seed=seed)
        prompt = random_ids(seed, 6, 8)
        for layout in LAYOUTS:
            steps = list(decode(model, prompt, max_tokens=25, layout=layout, stop_ids=(1, 3)))
            found = evaluate(model, [text_of(prompt, steps)], layout=layout)
            assert found.num_steps == len(steps)
            ended += steps[-1].finish_reason == "stop" and len(steps) > 2
    assert ended


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_a_walk_takes_the_steps_of_a_scripted_decode(layout: str, k: int) -> None:
    base = MTPModel(tiny_base())
    base.config = cast(Any, tiny_mtp(k=8).config)
    prompt, length = [3, 1, 4], 30
    plain = [step.tokens[0] for step in decode(base, prompt, max_tokens=length, layout="plain")]
    ids = prompt + plain
    for seed in range(3):
        holds = np.random.default_rng(seed).random((len(ids), k)) < 0.4 + 0.22 * seed

        def script(position: int, which: int, holds: Any = holds) -> int:
            is_right = position < len(ids) and holds[position, which]
            return (right if is_right else wrong)(ids)(position, which)

        scripted = cast(MTPModel, ScriptedModel(base, script))
        for most in (length, 17, 1):
            steps = list(
                decode(scripted, prompt, max_tokens=most, layout=layout, num_draft_tokens=k)
            )
            first, last = len(prompt), len(prompt) + most - 1
            counts = [
                next((j for j in range(k) if not (at + j <= last and holds[at + j, j])), k)
                for at in range(first + 1, last + 1)
            ]
            walked = walk(counts, first=first, last=last, num_draft_tokens=k, layout=layout)
            assert walked == len(steps)


def drafts_of_decoding(model: MTPModel, ids: list[int], anchor: int, shortlist: int) -> list[int]:
    """Run the step of decoding that ends at an anchor; its drafts."""
    k = model.num_draft_tokens
    layout = StepLayout(anchor + 1, 0, (k,))
    rows = mx.array([ids[: anchor + 1] + list(range(k))])
    hidden = model(rows, cache=model.make_cache(), layout=layout)[0, anchor + 1 :]
    return draft_tokens(
        model,
        hidden,
        RowLogits(model.logits(hidden[None])[0]),
        mx.array(ids[anchor + 1]),
        key=mx.random.key(0),
        shortlist=shortlist,
    ).ids()


def leading(drafts: list[int], ids: list[int]) -> int:
    """How many drafts are what the ids begin with."""
    pairs = list(zip(drafts, ids, strict=False))
    return next((j for j, (a, b) in enumerate(pairs) if a != b), len(pairs))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_drafts_are_those_of_decoding(kind: str, quantised: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "SHORTLIST", 3)
    model = tiny_mtp(kind, quantised=quantised)
    plain = tiny_mtp(kind, quantised=quantised, sampler=False)
    rng, ids = np.random.default_rng(0), random_ids(1, 4, 64)
    while len(ids) < 50:  # a text in which drafts hold now and then
        drafter, shortlist = (model, 3) if rng.random() < 0.6 else (plain, 64)
        drafts = drafts_of_decoding(drafter, ids, len(ids) - 2, shortlist)
        ids += [*drafts[: rng.integers(5)], int(rng.integers(64))]
    anchors = range(len(ids) - 1)
    for drafter, shortlist, options in ((model, 3, {}), (plain, 64, {"use_sampler": False})):
        found = accepted_counts(model, ids, anchors, **options)
        wanted = [
            leading(drafts_of_decoding(drafter, ids, at, shortlist), ids[at + 2 :])
            for at in anchors
        ]
        assert found.tolist() == wanted
        assert len(set(wanted)) > 2


def ranks_of_decoding(
    model: MTPModel, ids: list[int], anchor: int, shortlist: int, use_sampler: bool
) -> list[int]:
    """Ranks of the tokens of a text among the candidates of the step that ends at an anchor.

    The candidates are sorted, one mask row at a time, with NumPy.
    """
    k = model.num_draft_tokens
    rows = mx.array([ids[: anchor + 1] + list(range(k))])
    layout = StepLayout(anchor + 1, 0, (k,))
    hidden = model(rows, cache=model.make_cache(), layout=layout)[0, anchor + 1 :]
    ranks = []
    for j, target in enumerate(ids[anchor + 2 : anchor + 2 + k]):
        logits = np.array(model.logits(hidden[None, j : j + 1])[0, 0])
        if use_sampler and model.sampler_head is not None:
            candidates = np.argsort(-logits, kind="stable")[:shortlist]
            previous = model.embed(mx.array([ids[anchor + 1 + j]]))
            state = model.sampler_head(previous, hidden[j : j + 1])[0]
            unembed = model.unembed_rows(mx.array(candidates)[None])[0]  # [S, D]
            order = candidates[np.argsort(-np.array(unembed @ state), kind="stable")]
        else:
            order = np.argsort(-logits, kind="stable")
        places = np.flatnonzero(order == target)
        ranks.append(1 + int(places[0]) if len(places) else len(order) + 1)
    return ranks


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("num_candidates", [1, 3, 8])
def test_ranks_are_those_of_sorted_candidates(
    kind: str, num_candidates: int, monkeypatch: Any
) -> None:
    model, ids = tiny_mtp(kind, vocab_size=20), random_ids(5, 50, 20)
    anchors = range(49)
    for shortlist, use_sampler in ((20, True), (5, True), (20, False)):
        monkeypatch.setattr(room, "SHORTLIST", shortlist)
        options: dict[str, Any] = {"num_candidates": num_candidates, "use_sampler": use_sampler}
        found = draft_ranks(model, ids, anchors, **options)
        for anchor in anchors:
            wanted = ranks_of_decoding(model, ids, anchor, shortlist, use_sampler)
            wanted = [min(rank, num_candidates + 1) for rank in wanted]
            if num_candidates + 1 in wanted:  # the block is not followed after it
                wanted = wanted[: wanted.index(num_candidates + 1) + 1]
            assert found[anchor].tolist() == wanted + [0] * (4 - len(wanted))
        assert len(np.unique(found)) == num_candidates + 2 or shortlist < num_candidates
        counts = accepted_counts(model, ids, anchors, use_sampler=use_sampler)
        right = np.logical_and.accumulate(found == 1, axis=1).sum(axis=1)
        assert np.array_equal(right, counts)


def test_equal_scores_rank_as_argmax_takes_them() -> None:
    """All tokens have the same logits: the draft is token 0, and token t has rank t + 1."""
    model = tiny_mtp(vocab_size=8, sampler=False)
    flat = type(
        "Flat", (), {"sampler_head": None, "logits": lambda _, x: mx.zeros((*x.shape[:2], 8))}
    )
    right = mx.arange(8)
    found = room._ranks(
        cast(MTPModel, flat()), mx.zeros((8, model.hidden_size)), right, right, True
    )
    assert found.tolist() == list(range(1, 9))


def test_an_evaluation_has_the_ranks_of_each_kind() -> None:
    model = tiny_mtp(vocab_size=FEW)
    texts = [answer_only(40, seed=seed, given=3) for seed in range(4)]
    texts = [dataclasses.replace(text, kind="ab"[at % 2]) for at, text in enumerate(texts)]
    found = evaluate(model, texts, max_tokens=20)
    assert set(found.kinds) == {"a", "b"}
    statistics = found.statistics("texts", None)
    assert statistics is not None and statistics.total.acceptance == found.acceptance
    for kind, counts in found.kinds.items():
        alone = evaluate(model, [text for text in texts if text.kind == kind], max_tokens=20)
        assert counts.acceptance == alone.acceptance
        assert alone.kinds == {kind: counts}
    assert "kinds" not in found.to_dict()
    assert Evaluation.from_dict(found.to_dict()).statistics("texts", None) is None
    fewer = evaluate(model, texts, max_tokens=20, num_draft_tokens=2)
    assert fewer.kinds["a"].ranks == found.kinds["a"].ranks[:2]


def test_chunks_and_order_make_no_difference() -> None:
    model, ids = tiny_mtp(vocab_size=FEW), random_ids(0, 60)
    whole = accepted_counts(model, ids, range(60))
    for rows in (1, 7, 24):
        assert np.array_equal(accepted_counts(model, ids, range(60), rows_per_forward=rows), whole)
    some = [40, 3, 59, 3, 17]
    assert accepted_counts(model, ids, some).tolist() == whole[some].tolist()
    assert accepted_counts(model, ids, []).tolist() == []


def test_one_evaluation_serves_fewer_masks() -> None:
    model = tiny_mtp(vocab_size=FEW)
    texts = [answer_only(50, seed=seed, given=5) for seed in range(3)]
    answers = list(count_answers(model, texts))
    for layout in LAYOUTS:
        for k in range(1, 5):
            small = evaluate(model, texts, num_draft_tokens=k, layout=layout)
            assert summarise(answers, num_draft_tokens=k, layout=layout) == small


def test_walks_by_hand() -> None:
    options: dict[str, Any] = {"first": 10, "last": 14, "num_draft_tokens": 2}
    assert walk([0, 0, 0, 0], **options) == 5
    assert walk([2, 9, 9, 0], **options) == 3  # 10 | 11 12 13 | 14
    assert walk([1, 9, 2, 9], **options) == 3  # 10 | 11 12 | 13 14
    assert walk([1, 9, 2, 9], layout="linear", **options) == 4  # 10 | 11 12 | 13 | 14
    assert walk([], first=3, last=3, num_draft_tokens=2) == 1
    assert walk([5, 5, 5, 5], first=10, last=14, num_draft_tokens=0) == 5


def test_several_answers_of_one_sequence() -> None:
    model, ids = tiny_mtp(vocab_size=FEW), random_ids(2, 40)
    flags = [4 <= at < 9 or 15 <= at < 40 for at in range(40)]
    found = list(count_answers(model, [TokenSequence(ids, flags)], max_tokens=10))
    assert [(each.first, each.last, each.end) for each in found] == [(4, 8, 9), (15, 24, 40)]
    whole = accepted_counts(model, ids, range(40))
    assert found[0].counts.tolist() == whole[3:7].tolist()
    assert found[1].counts.tolist() == whole[14:23].tolist()
    total = evaluate(model, [TokenSequence(ids, flags)], max_tokens=10)
    assert (total.num_tokens, total.num_sequences) == (15, 1)


def test_a_text_that_is_an_answer_from_its_start() -> None:
    found = evaluate(tiny_mtp(vocab_size=FEW), [answer_only(20, given=0)])
    assert found.num_tokens == 19  # the first token has nothing to follow


def test_acceptance_counts_anchors_that_have_a_target() -> None:
    answers = [room.Answer(5, 8, 9, np.array([2, 1, 1]), 0)]
    found = summarise(answers, num_draft_tokens=4)
    assert found.acceptance == (1.0, 0.5, 0.0, 0.0)  # behind the anchors stand 3, 2 and 1 more
    longer = [room.Answer(5, 8, 20, np.array([2, 1, 1]), 0)]
    assert summarise(longer, num_draft_tokens=2).acceptance == (1.0, 1 / 3)


def test_the_dictionary_round_trip() -> None:
    found = evaluate(tiny_mtp(vocab_size=FEW), [answer_only(30)])
    assert len(found.acceptance) == 4
    values = found.to_dict()
    assert isinstance(values["acceptance"], list)
    assert Evaluation.from_dict(values | {"step": 100}) == found
    with pytest.raises(ValueError, match="lacks num_steps"):
        Evaluation.from_dict({key: values[key] for key in values if key != "num_steps"})


def test_progress_is_told() -> None:
    told = []
    texts = [answer_only(12, seed=seed) for seed in range(3)]
    evaluate(tiny_mtp(), texts, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layout": "auto"}, "layout must be one of quadratic, linear, got 'auto'"),
        ({"num_draft_tokens": 5}, "num_draft_tokens must be between 1 and the adapter's 4, got 5"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be between 1 and the adapter's 4, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"rows_per_forward": 0}, "rows_per_forward must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        evaluate(tiny_mtp(), [answer_only(12)], **options)


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(ValueError, match="no answers to evaluate on"):
        evaluate(tiny_mtp(), [TokenSequence([1, 2, 3], [False] * 3)])
    with pytest.raises(ValueError, match="has no adapter"):
        evaluate(MTPModel(tiny_base(), name="bare"), [answer_only(12)])
    with pytest.raises(ValueError, match="anchors must lie between 0 and 2"):
        accepted_counts(tiny_mtp(), [1, 2, 3], [3])
    with pytest.raises(ValueError, match="positions 3 to 5 need 2 counts"):
        walk([1], first=3, last=5, num_draft_tokens=2)


@pytest.mark.slow
def test_the_default_model_and_its_adapter() -> None:
    model, tokenizer = load()
    for prompt in builtin_prompts()[16:17]:
        text = chat_text(tokenizer, [{"role": "user", "content": prompt.text}])
        ids = encode_prompt(tokenizer, text, add_special_tokens=False)
        for layout, k in (("quadratic", 4), ("linear", 2)):
            options: dict[str, Any] = {"layout": layout, "num_draft_tokens": k}
            stop_ids = tokenizer.eos_token_ids
            steps = list(decode(model, ids, max_tokens=24, stop_ids=stop_ids, **options))
            found = evaluate(model, [text_of(ids, steps)], **options)
            assert found.num_steps == len(steps), (prompt.id, layout, k)
            assert found.num_tokens == sum(len(step.tokens) for step in steps)
