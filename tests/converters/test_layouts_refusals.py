"""What the PEFT layouts refuse, what has no layout at all, and what ``describe`` says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.converters.layouts import convert_layout, describe, recognise
from tests.converters import layout_samples as samples
from tests.converters.layout_samples import DIMS, MASK_IDS, MASK_KEY, RANK, VOCAB, checkpoint, facts

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"

Change = Callable[[dict[str, Any], dict[str, mx.array]], Any]
ROWS = mx.zeros((3, DIMS))
REFUSALS: dict[str, tuple[Change, str]] = {
    "peft type": (lambda c, t: c.update(peft_type="LOHA"), "peft_type must be 'LORA', got 'LOHA'"),
    "dora": (lambda c, t: c.update(use_dora=True), "use_dora is not supported"),
    "qalora": (lambda c, t: c.update(use_qalora=True), "use_qalora is not supported"),
    "bdlora": (lambda c, t: c.update(use_bdlora={"nblocks": 2}), "use_bdlora is not supported"),
    "lora bias": (lambda c, t: c.update(lora_bias=True), "lora_bias is not supported"),
    "conv1d": (lambda c, t: c.update(fan_in_fan_out=True), "fan_in_fan_out is not supported"),
    "replicated": (lambda c, t: c.update(layer_replication=[[0, 2]]), "layer_replication"),
    "parameters": (lambda c, t: c.update(target_parameters=["x"]), "target_parameters is not"),
    "arrow": (lambda c, t: c.update(arrow_config={"top_k": 1}), "arrow_config is not supported"),
    "megatron": (lambda c, t: c.update(megatron_config={"a": 1}), "megatron_config is not"),
    "the future": (lambda c, t: c.update(use_next_lora=True), "use_next_lora is not supported"),
    "bias": (lambda c, t: c.update(bias="all"), "bias must be 'none', got 'all'"),
    "pissa": (
        lambda c, t: c.update(init_lora_weights="pissa_niter_4"),
        "init_lora_weights 'pissa_niter_4' changes the base model's weights",
    ),
    "saved modules": (
        lambda c, t: c.update(modules_to_save=["embed_tokens", "score"]),
        "modules_to_save 'score' is not supported",
    ),
    "no rank": (lambda c, t: c.pop("r"), "r must be a whole number of at least 1, got None"),
    "no alpha": (lambda c, t: c.update(lora_alpha="x"), "lora_alpha must be a number, got 'x'"),
    "infinite alpha": (lambda c, t: c.update(lora_alpha=math.inf), "lora_alpha must be a number"),
    "bad pattern": (lambda c, t: c.update(rank_pattern={"q(": 2}), "is no regular expression"),
    "slow pattern": (lambda c, t: c.update(rank_pattern={"(a+)+$": 2}), "rank_pattern: pattern"),
    "slow wildcards": (lambda c, t: c.update(alpha_pattern={".*.*.*x": 2}), "too costly to match"),
    "pattern of what": (
        lambda c, t: c.update(alpha_pattern={"q_proj": None}),
        "alpha_pattern: q_proj must be a number, got None",
    ),
    "no list": (lambda c, t: c.update(rank_pattern=[1]), "rank_pattern must be an object"),
    "no masks": (
        lambda c, t: c.update(trainable_token_indices=None, alora_invocation_tokens=None),
        "neither trainable_token_indices nor alora_invocation_tokens is set",
    ),
    "whose rows": (
        lambda c, t: c.update(trainable_token_indices=None),
        "trainable_token_indices is missing, so the tokens of these rows are unknown",
    ),
    "other tokens": (
        lambda c, t: c.update(alora_invocation_tokens=[40, 41, 43]),
        "alora_invocation_tokens [40, 41, 43] and trainable_token_indices [40, 41, 42] must be",
    ),
    "fewer tokens": (
        lambda c, t: c.update(alora_invocation_tokens=[40, 41]),
        "must be the same tokens",
    ),
    "repeated tokens": (lambda c, t: c.update(alora_invocation_tokens=[40, 41, 41]), "repetition"),
    "negative token": (lambda c, t: c.update(alora_invocation_tokens=[-1]), "repetition, got [-1]"),
    "other embedding": (
        lambda c, t: c.update(trainable_token_indices={"wte": MASK_IDS}),
        "trainable_token_indices must name only embed_tokens, got wte",
    ),
    "other unembedding": (
        lambda c, t: c.update(trainable_token_indices={"embed_tokens": MASK_IDS, "lm_head": [1]}),
        "trainable_token_indices names other tokens for lm_head",
    ),
    "trained unembedding": (
        lambda c, t: t.update({MASK_KEY.replace("model.embed_tokens", "lm_head"): ROWS}),
        "trained unembedding rows are not supported",
    ),
    "two tables": (
        lambda c, t: t.update({MASK_KEY.replace("model.model", "model"): ROWS}),
        "are both embed_tokens",
    ),
    "dora tensor": (
        lambda c, t: t.update({f"{Q_PROJ}.lora_magnitude_vector": ROWS}),
        f"tensor {Q_PROJ}.lora_magnitude_vector belongs to DoRA",
    ),
    "embedding LoRA": (
        lambda c, t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": ROWS}),
        "embed_tokens.lora_embedding_A contains low-rank weights of an embedding",
    ),
    "bias tensor": (
        lambda c, t: t.update({f"{Q_PROJ}.lora_B.bias": ROWS}),
        "q_proj.lora_B.bias is a trained bias",
    ),
    "recurrent sampler": (
        lambda c, t: t.update({"sampler.rnn.weight_ih_l0": ROWS}),
        "the recurrent sampler (sampler.rnn.weight_ih_l0) is not supported",
    ),
    "unknown": (lambda c, t: t.update(gate=ROWS), "tensor gate is unknown"),
    "half a pair": (
        lambda c, t: t.pop(f"{Q_PROJ}.lora_B.weight"),
        "model.layers.0.self_attn.q_proj has only one of lora_A and lora_B",
    ),
    "the same layer twice": (
        lambda c, t: t.update({f"x.{name}": t[name] for name in list(t) if Q_PROJ in name}),
        "x.base_model.model.model.layers.0.self_attn.q_proj is no linear layer of tiny (llama)",
    ),
    "two names of one layer": (
        lambda c, t: t.update(
            {n.replace("model.model.", "model.", 1): t[n] for n in list(t) if Q_PROJ in n}
        ),
        "are both model.layers.0.self_attn.q_proj of tiny",
    ),
    "other rank": (lambda c, t: c.update(r=5), "has rank 4, but adapter_config.json says 5"),
    "no LoRA": (
        lambda c, t: [t.pop(name) for name in list(t) if "lora" in name],
        "the checkpoint contains no LoRA weights",
    ),
    "no mask rows": (lambda c, t: t.pop(MASK_KEY), "no tensor ends in embed_tokens.token_adapter"),
    "too few mask rows": (lambda c, t: t.update({MASK_KEY: ROWS[:2]}), "must have 3 rows"),
    "half a sampler": (lambda c, t: t.pop("sampler.mlp.5.bias"), "the sampler lacks norm_2.bias"),
    "larger sampler": (
        lambda c, t: t.update({"sampler.mlp.6.weight": ROWS}),
        "tensor sampler.mlp.6.weight is unknown",
    ),
    "NaN": (
        lambda c, t: t.update({MASK_KEY: ROWS + math.nan}),
        "mask_embeddings contains NaN or infinite values",
    ),
    "infinity": (
        lambda c, t: t.update({"sampler.mlp.2.bias": mx.full((DIMS,), math.inf)}),
        "sampler_head.norm_1.bias contains NaN or infinite values",
    ),
    "whole numbers": (
        lambda c, t: t.update({MASK_KEY: ROWS.astype(mx.int32)}),
        "mask_embeddings must be floating point of 16 or 32 bits",
    ),
    "other width": (
        lambda c, t: t.update({MASK_KEY: ROWS[:, :4]}),
        "mask_embeddings has shape (3, 4), but tiny needs (3, 8)",
    ),
    "other layer width": (
        lambda c, t: t.update({f"{Q_PROJ}.lora_B.weight": mx.zeros((4, RANK))}),
        "q_proj.lora_b has shape (4, 4), but tiny needs (4, 8)",
    ),
    "other sampler width": (
        lambda c, t: t.update({"sampler.mlp.0.weight": mx.zeros((DIMS, DIMS))}),
        "sampler_head.linear_1.weight has shape (8, 8), but tiny needs (8, 16)",
    ),
    "other layer": (
        lambda c, t: t.update(
            {name.replace("layers.0", "layers.9"): t.pop(name) for name in list(t)}
        ),
        "model.layers.9.mlp.down_proj is no linear layer of tiny (llama)",
    ),
    "empty LoRA": (
        lambda c, t: t.update(
            {
                f"{Q_PROJ}.lora_A.weight": mx.zeros((0, DIMS)),
                f"{Q_PROJ}.lora_B.weight": mx.zeros((DIMS, 0)),
            }
        ),
        "are not of one rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line(case: str) -> None:
    change, message = REFUSALS[case]
    config, tensors = samples.peft_config(), samples.peft_tensors()
    change(config, tensors)
    read = checkpoint(tensors, config=config)
    with pytest.raises(ValueError) as caught:
        convert_layout(read, facts())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert describe(read).layout == "peft-mtp"


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_unembedding_is_refused(tied: bool) -> None:
    tensors = samples.peft_tensors()
    tensors["base_model.model.lm_head.lora_A.weight"] = mx.zeros((RANK, DIMS))
    tensors["base_model.model.lm_head.lora_B.weight"] = mx.zeros((VOCAB, RANK))
    with pytest.raises(ValueError, match="lm_head"):
        convert_layout(checkpoint(tensors, config=samples.peft_config()), facts(tied=tied))


def test_hostile_patterns_end_at_once() -> None:
    """Each would keep a matcher busy for minutes on a name that nearly fits."""
    tensors = samples.peft_tensors() | {"a" * 400 + ".lora_A.weight": ROWS}
    for pattern in ("(a*)*b", "(a|aa)+b", "(a|a)" * 30 + "b", "a?" * 40 + "b", ".*.*.*.*b"):
        config = samples.peft_config(rank_pattern={pattern: 2})
        with pytest.raises(ValueError, match="too costly to match"):
            convert_layout(checkpoint(tensors, config=config), facts())


# --- recognising and describing ------------------------------------------------------------------


def test_description() -> None:
    read = checkpoint(samples.peft_tensors(), config=samples.peft_config())
    summary = describe(read)
    assert (summary.layout, summary.base_model) == ("peft-mtp", "someone/tiny")
    assert (summary.num_draft_tokens, summary.rank, summary.scale) == (3, RANK, 2.5)
    assert summary.targets == ("down_proj", "q_proj", "v_proj")
    assert summary.sampler == "mlp, LayerNorm, residual hidden"
    assert summary.problems == ()


def test_description_lists_every_problem() -> None:
    tensors = samples.peft_tensors() | {"sampler.rnn.weight_ih_l0": ROWS, "gate": ROWS}
    config = samples.peft_config(use_dora=True, bias="all")
    summary = describe(checkpoint(tensors, config=config))
    assert summary.sampler == "recurrent"
    assert len(summary.problems) == 4
    with pytest.raises(ValueError, match=r"\(and 3 more\)"):
        convert_layout(checkpoint(tensors, config=config), facts())


def test_description_of_lora_alone() -> None:
    config = samples.peft_config(trainable_token_indices=None, alora_invocation_tokens=None)
    tensors = samples.peft_tensors(sampler=False, masks=False)
    summary = describe(checkpoint(tensors, config=config))
    assert (summary.layout, summary.num_draft_tokens) == ("peft-lora", None)


def test_what_has_no_layout() -> None:
    tensors = {f"model.layers.{index}.weight": ROWS for index in range(5)}
    read = checkpoint(tensors, config={"model_type": "llama"}, config_name="config.json")
    with pytest.raises(ValueError) as caught:
        recognise(read)
    text = str(caught.value)
    for word in ("some/checkpoint", "peft-mtp:", "peft-lora:", "mtp-glora:", "state-dict:"):
        assert word in text
    assert "Found adapter_model.safetensors, config.json; 5 tensors: model.layers.0.weight" in text
    assert "and 2 more" in text and "\n" not in text
    assert describe(read).problems == (text,)
    with pytest.raises(ValueError, match="unknown layout 'x'; there are peft-mtp"):
        recognise(read, layout="x")
    assert recognise(read, layout="peft-mtp") == "peft-mtp"
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        convert_layout(read, facts(), layout="peft-mtp")


def test_an_adapter_of_ours() -> None:
    read = checkpoint({"mask_embeddings": ROWS}, config={"fine_tune_type": "mtp"})
    with pytest.raises(ValueError, match="some/checkpoint is an adapter of mlx-mtp already"):
        recognise(read)


def test_k_must_agree() -> None:
    read = checkpoint(samples.peft_tensors(), config=samples.peft_config())
    with pytest.raises(ValueError, match="num_draft_tokens is 2, but the checkpoint has 3"):
        convert_layout(read, facts(), options={"num_draft_tokens": "2"})


def test_endless_names() -> None:
    tensors = {"layers.0." * 100_000 + "weight": ROWS}
    with pytest.raises(ValueError, match="some/checkpoint: tensor layers.0.* has too long a name"):
        recognise(checkpoint(tensors))
