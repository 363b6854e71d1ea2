"""``mlx-mtp serve`` on a model with recurrent layers: concurrent answers and a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.generate import chat_text, generate
from mlx_mtp.lab.tiny_models import build, tiny_config, with_adapter
from mlx_mtp.loading import load
from mlx_mtp.train.gradient.adapter import adapter_tensors, trainable
from tests.helpers.fixtures_generate import EOS, byte_tokenizer
from tests.helpers.tiny import BYTE_VOCAB, save_adapter
from tests.server.command import Served, serving

TEXTS = [f"Tell {at} things about the number {at * 7}." for at in range(3)]

pytestmark = pytest.mark.slow


def save_pair(root: Path, family: str) -> tuple[Path, Path]:
    """Write the folders of a tiny model and of a random adapter."""
    config = tiny_config(family, vocab_size=BYTE_VOCAB, eos_token_id=EOS)
    base = build(config)
    model = root / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = dict(tree_flatten(base.parameters()))
    mx.save_safetensors(str(model / "model.safetensors"), tensors, metadata={"format": "mlx"})
    byte_tokenizer()._tokenizer.save_pretrained(model)
    loaded, _ = load(str(model), mtp=False)
    adapted = with_adapter(loaded.base)
    assert adapted.config is not None
    weights = adapter_tensors(trainable(adapted))
    return model, save_adapter(root / "adapter", adapted.config, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recurrent")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    model, adapter = save_pair(folder, "qwen3_5")
    pair = ("--model", str(model), "--adapter-path", str(adapter), "--model-name", "tiny")
    with serving(folder, *pair, "--max-tokens", "16") as running:
        yield running


def plain(folder: Path, conversations: list[list[dict[str, str]]]) -> list[str]:
    """What ``generate`` answers, one token a step."""
    model, tokenizer = load(str(folder / "model"), mtp=False)
    prompts = [chat_text(tokenizer, messages) for messages in conversations]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    return [generate(model, tokenizer, each, max_tokens=16, layout="plain") for each in ids]


def content(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def test_clients_at_once_get_the_text_of_generate(server, folder):
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        replies = [each.result().json() for each in [pool.submit(server.chat, x) for x in TEXTS]]
    conversations = [[{"role": "user", "content": text}] for text in TEXTS]
    assert list(map(content, replies)) == plain(folder, conversations)
    assert sum(reply["timings"]["draft_n"] for reply in replies) > 0


def test_a_conversation_continues_after_its_cached_prompt(server, folder):
    messages = [{"role": "user", "content": "Say a word about rain. " * 3}]
    sizes, cached = [], []
    for _ in range(3):
        body = {"messages": messages}
        reply = server.client.post("/v1/chat/completions", json=body).json()
        assert [content(reply)] == plain(folder, [messages])
        sizes.append(reply["usage"]["prompt_tokens"])
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages += [
            {"role": "assistant", "content": content(reply)},
            {"role": "user", "content": "And one more about snow."},
        ]
    assert cached[0] == 0
    assert all(now >= before - 1 for now, before in zip(cached[1:], sizes, strict=False))
