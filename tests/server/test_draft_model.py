"""A draft model in the server: answers stay the same, and it continues what it has read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.apps.engine.prefix_cache import PrefixCache
from mlx_mtp.apps.engine.prefix_setup import make_draft_prefix_cache, make_prefix_cache
from mlx_mtp.apps.engine.protocol import Load
from mlx_mtp.apps.engine.session import Engine
from mlx_mtp.apps.engine.token_text import TokenTexts
from mlx_mtp.generate import generate
from mlx_mtp.loading import load as load_model
from mlx_mtp.model.caches.blocks import CacheBlocks
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.hybrid import HYBRIDS, hybrid_base
from tests.helpers.tiny import BYTE_VOCAB, save_tiny_model, tiny_base
from tests.server.command import command, serving
from tests.server.sessions import messages_of

BLOCK = 16


def engine_of(draft_kind: str | None) -> Engine:
    """An engine with a draft model and caches of beginnings."""
    model, tokenizer = MTPModel(tiny_base("llama", vocab_size=BYTE_VOCAB)), byte_tokenizer()
    drafts = None
    if draft_kind is not None:
        make = hybrid_base if draft_kind in HYBRIDS else tiny_base
        model.draft_model = MTPModel(make(draft_kind, vocab_size=BYTE_VOCAB))
        blocks = CacheBlocks(model.draft_model, chunk_size=8)
        drafts = PrefixCache(blocks, max_bytes=2**24, block_size=BLOCK)
    return Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=Speculation.guess(0),
        prefixes=PrefixCache(CacheBlocks(model, chunk_size=8), max_bytes=2**24, block_size=BLOCK),
        texts=TokenTexts(tokenizer),
        prefill_step_size=8,
        draft_prefixes=drafts,
    )


def answer(engine: Engine, ids: list[int], **more: Any) -> tuple[list[int], dict[str, Any]]:
    """Ids and statistics of an answer."""
    job = {"prompt": ids, "max_tokens": 12, "pieces": True, "layout": "linear"} | more
    messages = messages_of(engine, job)
    groups = [each for each in messages if each["type"] == "group"]
    return [token for each in groups for token in each["ids"]], messages[-1]["stats"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5"])
def test_answers_are_plain_ones_and_drafts_continue(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain = engine_of(kind), engine_of(None)
    rows: list[int] = []
    forward = MTPModel.__call__

    def counted(self: Any, ids: mx.array, **options: Any) -> mx.array:
        if self is engine.model.draft_model:
            rows.append(ids.shape[1])
        return forward(self, ids, **options)

    monkeypatch.setattr(MTPModel, "__call__", counted)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 200, 100).tolist()
    for turn in range(3):
        rows.clear()
        found, stats = answer(engine, ids)
        assert found == answer(plain, ids, layout="plain")[0]
        assert set(stats["drafters"]) == {"draft-model"} and stats["mtp"]
        num_read = sum(size for size in rows if size > 4)  # drafts are read one or a few at a time
        assert num_read >= 90 if turn == 0 else num_read < 60
        ids += [*found, *rng.integers(3, 200, 20).tolist()]
    fresh, _ = answer(engine, ids, fresh=True)
    assert fresh == answer(plain, ids, layout="plain", fresh=True)[0]


def test_the_draft_model_has_a_part_of_the_memory() -> None:
    engine = engine_of("llama")
    load = Load(prefix_cache_bytes=1000)
    drafts = make_draft_prefix_cache(engine.model, load)
    assert drafts is not None and drafts._max_bytes == 250
    assert make_prefix_cache(engine.model, load)._max_bytes == 750
    alone = engine_of(None).model
    assert make_draft_prefix_cache(alone, load) is None
    assert make_prefix_cache(alone, load)._max_bytes == 1000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_serve_takes_a_draft_model(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    draft = str(save_tiny_model(tmp_path / "draft", "qwen3", num_hidden_layers=1))
    with serving(tmp_path, "--model", model, "--draft-model", draft) as running:
        reply = running.chat("Say a word.", max_tokens=16, draft_model="other").json()
        text = reply["choices"][0]["message"]["content"]
        assert reply["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] > 0
    loaded, tokenizer = load_model(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say a word."}], add_generation_prompt=True
    )
    assert text == generate(loaded, tokenizer, ids, max_tokens=16, layout="plain")
    (tmp_path / "draft" / "tokenizer.json").write_text("{}")
    run = subprocess.run(
        command("--model", model, "--draft-model", draft, "--port", "0"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 2
    [line] = run.stderr.splitlines()
    assert line.startswith(f"Error: draft model: cannot load the tokenizer in {draft}")
