"""Whatever is drafted, by whom and however, the text is that of plain decoding.

Planted drafters cover every source on models of every kind: with right drafts a step emits k + 1
tokens, with wrong ones 1, and the ids are the same.  ``tests/decoding/test_heads.py`` has the same
for heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from mlx_mtp.decoding.loop import StepResult, decode
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.planning.plan import DRAFT_MODEL, LOOKUP, MASK, NATIVE
from tests.helpers.hybrid import HYBRIDS, hybrid_mtp
from tests.helpers.planted import (
    PlantedDraftModel,
    PlantedNative,
    plant_lookup,
    written_down,
)
from tests.helpers.scripted import ScriptedModel
from tests.helpers.tiny import tiny_base, tiny_mtp

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
K, LENGTH = 3, 21
WIDE: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Case:
    """A model and its cache."""

    kind: str
    sizes: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join((self.kind, *self.cache))

    @property
    def model(self) -> MTPModel:
        """The model with a random adapter."""
        make = hybrid_mtp if self.kind in HYBRIDS else tiny_mtp
        return make(self.kind, k=K, **self.sizes)


CASES = [
    Case("llama"),
    Case("qwen3"),
    Case("gemma3_text"),  # a window
    Case("qwen3_moe"),
    Case("deepseek_v3"),  # latent attention
    Case("qwen3_next"),  # gated delta rule
    Case("qwen3_5"),
    Case("jamba"),  # mamba, row by row
    Case("falcon_h1"),  # mamba 2
    Case("lfm2"),  # convolutions
    Case("llama", WIDE, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 16}),
    Case("qwen3", {}, {"max_kv_size": 16}),
]
SOURCES = (MASK, NATIVE, DRAFT_MODEL, LOOKUP)


@cache
def plain_text(case: str) -> list[int]:
    """Prompt and answer of plain decoding."""
    [known] = [each for each in CASES if str(each) == case]
    model = known.model
    steps = decode(
        model, PROMPT, cache=model.make_cache(**known.cache), layout="plain", max_tokens=LENGTH
    )
    return [*PROMPT, *(token for step in steps for token in step.tokens)]


def small_draft(vocab_size: int) -> MTPModel:
    return MTPModel(tiny_base("llama", num_hidden_layers=1, vocab_size=vocab_size))


def planted(
    model: MTPModel, source: str, ids: list[int], patch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    """The model with a drafter of what is written down, and options of ``decode``."""
    if source == MASK:
        return ScriptedModel(model, lambda position, _: ids[position]), {}
    if source == DRAFT_MODEL:
        return model, {"draft_model": PlantedDraftModel(small_draft(model.vocab_size), ids)}
    if source == LOOKUP:
        plant_lookup(patch, ids)
    else:
        model.native = PlantedNative(model, ids, 1 + len(ids) % 2)  # type: ignore[assignment]
    return model, {}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_planted_drafts_decide_the_steps_and_not_the_text(
    case: Case, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, model = plain_text(str(case)), case.model
    for name in ("right", "wrong", "mixed"):
        ids = written_down(text, name, vocab_size=model.vocab_size)
        drafted, options = planted(model, source, ids, monkeypatch)
        steps = list(
            decode(
                drafted, PROMPT, cache=model.make_cache(**case.cache), drafter=source,
                layout="linear", num_draft_tokens=K, max_tokens=LENGTH, **options,
            )
        )  # fmt: skip
        assert [token for step in steps for token in step.tokens] == text[len(PROMPT) :], name
        check_steps(steps, name, may_be_short="quantized_kv_start" in case.cache)


def check_steps(steps: list[StepResult], name: str, *, may_be_short: bool) -> None:
    """The first step may have no drafts, and the last ones have less room."""
    sizes = [len(step.tokens) for step in steps]
    for step in steps:
        assert step.num_draft_tokens <= K
        assert name != "right" or step.num_accepted == step.num_draft_tokens
        assert name != "wrong" or step.num_accepted == 0
    if name == "right":
        full = [size for size in sizes[1:-1] if size == K + 1]
        assert len(full) >= len(sizes[1:-1]) - may_be_short and len(full) >= 3
    elif name == "wrong":
        assert sizes == [1] * LENGTH
    else:
        assert {1, K + 1} <= set(sizes) and len(steps) < LENGTH


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_drafters_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner chooses among a right, a wrong and two mixed ones where rows cost little."""
    text, model = plain_text(str(case)), case.model
    names = {MASK: "mixed", NATIVE: "wrong", DRAFT_MODEL: "right", LOOKUP: "mixed"}
    drafted, options = model, {}
    for seed, (source, name) in enumerate(names.items()):
        ids = written_down(text, name, vocab_size=model.vocab_size, seed=seed)
        made, more = planted(model, source, ids, monkeypatch)
        drafted, options = (made if source == MASK else drafted), {**options, **more}
    curve = CostCurve(rows=(1, 32), contexts=(0,), forward_ms=((1.0, 1.1),), draft_ms=(0.0, 0.1))
    steps = list(
        decode(
            drafted, PROMPT, cache=model.make_cache(**case.cache), max_tokens=LENGTH,
            speculation=Speculation(LiveCosts(curve, learns=False), Acceptance.unknown(K)),
            **options,
        )
    )  # fmt: skip
    assert [token for step in steps for token in step.tokens] == text[len(PROMPT) :]
    assert sum(step.num_accepted for step in steps) > 3
