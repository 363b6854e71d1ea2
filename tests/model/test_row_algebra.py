"""Several rows are computed as one row is: per layer class, in every format, and in the loop."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.lab.tiny_models import families
from mlx_mtp.model import mtp_model
from mlx_mtp.model.config import MTPConfig
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, MTPModel, embedding_dims, fingerprint
from mlx_mtp.model.wrappers import Wrapper, replace
from tests.helpers.row_algebra import FORMATS, first_difference, result_of, tiny
from tests.helpers.scripted import ScriptedModel, mixed, right, wrong

# One family per class of layer: attention, with sinks and windows, latent with and without a form
# for one row, experts, and recurrent layers of each kind.
SAMPLE = ("llama", "gpt_oss", "deepseek_v3", "mistral4", "deepseek_v2", "qwen3_moe")
SAMPLE += ("mamba2", "granitemoehybrid", "bailing_hybrid", "kimi_linear", "qwen3_next")
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 32, "moe_intermediate_size": 32}
LATENT = ("deepseek_v3", "glm4_moe_lite", "mistral4")
HYBRID = ("mamba2", "nemotron_h", "falcon_h1", "granitemoehybrid", "bailing_hybrid", "kimi_linear")
EMBEDDING = nn.Embedding | nn.QuantizedEmbedding
PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
BRANCHES = {
    "baichuan_m1.Attention._custom_convolution": "the same sums",
    "bailing_hybrid.MultiLatentAttention.__call__": "latent attention",
    "bailing_hybrid.recurrent_gla": "recurrent: a call per draft",
    "bailing_moe_v3.BailingMLA.__call__": "latent attention",
    "base.create_attention_mask": "the same rows are seen",
    "cache.BatchRotatingKVCache.make_mask": "not used: our caches have windows of their own",
    "cache.RotatingKVCache.make_mask": "not used",
    "cache.create_attention_mask": "the same rows are seen",
    "deepseek_v3.DeepseekV3Attention.__call__": "latent attention",
    "deepseek_v32.DeepseekV32Attention.__call__": "refused",
    "deepseek_v32.Indexer.__call__": "refused",
    "glm4_moe_lite.Glm4MoeLiteAttention.__call__": "latent attention",
    "kimi_k3.KimiK3DeltaAttention.__call__": "recurrent: a call per draft",
    "kimi_k3.Model.shard": "devices, not rows",
    "kimi_k3.KimiK3MLAAttention.__call__": "latent attention",
    "kimi_linear.KimiMLAAttention.__call__": "latent attention",
    "longcat_flash.LongcatFlashMLA.__call__": "latent attention",
    "mistral4.Mistral4Attention.__call__": "latent attention",
    "recurrent_gemma.rnn_scan": "the same sums",
    "rwkv7.TokenShift.__call__": "the same sums",
    "ssm.ssm_update": "recurrent: a call per draft",
    "switch_layers.SwitchGLU.__call__": "experts",
    "switch_layers.SwitchMLP.__call__": "experts",
}
"""Where mlx-lm compares a number of rows with a number, and what is done about it."""


PAIRS = [(family, form) for family in SAMPLE for form in ("bfloat16", "4-bit")]
PAIRS += [(family, "float16") for family in ("llama", "mistral4", "mamba2")]  # slow on the CPU


@pytest.mark.parametrize(("family", "form"), PAIRS)
def test_rows_of_a_step_are_those_of_plain_decoding(family: str, form: str) -> None:
    assert first_difference(lambda: tiny(family, form)) is None


def test_rows_of_a_step_are_those_of_plain_decoding_in_float32() -> None:
    assert set(float32_results(SAMPLE).values()) == {"equal"}


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_every_family_that_is_taken(form: str) -> None:
    names = families()
    if form == "float32":
        results = float32_results(names)
    else:
        results = {name: result_of(name, form) for name in names}
    taken = {name: x for name, x in results.items() if not x.startswith("refused: ")}
    assert set(taken.values()) == {"equal"} and len(taken) >= 100


def float32_results(names: Any) -> dict[str, str]:
    """Results of families with the reference BLAS, whose products do not depend on their rows."""
    command = [sys.executable, "-m", "tests.helpers.row_algebra", "float32", *names]
    env = {**os.environ, "MLX_MTP_BLAS": "reference"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


class PlantedMLP(Wrapper):
    """An MLP that multiplies in another order for one row."""

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if x.shape[1] == 1:
            return self.down_proj(gate * (mx.sigmoid(gate) * up))
        return self.down_proj((gate * mx.sigmoid(gate)) * up)


def test_a_planted_branch_is_found() -> None:
    def make() -> Any:
        base = tiny("llama", "bfloat16")
        replace(base, {"model.layers.2.mlp": PlantedMLP(base.layers[2].mlp)})
        return base

    assert "model.layers.2.mlp by" in str(first_difference(make))


@pytest.mark.parametrize("family", LATENT)
def test_stock_latent_attention_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp_model, "wrap_verify_attention", lambda *_: False)
    difference = first_difference(lambda: tiny(family, "bfloat16"))
    assert "Attention model.layers.0.self_attn by" in str(difference)


@pytest.mark.parametrize("wrapped", [True, False])
def test_sorted_experts_are_found(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Metal, where sorted pairs go through another kernel, which is imitated here."""
    product = mx.gather_qmm

    def other_kernel(*args: Any, sorted_indices: bool = False, **kwargs: Any) -> mx.array:
        return product(*args, **kwargs) * (1.01 if sorted_indices else 1)

    monkeypatch.setattr(mx, "gather_qmm", other_kernel)
    if not wrapped:
        monkeypatch.setattr(mtp_model, "wrap_experts", lambda *_: None)
    rows = 33  # 66 pairs of a row and an expert
    difference = first_difference(lambda: tiny("qwen3_moe", "4-bit"), num_rows=rows)
    assert (difference is None) == wrapped, difference


def test_every_branch_of_mlx_lm_is_known() -> None:
    found = set()
    for path in sorted(Path(mlx_lm.models.__path__[0]).glob("*.py")):
        for name, function in _functions(ast.parse(path.read_text(encoding="utf-8")), path.stem):
            if any(_compares_rows(node) for node in ast.walk(function)):
                found.add(name)
    assert found == set(BRANCHES)


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}.{node.name}")


def _compares_rows(node: ast.AST) -> bool:
    """Whether a number of rows, by its usual names, is compared with a number."""
    if not (isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant)):
        return False
    left = ast.unparse(node.left)
    names = ("L", "T", "S", "N", "s", "length", "seq_len", "x.shape[1]", "indices.size")
    number = node.comparators[0].value
    return left in names and isinstance(number, int) and number > 0


def drafted(family: str, form: str) -> tuple[Any, MTPModel]:
    """A stock model, and the same one with mask tokens and no low-rank weights."""
    small = {key: value for key, value in SMALL.items() if family not in HYBRID}
    stock, base = (tiny(family, form, **small) for _ in range(2))
    embedding = next(x for _, x in base.named_modules() if isinstance(x, EMBEDDING))
    num_tokens, dims = embedding.weight.shape[0], embedding_dims(embedding)
    config = MTPConfig(
        num_draft_tokens=4,
        rank=1,
        scale=1.0,
        target_modules=(),
        sampler=None,
        base_model=family,
        base_model_type=base.model_type,
        base_hidden_size=dims,
        base_num_layers=len(base.layers),
        base_vocab_size=num_tokens,
        base_fingerprint=fingerprint(base),
    )
    weights = {MASK_EMBEDDINGS: mx.random.normal((4, dims), key=mx.random.key(0))}
    return stock, MTPModel(base, config=config, weights=weights)


def stock_ids(base: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The largest logits of mlx-lm's model.

    ``generate_step`` compares log-probabilities rounded to bfloat16, which have more ties.
    """
    cache, ids = make_prompt_cache(base), []
    base(mx.array([prompt[:-1]]), cache=cache) if prompt[1:] else None
    for _ in range(num_tokens):
        token = (prompt + ids)[-1]
        ids.append(int(base(mx.array([[token]]), cache=cache)[0, -1].argmax().item()))
    return ids


def check_greedy(family: str, form: str, num_tokens: int, *, prompt: list[int]) -> None:
    """Ids with right, mixed and wrong drafts are those of plain decoding and of mlx-lm."""
    stock, model = drafted(family, form)
    expected = stock_ids(stock, prompt, num_tokens)
    scripts = {
        "plain": right([]),
        "quadratic": mixed([*prompt, *expected], seed=0),
        "linear": mixed([*prompt, *expected], seed=1, share=0.8),
    }
    for layout, script in scripts.items():
        scripted: Any = ScriptedModel(model, script)
        ids = [
            x
            for step in decode(scripted, prompt, layout=layout, max_tokens=num_tokens)
            for x in step.tokens
        ]
        assert ids == expected, layout
        assert layout == "plain" or scripted.forwards < 0.8 * num_tokens
    for script in (right, wrong):
        scripted = ScriptedModel(model, script([*prompt, *expected]))
        ids = [
            x
            for step in decode(scripted, prompt, layout="quadratic", max_tokens=num_tokens // 4)
            for x in step.tokens
        ]
        assert ids == expected[: num_tokens // 4], script.__name__


@pytest.mark.parametrize("family", LATENT)
def test_sampled_ids_are_drawn_from_the_logits_of_mlx_lm(family: str) -> None:
    stock, model = drafted(family, "bfloat16")
    for seed in range(2):
        script = mixed(np.random.default_rng(seed).integers(0, 64, 99).tolist(), seed=seed)
        scripted: Any = ScriptedModel(model, script)
        options: Any = {"sampling": Sampling(temp=1.0), "seed": seed, "max_tokens": 24}
        steps = list(decode(scripted, PROMPT, layout="quadratic", **options))
        logits = mx.concatenate([step.logits for step in steps])
        ids = [token for step in steps for token in step.tokens]
        cache = make_prompt_cache(stock)
        stock(mx.array([PROMPT[:-1]]), cache=cache)
        inputs = [PROMPT[-1], *ids[:-1]]
        rows = [stock(mx.array([[token]]), cache=cache)[0] for token in inputs]
        assert mx.array_equal(logits, mx.concatenate(rows))


@pytest.mark.parametrize("family", [*LATENT, "mamba2", "falcon_h1", "bailing_hybrid"])
def test_greedy_ids_are_those_of_mlx_lm(family: str) -> None:
    check_greedy(family, "bfloat16", 96 if family in LATENT else 24, prompt=PROMPT)


@pytest.mark.soak
@pytest.mark.parametrize("form", ["bfloat16", "float16", "4-bit"])
@pytest.mark.parametrize("family", [*LATENT, *HYBRID])
@pytest.mark.parametrize("prompt", [[5], PROMPT, PROMPT[::-1] * 20])
def test_many_greedy_ids_are_those_of_mlx_lm(family: str, form: str, prompt: list[int]) -> None:
    check_greedy(family, form, 2000, prompt=prompt)
