"""The two PEFT layouts: every tensor exact, every variant of real PEFT taken, all else refused."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from peft.utils.other import get_pattern_key

from mlx_mtp.converters.layouts import BaseFacts, convert_layout
from mlx_mtp.converters.layouts.peft_config import read_settings
from mlx_mtp.model.config import SamplerKind
from tests.converters import layout_samples as samples
from tests.converters.layout_samples import DIMS, MASK_KEY, RANK, TABLE, VOCAB, checkpoint, facts

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
SAMPLER = {"0": "linear_1", "2": "norm_1", "3": "linear_2", "5": "norm_2"}


def expected(source: dict[str, mx.array], order: list[int]) -> dict[str, mx.array]:
    """What the tensors of PEFT's layout become."""
    tensors = {}
    for name, tensor in source.items():
        if name == MASK_KEY:
            tensors["mask_embeddings"] = tensor[mx.array(order)]
        elif name.startswith("sampler."):
            _, _, index, leaf = name.split(".")
            tensors[f"sampler_head.{SAMPLER[index]}.{leaf}"] = tensor
        else:
            path, half, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            tensors[f"{path}.{half.lower()}"] = tensor.T
    return tensors


class TestMaskTokens:
    @pytest.mark.parametrize("dtype", samples.DTYPES)
    def test_every_tensor_is_exact(self, dtype: mx.Dtype) -> None:
        source = samples.peft_tensors(dtype=dtype)
        found = convert_layout(checkpoint(source, config=samples.peft_config()), facts())
        assert samples.same(found.tensors, expected(source, [0, 1, 2]))
        assert (found.layout, found.num_draft_tokens) == ("peft-mtp", 3)
        assert (found.rank, found.scale) == (RANK, 2.5)
        assert found.rank_pattern == found.scale_pattern == {}
        assert found.sampler == SamplerKind()
        assert found.base_model == "someone/tiny"
        assert found.notes == ()

    @pytest.mark.parametrize(
        "prefix", ["", "base_model.model.", "base_model.model.language_model."]
    )
    def test_prefixes(self, prefix: str) -> None:
        source = samples.peft_tensors(prefix=prefix)
        found = convert_layout(checkpoint(source, config=samples.peft_config()), facts())
        assert "model.layers.1.mlp.down_proj.lora_b" in found.tensors

    def test_a_sampler_may_lack(self) -> None:
        source = samples.peft_tensors(sampler=False)
        found = convert_layout(checkpoint(source, config=samples.peft_config()), facts())
        assert found.sampler is None

    @pytest.mark.parametrize(
        ("trained", "order", "rows"),
        [
            ([41, 40, 42], [42, 41, 40], [2, 0, 1]),
            ({"model.embed_tokens": [42, 40, 41]}, None, [0, 1, 2]),
            ({"embed_tokens": [40, 41, 42], "lm_head": [40, 41, 42]}, [], [0, 1, 2]),
        ],
    )
    def test_masks_follow_the_invocation_order(self, trained: Any, order: Any, rows: Any) -> None:
        config = samples.peft_config(trainable_token_indices=trained, alora_invocation_tokens=order)
        source = samples.peft_tensors()
        found = convert_layout(checkpoint(source, config=config), facts())
        assert samples.same(found.tensors, expected(source, rows))

    def test_an_order_may_be_given(self) -> None:
        read = checkpoint(samples.peft_tensors(), config=samples.peft_config())
        found = convert_layout(read, facts(), options={"mask_token_ids": "42,40,41"})
        assert samples.same(found.tensors, expected(samples.peft_tensors(), [2, 0, 1]))

    def test_rslora(self) -> None:
        config = samples.peft_config(use_rslora=True)
        found = convert_layout(checkpoint(samples.peft_tensors(), config=config), facts())
        assert found.scale == 10 / math.sqrt(RANK)

    def test_patterns(self) -> None:
        config = samples.peft_config(
            rank_pattern={r"layers\.1\.self_attn\.(q|v)_proj": 2, "v_proj": 6},
            alpha_pattern={"^model.layers.0.mlp.down_proj": 7, "q_proj": 5},
        )
        ranks = {
            "model.layers.1.self_attn.q_proj": 2,
            "model.layers.1.self_attn.v_proj": 2,
            "model.layers.0.self_attn.v_proj": 6,
        }
        read = checkpoint(samples.peft_tensors(ranks=ranks), config=config)
        found = convert_layout(read, facts())
        assert (found.rank, found.scale, found.rank_pattern) == (RANK, 2.5, ranks)
        assert found.scale_pattern == {
            "model.layers.0.mlp.down_proj": 7 / 4,
            "model.layers.0.self_attn.q_proj": 5 / 4,
            "model.layers.0.self_attn.v_proj": 10 / 6,
            "model.layers.1.self_attn.v_proj": 10 / 2,
        }  # layer 1's q_proj has half the rank and half the alpha

    @pytest.mark.parametrize(
        "pattern",
        ["q_proj", "proj", "self_attn.q_proj", r".*\.0\..*_proj", "^model.layers.1", "layers.1.*",
         "model.layers.[01].mlp.down_proj", "q_proj|down_proj", "(q|v)_proj", "0.self_attn.v_proj"],
    )  # fmt: skip
    def test_patterns_match_as_in_peft(self, pattern: str) -> None:
        settings, problems = read_settings(samples.peft_config(rank_pattern={pattern: 9}))
        assert problems == []
        for path in samples.PATHS:
            matched = get_pattern_key([pattern], path) == pattern
            assert settings.rank_of(path) == (9 if matched else RANK), path


class TestTables:
    """Whole tables beside or instead of trained rows."""

    EMBED = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    HEAD = "base_model.model.lm_head.weight"

    def table(self, rows: np.ndarray = TABLE, *, extra: int = 3) -> mx.array:
        surplus = np.random.default_rng(5).standard_normal((extra, DIMS))
        return mx.array(np.concatenate([rows, surplus]).astype(np.float32))

    def convert(self, tensors: dict[str, mx.array], base: BaseFacts, **options: Any) -> Any:
        source = samples.peft_tensors() | tensors
        config = samples.peft_config() | options.pop("config", {})
        if options.pop("alone", False):
            del source[MASK_KEY]
        return convert_layout(checkpoint(source, config=config), base, options=options)

    def test_a_copy_is_dropped(self) -> None:
        tables = {self.EMBED: self.table(), self.HEAD: self.table()}
        found = self.convert(tables, facts())
        assert samples.same(found.tensors, expected(samples.peft_tensors(), [0, 1, 2]))
        assert found.notes == ()

    def test_an_unembedding_of_its_own(self) -> None:
        found = self.convert({self.HEAD: self.table(samples.HEAD)}, facts(tied=False))
        assert found.notes == ()
        with pytest.raises(ValueError, match=r"lm_head.weight: row 0 differs from that of tiny"):
            self.convert({self.HEAD: self.table()}, facts(tied=False))
        found = self.convert({self.HEAD: self.table()}, facts(tied=False, unembed=None))
        assert found.notes == (
            f"{self.HEAD} was assumed to be the base model's own, which was not available",
        )

    def test_a_trained_unembedding(self) -> None:
        config = {"modules_to_save": ["lm_head"]}
        with pytest.raises(ValueError, match="the unembedding may have been trained"):
            base = facts(tied=False, unembed=None)
            self.convert({self.HEAD: self.table()}, base, config=config)

    @pytest.mark.parametrize("row", [0, 17, VOCAB - 1])
    @pytest.mark.parametrize("bad", [0.001, float("nan")])
    def test_a_changed_row_is_refused(self, row: int, bad: float) -> None:
        rows = TABLE.copy()
        rows[row, 3] += bad
        with pytest.raises(ValueError, match=rf"row {row} differs from that of tiny; an adapter"):
            self.convert({self.EMBED: self.table(rows)}, facts())

    @pytest.mark.parametrize("stored", samples.DTYPES)
    @pytest.mark.parametrize("own", samples.DTYPES)
    def test_types_may_differ(self, stored: mx.Dtype, own: mx.Dtype) -> None:
        tables = {self.EMBED: self.table().astype(own).astype(stored)}
        assert self.convert(tables, facts(dtype=own)).notes == ()

    def test_a_quantised_base_is_near(self) -> None:
        noisy = TABLE + 0.1 * np.random.default_rng(3).standard_normal(TABLE.shape)
        found = self.convert({self.EMBED: self.table(noisy)}, facts(quantised=True))
        assert found.notes == (f"{self.EMBED} is close to the base model's, which is quantised",)
        foreign = np.random.default_rng(3).standard_normal(TABLE.shape)
        with pytest.raises(ValueError, match="differs from that of tiny"):
            self.convert({self.EMBED: self.table(foreign)}, facts(quantised=True))

    def test_mask_rows_inside_a_table(self) -> None:
        name = "base_model.model.model.embed_tokens.weight"
        config = {"trainable_token_indices": None, "alora_invocation_tokens": [42, 40, 41]}
        table = self.table()
        found = self.convert({name: table}, facts(), alone=True, config=config)
        assert samples.bits(found.tensors["mask_embeddings"]) == samples.bits(
            table[mx.array([42, 40, 41])]
        )

    def test_mask_rows_that_nobody_names(self) -> None:
        name = "base_model.model.model.embed_tokens.weight"
        config = {"trainable_token_indices": None, "alora_invocation_tokens": None}
        shrunk = {name: mx.array(TABLE)[:TOKENS_AND_MASKS]}
        for tables, ids in (({name: self.table()}, "40,41,42"), (shrunk, "ID,...")):
            message = f"name the mask tokens by --checkpoint-option mask_token_ids={ids}"
            for options in ({}, {"num_draft_tokens": "3"}):
                with pytest.raises(ValueError, match=message):
                    self.convert(tables, facts(), alone=True, config=config, **options)
        tables, ids = {name: self.table()}, "42,40,41"
        found = self.convert(tables, facts(), alone=True, config=config, mask_token_ids=ids)
        assert found.num_draft_tokens == 3 and found.notes == ()
        base = facts(named_masks=(41, 42, 40))
        found = self.convert(tables, base, alone=True, config=config)
        assert found.notes == (f"mask rows: rows 41, 42, 40 of {name}, named <mask_i>",)

    def test_a_shrunken_table(self) -> None:
        """Enlarging by the tokenizer's length cuts a padded table; mask rows lie in the padding."""
        name = "base_model.model.model.embed_tokens.weight"
        rows = TABLE[:TOKENS_AND_MASKS].copy()
        rows[[37, 38]] = 7.0
        config = {"trainable_token_indices": None, "alora_invocation_tokens": None}
        tables = {name: mx.array(rows)}
        found = self.convert(tables, facts(), alone=True, config=config, mask_token_ids="37,38")
        assert np.array(found.tensors["mask_embeddings"]).tolist() == [[7.0] * DIMS] * 2

    def test_two_names_of_one_table(self) -> None:
        """PEFT writes a trained table twice, and what it was before."""
        name = "base_model.model.model.embed_tokens"
        config = {"trainable_token_indices": None}
        table, before = self.table(), self.table() * 0 + mx.array(TABLE[:1])
        before[:VOCAB] = mx.array(TABLE)
        tables = {
            f"{name}.weight": table,
            f"{name}.modules_to_save.weight": table,
            f"{name}.original_module.weight": before,
        }
        found = self.convert(tables, facts(), alone=True, config=config)
        assert np.array_equal(np.array(found.tensors["mask_embeddings"]), np.array(table[VOCAB:]))
        tables[f"{name}.modules_to_save.weight"] = before
        with pytest.raises(ValueError, match=r"rows of .*modules_to_save.weight and .* differ"):
            self.convert(tables, facts(), alone=True, config=config)

    def test_rows_of_other_tokens_are_noted(self) -> None:
        found = self.convert({self.EMBED: self.table(extra=8)}, facts())
        assert found.notes == (
            f"5 rows of {self.EMBED} from 43 on are neither mask tokens nor tokens of the base "
            "model and were left out",
        )


TOKENS_AND_MASKS = samples.TOKENS + 2


class TestLoraAlone:
    def source(self, **changes: Any) -> Any:
        config = samples.peft_config(
            trainable_token_indices=None, alora_invocation_tokens=None, **changes
        )
        return checkpoint(samples.peft_tensors(sampler=False, masks=False), config=config)

    @pytest.mark.parametrize(
        ("noise_end", "ids", "how"),
        [
            (None, (1, samples.TOKENS), "from 1 to 36, all tokens but the first"),
            (30, (1, 30), "from 1 to 29, below the mask token"),
            (VOCAB, (1, VOCAB), "from 1 to 39, below the mask token"),
            (VOCAB + 9, (1, VOCAB), "from 1 to 39, below the mask token"),
            (4, (1, samples.TOKENS), "from 1 to 36, all tokens but the first"),  # as Gemma's
        ],
    )
    def test_mask_rows_are_random_tokens(
        self, noise_end: int | None, ids: tuple[int, int], how: str
    ) -> None:
        base = facts(noise_end=noise_end)
        found = convert_layout(self.source(), base, options={"num_draft_tokens": "4"})
        assert (found.layout, found.num_draft_tokens, found.sampler) == ("peft-lora", 4, None)
        assert found.noise_ids == ids
        assert found.notes == (f"mask rows: random ids {how}",)
        source = samples.peft_tensors(sampler=False, masks=False)
        assert samples.same(found.tensors, expected(source, []))
        assert samples.as_config(found, base).noise_ids == ids

    @pytest.mark.parametrize(("own", "base", "k"), [(8, None, 7), (None, 16, 15), (8, 16, 7)])
    def test_k_is_suggested_by_the_block_size(
        self, own: int | None, base: int | None, k: int
    ) -> None:
        source = self.source() if own is None else self.source(block_size=own)
        found = convert_layout(source, facts(block_size=base))
        assert found.num_draft_tokens == k
        assert found.notes[0] == f"num_draft_tokens: {k}, one less than block_size {k + 1}"
        chosen = convert_layout(source, facts(block_size=base), options={"num_draft_tokens": "3"})
        assert chosen.num_draft_tokens == 3

    def test_a_range_may_be_given(self) -> None:
        options = {"num_draft_tokens": "2", "noise_ids": "3, 12"}
        found = convert_layout(self.source(), facts(noise_end=30), options=options)
        assert found.noise_ids == (3, 12)
        assert found.notes == ("mask rows: random ids from 3 to 11, as specified",)

    def test_ids_may_be_given(self) -> None:
        options = {"mask_token_ids": "5, 5,39"}
        found = convert_layout(self.source(use_rslora=True), facts(), options=options)
        assert np.array_equal(np.array(found.tensors["mask_embeddings"]), TABLE[[5, 5, 39]])
        assert found.scale == 5.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "layout option num_draft_tokens is required: an ordinary fine-tune looks"),
            ({"num_draft_tokens": "0"}, "num_draft_tokens must be a whole number of at least 1"),
            ({"mask_token_ids": "5,x"}, "mask_token_ids must list token ids"),
            ({"mask_token_ids": "5,40"}, "token 40 is not in the embedding of tiny"),
            ({"mask_token_ids": "5", "num_draft_tokens": "2"}, "mask_token_ids are 1, but"),
            ({"mask_token_ids": "5", "noise_ids": "2,9"}, "exclude each other"),
            ({"noise_ids": "9", "num_draft_tokens": "2"}, "noise_ids must be LOW,HIGH"),
            ({"noise_ids": "9,9", "num_draft_tokens": "2"}, "noise_ids must be LOW,HIGH"),
            ({"noise_ids": "1,2,3", "num_draft_tokens": "2"}, "noise_ids must be LOW,HIGH"),
            ({"noise_ids": "1,41", "num_draft_tokens": "2"}, "end at 41, but tiny has 40 tokens"),
            ({"seed": "1"}, "layout peft-lora has no option 'seed'"),
            ({"concat": "hidden-embedding"}, "layout peft-lora has no option 'concat'"),
            ({"size": "1"}, "unknown layout option 'size'"),
        ],
    )
    def test_options(self, options: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            convert_layout(self.source(), facts(), options=options)
