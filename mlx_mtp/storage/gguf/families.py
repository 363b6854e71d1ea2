"""The architectures of GGUF files: their tensors under mlx-lm's names, and their settings.

The settings are written in transformers' keys, which ``model.settings`` reads.  Where a file's
tensors differ from Hugging Face's (llama.cpp's converter rearranges rows or changes values), a slot
says how to undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.storage.gguf.rope import (
    FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    read_long_rope,
    read_rope,
)
from mlx_mtp.storage.gguf.source import Source

_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's numbers of the experts' gating functions


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes.

    Attributes:
        name: in the GGUF file, without the layer.
        target: in the mlx-lm model, without the layer.
        shape: the shape that it must have.
        heads: number of heads whose rotary halves are interleaved in the rows; 0 if they are not.
        offset: what is to be subtracted from the values.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Description:
    """What a file contains.

    Attributes:
        config: ``config.json`` without special tokens and quantisation.
        slots: a slot for each tensor, by the tensor's name; the targets are whole names.
        unused: tensors that ``config`` expresses.
    """

    config: dict[str, Any]
    slots: dict[str, Slot]
    unused: frozenset[str]


@dataclass
class Model:
    """Sizes that every architecture has, and what its own function adds.

    Attributes:
        source: the metadata.
        config: settings in transformers' keys.
        once: slots of tensors outside the layers.
        layer: slots of every layer's tensors.
        some: slots that only some layers have, by the number of the layer.
        unused: tensors that ``config`` expresses.
    """

    source: Source
    config: dict[str, Any] = field(default_factory=dict)
    once: list[Slot] = field(default_factory=list)
    layer: list[Slot] = field(default_factory=list)
    some: dict[int, list[Slot]] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        get = self.source.integer
        self.layers, self.width = get("block_count"), get("embedding_length")
        self.heads = get("attention.head_count")
        self.kv_heads = get("attention.head_count_kv", self.heads)
        self.head_dim = get("attention.key_length", max(self.width // self.heads, 1))
        self.context = get("context_length")
        if self.heads % self.kv_heads:
            raise self.source.refuse("attention.head_count_kv", self.kv_heads, "no divisor")
        if (size := get("attention.value_length", self.head_dim)) != self.head_dim:
            raise self.source.refuse("attention.value_length", size, f"not {self.head_dim}")
        if self.layers > len(self.source.file.tensors):
            raise self.source.refuse("block_count", self.layers, "more than there are tensors")
        table = self.source.file.tensors.get("token_embd.weight")
        if table is None:
            raise ValueError(f"{self.source.file.path} has no token_embd.weight")
        self.vocabulary = table.shape[0]
        if (size := get("vocab_size", self.vocabulary)) != self.vocabulary:
            raise self.source.refuse("vocab_size", size, f"token_embd has {self.vocabulary} rows")
        tied = not self.source.has("output.weight")
        self.config |= {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": tied,
        }
        rows = (self.vocabulary, self.width)
        self.once.append(Slot("token_embd.weight", "model.embed_tokens.weight", rows))
        if not tied:
            self.once.append(Slot("output.weight", "lm_head.weight", rows))

    def norm(self, name: str, target: str, size: int | None = None, **options: Any) -> None:
        """Add a norm's weight to the layers, or outside if ``target`` is ``norm``."""
        outside = target == "norm"
        slot = Slot(
            f"{name}.weight",
            f"model.{target}.weight" if outside else f"{target}.weight",
            (size or self.width,),
            **options,
        )
        (self.once if outside else self.layer).append(slot)

    def rms_norms(self, *pairs: tuple[str, str], offset: float = 0.0) -> None:
        """Add the norms before attention and MLP and the last one, or those given, and epsilon."""
        self.config["rms_norm_eps"] = self.source.number("attention.layer_norm_rms_epsilon")
        usual = (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
        for name, target in (*(pairs or usual), ("output_norm", "norm")):
            self.norm(name, target, offset=offset)

    def linear(
        self, name: str, target: str, out: int, width: int, *, bias: bool = False, heads: int = 0
    ) -> None:
        """Add a linear layer's weight ``[out, width]`` and bias."""
        self.layer.append(Slot(f"{name}.weight", f"{target}.weight", (out, width), heads))
        if bias:
            self.layer.append(Slot(f"{name}.bias", f"{target}.bias", (out,), heads))

    def attention(
        self, *, interleaved: bool = False, bias: bool = False, out_bias: bool | None = None
    ) -> None:
        """Add separate projections of queries, keys, values and the output."""
        for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            self.linear(
                f"attn_{part}",
                f"self_attn.{part}_proj",
                heads * self.head_dim,
                self.width,
                bias=bias,
                heads=heads if interleaved and part != "v" else 0,
            )
        self.linear(
            "attn_output",
            "self_attn.o_proj",
            self.width,
            self.heads * self.head_dim,
            bias=bias if out_bias is None else out_bias,
        )

    def mlp(self, *, bias: bool = False) -> None:
        """Add a gated MLP."""
        size = self.config["intermediate_size"] = self.source.integer("feed_forward_length")
        self.linear("ffn_gate", "mlp.gate_proj", size, self.width, bias=bias)
        self.linear("ffn_up", "mlp.up_proj", size, self.width, bias=bias)
        self.linear("ffn_down", "mlp.down_proj", self.width, size, bias=bias)

    def experts(self, count: int, size: int, *, module: str = "mlp") -> None:
        """Add routed experts, whose weights are stacked in the file as in mlx-lm."""
        scale = self.source.number("expert_weights_scale", 1.0)
        if scale not in (0, 1):
            raise self.source.refuse("expert_weights_scale", scale, "not 1")
        gating = self.source.integer("expert_gating_func", _SOFTMAX)
        if gating != _SOFTMAX:
            raise self.source.refuse("expert_gating_func", gating, "not softmax")
        self.stacks(count, size, module=module)

    def stacks(self, count: int, size: int, *, module: str = "mlp") -> None:
        """Add the router and the stacked weights of experts."""
        self.linear("ffn_gate_inp", f"{module}.gate", count, self.width)
        for name, rows, width in (
            ("gate", size, self.width),
            ("up", size, self.width),
            ("down", self.width, size),
        ):
            target = f"{module}.switch_mlp.{name}_proj.weight"
            self.layer.append(Slot(f"ffn_{name}_exps.weight", target, (count, rows, width)))

    def only_in(self, layers: range, add: Callable[[], None]) -> None:
        """Let only some layers have what a function adds to all of them."""
        start = len(self.layer)
        add()
        slots, self.layer[start:] = self.layer[start:], []
        for index in layers:
            self.some.setdefault(index, []).extend(slots)

    def rope(self, *, rotated: int | None = None) -> None:
        """Read the rotary settings; ``rotated`` dimensions of a head, by default all."""
        whole = rotated or self.head_dim
        size = self.source.integer("rope.dimension_count", whole)
        if size != whole:
            raise self.source.refuse("rope.dimension_count", size, f"heads have {whole}")
        self.config |= read_rope(self.source, head_dim=whole, limit=self.context)
        self.unused.add(FACTORS)

    def has(self, name: str) -> bool:
        """Whether the first layer has a tensor."""
        return self.source.has(f"blk.0.{name}")

    def description(self) -> Description:
        """Return everything, with whole names.

        Raises:
            ValueError: a key or a tensor of the file has no place.
        """
        self.source.check_all_read()
        slots = {slot.name: slot for slot in self.once}
        for index in range(self.layers):
            for slot in (*self.layer, *self.some.get(index, ())):
                name = f"blk.{index}.{slot.name}"
                target = f"model.layers.{index}.{slot.target}"
                slots[name] = Slot(name, target, slot.shape, slot.heads, slot.offset)
        return Description(self.config, slots, frozenset(self.unused))


def describe(source: Source) -> Description:
    """Describe a file.

    Raises:
        ValueError: its architecture is not read, a setting cannot be expressed, or a tensor is
            missing, unknown or of the wrong shape; one line that names it.
    """
    path = source.file.path
    family = FAMILIES.get(source.arch)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        arch = repr(source.arch)
        raise ValueError(f"{path}: architecture {arch} is not supported; known are {known}")
    model = Model(source)
    family(model)
    found = model.description()
    for problem in _tensor_problems(source, found):
        raise ValueError(f"{path}: {problem}")
    return found


def _tensor_problems(source: Source, found: Description) -> Iterator[str]:
    tensors = source.file.tensors
    for name, slot in found.slots.items():
        if name not in tensors:
            yield f"tensor {name} is missing"
        elif _stripped(tensors[name].shape) != _stripped(slot.shape):
            shapes = f"{list(tensors[name].shape)}, expected {list(slot.shape)}"
            yield f"tensor {name} has shape {shapes}"
    for name in tensors:
        if name not in found.slots and name not in found.unused:
            yield f"tensor {name} is not known in a {source.arch} model"


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading extents of 1, which files have or have not."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _llama(model: Model) -> None:
    """llama, and mistral and mixtral, which llama.cpp calls llama too."""
    source = model.source
    experts, window = (
        source.integer(key, 0, minimum=0) for key in ("expert_count", "attention.sliding_window")
    )
    kind = "mixtral" if experts else "mistral" if window else "llama"
    model.config |= {"model_type": kind, "head_dim": model.head_dim, "hidden_act": "silu"}
    model.rms_norms()
    bias, mlp_bias = (model.has(name) and kind == "llama" for name in _BIASES)
    if kind == "llama":
        model.config |= {"attention_bias": bias, "mlp_bias": mlp_bias}
    else:
        model.config["sliding_window"] = window or None
    model.attention(interleaved=True, bias=bias)
    if experts:
        size = model.config["intermediate_size"] = source.integer("feed_forward_length")
        used = source.integer("expert_used_count")
        model.config |= {"num_local_experts": experts, "num_experts_per_tok": used}
        model.experts(experts, size, module="block_sparse_moe")
    else:
        model.mlp(bias=mlp_bias)
    model.rope()


def _smollm3(model: Model) -> None:
    model.config |= {"model_type": "smollm3", "hidden_act": "silu", "attention_bias": False}
    # llama.cpp leaves the rotary embedding out of every fourth layer, whatever the file says.
    model.config |= {"no_rope_layer_interval": 4, "mlp_bias": False, "use_sliding_window": False}
    _check_usual_head_dim(model)
    model.rms_norms()
    model.attention(interleaved=True)
    model.mlp()
    model.rope()


def _granite(model: Model) -> None:
    number = model.source.number
    _check_usual_head_dim(model)
    model.config |= {
        "model_type": "granite",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": number("attention.scale", model.head_dim**-0.5),
        "embedding_multiplier": number("embedding_scale", 1.0),
        "residual_multiplier": number("residual_scale", 1.0),
        "logits_scaling": number("logit_scale", 1.0),
    }
    model.rms_norms()
    model.attention(interleaved=True)
    model.mlp()
    model.rope()


def _qwen2(model: Model) -> None:
    _check_usual_head_dim(model)
    model.config |= {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}
    model.rms_norms()
    model.attention(bias=True, out_bias=False)
    model.mlp()
    model.rope()


def _qwen2_moe(model: Model) -> None:
    source = model.source
    _check_usual_head_dim(model)
    model.config |= {"model_type": "qwen2_moe", "hidden_act": "silu", "use_sliding_window": False}
    model.rms_norms()
    model.attention(bias=True, out_bias=False)
    _routed(model, normalised=False)
    shared = source.integer("expert_shared_feed_forward_length")
    model.config["shared_expert_intermediate_size"] = shared
    for name, rows, width in (
        ("gate", shared, model.width),
        ("up", shared, model.width),
        ("down", model.width, shared),
    ):
        model.linear(f"ffn_{name}_shexp", f"mlp.shared_expert.{name}_proj", rows, width)
    model.layer.append(
        Slot("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", (1, model.width))
    )
    model.rope()


def _qwen3(model: Model) -> None:
    model.config |= {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False}
    model.config |= {"head_dim": model.head_dim, "use_sliding_window": False}
    model.rms_norms()
    _head_norms(model)
    model.attention()
    model.mlp()
    model.rope()


def _qwen3_moe(model: Model) -> None:
    model.config |= {"model_type": "qwen3_moe", "hidden_act": "silu", "attention_bias": False}
    model.config |= {"head_dim": model.head_dim, "use_sliding_window": False}
    model.rms_norms()
    _head_norms(model)
    model.attention()
    _routed(model, normalised=True)
    model.rope()


def _routed(model: Model, *, normalised: bool) -> None:
    """Add Qwen's routed experts, which all layers have."""
    source = model.source
    count, size = source.integer("expert_count"), source.integer("expert_feed_forward_length")
    named = source.get("expert_weights_norm")
    if named not in (None, True, False):
        raise source.refuse("expert_weights_norm", named, "neither true nor false")
    model.config |= {
        "num_experts": count,
        "num_experts_per_tok": source.integer("expert_used_count"),
        "moe_intermediate_size": size,
        "intermediate_size": source.integer("feed_forward_length", size, minimum=0) or size,
        "norm_topk_prob": normalised if named is None else named,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    model.experts(count, size)


def _glm4_moe(model: Model) -> None:
    """GLM-4.5 and later, whose last layers in the file are native MTP modules."""
    source, integer = model.source, model.source.integer
    modules = integer("nextn_predict_layers", 0, minimum=0)
    own = model.layers - modules
    dense, shared = (
        integer(key, default, minimum=0)
        for key, default in (("leading_dense_block_count", 0), ("expert_shared_count", 1))
    )
    if own < 1 or dense > own:
        raise source.refuse("block_count", model.layers, f"{modules} modules, {dense} dense layers")
    if not any(name.startswith(f"blk.{own}.") for name in source.file.tensors):
        modules, model.layers = 0, own  # a file that was written without them
    count, size = integer("expert_count"), integer("expert_feed_forward_length")
    gating = integer("expert_gating_func", _SIGMOID)
    if gating != _SIGMOID:
        raise source.refuse("expert_gating_func", gating, "not sigmoid")
    rotated = integer("rope.dimension_count", model.head_dim)
    bias, norms = model.has("attn_q.bias"), model.has("attn_q_norm.weight")
    model.config |= {
        **{"model_type": "glm4_moe", "hidden_act": "silu", "num_hidden_layers": own},
        **{"head_dim": model.head_dim, "partial_rotary_factor": rotated / model.head_dim},
        **{"attention_bias": bias, "use_qk_norm": norms, "rope_scaling": None},
        **{"first_k_dense_replace": dense, "n_shared_experts": shared, "n_routed_experts": count},
        **{"num_experts_per_tok": integer("expert_used_count"), "moe_intermediate_size": size},
        **{"n_group": integer("expert_group_count", 1)},
        **{"topk_group": integer("expert_group_used_count", 1)},
        "routed_scaling_factor": source.number("expert_weights_scale", 1.0),
        "norm_topk_prob": source.get("expert_weights_norm") is not False,
        "num_nextn_predict_layers": modules,
    }
    model.rms_norms(
        ("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")
    )
    if norms:
        _head_norms(model)
    model.attention(bias=bias, out_bias=False)

    def routed() -> None:
        model.stacks(count, size)
        target = "mlp.gate.e_score_correction_bias"
        model.layer.append(Slot("exp_probs_b.bias", target, (count,)))
        for name, rows, width in (
            ("gate", shared * size, model.width),
            ("up", shared * size, model.width),
            ("down", model.width, shared * size),
        ):
            model.linear(f"ffn_{name}_shexp", f"mlp.shared_experts.{name}_proj", rows, width)

    model.only_in(range(dense), model.mlp)
    model.only_in(range(dense, model.layers), routed)
    model.only_in(range(own, model.layers), lambda: _nextn(model, own))
    model.rope(rotated=rotated)


def _nextn(model: Model, layer: int) -> None:
    """Add what native MTP modules have besides a decoder layer, under their published names."""
    model.linear("nextn.eh_proj", "eh_proj", model.width, 2 * model.width)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        model.norm(f"nextn.{name}", name.replace("shared_head_", "shared_head."))
    for name, target in (
        ("embed_tokens", "embed_tokens"),
        ("shared_head_head", "shared_head.head"),
    ):
        if model.source.has(f"blk.{layer}.nextn.{name}.weight"):
            model.linear(f"nextn.{name}", target, model.vocabulary, model.width)


def _gemma3(model: Model) -> None:
    source = model.source
    pattern = _pattern(model, 6)
    # As llama.cpp: the 27B model, which alone has 62 layers, scales by the width of a share.
    usual = model.width / model.heads if model.layers == 62 else model.head_dim
    model.config |= _gemma(model, "gemma3_text", usual) | {
        "sliding_window": source.integer("attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": source.number("rope.freq_base_swa", 10000.0),
    }
    _head_norms(model, offset=1.0)


def _gemma2(model: Model) -> None:
    source = model.source
    _pattern(model, 2)
    usual = model.width / model.heads if model.layers == 46 else model.head_dim  # the 27B model
    model.config |= _gemma(model, "gemma2", usual) | {
        "sliding_window": source.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": source.number("attn_logit_softcapping", 50.0),
    }
    model.config["final_logit_softcapping"] = source.number("final_logit_softcapping", 30.0)


def _gemma(model: Model, kind: str, usual: float) -> dict[str, Any]:
    """Add what Gemma 2 and 3 have in common; their norms multiply by 1 + weight."""
    source = model.source
    model.rms_norms(
        ("attn_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
        offset=1.0,
    )
    model.attention()
    model.mlp()
    model.rope()
    scale = source.number("attention.scale", usual**-0.5)
    scalar = round(scale**-2) if scale > 0 else 0
    if not scalar or abs(scalar - scale**-2) > 1e-3:
        raise source.refuse("attention.scale", scale, "not 1 / sqrt of a whole number")
    capping = source.number("final_logit_softcapping", 0.0)
    return {
        "model_type": kind,
        "head_dim": model.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": capping or None,
        "attn_logit_softcapping": None,
    }


def _pattern(model: Model, usual: int) -> int:
    """Return the number of layers of which the last has no sliding window."""
    key = "attention.sliding_window_pattern"
    flags = model.source.list(key)
    if flags is not None:  # whether each layer has a window
        size = flags.index(False) + 1 if False in flags else usual
        if [bool(flag) for flag in flags] != [bool((i + 1) % size) for i in range(model.layers)]:
            raise model.source.refuse(key, flags, "which is no pattern that repeats")
    else:
        size = model.source.integer(key, usual)
    if model.source.arch == "gemma2" and size != usual:
        raise model.source.refuse(key, size, f"not {usual}")
    return size


def _phi3(model: Model) -> None:
    source = model.source
    _check_usual_head_dim(model)
    rotated = source.integer("rope.dimension_count", model.head_dim)
    if rotated > model.head_dim or rotated % 2:
        raise source.refuse("rope.dimension_count", rotated, f"heads have {model.head_dim}")
    original = source.integer("rope.scaling.original_context_length", model.context, minimum=2)
    model.config |= {
        "model_type": "phi3",
        "hidden_act": "silu",
        "sliding_window": source.integer("attention.sliding_window", 0, minimum=0) or None,
        "partial_rotary_factor": rotated / model.head_dim,
        "original_max_position_embeddings": original,
    }
    model.rms_norms()
    size = model.config["intermediate_size"] = source.integer("feed_forward_length")
    rows = (model.heads + 2 * model.kv_heads) * model.head_dim
    model.linear("attn_qkv", "self_attn.qkv_proj", rows, model.width)
    model.linear("attn_output", "self_attn.o_proj", model.width, model.heads * model.head_dim)
    model.linear("ffn_up", "mlp.gate_up_proj", 2 * size, model.width)
    model.linear("ffn_down", "mlp.down_proj", model.width, size)
    scaling = read_long_rope(source, head_dim=rotated, limit=model.context, original=original)
    if scaling is None:
        model.rope(rotated=rotated)
    else:
        source.text("rope.scaling.type", "longrope")
        model.config["rope_theta"] = source.number("rope.freq_base", 10000.0)
        model.config["rope_scaling"] = scaling
        model.unused |= {LONG_FACTORS, SHORT_FACTORS}


def _olmo2(model: Model) -> None:
    _check_usual_head_dim(model)
    model.config |= {"model_type": "olmo2", "hidden_act": "silu", "attention_bias": False}
    model.rms_norms(
        ("post_attention_norm", "post_attention_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )
    model.norm("attn_q_norm", "self_attn.q_norm", model.heads * model.head_dim)
    model.norm("attn_k_norm", "self_attn.k_norm", model.kv_heads * model.head_dim)
    model.attention()
    model.mlp()
    model.rope()


def _starcoder2(model: Model) -> None:
    source = model.source
    _check_usual_head_dim(model)
    size = source.integer("feed_forward_length")
    model.config |= {
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "norm_epsilon": source.number("attention.layer_norm_epsilon"),
        "intermediate_size": size,
        "sliding_window": source.integer("attention.sliding_window", 0, minimum=0) or None,
    }
    for name, target in (
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("output_norm", "norm"),
    ):
        model.norm(name, target)
        slots = model.once if target == "norm" else model.layer
        weight = slots[-1]
        slots.append(Slot(f"{name}.bias", weight.target.replace(".weight", ".bias"), weight.shape))
    model.attention(bias=True)
    model.linear("ffn_up", "mlp.c_fc", size, model.width, bias=True)
    model.linear("ffn_down", "mlp.c_proj", model.width, size, bias=True)
    model.rope()


def _head_norms(model: Model, *, offset: float = 0.0) -> None:
    for part in "qk":
        model.norm(f"attn_{part}_norm", f"self_attn.{part}_norm", model.head_dim, offset=offset)


def _check_usual_head_dim(model: Model) -> None:
    """Refuse heads of another size than mlx-lm's class computes."""
    if model.head_dim * model.heads != model.width:
        usual = model.width // model.heads
        raise model.source.refuse("attention.key_length", model.head_dim, f"not {usual}")


# transformers' classes by model type.
CLASSES = {
    kind: f"{name}ForCausalLM"
    for kind, name in {
        **{"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "granite": "Granite"},
        **{"qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"},
        **{"gemma2": "Gemma2", "gemma3_text": "Gemma3", "phi3": "Phi3", "olmo2": "Olmo2"},
        **{"smollm3": "SmolLM3", "starcoder2": "Starcoder2", "glm4_moe": "Glm4Moe"},
    }.items()
}
_BIASES = ("attn_q.bias", "ffn_gate.bias")
FAMILIES: dict[str, Callable[[Model], None]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "glm4moe": _glm4_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}
