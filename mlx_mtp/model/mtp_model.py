"""MTPModel: an mlx-lm model with mask tokens, gated LoRA weights and a sampler head.

No model is rewritten.  mlx-lm's models have seams, and at each of them a wrapper consults the step
in progress (``StepScope``):

- token embeddings turn mask rows into mask embeddings (``MaskEmbedding``);
- linear layers and experts add low-rank weights on mask rows (``GatedLoRALinear``, ``experts``);
- rotary and learned position embeddings give every row its own position (``positions``);
- the caches return the step's attention mask (``caches.layers.LayerCache``);
- recurrent layers pass their rows on to their caches (``recurrence``, ``row_by_row``).

Layers that compute one row in another form than several take that of one row in a step
(``one_row``), so a model decodes drafts exactly with and without an adapter.  The seam in attention
is also for back-ends and batches (``attention``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache

from mlx_mtp.model.attention import AttentionSeam, attention_blocks, wrap_verify_attention
from mlx_mtp.model.caches import make as kv_cache
from mlx_mtp.model.caches.mtp_cache import Caches, MTPCache
from mlx_mtp.model.chunks import wrap_chunks
from mlx_mtp.model.config import AdapterConfig, HeadsConfig, MTPConfig
from mlx_mtp.model.draft_heads import DraftHeads
from mlx_mtp.model.experts import GatedLoRASwitchLinear, is_switch, wrap_gated_experts
from mlx_mtp.model.fingerprint import fingerprint as fingerprint
from mlx_mtp.model.fingerprint import model_args
from mlx_mtp.model.head import OutputHead, PartialHead
from mlx_mtp.model.layout import MaskRun, RowLayout, StepLayout, StepScope
from mlx_mtp.model.lora import GatedLoRALinear, share_inputs
from mlx_mtp.model.mixers import wrap_mixers
from mlx_mtp.model.native.module import NativeModule
from mlx_mtp.model.one_row import wrap_experts
from mlx_mtp.model.parts import (
    TextModel,
    embedding_dims,
    find_parts,
    module_at,
    text_model,
)
from mlx_mtp.model.positions import counts_keys, wrap_positions
from mlx_mtp.model.recurrence import has_chunks
from mlx_mtp.model.sampler_head import SamplerHead
from mlx_mtp.model.statistics import AdapterStatistics
from mlx_mtp.model.wrappers import MaskEmbedding, WithoutHead, replace

MASK_EMBEDDINGS = "mask_embeddings"
MASK_PER_LAYER_EMBEDDINGS = "mask_per_layer_embeddings"
SAMPLER_PREFIX = "sampler_head."
_MAX_ERROR = 0.05  # of the largest value; see ``MTPModel._probe``

# What mlx-lm's own class computes so that drafts or masks cannot be exact, by its file.
_INDEXER = "its indexer chooses keys in another form for several rows than for one"
_REFUSED = {
    "deepseek_v32": _INDEXER,  # and glm_moe_dsa, which inherits from it
    "longcat_flash_ngram": "its embeddings are of n-grams, which mask rows do not have",
    "minimax_m3_vl": "its indexer chooses blocks of cached rows, in which mask rows would count",
    "muse_spark": "its fused rotary embedding takes one position for all rows of a forward",
    "phi3small": "its attention adds a mask of booleans to the scores, so rows see later ones",
}
_FAILURES = (TypeError, ValueError, AttributeError, IndexError, RuntimeError)


class MTPModel(nn.Module):
    """An mlx-lm model with or without an adapter.

    Args:
        base: the mlx-lm model.  With an adapter its modules are wrapped in place.
        name: name of the model in messages.
        config: the adapter's configuration; None decodes plainly.
        weights: the adapter's tensors by name (see ``loading``).

    Attributes:
        config: that of an adapter of mask tokens, or None.
        heads: independent heads on the final hidden states, if that is what the adapter has.
        statistics: what evaluations have shown of the adapter's drafts; None if that is not known.
        frequent: the head for the tokens that drafts of mask tokens come from, apart from those of
            the conversation; None for all tokens.
        native: MTP modules of the model's own checkpoint; None if it has none.
        draft_model: a smaller model with the same tokenizer, which proposes drafts; None without.

    Raises:
        ValueError: the model is not supported, or the adapter does not fit it.
    """

    def __init__(
        self,
        base: Any,
        *,
        name: str = "",
        config: MTPConfig | HeadsConfig | None = None,
        weights: Mapping[str, mx.array] | None = None,
    ) -> None:
        super().__init__()
        base = text_model(base)
        self.name = name or base.model_type
        if reason := _refusal(base) or kv_cache.unsupported_reason(base):
            raise ValueError(f"{self.name} ({base.model_type}) cannot be used: {reason}")
        self.base = base
        self.config = config if isinstance(config, MTPConfig) else None
        self.sampler_head: SamplerHead | None = None
        self.heads: DraftHeads | None = None
        self.statistics: AdapterStatistics | None = None
        self.frequent: PartialHead | None = None
        self.native: NativeModule | None = None
        self.draft_model: MTPModel | None = None
        self._scope = StepScope()
        self.parts = find_parts(base)
        self._embedding = module_at(base, self.parts.embedding)
        backbone = module_at(base, self.parts.backbone)
        self._takes_mask = _requires(inspect.signature(type(backbone).__call__), "mask")
        wrap_experts(base, self._scope)
        self._is_latent = wrap_verify_attention(base, self._scope)
        self._has_forms = self._is_latent  # one for one row and another for several
        self.is_recurrent = bool(self.make_cache().recurrent_layers)
        if self.is_recurrent:
            self._wrap_mixers()
            self._has_forms |= has_chunks(base)
        if config is not None:
            assert weights is not None
            self._check_shape(config)
            if isinstance(config, MTPConfig):
                self._attach(config, weights)
            else:
                self.heads = DraftHeads(config, weights, dtype=self.dtype)
        self._check_caches()
        if self.config is not None:
            self._probe()

    @property
    def num_draft_tokens(self) -> int:
        """k, the number of mask tokens; 0 without an adapter that has them."""
        return self.config.num_draft_tokens if self.config else 0

    @property
    def adapter_config(self) -> MTPConfig | HeadsConfig | None:
        """Configuration of the adapter, of mask tokens or of heads."""
        return self.config if self.heads is None else self.heads.config

    @property
    def scope(self) -> StepScope:
        """What the wrapped modules consult during a forward."""
        return self._scope

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self._embedding.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width D of the model."""
        return embedding_dims(self._embedding)

    @property
    def per_layer_size(self) -> int:
        """Width of the embeddings of a token for all layers; 0 if the model has none."""
        path = self.parts.per_layer
        return 0 if path is None else _width(module_at(self.base, path))

    @property
    def max_context(self) -> int | None:
        """Maximum number of positions, or None if the model's configuration has no such limit."""
        if self.parts.positions:
            return module_at(self.base, self.parts.positions[0]).weight.shape[0]
        return getattr(model_args(self.base), "max_position_embeddings", None)

    @property
    def dtype(self) -> mx.Dtype:
        """Floating-point type of the hidden states."""
        return self.embed(mx.array([0])).dtype

    def make_cache(self, **options: Any) -> MTPCache:
        """Make fresh caches; see ``caches.make.make_cache`` for the options and errors."""
        cache = kv_cache.make_cache(self.base, scope=self._scope, **options)
        cache.last_id_alone = self._has_forms
        if options.get("max_kv_size") is not None and counts_keys(self.base):
            raise ValueError(
                f"max_kv_size cannot be used with {self.name} ({self.base.model_type}): layers "
                "that share keys count them to know a row's position"
            )
        if cache.kv_bits is not None and self._is_latent:
            raise ValueError(f"kv_bits cannot be used with {self.name}: it caches latent vectors")
        if cache.kv_bits is not None:
            attention = self._sample_cache().attention_layers
            size = attention[0].inner.keys.shape[-1] if attention else 0
            if size % cache.kv_group_size:
                raise ValueError(
                    f"kv_group_size {cache.kv_group_size} does not divide the head size {size}"
                )
            self._check_quantised(options | {"quantized_kv_start": 0})
        return cache

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers; mlx-lm counts them."""
        return self.base.layers

    def wrap_prompt_cache(self, caches: Sequence[Any]) -> MTPCache:
        """Wrap a list of mlx-lm's caches; see ``caches.make.from_mlx_lm``."""
        return kv_cache.from_mlx_lm(caches, sample=self._sample_cache(), scope=self._scope)

    def load_prompt_cache(self, path: Path) -> tuple[MTPCache, dict[str, str]]:
        """Read a file of ``mlx_lm.cache_prompt``; see ``caches.make.load_prompt_cache``."""
        return kv_cache.load_prompt_cache(path, sample=self._sample_cache(), scope=self._scope)

    def _sample_cache(self) -> MTPCache:
        """Make caches of one row, never evaluated, for their shapes and types."""
        sample = kv_cache.make_cache(self.base, scope=self._scope)
        sample.last_id_alone = self._has_forms
        self(mx.array([[0]]), cache=sample)
        return sample

    def __call__(
        self,
        ids: mx.array,
        *,
        cache: Caches,
        layout: RowLayout | None = None,
    ) -> mx.array:
        """Run the backbone over the rows of one step, or over a batch of steps.

        Args:
            ids: ``[1, L]``; those of mask rows are ``noise.mask_ids``.
            cache: the caches; all rows are appended.
            layout: the rows of the forward; None means L contiguous ordinary rows.

        Returns:
            Final hidden states ``[1, L, D]``.
        """
        backbone = self._backbone
        self._scope.layout = layout
        cache.begin_forward(ids.shape[1], layout)
        try:
            if not self._takes_mask:
                return backbone(ids, cache=cache.layers)
            mask = create_attention_mask(ids, cache.layers[0])
            return backbone(ids, mask=mask, cache=cache.layers)
        finally:
            self._scope.layout = None

    @property
    def _backbone(self) -> Any:
        backbone = module_at(self.base, self.parts.backbone)
        head = self.parts.inner_head
        return backbone if head is None else WithoutHead(backbone, head)

    def logits(self, hidden: mx.array) -> mx.array:
        """Turn hidden states ``[B, L, D]`` into logits ``[B, L, V]`` by the base model's head."""
        return OutputHead(self.base, self.parts)(hidden)

    def embed(self, ids: mx.array) -> mx.array:
        """Look up token embeddings, ``[...]`` to ``[..., D]``."""
        rows = self._embedding(ids.reshape(-1))  # a quantised table takes no scalar
        return rows.reshape(*ids.shape, -1)

    def unembed_rows(self, ids: mx.array) -> mx.array:
        """Rows of the unembedding, ``[...]`` to ``[..., D]``."""
        if self.parts.head is None:
            return self._embedding(ids)
        head = module_at(self.base, self.parts.head)
        if isinstance(head, mx.array):
            return head[ids]
        if not isinstance(head, nn.QuantizedLinear):
            return head.weight[ids]
        biases = None if head.biases is None else head.biases[ids]
        return mx.dequantize(
            head.weight[ids],
            head.scales[ids],
            biases,
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )

    def _check_shape(self, config: AdapterConfig) -> None:
        """Refuse an adapter for a model of another shape."""
        dims = embedding_dims(self._embedding)
        shape = "{}, {} layers of {}, {} tokens".format
        actual = shape(self.base.model_type, len(self.base.layers), dims, self.vocab_size)
        expected = shape(
            config.base_model_type,
            config.base_num_layers,
            config.base_hidden_size,
            config.base_vocab_size,
        )
        if actual != expected:
            raise ValueError(
                f"the adapter is for {config.base_model} ({expected}), "
                f"not for {self.name} ({actual})"
            )

    def _attach(self, config: MTPConfig, weights: Mapping[str, mx.array]) -> None:
        """Wrap the model's modules."""
        dtype = self.dtype
        cast = {key: value.astype(dtype) for key, value in weights.items()}
        embeddings = self._mask_embeddings(config, cast)
        self._attach_sampler(config, cast, self.hidden_size)
        self._wrap_linears(config, cast)
        if not (self.wrap_ropes() or self.is_recurrent):
            raise ValueError(
                f"{self.name} ({self.base.model_type}) cannot take mask rows: it has no embedding "
                "of positions that could give each row its own"
            )
        wrap_chunks(self.base, self._scope)
        replace(self.base, embeddings)

    def _mask_embeddings(
        self, config: MTPConfig, weights: dict[str, mx.array]
    ) -> dict[str, nn.Module]:
        """Embeddings with mask tokens by path, their tensors moved out of ``weights``.

        There are none if mask rows have ids of the vocabulary.
        """
        if config.noise_ids:
            if MASK_EMBEDDINGS in weights:
                raise ValueError(f"the adapter has noise_ids and {MASK_EMBEDDINGS}")
            return {}
        tables = {self.parts.embedding: MASK_EMBEDDINGS}
        if self.parts.per_layer is not None:
            tables[self.parts.per_layer] = MASK_PER_LAYER_EMBEDDINGS
            if MASK_PER_LAYER_EMBEDDINGS not in weights:
                shape = (config.num_draft_tokens, self.per_layer_size)
                weights[MASK_PER_LAYER_EMBEDDINGS] = mx.zeros(shape, self.dtype)
        embeddings: dict[str, nn.Module] = {}
        for path, name in tables.items():
            embedding, masks = module_at(self.base, path), weights.pop(name, None)
            expected = (config.num_draft_tokens, embedding_dims(embedding))
            if masks is None or masks.shape != expected:
                shape = None if masks is None else tuple(masks.shape)
                raise ValueError(f"{name} must be {expected}, got {shape}")
            embeddings[path] = MaskEmbedding(embedding, masks, scope=self._scope)
        return embeddings

    def _wrap_mixers(self) -> None:
        """Let recurrent layers ask their caches, and check that they do."""

        def forward(layout: StepLayout) -> MTPCache:
            cache = self.make_cache()
            self(mx.zeros((1, layout.num_rows), mx.int32), cache=cache, layout=layout)
            return cache

        try:
            wrap_mixers(self.base, forward, scope=self._scope)
        except (TypeError, ValueError, AttributeError, IndexError) as failure:
            raise ValueError(
                f"{self.name} ({self.base.model_type}) cannot be used: {_first_line(failure)}"
            ) from None

    def wrap_attention(self) -> bool:
        """Let batches attend answer by answer; seams that exist keep their function.

        Returns:
            Whether there is an attention block with a seam.
        """
        blocks = attention_blocks(self.base)
        plain = {k: block for k, block in blocks.items() if not isinstance(block, AttentionSeam)}
        replace(self.base, {path: AttentionSeam(block) for path, block in plain.items()})
        return bool(blocks)

    def wrap_ropes(self) -> bool:
        """Let each row have its own position; what is wrapped already stays as it is.

        Returns:
            Whether the model knows positions.
        """
        return wrap_positions(self.base, self.parts.positions, self._scope)

    def _attach_sampler(self, config: MTPConfig, weights: dict[str, mx.array], dims: int) -> None:
        """Move the sampler head's tensors out of ``weights``."""
        names = [name for name in weights if name.startswith(SAMPLER_PREFIX)]
        tensors = [(name.removeprefix(SAMPLER_PREFIX), weights.pop(name)) for name in names]
        if config.sampler is not None:
            self.sampler_head = SamplerHead(dims, config.sampler_kind)
            try:
                self.sampler_head.load_weights(tensors, strict=True)
            except ValueError as error:  # its message may have several lines
                raise ValueError(f"sampler_head: {' '.join(str(error).split())}") from None
        elif tensors:
            raise ValueError(f"the adapter has a tensor {names[0]}, but no sampler")

    def _wrap_linears(self, config: MTPConfig, weights: dict[str, mx.array]) -> None:
        """Wrap every linear layer that ``weights`` has low-rank weights for."""
        modules = dict(self.base.named_modules())
        paths = sorted({name.rpartition(".")[0] for name in weights})
        wrapped = {}
        for path in paths:
            lora_a = weights.pop(f"{path}.lora_a", None)
            lora_b = weights.pop(f"{path}.lora_b", None)
            if path not in modules or lora_a is None or lora_b is None:
                raise ValueError(f"the adapter's tensors for {path!r} do not fit {self.name}")
            kind: Any = GatedLoRASwitchLinear if is_switch(modules[path]) else GatedLoRALinear
            try:
                wrapped[path] = kind.from_base(
                    modules[path],
                    lora_a=lora_a,
                    lora_b=lora_b,
                    scale=config.scale_of(path),
                    scope=self._scope,
                )
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if lora_a.shape[-1] != config.rank_of(path):
                raise ValueError(f"{path} has rank {lora_a.shape[-1]}, not {config.rank_of(path)}")
        if weights:
            raise ValueError(f"the adapter has an unknown tensor {sorted(weights)[0]!r}")
        names = sorted({path.rpartition(".")[-1] for path in paths})
        if names != sorted(config.target_modules):
            raise ValueError(
                f"the adapter has tensors for {', '.join(names)}, while its target_modules are "
                f"{', '.join(config.target_modules)}"
            )
        _check_finite({f"{path}.lora_b": wrapped[path].lora_b for path in paths})
        replace(self.base, wrapped)
        share_inputs(self.base)
        switches = [path for path in paths if isinstance(wrapped[path], GatedLoRASwitchLinear)]
        wrap_gated_experts(self.base, switches, self._scope)

    def _check_caches(self) -> None:
        """Refuse a model whose forward fails, or leaves a cache empty, before any work."""
        prefix = f"{self.name} ({self.base.model_type}) cannot be used"
        try:
            layers = self._sample_cache().layers
        except _FAILURES as failure:
            raise ValueError(f"{prefix}: {_first_line(failure)}") from None
        inners = [getattr(layer, "inner", None) for layer in layers]  # none if it is recurrent
        unused = [i for i, inner in enumerate(inners) if inner is not None and inner.empty()]
        if unused:
            raise ValueError(f"{prefix}: layer {unused[0]} does not use its cache")

    def _check_quantised(self, options: Mapping[str, Any]) -> None:
        """Refuse a quantised cache if the model's own code computes with keys or values."""
        sample = kv_cache.make_cache(self.base, scope=self._scope, **options)
        sample.begin_step()
        try:
            self(mx.array([[0]]), cache=sample)  # never evaluated
        except _FAILURES:
            raise ValueError(
                f"kv_bits cannot be used with {self.name} ({self.base.model_type}): its attention "
                "takes no quantised keys and values"
            ) from None

    def _probe(self) -> None:
        """Run a tiny step, so that a model with other seams is refused early.

        Its ordinary rows must agree with the model's own forwards, one row at a time.  Its mask
        row, which follows the first of them, must agree with a forward of that row alone after the
        step has been rewound.  Where the seams work, both differ by rounding only, so a coarse
        bound is enough.
        """
        layout, cache = StepLayout(1, 1, (1, 0)), self.make_cache()
        try:
            hidden = self(mx.array([[1, 2, 0]]), cache=cache, layout=layout)
            cache.rewind(2)
            alone = self(mx.array([[0]]), cache=cache, layout=MaskRun(1))
            own: Any = make_prompt_cache(self.base)
            rows = [self.base(mx.array([[token]]), cache=own) for token in (1, 2)]
            stepped, plain = self.logits(hidden[:, :2]), mx.concatenate(rows, axis=1)
            errors: Any = [_relative_error(stepped, plain), _relative_error(hidden[:, 2:], alone)]
            agrees: Any = (mx.stack(errors) < _MAX_ERROR).tolist()
        except _FAILURES as failure:
            raise self._no_mask_rows(_first_line(failure)) from None
        if not agrees[0]:
            raise self._no_mask_rows("its ordinary rows would change")
        if not agrees[1]:
            raise self._no_mask_rows("they would see other rows than those before them")

    def _no_mask_rows(self, reason: str) -> ValueError:
        return ValueError(f"{self.name} ({self.base.model_type}) cannot take mask rows: {reason}")


def _check_finite(weights: Mapping[str, mx.array]) -> None:
    """Refuse weights that would turn the zeros of ordinary rows into something else."""
    finite = [mx.isfinite(value).all() for value in weights.values()]
    mx.eval(finite)
    for name, is_finite in zip(weights, finite, strict=True):
        if not is_finite.item():
            raise ValueError(f"the adapter's tensor {name} has values that are not finite")


def _relative_error(values: mx.array, expected: mx.array) -> mx.array:
    """Largest error relative to the largest value."""
    values, expected = values.astype(mx.float32), expected.astype(mx.float32)
    return mx.abs(values - expected).max() / (mx.abs(expected).max() + 1e-6)


def _first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _refusal(base: Any) -> str | None:
    """Why a model of that class cannot be used, if that is known."""
    wrapped = base.wrapped if isinstance(base, TextModel) else base
    files = [kind.__module__.rpartition(".")[-1] for kind in type(wrapped).__mro__]
    return next((_REFUSED[file] for file in files if file in _REFUSED), None)


def _width(embedding: Any) -> int:
    inner = embedding.embedding if isinstance(embedding, MaskEmbedding) else embedding
    return embedding_dims(inner)


def _requires(call: inspect.Signature, name: str) -> bool:
    """Whether a function has an argument of that name without a default."""
    argument = call.parameters.get(name)
    return argument is not None and argument.default is inspect.Parameter.empty
