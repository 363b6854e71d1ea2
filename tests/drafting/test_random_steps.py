"""Conversations of random steps: caches and what drafters remember are as if the text were new."""

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
from mlx_mtp.decoding.together import decode_together
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.draft_heads import DraftHeads
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import CHAIN, DRAFT_MODEL, HEADS, LOOKUP, NATIVE, SOURCES, Plan
from tests.drafting.test_exactness import CASES, Case, K, small_draft
from tests.helpers.planted import PlantedNative
from tests.helpers.tiny import random_heads

VOCAB = 12  # small, so that random drafts are right now and then
MAX_TEXT = 160
BATCHED = ("llama", "qwen3_moe", "qwen3_5")
ALL = {*SOURCES, CHAIN}
MAX_STEPS = 300  # until every source was taken, which chance decides
SOME = [Case(each.kind, {**each.sizes, "vocab_size": VOCAB}, each.cache) for each in CASES]


class AnyPlanner:
    """Takes any offer, any number of its drafts and any masks."""

    def __init__(self, k: int, rng: np.random.Generator, used: set[str]) -> None:
        self._k, self._rng, self._used = k, rng, used

    def plan(self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), **_: Any) -> Plan:
        rng = self._rng
        usable = [each for each in offers if 0 < each.num_drafts <= room - 1 - each.follows]
        drafts, source, first = 0, "", 0
        if usable and rng.random() < 0.85:
            chains = [
                each for each in usable if each.follows and rng.random() < 0.5
            ]  # they are rare
            offer = [*chains, *rng.permuted(np.array(usable, object))][0]
            source, first = offer.source, offer.follows
            drafts = first + int(rng.integers(1, offer.num_drafts + 1))
            self._used.add(source)
        masks = rng.integers(0, min(self._k, room) + 1, drafts + 1).tolist()
        return Plan(StepLayout(num_pending, drafts, tuple(masks)), source=source, num_first=first)

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


def second(logprobs: mx.array) -> mx.array:
    """A sampler function: the second most likely token."""
    return mx.argsort(-logprobs.reshape(-1))[1]


def grammar(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor that allows what a rule allows after the last id."""
    allowed = (mx.arange(logits.shape[-1]) + tokens[-1]) % 3 != 1
    return mx.where(allowed, logits, -mx.inf)


TARGETS: list[dict[str, Any]] = [
    {},
    {},
    {"sampler": second},
    {"logits_processors": [grammar]},
    {"sampling": Sampling(repetition_penalty=1.4, repetition_context_size=8)},
]


class Conversation:
    """Random answers on one cache, each compared with plain decoding on a copy of the cache.

    Attributes:
        ids: ids of the text; the last one may not be in the cache yet.
        stale: places at which the text went on in another way before.
    """

    def __init__(self, model: Any, case: Case, rng: np.random.Generator, draft: MTPModel) -> None:
        self.model, self.case, self.rng, self.draft = model, case, rng, draft
        self.cache = self._new_cache()
        self.ids: list[int] = []
        self.stale: set[int] = set()

    def _new_cache(self) -> MTPCache:
        cache = self.model.make_cache(**self.case.cache)
        cache.keeps_checkpoints = True
        return cache

    def rewind(self) -> None:
        """Begin anew, go back, or continue from a copy."""
        choice = self.rng.random()
        if len(self.ids) > MAX_TEXT:
            self.cache, self.ids, self.stale = self._new_cache(), [], set()
        elif choice < 0.4:
            end = self.cache.rewind_point(int(self.rng.integers(0, self.cache.offset + 1)))
            if end:
                self.cache.rewind(self.cache.offset - end)
                self.ids = self.ids[:end]
        elif choice < 0.5:
            self.cache, self.stale = self.cache.copied(), set()

    def request(self) -> tuple[list[int], dict[str, Any]]:
        """A prompt and options; the prompt begins with the last id if that is not cached."""
        rng, cached = self.rng, self.ids[: self.cache.offset]
        waiting = self.ids[self.cache.offset :]
        if waiting and rng.random() < 0.2:
            waiting = []  # as where the id that ended an answer is left out
        self.stale.add(self.cache.offset)  # the id there may have been another
        more = rng.integers(0, VOCAB, rng.integers(1, 1 + rng.choice([2, 40]))).tolist()
        if waiting and rng.random() < 0.3:
            more = []
        self.ids = [*cached, *waiting, *more]
        return self.ids[len(cached) :], {
            "cached_ids": cached,
            "max_tokens": int(rng.integers(1, 25)),
            "stop_ids": set(rng.integers(0, VOCAB, rng.integers(0, 2)).tolist()),
            "prefill_step_size": int(rng.choice([1, 3, 7, 64])),
            **TARGETS[rng.integers(len(TARGETS))],
        }

    def answer(self) -> int:
        """One answer, perhaps abandoned; returns its number of steps."""
        self.rewind()
        twin = self.cache.copied()
        prompt, options = self.request()
        limit = self.rng.choice([3, 1000])
        emitted, num_steps = [], 0
        steps = decode(
            self.model, prompt, cache=self.cache, draft_model=self.draft, layout="auto", **options
        )
        for step in steps:
            emitted += step.tokens
            num_steps += 1
            if num_steps == limit:
                steps.close()
        self.ids += emitted
        assert emitted == self.plain(prompt, twin, len(emitted), options)
        self.check_cache(twin)
        self.check_memory()
        return num_steps

    def plain(
        self, prompt: list[int], twin: MTPCache, count: int, options: dict[str, Any]
    ) -> list[int]:
        """The first ids of the same answer by plain decoding."""
        steps = decode(
            self.model, prompt, cache=twin, layout="plain", **{**options, "max_tokens": count}
        )
        return [token for step in steps for token in step.tokens]

    def check_cache(self, twin: MTPCache) -> None:
        """The cache is that of plain decoding and, where chunks do not matter, of a new prefill."""
        end = self.cache.offset
        assert end == twin.offset == len(self.ids) - 1
        fresh = self.model.make_cache()
        others = [twin] if self.case.cache else [twin, fresh]
        if not self.case.cache:
            self.model(mx.array([self.ids[:end]]), cache=fresh)
        probe = mx.array([[7, 11, 2]])
        after = self.model(probe, cache=self.cache.copied())
        for other in others:
            expected = self.model(probe, cache=other.copied())
            assert mx.allclose(after, expected, rtol=1e-3, atol=1e-3)

    def check_memory(self) -> None:
        """Lookup has the text, modules have read its rows, a draft model has read some of it."""
        memory, ids, end = self.cache.drafter_memory, self.ids, self.cache.offset
        assert memory[LOOKUP]._ids[memory[LOOKUP]._start :][: len(ids)] == ids
        rows = memory[NATIVE]
        assert rows.end == end and len(rows.next_ids) == sum(len(x) for x in rows.hidden)
        self.check_module(rows)
        if not self.case.cache:
            self.check_heads(memory[HEADS])
        text = memory[DRAFT_MODEL]
        assert text.ids == ids and text.cache.offset <= len(ids) + 8
        self.check_draft(text.cache.copied())

    def check_module(self, rows: Any) -> None:
        """Rows are at their places, and have the state of the place and the id after it.

        Where the text once went on in another way, the id may be the earlier one.
        """
        first, (count, *others) = rows.cache.layers[0], rows.counts
        found = list(rows.next_ids)
        if count:  # more rows are those of drafts
            keys, values = (each[:, :, :count] for each in first.keys_and_values())
            found = [*values[0, 0, :, 0].astype(mx.int32).tolist(), *found]
            if not self.case.cache:
                hidden = self.model(mx.array([self.ids[:-1]]), cache=self.model.make_cache())[0]
                expected = hidden[rows.start : rows.start + count]
                assert mx.allclose(keys[0, 0], expected, rtol=1e-3, atol=1e-3)
        assert rows.start + len(found) == self.cache.offset
        pairs = enumerate(zip(found, self.ids[rows.start + 1 :], strict=True), rows.start + 1)
        assert {place for place, (one, other) in pairs if one != other} <= self.stale
        num_lost = len(self.stale) + 1  # by a module that was further behind than the rewind went
        for index, other in enumerate(others, 1):
            assert count - index * num_lost <= other <= count

    def check_heads(self, rows: Any) -> None:
        """The heads have read every row at its place, as if they had read the text anew."""
        end = rows.end - len(rows.next_ids)
        assert rows.end == self.cache.offset
        hidden = self.model(mx.array([self.ids[: rows.end]]), cache=self.model.make_cache())
        waiting = mx.concatenate([hidden[0, :0], *rows.hidden])
        assert mx.allclose(waiting, hidden[0, end:], rtol=1e-3, atol=1e-3)
        if end > rows.start:
            fresh = self.model.heads.make_cache()
            self.model.heads(hidden[:, rows.start : end], cache=fresh)
            for layer, other in zip(rows.cache.layers, fresh.layers, strict=True):
                pairs = zip(layer.keys_and_values(), other.keys_and_values(), strict=True)
                assert all(mx.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in pairs)

    def check_draft(self, cache: MTPCache) -> None:
        """A draft model's rows of the text are as if it had read the text anew."""
        end = min(cache.offset, len(self.ids))
        cache.rewind(cache.offset - end)
        fresh, probe = self.draft.make_cache(), mx.array([[7, 11, 2]])
        if end:
            self.draft(mx.array([self.ids[:end]]), cache=fresh)
        found, expected = (self.draft(probe, cache=each) for each in (cache, fresh))
        assert mx.allclose(found, expected, rtol=1e-3, atol=1e-3)


def drafted(case: Case, rng: np.random.Generator) -> Any:
    """A model all of whose drafters propose random ids."""
    model = case.model
    ids = rng.integers(0, VOCAB, 4 * MAX_TEXT).tolist()
    model.native = PlantedNative(model, ids, int(rng.integers(1, 4)))  # type: ignore[assignment]
    config, weights = random_heads(model.base, head="layer", count=2)
    model.heads = DraftHeads(config, weights, dtype=mx.float32)
    return model


@pytest.mark.parametrize("count", [25, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_caches_and_memories_after_random_steps(
    case: Case, count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, done, used = np.random.default_rng([seed, len(str(case))]), 0, set[str]()
    model = drafted(case, rng)
    monkeypatch.setattr(
        "mlx_mtp.decoding.setup.make_planner", lambda *_, **__: AnyPlanner(K, rng, used)
    )
    talk = Conversation(model, case, rng, small_draft(VOCAB))
    while done < count or (used != ALL and done < MAX_STEPS):
        done += talk.answer()
    assert used == ALL


@pytest.mark.parametrize("count", [25, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("case", [each for each in SOME if str(each) in BATCHED], ids=str)
def test_batched_answers_that_end_anywhere(
    case: Case, count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several answers at once; some of their last steps were planned and never run."""
    rng, done, used, sizes = np.random.default_rng([seed, 7]), 0, set[str](), set[int]()
    model, draft = drafted(case, rng), small_draft(VOCAB)
    monkeypatch.setattr(
        "mlx_mtp.decoding.setup.make_planner", lambda *_, **__: AnyPlanner(K, rng, used)
    )

    def counted(model: Any, steps: Any) -> Any:
        sizes.add(len(steps))
        return run(model, steps)

    monkeypatch.setattr("mlx_mtp.decoding.together.run", counted)
    talks = [Conversation(model, case, rng, draft) for _ in range(3)]
    while done < count or (used != ALL and done < MAX_STEPS):
        for talk in talks:
            talk.rewind()
        twins = [talk.cache.copied() for talk in talks]
        asked = [talk.request() for talk in talks]
        requests = [
            make_request(model, prompt, cache=talk.cache, draft_model=draft, **options)
            for talk, (prompt, options) in zip(talks, asked, strict=True)
        ]
        limit = int(rng.choice([5, 12, 1000]))
        known = Speculation.guess(K)
        steps = decode_together(model, requests, speculation=known, max_answers=3)
        for number, _ in enumerate(steps, 1):
            done += 1
            if number == limit:
                steps.close()
        for talk, twin, one, (prompt, options) in zip(talks, twins, requests, asked, strict=True):
            found = one.ids[len(talk.ids) :]
            if not found:  # some of its prompt is in the cache
                talk.ids = talk.ids[: talk.cache.offset + 1]
                continue
            talk.ids += found
            assert found == talk.plain(prompt, twin, len(found), options)
            talk.check_cache(twin)
            talk.check_memory()
    assert used == ALL and max(sizes) > 1
