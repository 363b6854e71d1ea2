"""Recurrent layers over all kinds of mixers: rows of a step, masks, rewinding, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as lm_cache

from mlx_mtp.decoding.loop import decode
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.caches.recurrent import MAX_CHECKPOINTS, Replay
from mlx_mtp.model.layout import (
    MaskRun,
    StepLayout,
    linear_layout,
    plain_layout,
    quadratic_layout,
)
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.recurrence import RecurrenceCall, RecurrenceSeam, Rows, inject_recurrence
from mlx_mtp.model.row_by_row import RowByRow
from tests.helpers.hybrid import HYBRIDS, REFUSED, ROW_BY_ROW, hybrid_base, hybrid_mtp
from tests.helpers.scripted import ScriptedModel, mixed
from tests.helpers.tiny import step_ids

PREFIX = [3, 17, 42, 8, 29, 55, 1, 33, 20]
LAYOUTS = [
    quadratic_layout(num_pending=1, num_draft_tokens=2, num_masks=2),
    linear_layout(num_pending=1, num_draft_tokens=3, num_masks=2),
    StepLayout(1, 3, (2, 0, 1, 3)),
    StepLayout(1, 3, (0, 0, 0, 0)),
]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
# Layers that compute one row by another algebra than several: more than the recurrence differs.
MLA = ("kimi_linear", "kimi_k3", "bailing_hybrid", "bailing_moe_v3")
STATE = ("qwen3_5", "nemotron_h", "falcon_h1", "bailing_moe_linear", "lfm2", "rwkv7")


def run_step(model: MTPModel, cache: MTPCache, layout: StepLayout, ids: list[int]) -> mx.array:
    """Logits ``[rows, V]`` of a step."""
    cache.begin_step()
    return model.logits(model(step_ids(layout, ids), cache=cache, layout=layout))[0]


def prefilled(model: MTPModel, prefix: list[int] = PREFIX) -> MTPCache:
    cache = model.make_cache()
    model(mx.array([prefix]), cache=cache)
    return cache


def one_by_one(model: MTPModel, cache: MTPCache, ids: list[int]) -> mx.array:
    """Logits ``[L, V]`` of plain decoding."""
    return mx.concatenate([run_step(model, cache, plain_layout(), [token]) for token in ids])


def stock_rows(base: Any, prefix: list[int], ids: list[int]) -> mx.array:
    """Logits ``[L, V]`` of mlx-lm, one id at a time after a prompt."""
    cache = lm_cache.make_prompt_cache(base)
    base(mx.array([prefix]), cache=cache)
    return mx.stack([base(mx.array([[token]]), cache=cache)[0, 0] for token in ids])


def slots(cache: MTPCache) -> list[mx.array]:
    """All states of the recurrent layers after the rows of the cache."""
    layers = [layer.to_mlx_lm() for layer in cache.copied().recurrent_layers]
    return [value for layer in layers for value in layer.cache if value is not None]


def largest_error(ours: list[mx.array], theirs: list[mx.array]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(largest(a.astype(mx.float32) - b) for a, b in pairs)


def largest(x: mx.array) -> float:
    value: Any = mx.abs(x).max().item()
    return value


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_step_equals_plain_decoding(kind: str) -> None:
    model, stock = hybrid_mtp(kind), hybrid_base(kind)
    rng = np.random.default_rng(len(kind))
    for number, layout in enumerate(LAYOUTS):
        ids = rng.integers(0, 64, layout.num_ordinary).tolist()
        expected = stock_rows(stock, PREFIX, ids)
        cache = prefilled(model)
        logits = run_step(model, cache, layout, ids)
        assert mx.allclose(logits[: layout.num_ordinary], expected, **CLOSE)
        if number < 2:
            assert_masks(model, layout, ids, logits)
        kept = 1 + number % layout.num_ordinary
        cache.rewind(layout.num_rows - kept)
        assert cache.offset == len(PREFIX) + kept
        fresh = prefilled(model)
        one_by_one(model, fresh, ids[:kept])
        assert largest_error(slots(cache), slots(fresh)) < 1e-4
        more = rng.integers(0, 64, 2).tolist()
        logits = run_step(model, cache, StepLayout(1, 1, (1, 1)), more)
        expected = stock_rows(stock, PREFIX, [*ids[:kept], *more])[-2:]
        assert mx.allclose(logits[:2], expected, **CLOSE)


def assert_masks(model: MTPModel, layout: StepLayout, ids: list[int], logits: mx.array) -> None:
    """Mask rows are those of a forward of their own after their prefix."""
    first = layout.num_ordinary
    for anchor, count in enumerate(layout.mask_counts):
        if count:
            cache = prefilled(model, [*PREFIX, *ids[: 1 + anchor]])
            expected = model.logits(
                model(mx.arange(count)[None], cache=cache, layout=MaskRun(count))
            )
            assert mx.allclose(logits[first : first + count], expected[0], **CLOSE), anchor
        first += count


@pytest.mark.parametrize("kind", ["qwen3_5", "nemotron_h", "falcon_h1", "lfm2", "rwkv7"])
@pytest.mark.parametrize("quantised", [False, True])
def test_ordinary_rows_of_half_precision_have_the_bits_of_plain_decoding(
    kind: str, quantised: bool
) -> None:
    model = hybrid_mtp(kind, quantised=quantised, dtype=mx.bfloat16)
    for layout in LAYOUTS[:2]:
        ids = [5, 60, 31, 7][: layout.num_ordinary]
        cache, plain = prefilled(model), prefilled(model)
        logits = run_step(model, cache, layout, ids)
        assert mx.array_equal(logits[: layout.num_ordinary], one_by_one(model, plain, ids))
        cache.rewind(layout.num_rows - layout.num_ordinary)
        assert all(map(mx.array_equal, slots(cache), slots(plain)))


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("count", [3, pytest.param(250, marks=pytest.mark.soak)])
def test_random_steps_leave_the_state_of_a_fresh_prefill(kind: str, count: int, seed: int) -> None:
    model = hybrid_mtp(kind)
    rng = np.random.default_rng([len(kind), seed])
    text = list(PREFIX)
    cache = prefilled(model)
    for number in range(count):
        drafts = int(rng.integers(0, 4))
        masks = tuple(int(x) for x in rng.integers(0, 3, drafts + 1))
        layout = StepLayout(1, drafts, masks)
        ids = rng.integers(0, 64, layout.num_ordinary).tolist()
        mx.eval(run_step(model, cache, layout, ids))
        kept = int(rng.integers(0, layout.num_ordinary + 1))
        first = int(rng.integers(max(kept, 1), layout.num_ordinary + 1))
        cache.rewind(layout.num_rows - first)  # a stop string may drop more rows later
        cache.rewind(first - kept)
        text += ids[:kept]
        if rng.random() < 0.2:
            cache = cache.copied()
        if number % 25 == 2:
            fresh = prefilled(model, text)
            scale = max(map(largest, slots(fresh)))
            assert largest_error(slots(cache), slots(fresh)) < 1e-4 * max(scale, 1.0)
    assert cache.offset == len(text)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_decoding_emits_the_ids_of_mlx_lm(kind: str) -> None:
    expected = stock_ids(hybrid_base(kind), PREFIX, 12)
    model = hybrid_mtp(kind, k=3)
    for layout in ("plain", "linear", "quadratic"):
        steps = decode(model, PREFIX, max_tokens=12, layout=layout, prefill_step_size=5)
        assert [token for step in steps for token in step.tokens] == expected, layout


# The CPU multiplies experts in float32 only; MLA has another algebra for one row.
HALF = tuple(
    kind
    for kind in HYBRIDS
    if kind not in MLA and "moe" not in kind and kind not in ("qwen3_next", "jamba")
)


def draft_cases() -> Iterator[Any]:
    """Kinds and forms of models; a few in the default run with short texts, all in soak."""
    forms = {"float32": HYBRIDS, "bfloat16": HALF, "quantised": HYBRIDS}
    default = {("qwen3_5", "bfloat16"), ("falcon_h1", "bfloat16"), ("nemotron_h", "quantised")}
    default |= {("kimi_linear", "float32"), ("lfm2_moe", "quantised"), ("rwkv7", "bfloat16")}
    for form, kinds in forms.items():
        for kind in kinds:
            if (kind, form) in default:
                yield pytest.param(kind, form, 24)
            yield pytest.param(kind, form, 500, marks=pytest.mark.soak)


@pytest.mark.parametrize(("kind", "form", "count"), list(draft_cases()))
def test_adversarial_drafts_change_no_id(kind: str, form: str, count: int, seed: int) -> None:
    options: dict[str, Any] = {"quantised": form == "quantised"}
    options |= {"dtype": mx.bfloat16} if form == "bfloat16" else {}
    prompt = np.random.default_rng([len(kind), seed]).integers(0, 64, 12).tolist()
    expected = stock_ids(hybrid_base(kind, **options), prompt, count)
    model = hybrid_mtp(kind, k=3, **options)
    drafted: Any = ScriptedModel(model, mixed([*prompt, *expected], seed=seed))
    for layout in ("linear", "quadratic", "auto"):
        steps = list(decode(drafted, prompt, max_tokens=count, layout=layout, prefill_step_size=5))
        assert [token for step in steps for token in step.tokens] == expected, layout
        assert len(steps) < count


@pytest.mark.parametrize("kind", ["qwen3_5", "mamba2"])
def test_a_model_without_adapter_decodes_with_lookup(kind: str) -> None:
    prompt = [5, 6, 7, 8, 9] * 4
    expected = stock_ids(hybrid_base(kind), prompt, 24)
    model = MTPModel(hybrid_base(kind))
    drafter = [*prompt, *expected]
    cache = model.make_cache()
    run_step(model, cache, plain_layout(num_pending=len(prompt) - 1), prompt[:-1])
    at = len(prompt) - 1
    for wrong in (3, 1, 2, 0, 3):  # drafts as lookup has them, without masks
        ids = drafter[at : at + 4]
        ids[1 + wrong :] = [(token + 1) % 64 for token in ids[1 + wrong :]]
        logits = run_step(model, cache, StepLayout(1, 3, (0, 0, 0, 0)), ids)
        found: Any = logits.argmax(axis=-1).tolist()
        assert found[: 1 + wrong] == drafter[at + 1 : at + 2 + wrong]
        cache.rewind(3 - wrong)
        at += 1 + wrong


def stock_ids(base: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy ids of mlx-lm."""
    steps = generate_step(mx.array(prompt), base, max_tokens=count, prefill_step_size=5)
    return [int(token) for token, _ in steps]


def test_a_prompt_end_can_be_rewound_to() -> None:
    """A chat template may leave the reasoning of earlier answers out, so ids differ before it."""
    model = hybrid_mtp("qwen3_5")
    cache = model.make_cache()
    cache.keeps_checkpoints = True
    list(decode(model, list(range(40)), max_tokens=8, cache=cache, layout="linear"))
    assert [cache.rewind_point(rows) for rows in (40, 39, 38, 24, 23)] == [39, 39, 24, 24, 0]


@pytest.mark.parametrize("kind", STATE)
def test_checkpoints_can_be_rewound_to(kind: str) -> None:
    model = hybrid_mtp(kind)
    cache = prefilled(model)
    cache.checkpoint()
    layout = LAYOUTS[0]
    for ids in ([1, 2, 3], [4, 5, 6]):
        run_step(model, cache, layout, ids)
        cache.rewind(layout.num_rows - 2)
    assert cache.offset == 13
    assert [cache.rewind_point(rows) for rows in (13, 12, 11, 10, 9, 8)] == [13, 12, 11, 9, 9, 0]
    assert not cache.can_rewind(3)
    with pytest.raises(ValueError, match="cannot rewind 3 of 13 rows"):
        cache.rewind(3)
    copied = cache.copied()
    cache.rewind(4)
    fresh = prefilled(model)
    assert all(map(mx.array_equal, slots(cache), slots(fresh)))
    logits = run_step(model, cache, layout, [9, 8, 7])
    assert mx.array_equal(logits, run_step(model, fresh, layout, [9, 8, 7]))
    assert copied.offset == 13
    other = prefilled(model)
    one_by_one(model, other, [1, 2, 4, 5])
    assert largest_error(slots(copied), slots(other)) < 1e-4


def test_a_checkpoint_after_rejected_rows_is_forgotten() -> None:
    """A text that goes on in another way reaches its offset with another state."""
    model = hybrid_mtp("qwen3_5")
    cache = prefilled(model)
    layout = StepLayout(1, 3, (0, 0, 0, 1))
    run_step(model, cache, layout, [1, 2, 3, 4])
    cache.rewind(2)
    cache.checkpoint()  # after 1 2 3
    cache.rewind(1)
    before = cache.offset
    for token in (7, 8, 9):
        run_step(model, cache, plain_layout(), [token])
    assert cache.rewind_point(before + 1) < before
    assert not cache.can_rewind(2)


def test_only_the_last_checkpoints_are_kept() -> None:
    model = hybrid_mtp("lfm2")
    cache = model.make_cache()
    for token in range(MAX_CHECKPOINTS + 3):
        run_step(model, cache, plain_layout(), [token])
        cache.checkpoint()
    assert len(cache.recurrent_layers[0].checkpoints) == 1 + MAX_CHECKPOINTS
    assert cache.can_rewind(cache.offset) and not cache.can_rewind(cache.offset - 1)


def test_a_prompt_chunk_keeps_no_arrays_of_its_rows() -> None:
    model = hybrid_mtp("qwen3_5")
    cache = model.make_cache()
    layout = StepLayout(300, 2, (1, 1, 1))
    mx.eval(run_step(model, cache, layout, list(range(60)) * 5 + [1, 2]), cache.state)
    cache.rewind(layout.num_masks)
    for value in cache.recurrent_layers[0]._values():
        arrays = [value.before, *value.call.rows.values()] if isinstance(value, Replay) else [value]
        assert all(x is None or x.size < 4096 for x in arrays)


@pytest.mark.parametrize("kind", STATE)
def test_caches_go_to_mlx_lm_and_back(kind: str, tmp_path: Path) -> None:
    model, stock = hybrid_mtp(kind), hybrid_base(kind)
    cache = prefilled(model)
    run_step(model, cache, LAYOUTS[0], [1, 2, 3])
    cache.rewind(LAYOUTS[0].num_rows - 2)
    path = tmp_path / "prompt.safetensors"
    lm_cache.save_prompt_cache(str(path), cache, {"model": kind})  # type: ignore[arg-type]
    saved = lm_cache.load_prompt_cache(str(path))
    expected = stock_rows(stock, [*PREFIX, 1, 2], [7])
    assert mx.allclose(stock(mx.array([[7]]), cache=saved)[0], expected, **CLOSE)
    loaded, metadata = model.load_prompt_cache(path)
    assert metadata["model"] == kind
    assert loaded.offset in (11, 0)  # a model without attention counts from the file on
    assert mx.allclose(run_step(model, loaded, LAYOUTS[3], [7, 1, 1, 1])[:1], expected, **CLOSE)
    loaded.rewind(4)
    assert mx.allclose(run_step(model, loaded, plain_layout(), [7]), expected, **CLOSE)
    theirs = lm_cache.make_prompt_cache(stock)
    stock(mx.array([PREFIX]), cache=theirs)
    wrapped = model.wrap_prompt_cache(theirs)
    logits = run_step(model, wrapped, LAYOUTS[0], [1, 2, 3])
    assert mx.allclose(logits[:3], stock_rows(stock, PREFIX, [1, 2, 3]), **CLOSE)


def test_caches_of_other_models_are_refused() -> None:
    model = hybrid_mtp("qwen3_5")
    for kind, reason in (("lfm2", "recurrent layers"), ("mamba2", "it has 2 layers")):
        theirs = lm_cache.make_prompt_cache(hybrid_base(kind))
        hybrid_base(kind)(mx.array([PREFIX]), cache=theirs)
        with pytest.raises(ValueError, match=f"made with another model.*{reason}"):
            model.wrap_prompt_cache(theirs)


@pytest.mark.parametrize("kind", ["qwen3_5", "falcon_h1", "mamba2"])
def test_only_attention_is_quantised_or_has_a_window(kind: str) -> None:
    model = hybrid_mtp(kind)
    options: dict[str, Any] = {"max_tokens": 12, "prefill_step_size": 4}
    for settings in ({"max_kv_size": 8}, {"kv_bits": 8, "quantized_kv_start": 10}):
        if kind != "qwen3_5" and "kv_bits" in settings:
            settings |= {"kv_group_size": 32} if kind == "mamba2" else {}
        if kind == "falcon_h1" and "kv_bits" in settings:
            with pytest.raises(ValueError, match="head size 8"):
                model.make_cache(**settings)
            continue
        if kind == "qwen3_5" and "kv_bits" in settings:
            continue  # heads of 16
        ids = [
            [
                token
                for step in decode(
                    model, PREFIX, layout=layout, cache=model.make_cache(**settings), **options
                )
                for token in step.tokens
            ]
            for layout in ("plain", "quadratic")
        ]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("kind", ["qwen3_5", "nemotron_h"])
def test_a_back_end_takes_whole_steps(kind: str) -> None:
    calls = []

    def step(
        call: RecurrenceCall, layout: StepLayout, state: mx.array | None, kept: Rows | None
    ) -> tuple[mx.array, mx.array] | None:
        """The contract in plain ops: repeat kept rows, then rows one by one, then groups."""
        if state is None:
            return None
        calls.append(0 if kept is None else len(kept))
        if kept is not None:
            before = RecurrenceCall(call.name, kept, call.constants, call.function)
            state = before.state_after(before.num_rows, state)
        assert state is not None
        ys, after = [], [state]
        for row in range(layout.num_ordinary):
            y, now = call.cut(row, row + 1).run(after[-1])
            ys.append(y)
            after.append(now)
        first = layout.num_ordinary
        for anchor, count in enumerate(layout.mask_counts):
            now = after[1 + anchor]
            for row in range(first, first + count):
                y, now = call.cut(row, row + 1).run(now)
                ys.append(y)
            first += count
        return mx.concatenate(ys, axis=call.recurrence.axis), state

    model = hybrid_mtp(kind)
    expected = [
        [token for result in decode(model, PREFIX, max_tokens=12, layout=layout) for token in
         result.tokens] for layout in ("plain", "quadratic")
    ]  # fmt: skip
    inject_recurrence(model.base, step)
    for layout, ids in zip(("plain", "quadratic"), expected, strict=True):
        steps = decode(model, PREFIX, max_tokens=12, layout=layout)
        assert [token for result in steps for token in result.tokens] == ids
    assert any(calls)
    cache, plain = prefilled(model), prefilled(model)
    for kept in (2, 0, 3, 1):
        ids = [11, 22, 33]
        logits = run_step(model, cache, LAYOUTS[0], ids)
        inject_recurrence(model.base, None)
        assert_rows = run_step(model, plain, LAYOUTS[0], ids)
        inject_recurrence(model.base, step)
        assert mx.allclose(logits, assert_rows, **CLOSE)
        cache.rewind(LAYOUTS[0].num_rows - kept)
        plain.rewind(LAYOUTS[0].num_rows - kept)
    cache.checkpoint()
    assert largest_error(slots(cache), slots(plain)) < 1e-4


@pytest.mark.parametrize("kind", HYBRIDS)
def test_mixers_have_the_seam_that_fits(kind: str) -> None:
    model = MTPModel(hybrid_base(kind))
    kinds = {type(m) for _, m in model.base.named_modules()} & {RecurrenceSeam, RowByRow}
    assert kinds == {RowByRow if kind in ROW_BY_ROW else RecurrenceSeam}
    assert model.is_recurrent
    again = MTPModel(model.base)  # as when an adapter is added
    logits = again.logits(again(mx.array([PREFIX]), cache=again.make_cache()))
    assert mx.allclose(logits, hybrid_base(kind)(mx.array([PREFIX])), **CLOSE)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_states_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}.* cannot be used: its recurrent layers keep"):
        MTPModel(hybrid_base(kind))


@pytest.mark.parametrize("kind", ["jamba", "qwen3_5", "lfm2", "mamba2"])
def test_the_probe_notices_a_recurrence_without_a_seam(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MTPModel, "_wrap_mixers", lambda _: None)
    with pytest.raises(ValueError, match="cannot take mask rows"):
        hybrid_mtp(kind)
