"""Drafts of a draft model: what it proposes, and that its cache has what was emitted."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.drafting.draft_model import MAX_DRAFTS, DraftModelDrafter
from mlx_mtp.drafting.drafter import CommittedStep, Drafts
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepLayout, plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import DRAFT_MODEL
from tests.helpers.exact import p_value
from tests.helpers.hybrid import HYBRIDS, hybrid_base
from tests.helpers.tiny import tiny_base

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
DRAFTS = ("llama", "gemma3_text", "ministral3", "deepseek_v3", "qwen3_5", "mamba2", "lfm2", "rwkv7")
NO_STATES = mx.zeros((0, 0))


def tiny(kind: str, seed: int = 0, **overrides: Any) -> MTPModel:
    """A tiny model without an adapter."""
    make = hybrid_base if kind in HYBRIDS else tiny_base
    return MTPModel(make(kind, seed=seed, **overrides))


class Answer:
    """An answer whose steps are made up, around a drafter that is under test."""

    def __init__(
        self, draft: MTPModel, model: MTPModel, prompt: list[int], *,
        memory: dict[str, Any] | None = None, sampling: Sampling | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.draft = draft
        self.ids = list(prompt)
        self.memory = {} if memory is None else memory
        distribution = (sampling or Sampling()).distribution
        self.drafter = DraftModelDrafter(
            draft, model, prompt, distribution, memory=self.memory, **options
        )
        self._key = mx.random.key(0)

    @property
    def cache(self) -> MTPCache:
        """The draft model's."""
        return self.memory[DRAFT_MODEL].cache

    def read_prompt(self, chunk: int) -> None:
        """The steps of a prompt, of which the last one emits an id."""
        num_prompt = len(self.ids)
        for start in range(0, num_prompt, chunk):
            end = min(start + chunk, num_prompt)
            emitted = [5] if end == num_prompt else []
            self._commit(plain_layout(num_pending=end - start), "", 0, emitted, start)
            self.ids += emitted

    def propose(self, count: int) -> Drafts:
        """Let the drafter propose."""
        self._key, key = mx.random.split(self._key)
        drafts = self.drafter.propose(count, key=key)
        assert len(drafts) == count
        return drafts

    def verify(self, drafts: Drafts, num_accepted: int, bonus: int) -> None:
        """A step that accepts some of the drafts."""
        emitted = [*drafts.ids()[:num_accepted], bonus]
        layout = StepLayout(1, len(drafts), (0,) * (len(drafts) + 1))
        self._commit(layout, DRAFT_MODEL, num_accepted, emitted, len(self.ids) - 1)
        self.ids += emitted

    def other_step(self, emitted: list[int]) -> None:
        """A step whose drafts are another drafter's."""
        layout = StepLayout(1, len(emitted), (0,) * (len(emitted) + 1))
        self._commit(layout, "lookup", len(emitted) - 1, emitted, len(self.ids) - 1)
        self.ids += emitted

    def _commit(
        self, layout: StepLayout, source: str, num_accepted: int, emitted: list[int], start: int
    ) -> None:
        rows_left = layout.num_pending + max(len(emitted) - 1, 0)
        next_ids = [*self.ids, *emitted][start + 1 : start + 1 + rows_left]
        self.drafter.commit(
            CommittedStep(
                layout=layout, source=source, last_node=num_accepted, tokens=emitted,
                next_ids=next_ids, hidden=NO_STATES, drafts=Drafts.none(),
            )
        )  # fmt: skip

    def assert_cache_is_fresh(self) -> None:
        """The cache has some of the first ids, as if these had been read in one go."""
        num_ids = self.cache.offset
        assert num_ids < len(self.ids)
        fresh = self.draft.make_cache()
        self.draft(mx.array([self.ids[:num_ids]]), cache=fresh)
        found = self.cache.copied()
        for layer, like in zip(found.recurrent_layers, fresh.recurrent_layers, strict=True):
            slots = [each.slots_at(num_ids) for each in (layer, like)]
            for value, expected in zip(*slots, strict=True):  # type: ignore[arg-type]
                assert mx.allclose(value, expected, rtol=1e-3, atol=1e-3)
        after = [self.draft(mx.array([[7, 11, 2]]), cache=cache) for cache in (fresh, found)]
        assert mx.allclose(*after, rtol=1e-3, atol=1e-3)


def continued(draft: MTPModel, ids: list[int], count: int) -> list[int]:
    """What a draft model generates greedily, by forwards over the whole text."""
    found: list[int] = []
    for _ in range(count):
        hidden = draft(mx.array([[*ids, *found]]), cache=draft.make_cache())
        best: Any = mx.argmax(draft.logits(hidden)[0, -1]).item()
        found.append(best)
    return found


def random_steps(answer: Answer, count: int, rng: np.random.Generator) -> None:
    """Steps with a random number of drafts, of which a random number is accepted."""
    for _ in range(count):
        if rng.random() < 0.1:
            answer.other_step(rng.integers(0, 64, rng.integers(1, 6)).tolist())
            continue
        drafts = answer.propose(int(rng.integers(1, MAX_DRAFTS + 1)))
        if rng.random() < 0.1:  # the step was planned, and is not run
            drafts = answer.propose(int(rng.integers(1, MAX_DRAFTS + 1)))
        answer.verify(drafts, int(rng.integers(0, len(drafts) + 1)), int(rng.integers(0, 64)))


@pytest.mark.parametrize("kind", DRAFTS)
def test_drafts_are_what_the_draft_model_generates(kind: str) -> None:
    draft = tiny(kind)
    for chunk in (64, 4):
        answer = Answer(draft, tiny("llama"), PROMPT)
        answer.read_prompt(chunk)
        for num_accepted in (0, 3, 1, 2):
            drafts = answer.propose(3)
            assert drafts.ids() == continued(draft, answer.ids, 3)
            assert drafts.probs.tolist() == [[1.0]] * 3
            answer.verify(drafts, num_accepted, bonus=9)


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", DRAFTS)
def test_the_cache_has_what_was_emitted(kind: str, count: int, seed: int) -> None:
    draft, rng = tiny(kind), np.random.default_rng(seed)
    done = 0
    while done < count:  # texts of a few hundred ids, as a fresh prefill takes the longer the more
        answer = Answer(draft, tiny("llama"), PROMPT, prefill_step_size=7)
        answer.read_prompt(4)
        for _ in range(3):
            random_steps(answer, 20, rng)
            done += 20
            answer.assert_cache_is_fresh()


def test_a_windows_rows_are_dropped_and_never_needed_again() -> None:
    draft, rng = tiny("gemma3_text"), np.random.default_rng(0)
    answer = Answer(draft, tiny("llama"), PROMPT)
    answer.read_prompt(64)
    random_steps(answer, 150, rng)
    assert len(answer.ids) > 400
    answer.assert_cache_is_fresh()
    layer: Any = answer.cache.layers[0]
    assert layer.dropped > 0


def test_sampled_drafts_follow_the_distribution_that_they_report() -> None:
    draft, model = tiny("llama", vocab_size=8), tiny("qwen3", vocab_size=8)
    sampling = Sampling(temp=0.8, top_k=6)
    answer = Answer(draft, model, [1, 5, 3], sampling=sampling)
    counts, rows, probs = np.zeros((8, 8)), np.zeros((8, 8)), np.zeros((2, 8))
    for _ in range(1200):
        drafts = answer.propose(2)
        tokens, dense = drafts.ids(), mx.zeros((2, 8))
        probs = np.array(mx.put_along_axis(dense, drafts.candidates, drafts.probs, axis=-1))
        counts[tokens[0], tokens[1]] += 1
        rows[tokens[0]] = probs[1]
    assert p_value(counts.sum(axis=1), probs[0]) > 0.001
    assert p_value(counts, rows) > 0.001
    hidden = draft(mx.array([[1, 5, 3]]), cache=draft.make_cache())
    expected = sampling.distribution(draft.logits(hidden)[0, -1:])  # type: ignore[misc]
    assert np.abs(probs[0] - np.array(expected)[0]).max() < 1e-5
    assert np.ptp(rows[counts.sum(axis=1) > 0], axis=0).max() > 0.01  # the first draft matters


@pytest.mark.parametrize("sampling", [None, Sampling(temp=2.0)])
@pytest.mark.parametrize(("of_draft", "of_model"), [(64, 48), (48, 64)])
def test_tables_may_have_other_numbers_of_tokens(
    of_draft: int, of_model: int, sampling: Sampling | None
) -> None:
    draft, model = tiny("llama", vocab_size=of_draft), tiny("qwen3", vocab_size=of_model)
    prompt = [of_model - 1, 3, of_model - 2, 5]  # ids that a smaller draft does not have
    answer = Answer(draft, model, prompt, sampling=sampling)
    seen: set[int] = set()
    for _ in range(40):
        drafts = answer.propose(5)
        seen |= set(drafts.ids())
        assert np.array(drafts.candidates).max() < 48
        answer.verify(drafts, 2, bonus=of_model - 1)
    assert max(seen) < 48


def test_an_offer_is_as_large_as_there_is_room() -> None:
    draft = tiny("llama", max_position_embeddings=20)
    answer = Answer(draft, tiny("llama"), PROMPT)
    offers = [answer.drafter.offer(room).num_drafts for room in (100, 4, 1, 0)]
    assert offers == [8, 4, 1, 0]
    few = Answer(draft, tiny("llama"), PROMPT, max_drafts=3)
    assert few.drafter.offer(100).num_drafts == 3
    answer.other_step(list(range(7)))
    assert answer.drafter.offer(100).num_drafts == 20 - 16
    answer.propose(4)
    assert answer.cache.offset == 19
    answer.other_step([1] * 9)
    assert answer.drafter.offer(100).num_drafts == 0
    answer.read_prompt(64)  # reads no further than there are positions
    assert answer.cache.offset <= 20


def test_the_cost_of_a_draft_is_that_of_the_weights() -> None:
    small, large = tiny("llama", num_hidden_layers=1), tiny("llama", num_hidden_layers=8)
    costs = [
        Answer(draft, model, PROMPT).drafter.offer(9)
        for draft, model in ((small, large), (large, small), (small, small))
    ]
    assert 0.1 < costs[0].first_cost < 0.5 < 2 < costs[1].first_cost
    assert costs[2].first_cost == costs[2].next_cost == 1.0


@pytest.mark.parametrize("kind", DRAFTS)
def test_the_next_answer_continues_what_was_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, model, memory = tiny(kind), tiny("llama"), {}
    long_prompt = np.random.default_rng(0).integers(0, 64, 60).tolist()
    answer = Answer(draft, model, long_prompt, memory=memory)
    answer.read_prompt(64)
    random_steps(answer, 5, np.random.default_rng(1))
    num_rows, rows = answer.cache.offset, []
    forward = MTPModel.__call__

    def counted(self: Any, ids: mx.array, **options: Any) -> mx.array:
        rows.append(ids.shape[1])
        return forward(self, ids, **options)

    monkeypatch.setattr(MTPModel, "__call__", counted)
    turn = Answer(draft, model, [*answer.ids, 4, 4, 4], memory=memory)
    assert turn.propose(3).ids() == continued(draft, turn.ids, 3)
    assert sum(rows[:3]) == len(turn.ids) - num_rows + 2
    # An answer that knows only its own prompt.
    ids = list(turn.ids)
    late = Answer(draft, model, [9, 9], memory=memory, num_before=len(ids))
    rows.clear()
    assert late.propose(2).ids() == continued(draft, [*ids, 9, 9], 2)
    assert rows[:2] == [2, 1]
    # Another text after the prompt: it continues at its end, or shortly before.
    changed = [*long_prompt[:-3], 60, 61, 62, 63]
    other = Answer(draft, model, changed, memory=memory)
    rows.clear()
    assert other.propose(2).ids() == continued(draft, changed, 2)
    assert rows[0] <= 7 + 16
    # Another model takes nothing from it.
    stranger = tiny(kind, seed=5)
    assert Answer(stranger, model, changed, memory=memory).propose(2).ids() == continued(
        stranger, changed, 2
    )


def test_a_text_that_shares_nothing_is_read_anew() -> None:
    draft, model, memory = tiny("gemma3_text"), tiny("llama"), {}
    answer = Answer(draft, model, PROMPT, memory=memory)
    answer.read_prompt(64)
    random_steps(answer, 150, np.random.default_rng(0))  # the window has dropped rows
    other = Answer(draft, model, [1, *PROMPT], memory=memory)
    assert other.cache is not answer.cache or other.cache.offset == 0
    assert other.propose(3).ids() == continued(draft, other.ids, 3)
