"""The draft vocabulary: which tokens it has, and that it changes the speed and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.drafting import vocabulary
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.drafting.vocabulary import ConversationVocabulary, by_frequency, frequent_head
from mlx_mtp.model.head import PartialHead
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.statistics import AdapterStatistics, DraftVocabulary, RankCounts
from tests.helpers.families import family_mtp
from tests.helpers.tiny import tiny_base, tiny_mtp

PROMPT = [5, 9, 40, 3, 9]
FREQUENT = [0, 1, 2, 3, 50, 51, 52, 53]


def with_vocabulary(model: MTPModel, ids: Sequence[int] = FREQUENT) -> MTPModel:
    """Let the drafts of a model come from these tokens and those of the conversation."""
    model.frequent = PartialHead(model.base, model.parts, mx.array(list(ids)))
    return model


def conversation(model: MTPModel, ids: Sequence[int]) -> ConversationVocabulary:
    """The vocabulary of an answer."""
    assert model.frequent is not None
    return ConversationVocabulary(model, model.frequent, ids)


def counted(model: MTPModel, ids: Sequence[int]) -> AdapterStatistics:
    """Statistics of training text in which tokens occur, the first ones most often."""
    k = model.num_draft_tokens
    ranks = RankCounts(num_anchors=(0,) * k, ranks=((0,) * 9,) * k, side_ranks=((0,) * 9,) * k)
    counts = tuple(range(len(ids), 0, -1))
    found = DraftVocabulary(ids=tuple(ids), counts=counts)
    return AdapterStatistics(source="", kinds={"text": ranks}, vocabulary=found)


def emitted(model: MTPModel, **options: object) -> list[int]:
    """Ids of an answer."""
    steps = decode(model, PROMPT, max_tokens=24, **options)  # type: ignore[arg-type]
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite"])
@pytest.mark.parametrize("layout", ["linear", "quadratic", "auto"])
def test_greedy_ids_are_those_of_plain_decoding(kind: str, layout: str) -> None:
    plain = emitted(tiny_mtp(kind, quantised=True), layout="plain")
    assert emitted(with_vocabulary(tiny_mtp(kind, quantised=True)), layout=layout) == plain


@pytest.mark.parametrize("family", ["gemma2", "lille-130m"])
def test_so_they_are_with_limited_logits_and_a_head_in_the_backbone(family: str) -> None:
    model = family_mtp(family)
    plain = emitted(model, layout="plain")
    assert emitted(with_vocabulary(model), layout="linear") == plain


def test_a_vocabulary_of_useless_tokens_costs_speed_only() -> None:
    model = tiny_mtp("llama")
    plain = emitted(model, layout="plain")
    useless = [token for token in range(64) if token not in {*plain, *PROMPT}][:16]
    with_vocabulary(model, useless)
    assert emitted(model, layout="quadratic") == plain


@pytest.mark.parametrize("sampling", [None, Sampling(temp=1.0)])
@pytest.mark.parametrize("sampler", [True, False])
def test_drafts_are_in_the_vocabulary(sampling: Sampling | None, sampler: bool) -> None:
    model = with_vocabulary(tiny_mtp("llama", sampler=sampler))
    request = make_request(
        model, PROMPT, layout="quadratic", max_tokens=24, sampling=sampling, seed=0
    )
    drafter, seen = request.masks, set()
    assert isinstance(drafter, MaskTokenDrafter)
    while not request.finished:
        known = {*FREQUENT, *request.ids}
        [outcome] = run(model, [request.plan()])
        request.commit(outcome)
        filler = {token for token in vocabulary_ids(drafter) if token not in known}
        assert len(filler) <= 64 - len(FREQUENT)
        drafts: list[int] = outcome.drafts.ids()
        assert drafts and set(drafts) <= {*known, *filler}
        candidates: list[list[int]] = outcome.drafts.candidates.tolist()  # type: ignore[assignment]
        assert all(len(set(row)) == len(row) for row in candidates)
        seen |= set(drafts)
    assert len(seen) > 1


def vocabulary_ids(drafter: MaskTokenDrafter) -> list[int]:
    """Ids of a drafter's vocabulary."""
    assert drafter._vocabulary is not None
    return drafter._vocabulary.ids.tolist()  # type: ignore[return-value]


def test_tokens_of_the_conversation_join() -> None:
    model = with_vocabulary(tiny_mtp("llama", vocab_size=400))
    words = conversation(model, [7, 300, 7, 2])
    ids: list[int] = words.ids.tolist()  # type: ignore[assignment]
    assert {*FREQUENT, 7, 300} <= set(ids) and len(ids) == len(set(ids)) == len(FREQUENT) + 64
    words.add([399, 300])
    assert 399 in words.ids.tolist()  # type: ignore[operator]
    hidden = mx.random.normal((3, model.hidden_size), key=mx.random.key(1))
    assert model.frequent is not None
    whole = model.logits(hidden[None])[0]
    found = words.rate(hidden, model.frequent.logits(hidden[None])[0])
    assert found.ids is not None
    assert mx.allclose(found.logits, whole[:, found.ids], rtol=1e-5, atol=1e-5)


def test_a_long_conversation_keeps_its_latest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_OWN", 64)
    model = with_vocabulary(tiny_mtp("llama", vocab_size=400))
    words = conversation(model, [10, 11, *range(100, 180), 10])
    ids = set(words.ids.tolist())  # type: ignore[arg-type]
    assert ids == {*FREQUENT, 10, *range(117, 180)}


def test_no_conversation_needs_no_second_head() -> None:
    model = with_vocabulary(tiny_mtp("llama"))
    words = conversation(model, [1, 2, 3])
    assert words.ids.tolist() == FREQUENT
    logits = mx.ones((2, len(FREQUENT)))
    assert words.rate(mx.zeros((2, model.hidden_size)), logits).logits is logits


@pytest.mark.parametrize("sampler", [True, False])
def test_one_pass_over_all_tokens_gives_the_same_drafts(sampler: bool) -> None:
    """So that what a machine's costs decide changes no drawn token."""
    model = with_vocabulary(tiny_mtp("llama", sampler=sampler))
    drafter = MaskTokenDrafter(model, Sampling(temp=1.0).distribution, PROMPT)
    hidden = mx.random.normal((4, model.hidden_size), key=mx.random.key(2))
    assert model.frequent is not None
    found: list[Drafts] = [
        drafter.draft(hidden, logits[0], mx.array(5), key=mx.random.key(3))
        for logits in (model.logits(hidden[None]), model.frequent.logits(hidden[None]))
    ]
    assert mx.array_equal(found[0].tokens, found[1].tokens)
    assert mx.array_equal(mx.sort(found[0].candidates), mx.sort(found[1].candidates))


class TestFrequentHead:
    def test_it_has_the_tokens_that_were_counted_most_often(self) -> None:
        model = tiny_mtp("llama")
        model.statistics = counted(model, [60, 3, 7])
        head = frequent_head(model, size=8)
        assert head is not None and head.ids.tolist() == [60, 3, 7, 0, 1, 2, 4, 5]

    def test_without_counts_it_has_the_first_ids(self) -> None:
        head = frequent_head(tiny_mtp("llama"), size=3)
        assert head is not None and head.ids.tolist() == [0, 1, 2]

    def test_there_is_none_without_mask_tokens_or_for_a_small_vocabulary(self) -> None:
        model = tiny_mtp("llama")
        model.statistics = counted(model, [60, 3, 7])
        assert frequent_head(model, size=33) is None and frequent_head(model) is None
        assert frequent_head(MTPModel(tiny_base("llama")), size=8) is None

    def test_its_size_follows_the_vocabulary(self) -> None:
        model = tiny_mtp("llama", vocab_size=24_600)
        uncounted = frequent_head(model)
        model.statistics = counted(model, [60, 3, 7])
        found = frequent_head(model)
        assert uncounted is not None and uncounted.ids.size == 8192
        assert found is not None and found.ids.size == 4096

    def test_there_is_none_where_the_models_code_does_something_else(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_mtp("llama")
        model.statistics = counted(model, [60, 3, 7])
        own = type(model.base).__call__

        def mixed(self: Any, *args: Any) -> mx.array:
            return own(self, *args) - mx.roll(own(self, *args), 1, -1)

        monkeypatch.setattr(type(model.base), "__call__", mixed)
        assert frequent_head(model, size=8) is None

    def test_all_ids_have_a_place(self) -> None:
        assert np.array_equal(by_frequency([4, 1], 6), [4, 1, 0, 2, 3, 5])
