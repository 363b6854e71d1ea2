"""What ``config.json`` means, in the keys that mlx-lm reads.

transformers' configuration class of the model type is the reference: its defaults, its precedence
of old and new keys, its spelling of rotary embeddings (``rope_parameters``).  mlx-lm drops every
key that its ``ModelArgs`` does not have and applies defaults of its own, so a model can load
without an error and compute something else.  Therefore each setting is translated, or must be what
mlx-lm's class computes anyway, or is refused by name.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from mlx_lm import utils as lm_utils
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = ("rope_theta", "rotary_emb_base")
_PARTIAL = ("partial_rotary_factor", "rotary_pct")
_TYPES_WITH_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
# These read rotary settings by type of layer, as they are in the file.
_NESTED_AS_GIVEN = ("gemma4_text", "laguna", "mellum", "spark2_5")
_BY_PARAMETERS = ("mistral4", "glm_moe_dsa")  # have both fields and read one
_NESTED_BY_CLASS = ("olmo3",)  # scales the rotary embedding of its full-attention layers only

# Settings of transformers' classes that change no logits of a causal forward in evaluation.
_HARMLESS = {
    *("initializer_range", "use_cache", "pretraining_tp", "is_decoder"),  # loading and generating
    *("pad_token_id", "bos_token_id", "eos_token_id", "eod_token_id"),  # tokens
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),  # training
    *("num_nextn_predict_layers", "num_mtp_layers"),  # of heads that a causal forward does not run
    "max_position_embeddings",  # a limit, which decoding keeps to; rotary scaling gets it
}
_HARMLESS_ENDINGS = (
    *("dropout", "_pdrop", "_token_id", "_token_index"),
    *("hidden_size", "intermediate_size", "vocab_size"),  # other shapes than the weights' fail
)

_EXPLICIT = ("rope_theta", "tie_word_embeddings")  # their defaults differ in transformers

# These are translated as a whole, below.
_TRANSLATED = {
    *("rope_parameters", "rope_scaling", "rope_local_base_freq", *_THETA, *_PARTIAL),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("sliding_window_pattern", "original_max_position_embeddings", "model_type", "rope_type"),
    *("tie_word_embeddings", "max_position_embeddings", "rope_traditional", "text_config"),
}

# Names by which some architecture computes differently.  If neither transformers' class of the
# model type nor mlx-lm's reads the key, the folder asks for what neither does.
_COMPUTING = {
    *("clip_qkv", "use_qk_norm", "qk_norm", "qk_layernorm", "attention_bias", "mlp_bias"),
    *("qkv_bias", "lm_head_bias", "no_rope_layers", "no_rope_layer_interval"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"),
    *("logit_scale", "use_bidirectional_attention", "sliding_window"),
    *("per_layer_config", "scale_emb", "scale_depth", "alibi", "parallel_attn"),
}
_SAME_ACTIVATION = ({"silu", "swish"}, {"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})

# Architectures of which mlx-lm's class computes something else than transformers' by default, but
# has modules that can be exchanged: another GELU, and a rotary embedding of whole heads.
_OTHER_ACTIVATION = ("gemma", "gpt_neox", "starcoder2")
_OTHER_ROTARY_DIMS = ("glm",)
_USUAL_HEAD_DIM = ("cohere2", "exaone")  # their code fails with others, though it reads head_dim
ACTIVATIONS = {
    **{"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_approx"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary scaling of a model's full-attention layers.

    Attributes:
        theta: base frequency.
        scaling: mlx-lm's ``rope_scaling``; None for none.
        max_positions: ``max_position_embeddings``.
        applied: whether mlx-lm's class reads ``rope_scaling``.
        partial: rotated share of a head, if mlx-lm's class rotates whole heads only; else None.
    """

    theta: float
    scaling: dict[str, Any] | None
    max_positions: int
    applied: bool
    partial: float | None = None


@dataclass(frozen=True)
class Settings:
    """A model's settings for mlx-lm.

    Attributes:
        config: ``config.json`` in keys that mlx-lm and transformers read alike.
        overrides: keys that only building mlx-lm's class needs; they are not written to files.
        windows: by layer, a sliding window that mlx-lm's class does not apply; empty if none.
        rope: None if transformers does not know the model type.
        tied: whether the output head is the embedding table; None if that is left to mlx-lm.
        activation: function of ``mlx.nn`` that mlx-lm's class does not apply; None if it does.
    """

    config: dict[str, Any]
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: tuple[int | None, ...] = ()
    rope: Rope | None = None
    tied: bool | None = None
    activation: str | None = None


def read_settings(config: Mapping[str, Any], *, has_head: bool | None = None) -> Settings:
    """Translate a model's ``config.json``.

    Args:
        config: its values.
        has_head: whether the files have an output head; None if unknown.

    Raises:
        ValueError: a setting changes what the model computes and cannot be obeyed; one line with
            its key and value.
    """
    config = copy.deepcopy(dict(config))
    inner, classes = config.get("text_config"), _classes(config)
    if not isinstance(inner, dict) or (
        classes is not None and "text_config" not in _fields(classes[1])
    ):
        known = transformers_config(config)
        return _read_flat(config, known, has_head=has_head, classes=classes)
    outer = transformers_config(config)
    known: Any = outer.get_text_config() if outer is not None else None
    if not isinstance(known, PreTrainedConfig):  # some classes keep it as it is in the file
        known = transformers_config(inner)
    if known is not None:
        inner = {"model_type": known.model_type, **inner}
    if "tie_word_embeddings" in config:
        inner.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    text_classes = _classes(inner) if classes is None else _text_classes(classes, inner)
    found = _read_flat(inner, known, has_head=has_head, classes=text_classes)
    overrides = {"text_config": found.config | found.overrides}
    return dataclasses.replace(
        found, config=config | {"text_config": found.config}, overrides=overrides
    )


def _read_flat(
    config: dict[str, Any],
    known: PreTrainedConfig | None,
    *,
    has_head: bool | None,
    classes: tuple[type, type] | None,
) -> Settings:
    """Translate a configuration without a ``text_config``, for mlx-lm's classes."""
    if known is None or classes is None:
        config = _older_keys(config)
        if classes is not None:
            _check_unknown(config, _keys_read(*classes)[0])
        return Settings(config, tied=config.get("tie_word_embeddings"))
    reads, usual_head = _keys_read(*classes)
    _check_fixed(config, known, reads, classes[1])
    tied = _is_tied(config, known, has_head if usual_head else None)
    if has_head and not tied and not usual_head and "tie_word_embeddings" not in reads:
        why = f"but mlx-lm's {config['model_type']} has no output head"
        raise _refuse("tie_word_embeddings", tied, why)
    named = _fields(known) | set(known.attribute_map)
    values = {
        key: getattr(known, key)
        for key in (reads & named) - _TRANSLATED
        if not isinstance(getattr(known, key), PreTrainedConfig | None)
    }
    if "tie_word_embeddings" in reads:
        values["tie_word_embeddings"] = tied
    rope, rope_keys = _rope(known, reads, model_type=config["model_type"])
    windows, window_keys, overrides = _windows(config, known, reads)
    if rope is not None and rope.scaling is not None and "max_position_embeddings" in reads:
        values["max_position_embeddings"] = rope.max_positions
    keys = values | rope_keys | window_keys
    if rope is not None and "rope_parameters" not in keys:
        config.pop("rope_parameters", None)
    try:
        defaults = classes[1].from_dict(copy.deepcopy(config))
    except (TypeError, ValueError, KeyError, AttributeError):
        defaults = None  # a key is missing that transformers writes under another name
    required = [field.name for field in dataclasses.fields(classes[1]) if _is_required(field)]
    changes = {
        key: value
        for key, value in keys.items()
        if key in (*config, *_EXPLICIT, *required) or value != getattr(defaults, key, None)
    }
    activation = None
    if config["model_type"] in _OTHER_ACTIVATION:
        activation = ACTIVATIONS[getattr(known, "hidden_act", None) or "silu"]
    return Settings(config | changes, overrides, windows, rope, tied, activation)


def _classes(config: Mapping[str, Any]) -> tuple[type, type] | None:
    """Return mlx-lm's model class and ``ModelArgs``; None if it has none or the folder has."""
    if config.get("model_file"):
        return None
    try:
        classes = lm_utils._get_classes(dict(config))
    except (KeyError, ValueError, AttributeError):
        return None
    except SystemExit:  # of the module of olmo
        why = "for which mlx-lm needs another package"
        raise _refuse("model_type", config["model_type"], why) from None
    return classes if dataclasses.is_dataclass(classes[1]) else None


def _text_classes(outer: tuple[type, type], inner: Mapping[str, Any]) -> tuple[type, type] | None:
    """Return mlx-lm's model class and arguments for the ``text_config`` of a model class.

    A file may have arguments of its own for it, whatever the model type in it is.
    """
    module: Any = inspect.getmodule(outer[0])
    # a dotted name is that of another file, which the model type names too
    calls = re.findall(r"(?<![\w.])(\w+)\.from_dict\(\w+\.text_config\)", inspect.getsource(module))
    kinds = [getattr(module, name, None) for name in set(calls)]
    classes = _classes(inner)
    if len(kinds) != 1 or not dataclasses.is_dataclass(kinds[0]):
        return classes
    kind = cast(type, kinds[0])
    # the layers that read them are in the same file, or in that of the model type
    own = "num_attention_heads" in _keys_read(outer[0], kind)[0]
    return (outer[0] if own or classes is None else classes[0]), kind


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def transformers_config(config: Mapping[str, Any]) -> PreTrainedConfig | None:
    """Read a configuration by transformers' class; None if it does not know the model type."""
    model_type = config.get("model_type")
    if model_type == "mistral" and "layer_types" in config:  # as AutoConfig does
        model_type = "ministral"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    values = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype")}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "su":  # the first name of longrope
        length = config.get("original_max_position_embeddings")
        kind = {"type": "longrope", "original_max_position_embeddings": length}
        values["rope_scaling"] = scaling | kind
    with _quiet():
        try:
            return CONFIG_MAPPING[model_type](**copy.deepcopy(values))
        except Exception as error:  # its validators raise many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"config.json is not a valid {model_type} model: {reason}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings about configurations from the terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@functools.cache
def _keys_read(model_class: type, args_class: Any) -> tuple[frozenset[str], bool]:
    """Return the fields of a ``ModelArgs`` that mlx-lm's code uses; it has others for show.

    Also returns whether the model's head is named ``lm_head``.
    """
    modules = [inspect.getmodule(cls) for cls in {*args_class.__mro__, model_class}]
    names = set()
    for module in (module for module in modules if "mlx_lm" in getattr(module, "__name__", "")):
        for node in ast.walk(ast.parse(inspect.getsource(module))):  # type: ignore[arg-type]
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # of getattr
    return frozenset(_fields(args_class) & names), "lm_head" in names


def _refuse(key: str, value: Any, why: str) -> ValueError:
    return ValueError(f"config.json: {key} is {value!r}, {why}")


def _check_fixed(
    config: dict[str, Any], known: PreTrainedConfig, reads: frozenset[str], args_class: Any
) -> None:
    """Refuse settings that mlx-lm's class does not read and that are not what it computes.

    mlx-lm's classes are ports of models whose settings are the defaults of transformers' class, so
    those are what a class computes where it reads no key.
    """
    why = f"which mlx-lm's {config['model_type']} does not apply"
    fields = {field.name: field for field in dataclasses.fields(known)}
    base = _fields(PreTrainedConfig)
    aliases = {known.attribute_map.get(key, key) for key in reads}
    if config["model_type"] in _OTHER_ACTIVATION and known.hidden_act in ACTIVATIONS:
        aliases.add("hidden_act")
    for key, field in fields.items():
        handled = base | _TRANSLATED | _HARMLESS | reads | aliases | {"head_dim"}
        if key in handled or key.endswith(_HARMLESS_ENDINGS):
            continue
        value = getattr(known, key)
        default = field.default
        if default is dataclasses.MISSING:
            continue
        if key == "num_key_value_heads" and value == getattr(known, "num_attention_heads", None):
            continue  # as many as the heads of queries, which is no grouping
        if not _same(value, default) and not (default is None and _is_derived(config, key, value)):
            raise _refuse(key, value, f"{why}: it computes with {default!r}")
    for field in dataclasses.fields(args_class):
        read = field.name in (reads & set(fields)) - _TRANSLATED
        if read and getattr(known, field.name) is None and field.default is not None:
            raise _refuse(field.name, None, why)
    heads = getattr(known, "num_attention_heads", None)
    head_dim = getattr(known, "head_dim", None)
    computed = known.hidden_size // heads if heads else None
    fixed = "head_dim" not in reads or config["model_type"] in _USUAL_HEAD_DIM
    if fixed and head_dim not in (None, computed):
        raise _refuse("head_dim", head_dim, f"{why}: it computes with {computed}")
    mapped = set(known.attribute_map) | set(known.attribute_map.values())
    for key in sorted(_COMPUTING & set(config) - set(fields) - reads - mapped):
        if config[key] not in (None, False, 0, 1, [], {}):
            raise _refuse(key, config[key], why)


def _is_derived(config: Mapping[str, Any], key: str, value: Any) -> bool:
    """Return whether transformers derives a setting's value from the others."""
    known = transformers_config({k: v for k, v in config.items() if k != key})
    return getattr(known, key, None) == value


def _check_unknown(config: Mapping[str, Any], reads: frozenset[str]) -> None:
    """Refuse what mlx-lm's class does not read, if transformers does not know the model type."""
    window, limit = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    unused = config.get("use_sliding_window") is False or not window or 0 < limit <= window
    neutral = {"sliding_window"} if unused else set()
    for key in sorted((_COMPUTING | {"rope_scaling"} | set(_PARTIAL)) - reads - neutral):
        value = config.get(key)
        if isinstance(value, dict) and value.get("rope_type", value.get("type")) == "default":
            continue
        if value not in (None, False, 0, 1, [], {}):
            why = f"which mlx-lm's {config['model_type']} does not apply"
            raise _refuse(key, value, why)


def _same(value: Any, default: Any) -> bool:
    if any(value in names and default in names for names in _SAME_ACTIVATION if _is_name(value)):
        return True
    return value == default or (not value and not default)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_tied(config: dict[str, Any], known: PreTrainedConfig, has_head: bool | None) -> bool:
    """Return whether the head is the embedding table."""
    tied = bool(getattr(known, "tie_word_embeddings", False))
    if config.get("tie_word_embeddings") is None and has_head is False:
        return True  # as mlx-lm writes and reads such folders
    if not tied and has_head is False:
        raise _refuse("tie_word_embeddings", False, "but the files have no output head (lm_head)")
    return tied


def _rope(
    known: PreTrainedConfig, reads: frozenset[str], *, model_type: str
) -> tuple[Rope | None, dict[str, Any]]:
    """Return the rotary settings, and the keys that say so to mlx-lm and to transformers."""
    parameters = getattr(known, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return None, {}
    if model_type in _NESTED_AS_GIVEN:
        return None, {"rope_parameters": parameters}
    nested = {
        key: value
        for key, value in parameters.items()
        if key in (_FULL, _SLIDING) and isinstance(value, dict)
    }
    keys: dict[str, Any] = {}
    main = nested.get(_FULL) or next(iter(nested.values()), parameters)
    local = nested.get(_SLIDING)
    for value in nested.values():
        if value.get("type", value.get("rope_type")) != value.get("rope_type"):
            why = f"which transformers' {model_type} does not read: it needs rope_type"
            raise _refuse("type of rope_scaling", value["type"], why)
    if local is not None and _plain(local) != _plain(main):
        theta = local.get("rope_theta")
        scaled = local.get("rope_type", "default") != "default"
        if scaled or not (
            "rope_local_base_freq" in reads
            or (model_type in _NESTED_BY_CLASS and theta == main.get("rope_theta"))
        ):
            raise _refuse(
                "rope_parameters", parameters, f"which mlx-lm's {model_type} does not apply"
            )
    if local is not None and "rope_local_base_freq" in reads:
        keys["rope_local_base_freq"] = local.get("rope_theta")
        if local.get("rope_type", "default") != "default":
            raise _refuse("rope_parameters", local, "which mlx-lm does not apply to local layers")
    theta = main.get("rope_theta")
    if theta is None:
        theta = known.default_theta if isinstance(known.default_theta, float) else 10000.0
    keys |= {key: theta for key in _THETA if key in reads or key == "rope_theta"}
    partial = main.get("partial_rotary_factor")
    other = model_type in _OTHER_ROTARY_DIMS
    if partial is not None and not other:
        if not reads.isdisjoint(_PARTIAL):
            keys |= {key: partial for key in _PARTIAL if key in reads}
        elif partial != 1 and "qk_rope_head_dim" not in reads:  # latent attention has a part
            why = f"which mlx-lm's {model_type} does not apply"
            raise _refuse("partial_rotary_factor", partial, why)
    scaling = _scaling(main, known)
    if "original_max_position_embeddings" in reads and scaling is not None:
        length = scaling.get("original_max_position_embeddings")
        keys |= {} if length is None else {"original_max_position_embeddings": length}
    keys["rope_scaling"] = scaling
    # Only one generation is written, so that no two keys of a file can contradict each other.
    if nested and "rope_local_base_freq" not in reads:
        keys["rope_parameters"] = {**nested, _FULL: _joined(main, scaling, theta)}
    elif "rope_parameters" in reads and (
        "rope_scaling" not in reads or model_type in _BY_PARAMETERS
    ):
        keys["rope_parameters"] = _joined(parameters, scaling, theta)
    applied = "rope_scaling" in reads or "rope_parameters" in reads
    limit = getattr(known, "max_position_embeddings", None) or 2048
    return Rope(theta, scaling, limit, applied, partial if other else None), keys


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != "type"}


def _joined(
    parameters: Mapping[str, Any], scaling: dict[str, Any] | None, theta: float
) -> dict[str, Any]:
    kind = {key: "default" for key in ("rope_type", "type") if key in parameters}
    return {**parameters, **kind, **(scaling or {}), "rope_theta": theta}


def _scaling(parameters: Mapping[str, Any], known: PreTrainedConfig) -> dict[str, Any] | None:
    """Return mlx-lm's ``rope_scaling`` for one dictionary of ``rope_parameters``."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {
        key: value
        for key, value in parameters.items()
        if value is not None and key not in ("rope_theta", "partial_rotary_factor")
    }
    scaling |= {"rope_type": kind, "type": kind}  # mlx-lm reads the former name, at times only that
    limit = getattr(known, "max_position_embeddings", None) or 2048
    if kind in _TYPES_WITH_ORIGINAL_LENGTH:
        scaling.setdefault("original_max_position_embeddings", limit)
    if kind == "longrope":
        scaling.setdefault("factor", limit / scaling["original_max_position_embeddings"])
    if kind == "yarn":
        _translate_yarn(scaling, limit)
    return scaling


def _translate_yarn(scaling: dict[str, Any], limit: int) -> None:
    """Express transformers' attention factor by ``mscale``, the way in which mlx-lm computes it."""
    factor = scaling.get("factor")
    if factor is None:
        factor = scaling["factor"] = limit / scaling["original_max_position_embeddings"]
    for key in ("beta_fast", "beta_slow"):
        if not scaling.get(key, True):
            del scaling[key]  # transformers takes its default for 0
    attention = scaling.get("attention_factor")
    if attention is not None:
        if factor <= 1 and attention != 1:
            raise _refuse("attention_factor of rope_parameters", attention, "with a factor of 1")
        mscale = (attention - 1) / (0.1 * math.log(factor)) if factor > 1 else 1
        scaling |= {"mscale": mscale, "mscale_all_dim": 0}
    elif not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        scaling |= {"mscale": 1, "mscale_all_dim": 0}


def _windows(
    config: dict[str, Any], known: PreTrainedConfig, reads: frozenset[str]
) -> tuple[tuple[int | None, ...], dict[str, Any], dict[str, Any]]:
    """Return the windows that mlx-lm's class does not apply, keys for those it does, overrides."""
    fields = _fields(known)
    count = known.num_hidden_layers
    window = getattr(known, "sliding_window", None) if "sliding_window" in fields else None
    kinds: list[str] = []
    if "layer_types" in fields:
        kinds = list(getattr(known, "layer_types", None) or ())
    kinds = kinds or [_FULL if window is None else _SLIDING] * count
    asked = config.get("layer_types") or []
    if "layer_types" in reads and "layer_types" not in fields and _SLIDING in asked:
        if "transformers_version" not in config:  # written for mlx-lm
            return (), {}, {}
        why = f"which transformers' {config['model_type']} ignores and mlx-lm's applies"
        raise _refuse("layer_types", asked, why)
    if "layer_types" in reads and "sliding_window" in reads and _FULL in kinds:
        return (), {"layer_types": kinds, "sliding_window": window} if _SLIDING in kinds else {}, {}
    if window is None or _SLIDING not in kinds:
        return (), {}, {}
    if "sliding_window_pattern" in reads:
        pattern = kinds.index(_FULL) + 1 if _FULL in kinds else count + 1
        if not isinstance(config.get("sliding_window_pattern", pattern), int):
            return (), {}, {}  # exaone4 spells the pattern in letters, for both
        if kinds != [_SLIDING if (i + 1) % pattern else _FULL for i in range(count)]:
            raise _refuse("layer_types", kinds, "which is not a pattern that mlx-lm can apply")
        if pattern > count and config["model_type"] == "gemma3_text":
            raise _refuse("layer_types", kinds, "but mlx-lm needs a layer of full_attention")
        return (), {"sliding_window_pattern": pattern, "sliding_window": window}, {}
    limit = config.get("max_position_embeddings")
    overrides = {"layer_types": [_FULL] * count} if "layer_types" in reads and asked else {}
    if isinstance(limit, int) and window >= limit:
        return (), {}, overrides  # decoding never exceeds the limit
    return tuple(window if kind == _SLIDING else None for kind in kinds), {}, overrides


def _older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Add the older keys for ``rope_parameters`` if transformers does not know the model type."""
    rope = config.get("rope_parameters")
    if config.get("rope_scaling") or not isinstance(rope, dict):
        return config
    local = rope.get(_SLIDING)
    rope = rope.get(_FULL, rope)
    if not isinstance(rope, dict):
        return config
    added = {key: rope[key] for key in (_THETA[0], _PARTIAL[0]) if rope.get(key) is not None}
    if isinstance(local, dict) and local.get("rope_theta") is not None:
        added["rope_local_base_freq"] = local["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        scaling = {key: value for key, value in rope.items() if key not in added}
        added["rope_scaling"] = scaling | {"rope_type": kind, "type": kind}
    return config | added
