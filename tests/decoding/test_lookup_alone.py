"""A model without an adapter decodes with drafts from the text: same ids, exact samples."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_mtp.decoding.loop import StepResult, decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from tests.decoding.test_decode import PROMPT, ids_of, plain_ids, run, stock_ids
from tests.helpers.exact import exact_probs, holm, p_value
from tests.helpers.scripted import TableModel
from tests.helpers.tiny import KINDS, tiny_base

COUNT = {"max_tokens": 40}


def cheap_rows() -> Speculation:
    """What is known where more rows cost nearly nothing, so that all that is found is verified."""
    curve = CostCurve(rows=(1, 32), contexts=(0,), forward_ms=((1.0, 1.01),), draft_ms=(0.0,))
    return Speculation(LiveCosts(curve, learns=False), Acceptance.unknown(0))


def looked_up(steps: list[StepResult]) -> tuple[int, int]:
    """Drafts from the text, verified and accepted; there are no others."""
    assert {step.source for step in steps} <= {"", "lookup"}
    verified = sum(step.num_draft_tokens for step in steps)
    return verified, sum(step.num_accepted for step in steps)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_are_those_of_mlx_lm(kind: str) -> None:
    base = tiny_base(kind)
    expected = stock_ids(base, PROMPT, **COUNT)
    model = MTPModel(base, name=kind)
    altered = [(token + (place % 6 == 5)) % 64 for place, token in enumerate(expected)]
    texts = [[*PROMPT, *altered], [63, *expected, 62]]
    steps = run(model, PROMPT, lookup_ids=texts, speculation=cheap_rows(), **COUNT)
    verified, accepted = looked_up(steps)
    assert ids_of(steps) == expected and len(steps) < 40
    assert 10 < accepted < verified
    off = run(model, PROMPT, lookup_ids=texts, lookup=False, **COUNT)
    assert ids_of(off) == expected and looked_up(off) == (0, 0) and len(off) == 40


def test_it_is_on_by_default_and_off_by_option_or_layout() -> None:
    model = MTPModel(tiny_base("llama"), name="llama")
    texts = [[*PROMPT, *plain_ids(model, PROMPT, **COUNT)]]
    for options, is_on in [
        ({}, True),
        ({"drafter": "lookup"}, True),
        ({"lookup": False}, False),
        ({"layout": "plain"}, False),
        ({"num_draft_tokens": 0}, False),
    ]:
        steps = run(model, PROMPT, lookup_ids=texts, speculation=cheap_rows(), **options, **COUNT)
        assert (looked_up(steps)[0] > 0) == is_on, options


def test_ids_outside_the_vocabulary_are_refused() -> None:
    model = MTPModel(tiny_base("llama"), name="llama")
    with pytest.raises(ValueError, match="lookup_ids contains the id 64, but"):
        decode(model, PROMPT, lookup_ids=[[1, 2], [3, 64]])
    with pytest.raises(ValueError, match="lookup_ids contains the id -2"):
        decode(model, PROMPT, lookup_ids=[[-2]])


def test_earlier_answers_with_the_same_cache_are_looked_up_in() -> None:
    model = MTPModel(tiny_base("llama"), name="llama")
    cache = model.make_cache()
    first = ids_of(run(model, PROMPT, cache=cache, speculation=cheap_rows(), max_tokens=12))
    again = [first[-1], *PROMPT]
    known = {"cached_ids": [*PROMPT, *first[:-1]], "max_tokens": 12}
    fresh = model.make_cache()
    run(model, [*PROMPT, *first[:-1]], cache=fresh, layout="plain", max_tokens=1)
    expected = ids_of(run(model, again, cache=fresh, layout="plain", **known))
    steps = run(model, again, cache=cache, speculation=cheap_rows(), max_tokens=12)
    assert ids_of(steps) == expected
    assert looked_up(steps)[0] > 0  # the prompt is found before the first answer


def chain(seed: int, temp: float) -> TableModel:
    rng = np.random.default_rng(seed)
    logits = (1.5 / temp * rng.standard_normal((3, 8, 8))).astype(np.float32)
    model = TableModel(logits, np.zeros((3, 8), np.float32), np.zeros((8, 8), np.float32))
    model.num_draft_tokens = 0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("temp", [1.0, 0.5])
def test_samples_follow_the_model_whatever_the_text_has(temp: float) -> None:
    model, sampling = chain(3, temp), Sampling(temp=1.0)
    counts, verified, accepted = np.zeros((3, 8, 8, 8)), 0, 0
    for seed in range(4):
        steps = run(
            model, [1, 2, 3], sampling=sampling, seed=seed, speculation=cheap_rows(),
            max_tokens=1_000,
        )  # fmt: skip
        ids = [1, 2, 3, *ids_of(steps)]
        verified, accepted = np.add((verified, accepted), looked_up(steps))
        for place in range(3, len(ids)):
            counts[(place % 3, *ids[place - 2 : place + 1])] += 1
    assert 100 < accepted < verified
    probs = np.array(
        [[exact_probs(row, [before], sampling) for before, row in enumerate(table)]
         for table in model.logits_table]
    )  # fmt: skip
    rows = np.broadcast_to(probs[:, None], counts.shape).reshape(-1, 8)
    found = [p_value(counts.reshape(-1, 8), rows)]
    found += [p_value(counts[phase].sum(axis=0), probs[phase]) for phase in range(3)]
    assert holm(found)[0] > 0.001, found
