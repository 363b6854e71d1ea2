"""Raw state dicts: found out from names and shapes, given by options, or refused."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.converters.layouts import convert_layout
from mlx_mtp.model.config import SamplerKind
from tests.converters import layout_samples as samples
from tests.converters.layout_samples import (
    ADAPTED,
    DIMS,
    RANK,
    TABLE,
    checkpoint,
    facts,
    state_tensors,
)
from tests.converters.layout_samples import state_expected as expected
from tests.converters.layout_samples import state_read as read

PLAIN = SamplerKind(residual="none")


class TestNames:
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.model.", "lora.", "net.decoder."])
    @pytest.mark.parametrize(
        "leaf",
        ["lora_A lora_B", "lora_A.weight lora_B.weight", "lora_a lora_b",
         "lora_A.default.weight lora_B.default.weight"],
    )  # fmt: skip
    def test_any_prefix_and_leaf(self, prefix: str, leaf: str) -> None:
        found = convert_layout(read(state_tensors(prefix=prefix, leaf=leaf)), facts())
        assert samples.same(found.tensors, expected())
        assert (found.layout, found.num_draft_tokens) == ("state-dict", 5)
        assert (found.rank, found.scale, found.sampler) == (RANK, 1.5, PLAIN)

    def test_layers_without_the_model(self) -> None:
        source = {name.removeprefix("model."): value for name, value in state_tensors().items()}
        assert samples.same(convert_layout(read(source), facts()).tensors, expected())

    def test_one_layer_under_two_prefixes(self) -> None:
        source = state_tensors() | state_tensors(prefix="draft.", masks=None, sampler=())
        with pytest.raises(ValueError, match="are both model.layers.0.self_attn.v_proj of tiny"):
            convert_layout(read(source), facts())


class TestAxes:
    @pytest.mark.parametrize("flip_a", [False, True])
    @pytest.mark.parametrize("flip_b", [False, True])
    def test_either_order_is_found_out(self, flip_a: bool, flip_b: bool) -> None:
        source = state_tensors(flip_a=flip_a, flip_b=flip_b)
        found = convert_layout(read(source), facts())
        assert samples.same(found.tensors, expected())
        assert not any("order of axes" in note for note in found.notes)

    def test_layers_must_agree(self) -> None:
        source, flipped = state_tensors(), state_tensors(flip_a=True, flip_b=True)
        for half in ("lora_A", "lora_B"):
            source[f"{ADAPTED[1]}.{half}"] = flipped[f"{ADAPTED[1]}.{half}"]
        with pytest.raises(ValueError, match="do not fit model.layers.1.mlp.down_proj of tiny"):
            convert_layout(read(source), facts())

    def test_square_ones_are_noted(self) -> None:
        square = {f"model.layers.0.self_attn.q_proj.lora_{half}": mx.eye(DIMS) for half in "AB"}
        source = state_tensors() | square
        for path in ADAPTED:
            del source[f"{path}.lora_A"], source[f"{path}.lora_B"]
        found = convert_layout(read(source), facts())
        assert found.notes[0] == (
            "the order of axes is not visible from shapes: assumed PyTorch's, "
            "A [r, in] and B [out, r]"
        )

    @pytest.mark.parametrize("shape", [(RANK,), (RANK, DIMS + 1), (RANK + 1, DIMS), (0, DIMS)])
    def test_what_does_not_fit(self, shape: tuple[int, ...]) -> None:
        source = state_tensors() | {f"{ADAPTED[0]}.lora_A": mx.zeros(shape)}
        with pytest.raises(ValueError, match="do not fit model.layers.0.self_attn.v_proj of tiny"):
            convert_layout(read(source), facts())


class TestScale:
    @pytest.mark.parametrize(
        ("values", "scale"),
        [
            ({"alpha": 8}, 2.0),
            ({"config.lora_alpha": 8, "config.lora_rank": RANK}, 2.0),
            ({"args.alpha": 8, "args.use_rslora": True}, 4.0),
            ({"scaling": 0.3}, 0.3),
            ({"alpha": 8, "scaling": 2.0}, 2.0),
            ({"alpha": 8, "scaling": 4.0}, 4.0),  # over the root of the rank
            ({"alpha": 8, "optimizer.param_groups.alpha": 0.9, "step": 5}, 2.0),
        ],
    )
    def test_found_among_the_values(self, values: dict[str, Any], scale: float) -> None:
        assert convert_layout(read(state_tensors(), **values), facts()).scale == scale

    @pytest.mark.parametrize(
        ("options", "scale"),
        [
            ({"alpha": "2"}, 0.5),
            ({"scale": "0.25"}, 0.25),
            ({"alpha": "2", "rank": str(RANK)}, 0.5),
            ({"alpha": "2", "scale": "9"}, 9.0),
        ],
    )
    def test_options_come_first(self, options: dict[str, str], scale: float) -> None:
        contradictory = {"a.alpha": 8, "b.alpha": 16}
        found = convert_layout(read(state_tensors(), **contradictory), facts(), options=options)
        assert found.scale == scale

    def test_found_in_json(self) -> None:
        config = {"lora": {"r": RANK, "alpha": 8}, "base_model": "someone/tiny"}
        source = checkpoint(state_tensors(), config=config, config_name="config.json")
        found = convert_layout(source, facts())
        assert (found.scale, found.base_model) == (2.0, "someone/tiny")
        assert "scale: alpha / rank, 2 at rank 4" in found.notes

    def test_a_base_models_config_is_not_asked(self) -> None:
        config = {"model_type": "llama", "alpha": 8}
        source = checkpoint(state_tensors(), config=config, config_name="config.json")
        with pytest.raises(
            ValueError, match="the checkpoint contains neither alpha nor scale: specify"
        ):
            convert_layout(source, facts())

    def test_a_layers_own(self) -> None:
        source = state_tensors()
        source |= {f"{ADAPTED[0]}.scaling": mx.array(0.5), f"{ADAPTED[1]}.alpha": mx.array([8.0])}
        found = convert_layout(checkpoint(source), facts())
        assert (found.scale, found.scale_pattern) == (0.5, {ADAPTED[1]: 2.0})

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            ({"a.alpha": 8, "b.alpha": 16}, {}, "contradicts itself: a.alpha 8, b.alpha 16"),
            ({"alpha": 8, "scale": 3.0}, {}, "alpha 8 and scale 3.0 of the checkpoint contradict"),
            ({"alpha": 8}, {"rank": "5"}, "has rank 4, but layout option rank is 5"),
            ({"alpha": math.nan}, {}, "neither alpha nor scale"),
            ({"alpha": 8}, {"scale": "nan"}, "layout option scale must be a finite number"),
            ({"alpha": 8, "p.alpha_pattern.x": 4}, {}, "p.alpha_pattern.x is not supported"),
        ],
    )
    def test_refused(self, values: Any, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            convert_layout(read(state_tensors(), **values), facts(), options=options)

    def test_another_rank_is_noted(self) -> None:
        found = convert_layout(read(state_tensors(), alpha=8, rank=16), facts())
        assert "the checkpoint specifies rank 16, which no layer has" in found.notes


class TestMasks:
    def test_shapes(self) -> None:
        for name, shape in (("mask_emb.weight", (5, DIMS)), ("model.masks", (1, 5, DIMS))):
            source = state_tensors()
            source[name] = source.pop("mask_embeddings").reshape(shape)
            assert samples.same(convert_layout(read(source), facts()).tensors, expected())

    @pytest.mark.parametrize("shape", [(DIMS,), (1, DIMS), (1, 1, DIMS)])
    def test_one_row_for_all(self, shape: tuple[int, ...]) -> None:
        source = state_tensors(masks=None) | {"mask_token": mx.ones(shape)}
        found = convert_layout(read(source), facts(), options={"num_draft_tokens": "3"})
        assert np.array(found.tensors["mask_embeddings"]).tolist() == [[1.0] * DIMS] * 3
        assert "mask rows: the one row of mask_token, 3 times" in found.notes
        assert convert_layout(read(source), facts()).num_draft_tokens == 1

    def test_chosen_by_name(self) -> None:
        source = state_tensors() | {"query": mx.ones((2, DIMS))}
        with pytest.raises(ValueError, match="tensor mask_embeddings is unknown"):
            convert_layout(read(source), facts(), options={"masks": "query"})
        del source["mask_embeddings"]
        found = convert_layout(read(source), facts(), options={"masks": "query"})
        assert found.num_draft_tokens == 2
        with pytest.raises(ValueError, match="option masks: there is no tensor nothing"):
            convert_layout(read(state_tensors(masks=None)), facts(), options={"masks": "nothing"})

    def test_surplus_rows_of_the_embedding(self) -> None:
        table = np.concatenate([TABLE, 2 * np.ones((2, DIMS), np.float32)])
        source = state_tensors(masks=None) | {"model.embed_tokens.weight": mx.array(table)}
        with pytest.raises(ValueError, match="--checkpoint-option mask_token_ids=40,41"):
            convert_layout(read(source), facts(), options={"num_draft_tokens": "2"})
        found = convert_layout(read(source), facts(named_masks=(40, 41)))
        assert np.array(found.tensors["mask_embeddings"]).tolist() == [[2.0] * DIMS] * 2
        chosen = convert_layout(read(source), facts(), options={"mask_token_ids": "41,39,40"})
        assert np.array_equal(np.array(chosen.tensors["mask_embeddings"]), table[[41, 39, 40]])

    def test_random_tokens(self) -> None:
        source = read(state_tensors(masks=None, sampler=()))
        options = {"seed": "3", "num_draft_tokens": "2"}
        found = convert_layout(source, facts(), options=options)
        ids = np.random.default_rng(3).integers(samples.TOKENS, size=2)
        assert np.array_equal(np.array(found.tensors["mask_embeddings"]), TABLE[ids])
        assert found.sampler is None
        with pytest.raises(ValueError, match="layout option num_draft_tokens is required"):
            convert_layout(source, facts(), options={"seed": "3"})

    @pytest.mark.parametrize(
        ("extra", "options", "message"),
        [
            ({}, {}, "no mask embeddings were found: no tensor with 'mask' in its name"),
            ({"a.mask": 8, "b.mask": 8}, {}, "several tensors may be mask embeddings: a.mask, b"),
            ({"mask": 7}, {}, r"mask has shape \(3, 7\), not \[k, 8\]"),
            ({"mask": 8}, {"num_draft_tokens": "2"}, "mask has 3 rows, but num_draft_tokens is 2"),
            ({"mask": 8}, {"seed": "2"}, "seed and mask_token_ids are not needed"),
        ],
    )
    def test_refused(self, extra: dict[str, int], options: Any, message: str) -> None:
        source = state_tensors(masks=None)
        source |= {name: mx.zeros((3, width)) for name, width in extra.items()}
        with pytest.raises(ValueError, match=message):
            convert_layout(read(source), facts(), options=options)


class TestSampler:
    @pytest.mark.parametrize(
        "names",
        [
            ("sampler.mlp.0", "sampler.mlp.2", "sampler.mlp.3", "sampler.mlp.5"),
            ("mtp_sampler.9.linear", "mtp_sampler.9.norm", "mtp_sampler.10.linear",
             "mtp_sampler.10.norm"),
            ("sampler.down", "sampler.ln_1", "sampler.up", "sampler.ln_2"),
        ],
    )  # fmt: skip
    def test_names(self, names: tuple[str, ...]) -> None:
        found = convert_layout(read(state_tensors(sampler=names)), facts())
        assert samples.same(found.tensors, expected())

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("norm_bias", [False, True])
    def test_biases_tell_the_kind(self, bias: bool, norm_bias: bool) -> None:
        found = convert_layout(read(state_tensors(bias=bias, norm_bias=norm_bias)), facts())
        norm, eps = ("layer", 1e-5) if norm_bias else ("rms", 3e-6)
        assert found.sampler == SamplerKind(norm=norm, norm_eps=eps, bias=bias, residual="none")

    def test_a_layer_norm_without_bias(self) -> None:
        source = read(state_tensors(norm_bias=False))
        found = convert_layout(source, facts(), options={"norm": "layer", "norm_eps": "1e-7"})
        assert found.sampler == SamplerKind(norm_eps=1e-7, residual="none")
        assert not np.array(found.tensors["sampler_head.norm_2.bias"]).any()

    def test_the_other_order_of_halves(self) -> None:
        options = {"concat": "hidden-embedding", "residual": "inner"}
        found = convert_layout(read(state_tensors()), facts(), options=options)
        before, after = (
            np.array(tensors["sampler_head.linear_1.weight"])
            for tensors in (expected(), found.tensors)
        )
        assert np.array_equal(after[:, :DIMS], before[:, DIMS:])
        assert np.array_equal(after[:, DIMS:], before[:, :DIMS])
        assert found.sampler == SamplerKind(residual="inner")
        assert "concat hidden-embedding, residual inner" in found.notes[-1]

    def test_every_assumption_is_noted(self) -> None:
        notes = convert_layout(read(state_tensors()), facts()).notes
        assert notes == (
            "scale: alpha / rank, 1.5 at rank 4",
            "mask rows: mask_embeddings",
            "sampler: Linear, SiLU, LayerNorm (eps 1e-05) twice, its norms sampler.norm1 and "
            "sampler.norm2 in that order; concat embedding-hidden, residual none; assumed "
            "unless specified by options",
        )

    @pytest.mark.parametrize(
        ("extra", "options", "message"),
        [
            ({"sampler.fc3.weight": (DIMS, DIMS)}, {}, "the sampler is unknown: it must have"),
            ({"sampler.fc3.bias": (DIMS,)}, {}, "the sampler is unknown"),
            ({"sampler.fc1.weight": (DIMS, DIMS)}, {}, "the sampler is unknown"),
            ({"sampler.fc1.weight": (2 * DIMS, DIMS)}, {}, "the sampler is unknown"),
            ({"sampler.norm2.weight": (DIMS, 1)}, {}, "the sampler is unknown"),
            ({"sampler.gate": (DIMS,)}, {}, "tensor sampler.gate is unknown"),
            ({"sampler.fc1.bias": None}, {}, "the sampler's linear layers must both have a bias"),
            ({"sampler.norm1.bias": None}, {}, "the sampler's normalisations must both have"),
            ({}, {"norm": "rms"}, "layout option norm is rms, but sampler.norm1 has a bias"),
            ({}, {"norm": "batch"}, "layout option norm must be one of layer, rms, got 'batch'"),
            ({}, {"residual": "x"}, "layout option residual must be one of hidden, inner, none"),
            ({}, {"norm_eps": "-1"}, "layout option norm_eps must be 0 or more"),
        ],
    )
    def test_refused(self, extra: dict[str, Any], options: Any, message: str) -> None:
        source = state_tensors()
        for name, shape in extra.items():
            if shape is None:
                del source[name]
            else:
                source[name] = mx.zeros(shape)
        with pytest.raises(ValueError, match=message):
            convert_layout(read(source), facts(), options=options)

    def test_of_another_width(self) -> None:
        wide = {
            name: mx.zeros([2 * size for size in value.shape])
            for name, value in state_tensors().items()
            if name.startswith("sampler")
        }
        with pytest.raises(ValueError, match=r"has shape \(16,\), but tiny needs \(8,\)"):
            convert_layout(read(state_tensors() | wide), facts())
