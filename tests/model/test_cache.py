"""Caches: what is held after thousands of rewinds, windows, quantisation borders, prompt files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache, save_prompt_cache

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.model.caches import layers
from mlx_mtp.model.caches.layers import QuantizedLayerCache, WindowLayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.tiny import KINDS, WINDOW, step_ids, tiny_base, tiny_mtp

WIDE: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def random_ids(count: int, *, vocab: int = 64, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def held(cache: MTPCache) -> list[Any]:
    """Keys and values of every layer."""
    return [layer.keys_and_values() for layer in cache.attention_layers]


def assert_same_rows(cache: MTPCache, base: Any, ids: list[int]) -> None:
    """The cache holds exactly what a fresh prefill of the ids by stock mlx-lm holds."""
    fresh = make_prompt_cache(base)
    base(mx.array([ids]), cache=fresh)
    assert [layer.offset for layer in cache.layers] == [len(ids)] * len(fresh)
    for layer, expected in zip(held(cache), fresh, strict=True):
        for found, wanted in zip(layer, expected.keys_and_values(), strict=True):
            assert found.shape == wanted.shape
            assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [334, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("layout", ["linear", "quadratic", "auto"])
def test_thousands_of_random_steps_leave_what_a_fresh_prefill_leaves(
    layout: str, num_steps: int, seed: int
) -> None:
    # Drafts of a random adapter over six ids at temperature 1 hold about as often as not.
    options: dict[str, Any] = {"vocab_size": 6, "num_hidden_layers": 1, "num_key_value_heads": 1}
    model = tiny_mtp("llama", k=2, sampler=False, low_rank=False, **options)
    base = tiny_base("llama", **options)
    steps, counts = 0, Counter[int]()
    for start in range(seed, seed + num_steps):
        prompt = random_ids(5 + start % 9, vocab=6, seed=start)
        cache, ids = model.make_cache(), list(prompt)
        found = decode(
            model,
            prompt,
            cache=cache,
            max_tokens=250,
            layout=layout,
            sampling=Sampling(temp=1.0),
            seed=start,
        )
        for step in found:
            ids += step.tokens
            counts[step.num_accepted] += 1
            steps += 1
            if steps % 40 == 0:
                assert_same_rows(cache, base, ids[:-1])
        assert_same_rows(cache, base, ids[:-1])
        if steps >= num_steps:
            break
    assert steps >= num_steps
    assert min(counts[accepted] for accepted in range(3)) > 0.03 * num_steps


@pytest.mark.parametrize("kind", KINDS)
def test_rewinding_forgets_exactly(kind: str) -> None:
    model, base = tiny_mtp(kind), tiny_base(kind)
    ids = random_ids(24)
    cache = model.make_cache()
    layout = StepLayout(1, 2, (2, 0, 2))
    done = 4
    model(mx.array([ids[:done]]), cache=cache)
    while done < 20:
        kept = 1 + done % 3
        wrong = [*ids[done : done + kept], 60, 61, 62][:3]
        model(step_ids(layout, wrong), cache=cache, layout=layout)
        cache.rewind(layout.num_rows - kept)
        done += kept
        assert cache.offset == done
    fresh = model.make_cache()
    model(mx.array([ids[:done]]), cache=fresh)
    for found, wanted in zip(held(cache), held(fresh), strict=True):
        assert mx.allclose(found[0], wanted[0], atol=1e-5)
        assert mx.allclose(found[1], wanted[1], atol=1e-5)
    logits = model.logits(model(mx.array([[7]]), cache=cache))
    expected = base(mx.array([[*ids[:done], 7]]))[:, -1:]
    assert mx.allclose(logits, expected, atol=1e-5)


def test_rewinding_too_far_is_refused_and_changes_nothing() -> None:
    model = tiny_mtp("llama")
    cache = model.make_cache()
    model(mx.array([[1, 2, 3]]), cache=cache)
    assert cache.can_rewind(3) and not cache.can_rewind(4)
    with pytest.raises(ValueError, match="cannot rewind 4 of 3 rows"):
        cache.rewind(4)
    assert cache.offset == 3
    cache.rewind(0)
    cache.rewind(3)
    assert cache.offset == 0


class NaiveWindow(KVCache):
    """Holds every row and masks by the rule: the kept rows, and the last ones up to oneself."""

    def __init__(self, window: int, keep: int) -> None:
        super().__init__()
        self.window, self.keep = window, keep

    def make_mask(self, num_rows: int, **_: Any) -> mx.array:
        rows = np.arange(self.offset, self.offset + num_rows)[:, None]
        seen = np.arange(self.offset + num_rows)[None]
        near = (seen > rows - self.window) | (seen < self.keep)
        mask: Any = near & (seen <= rows)
        return mx.array(mask)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_bounded_cache_keeps_the_first_and_the_last_rows(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "WINDOW_SLACK", 5)
    model, base = tiny_mtp("llama"), tiny_base("llama")
    ids = random_ids(70)
    naive = [NaiveWindow(window=8, keep=4) for _ in base.layers]
    expected = base(mx.array([ids]), cache=naive)
    unbounded = base(mx.array([ids]))
    cache = model.make_cache(max_kv_size=12)
    for start in range(0, len(ids), chunk):
        cache.begin_step()
        rows = ids[start : start + chunk]
        logits = model.logits(model(mx.array([rows]), cache=cache))
        assert mx.allclose(logits, expected[:, start : start + chunk], rtol=1e-5, atol=1e-5)
    assert not mx.allclose(expected[:, -1], unbounded[:, -1], atol=1e-2)
    layer = cache.layers[0]
    assert isinstance(layer, WindowLayerCache)
    assert layer.offset == len(ids)
    assert layer.inner.offset <= 12 + 5 + chunk  # what is out of sight was dropped
    assert not cache.can_rewind(len(ids) - 20)


@pytest.mark.parametrize("layout", [StepLayout(1, 3, (2, 0, 1, 3)), StepLayout(2, 1, (2, 2))])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "ministral3"])
def test_steps_with_masks_obey_the_window(
    kind: str, layout: StepLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "WINDOW_SLACK", 4)
    model = tiny_mtp(kind)
    options: dict[str, Any] = {"max_kv_size": 10} if kind == "llama" else {}
    ids = random_ids(50)
    cache, plain = model.make_cache(**options), model.make_cache(**options)
    expected = model(mx.array([ids]), cache=plain)
    for start in range(0, 46, layout.num_pending):
        cache.begin_step()
        rows = ids[start : start + layout.num_ordinary]
        hidden = model(step_ids(layout, rows), cache=cache, layout=layout)
        wanted = expected[:, start : start + layout.num_ordinary]
        assert mx.allclose(hidden[:, : layout.gate_split], wanted, rtol=1e-5, atol=5e-5)
        cache.rewind(layout.num_rows - layout.num_pending)
    windows = [layer for layer in cache.layers if isinstance(layer, WindowLayerCache)]
    assert windows and all(layer.dropped > 20 for layer in windows)
    assert all(layer.offset == 46 for layer in cache.layers)


def test_models_with_a_window_get_one() -> None:
    for kind in ("gemma3_text", "ministral3"):
        layers = tiny_mtp(kind).make_cache().layers
        windows = [layer.window for layer in layers if isinstance(layer, WindowLayerCache)]
        assert windows == [WINDOW] * len(windows) and 0 < len(windows) < len(layers)


def test_a_cache_is_quantised_at_the_border_and_no_step_crosses_it() -> None:
    model = tiny_mtp("llama", **WIDE)
    cache = model.make_cache(kv_bits=8, kv_group_size=32, quantized_kv_start=6)
    assert cache.rows_until_change == 6
    model(mx.array([random_ids(4)]), cache=cache)
    cache.begin_step()
    assert cache.rows_until_change == 2
    model(mx.array([random_ids(2)]), cache=cache)
    before = held(cache)[0][0]
    cache.begin_step()
    assert all(isinstance(layer, QuantizedLayerCache) for layer in cache.layers)
    assert cache.rows_until_change is None and cache.offset == 6
    keys = mx.dequantize(*held(cache)[0][0], group_size=32, bits=8)
    assert mx.allclose(keys, before, atol=0.05) and not mx.array_equal(keys, before)
    model(mx.array([random_ids(5)]), cache=cache)
    cache.rewind(3)
    assert cache.offset == 8


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"max_kv_size": 7}, "max_kv_size must be at least 8, got 7"),
        ("llama", {"kv_bits": 7}, "kv_bits must be .*, got 7"),
        ("llama", {"kv_bits": 8, "kv_group_size": 16}, "kv_group_size must be .*, got 16"),
        ("llama", {"kv_bits": 8, "max_kv_size": 16}, "cannot be combined"),
        ("gemma3_text", {"kv_bits": 8}, "cannot be combined"),
    ],
)
def test_impossible_caches_are_refused(kind: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mtp(kind).make_cache(**options)


def prompt_file(folder: Path, base: Any, ids: list[int], *, quantised: bool = False) -> Path:
    """A prompt cache as ``mlx_lm.cache_prompt`` writes it."""
    caches = make_prompt_cache(base)
    if ids:
        base(mx.array([ids]), cache=caches)
    if quantised:
        caches = [layer.to_quantized(group_size=32, bits=8) for layer in caches]
    path = folder / "prompt.safetensors"
    save_prompt_cache(str(path), caches, {"model": "some-model"})
    return path


@pytest.mark.parametrize("quantised", [False, True])
def test_a_prompt_file_of_mlx_lm_is_read_and_gone_on_with(tmp_path: Path, quantised: bool) -> None:
    ids = random_ids(12)
    model, base = tiny_mtp("llama", **WIDE), tiny_base("llama", **WIDE)
    path = prompt_file(tmp_path, base, ids[:8], quantised=quantised)
    outputs = []
    for layout in ("plain", "quadratic"):
        cache, metadata = model.load_prompt_cache(path)
        assert metadata["model"] == "some-model" and cache.offset == 8
        steps = decode(model, ids[8:], cache=cache, layout=layout, max_tokens=12)
        outputs.append([token for step in steps for token in step.tokens])
        assert cache.offset == len(ids) + 11
    whole = [t for step in decode(model, ids, layout="plain", max_tokens=12) for t in step.tokens]
    assert outputs[0] == outputs[1]
    assert quantised or outputs[0] == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({**WIDE, "num_hidden_layers": 3}, "another model: it has 3 layers, this model has 2"),
        ({**WIDE, "num_key_value_heads": 2}, "another model: its keys have 2 heads of 32"),
        ({}, "another model: its keys have 2 heads of 8"),
    ],
)
def test_a_prompt_file_of_another_model_is_refused(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    path = prompt_file(tmp_path, tiny_base("llama", **overrides), random_ids(5))
    with pytest.raises(ValueError, match=message) as error:
        tiny_mtp("llama", **WIDE).load_prompt_cache(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not a cache", b"\x08" + b"\0" * 30])
def test_a_foreign_prompt_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompt.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a prompt cache") as error:
        tiny_mtp("llama").load_prompt_cache(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [5, 50])
def test_a_prompt_file_of_a_window_goes_on_as_in_mlx_lm(tmp_path: Path, count: int) -> None:
    base, model = tiny_base("gemma3_text"), tiny_mtp("gemma3_text")
    ids = random_ids(count)
    cache, _ = model.load_prompt_cache(prompt_file(tmp_path, base, ids))
    caches = make_prompt_cache(base)
    base(mx.array([ids]), cache=caches)
    steps = generate_step(mx.array([7, 8]), base, max_tokens=12, prompt_cache=caches)
    expected = [int(token) for token, _ in steps]
    found = decode(model, [7, 8], max_tokens=12, cache=cache, layout="quadratic")
    assert [token for step in found for token in step.tokens] == expected


def test_other_tensors_are_no_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(path), {"mask_embeddings": mx.zeros((4, 4))})
    with pytest.raises(ValueError, match="is not a prompt cache"):
        tiny_mtp("llama").load_prompt_cache(path)


def test_a_prompt_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, tiny_base("llama"), [])
    with pytest.raises(ValueError, match="is an empty prompt cache"):
        tiny_mtp("llama").load_prompt_cache(path)


def test_without_an_adapter_the_cache_is_the_same() -> None:
    model = MTPModel(tiny_base("llama"))
    cache = model.make_cache()
    model(mx.array([random_ids(6)]), cache=cache)
    assert_same_rows(cache, tiny_base("llama"), random_ids(6))


def test_a_group_that_does_not_divide_the_heads_is_refused_at_once():
    model = tiny_mtp("llama")  # heads of 8
    with pytest.raises(ValueError, match="kv_group_size 64 does not divide the head size 8"):
        model.make_cache(kv_bits=8, kv_group_size=64)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gemma3_text", {}),
        ("llama", {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}),
    ],
)
def test_a_copy_goes_its_own_way(kind: str, options: dict[str, Any]) -> None:
    model = tiny_mtp(kind, head_dim=32 if options else 8)
    ids = [(7 * at + 3) % 64 for at in range(300)]

    def fresh(rows: list[int]) -> Any:
        cache = model.make_cache(**options)
        cache.begin_step()
        for start in range(0, len(rows), 64):
            cache.begin_step()
            mx.eval(model(mx.array([rows[start : start + 64]]), cache=cache))
        return cache

    def behind(cache: Any, rows: list[int]) -> mx.array:
        cache.begin_step()
        return model(mx.array([rows]), cache=cache)

    for count in (1, 255, 256, 300):
        cache = fresh(ids[:count])
        copy = cache.copied()
        cut = min(count - 1, 3)
        copy.rewind(cut)
        other = behind(copy, [1, 2, 3, 4])
        assert mx.allclose(other, behind(fresh(ids[: count - cut]), [1, 2, 3, 4]), atol=1e-4)
        own = behind(cache, [5, 6])
        assert mx.allclose(own, behind(fresh(ids[:count]), [5, 6]), atol=1e-4)
        assert mx.allclose(behind(copy, [9]), behind(fresh([*ids[: count - cut], 1, 2, 3, 4]), [9]),
                           atol=1e-4)  # fmt: skip
