"""Kept beginnings of models with recurrent layers, which continue only where a state is kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.apps.engine import prefix_cache
from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.lab.tiny_models import tiny_model, with_adapter
from mlx_mtp.model.caches.blocks import CacheBlocks, has_states
from mlx_mtp.model.caches.mtp_cache import CHECKPOINT_MARGIN
from mlx_mtp.planning.auto import Speculation
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB
from tests.server.test_engine import Turns
from tests.server.test_prefix_cache import BLOCK, answer, restarted, text

FAMILIES = ("qwen3_5", "falcon_h1", "mamba2")  # hybrid, both in one layer, no attention


def engine_of(family: str, folder: Path | None = None, **limits: Any) -> Engine:
    """An engine of a tiny model with a random adapter."""
    model = with_adapter(tiny_model(family, vocab_size=BYTE_VOCAB))
    tokenizer = byte_tokenizer()
    engine = Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=Speculation.guess(model.num_draft_tokens),
        prefixes=PrefixCache(CacheBlocks(model, chunk_size=8), max_bytes=0),
        texts=TokenTexts(tokenizer),
        prefill_step_size=8,
    )
    return restarted(engine, folder, **limits)


def check(engine: Engine, ids: list[int]) -> tuple[list[int], int, int]:
    """Answer a prompt; its ids and logprobs are those without the cache of beginnings."""
    tokens, logprobs, cached, read = answer(engine, ids)
    expected, expected_logprobs, *nothing = answer(engine, ids, fresh=True)
    assert nothing == [0, 0] and tokens == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
    return tokens, cached, read


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_continues_where_its_states_are_kept(family, tmp_path):
    chance, engine = random.Random(1), engine_of(family, tmp_path)
    ids = text(chance, 70)
    tokens, cached, _ = check(engine, ids)
    assert cached == 0
    assert check(engine, ids)[1] == 69  # the same prompt again
    assert check(engine, [*ids, *tokens, *text(chance, 5)])[1] == 70 + 5  # after the answer
    whole = (70 - CHECKPOINT_MARGIN) // BLOCK * BLOCK
    assert check(engine, [*ids[:-4], *text(chance, 9)])[1] == whole  # a template changed the end
    engine = restarted(engine, tmp_path)
    assert check(engine, ids)[1:] == (64, 64)  # in files: the last whole block that was shared


def test_what_texts_share_is_kept_from_the_second_on():
    chance, engine = random.Random(2), engine_of("qwen3_5")
    system = text(chance, 3 * BLOCK + 5)
    cached = [check(engine, [*system, *text(chance, 60)])[1] for _ in range(4)]
    assert cached == [0, 0, 3 * BLOCK, 3 * BLOCK]


def test_states_of_a_long_conversation_are_thinned_and_its_size_is_that_of_the_arrays(monkeypatch):
    monkeypatch.setattr(prefix_cache, "STATE_SPACING", 4 * BLOCK)
    chance, engine = random.Random(3), engine_of("qwen3_5")
    ids = text(chance, 70)
    for _ in range(4):
        tokens, _, _ = check(engine, ids)
        ids = [*ids, *tokens, *text(chance, 40)]
    nodes = list(engine.prefixes._nodes)
    assert engine.prefixes.nbytes == sum(x.nbytes for node in nodes for x in node.rows.values())
    path = list(engine.prefixes._whole_blocks(ids))
    ends = [node.end for node in path if has_states(node.rows)]
    assert all(end % (4 * BLOCK) == 0 for end in ends[:-3]) and len(ends) <= len(path) // 4 + 3


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_5", {}),
        ("qwen3_5", {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 40}),
        pytest.param("falcon_h1", {"max_kv_size": 30}, marks=pytest.mark.soak),
        pytest.param("kimi_linear", {}, marks=pytest.mark.soak),
        pytest.param("jamba", {}, marks=pytest.mark.soak),
        pytest.param("lfm2", {}, marks=pytest.mark.soak),
    ],
)
def test_answers_equal_fresh_ones_within_the_limits(family, options, tmp_path):
    chance = random.Random(4)
    limits: dict[str, Any] = {"max_bytes": 400_000, "file_bytes": 500_000, **options}
    engine = engine_of(family, tmp_path, **limits)
    texts: list[list[int]] = [[]]
    num_cached = num_read = 0
    for number in range(9):
        if number % 4 == 3:
            engine = restarted(engine, tmp_path, **limits)
        one = chance.choice(texts[-3:])
        ids = one[: chance.randint(len(one) * 3 // 4, len(one))] + text(
            chance, chance.randint(1, 60)
        )
        tokens, cached, read = check(engine, ids)
        assert engine.prefixes.nbytes <= limits["max_bytes"]
        num_cached, num_read = num_cached + cached, num_read + read
        texts.append(ids + tokens)
    assert num_cached > 100 and num_read > 0


def test_states_from_files_have_the_same_bits(tmp_path):
    ids = text(random.Random(5), 70)
    engine = engine_of("falcon_h1", tmp_path)
    answer(engine, ids)
    size = (70 - CHECKPOINT_MARGIN) // BLOCK * BLOCK
    from_memory = engine.prefixes.take(ids[: size + 1])
    engine = restarted(engine, tmp_path)
    engine.prefixes.add(ids, engine.prefixes.read(ids))
    from_files = engine.prefixes.take(ids[: size + 1])
    assert from_memory.num_ids == from_files.num_ids == from_files.num_read == size
    for one, other in zip(
        from_memory.cache.recurrent_layers, from_files.cache.recurrent_layers, strict=True
    ):
        assert one.offset == other.offset == size
        pairs: Any = zip(one.slots(), other.slots(), strict=True)
        assert all(mx.array_equal(a, b).item() for a, b in pairs)


@pytest.mark.parametrize("layout", ["quadratic", "auto"])
def test_answers_in_company_are_those_alone(layout):
    engine = engine_of("qwen3_5")
    ids = text(random.Random(6), 100)
    prompts = [[*ids, *tail] for tail in ([1, 2, 3], [4, 5, 6])]
    job: dict[str, Any] = {"max_tokens": 12, "layout": layout, "pieces": True}
    expected = [
        answer(engine, prompt, max_tokens=12, layout="plain", fresh=True)[0] for prompt in prompts
    ]
    turns = Turns(engine)
    for number, prompt in enumerate(prompts):
        turns.submit(number, {"prompt": prompt, **job})
    turns.wait_until_prepared(2)
    sizes = []
    run = turns.scheduler._run
    turns.scheduler._run = lambda steps: (sizes.append(len(steps)), run(steps))[1]
    turns.run(2)
    for number, tokens in enumerate(expected):
        groups = [each for each in turns.of(number) if each["type"] == "group"]
        assert [token for each in groups for token in each["ids"]] == tokens
    assert turns.of(0)[0]["cached_tokens"] == 0
    whole = (103 - CHECKPOINT_MARGIN) // BLOCK * BLOCK
    assert turns.of(1)[0]["cached_tokens"] == whole  # it has waited
    assert max(sizes) == 2
