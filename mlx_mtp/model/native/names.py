"""Which tensors of a checkpoint belong to its modules for multi-token prediction, and what each is.

A module normalises a token's embedding and a hidden state, projects the two to one row, runs one
decoder layer and normalises (DeepSeek-V3 report, section 2.2).  Checkpoints name its parts in four
ways; here each tensor gets a canonical name, ``{module}.{part}.{leaf}``:

    0.embedding_norm.weight  0.hidden_norm.weight  0.projection.weight  0.norm.weight
    0.layer.<name in the decoder layer>  0.head.weight  0.embedding.weight

What a family's published checkpoints have, and where that was read (vLLM's ``*_mtp.py``, SGLang's
``*_nextn.py`` and ``*_mtp.py``, ``MtpModel`` of transformers 5; N is ``num_hidden_layers``):

=====================  ===========================  =============  ==========  ==================
family                 names                        concatenated   norms       passed on
=====================  ===========================  =============  ==========  ==================
deepseek_v3, glm4_moe  model.layers.{N+i}.{enorm,   embedding,     plain       after its norm
glm4_moe_lite          hnorm,eh_proj,shared_head.   hidden
solar_open (a)         {norm,head},embed_tokens}
bailing_moe,           the same, final_layernorm    embedding,     plain       after its norm
_hybrid, _moe_v3 (a)   for shared_head.norm         hidden
step3p5 (b)            the same, some within        embedding,     zero-       before its norm
                       ``transformer.``, the head   hidden         centred
                       as shared_head.output
qwen3_next, qwen3_5,   mtp.{pre_fc_norm_embedding,  embedding,     zero-       after its norm
qwen3_5_moe            pre_fc_norm_hidden,fc,norm}  hidden         centred
                       and mtp.layers.{i}.*
exaone_moe (c),        the same                     embedding,     plain       after its norm
mellum                                              hidden
mimo                   model.mtp_layers.{i}.{token_ hidden,        plain       after its norm
                       layernorm,hidden_layernorm,  embedding
                       input_proj,final_layernorm}
mimo_v2_flash          model.mtp.layers.{i}.        embedding,     plain       after its norm
                       {enorm,hnorm,eh_proj,final_  hidden
                       layernorm,pre_mlp_layernorm}
ernie4_5_moe (d)       model.mtp_{emb_norm,         embedding,     plain       before the
                       hidden_norm,linear_proj,     hidden                     model's final norm,
                       block}.{i}.*                                            which it has for
                                                                               its own
=====================  ===========================  =============  ==========  ==================

Where a state is passed on after the module's norm, the model's hidden state comes after its final
norm too.  vLLM passed DeepSeek's on before the norm; after it more drafts were accepted (ATOM pull
1764 for DeepSeek-R1, vLLM pulls 46075 and 47448 for GLM-5), as for Qwen3.5 (LightLLM pull 1402,
llama.cpp pull 24025).  vLLM and SGLang set the embedding of the first row to zero; the report does
not, and neither do transformers and this code.

(a) Names and order by analogy, unconfirmed; of the Bailing family SGLang has bailing_moe's.
(b) The model's hidden state before its final norm, as in vLLM's ``step3p5.py`` and SGLang;
    transformers takes it after.  Modules attend in a window and have a dense MLP.
(c) vLLM: a dense MLP, attention as ``mtp_layer_types`` says; that it has a window where the
    configuration says nothing is unconfirmed.
(d) PaddleFormers' training code; vLLM and SGLang take the state after the final norm and make
    logits without a norm.  SGLang pull 7657 reports that the 300B model's projection was published
    transposed.

Left out: deepseek_v32, glm_moe_dsa and longcat_flash_ngram (refused models), longcat_flash and
nemotron_h (a module's layer is not of the model's own class), fused ``qkv_proj`` of MiMo-V2.5-Pro.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the modules of a family compute.

    Attributes:
        hidden_first: whether the hidden state is concatenated before the embedding.
        zero_centred: whether published norms have weights around 0, of which 1 + w is used.
        before_norm: whether hidden states are passed on, the model's own included, before a norm.
    """

    hidden_first: bool = False
    zero_centred: bool = False
    before_norm: bool = False


_PLAIN = Family()
_FAMILIES = {
    **dict.fromkeys(("deepseek_v3", "kimi_k2", "joyai_llm_flash"), _PLAIN),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "solar_open"), _PLAIN),
    **dict.fromkeys(("bailing_moe", "bailing_hybrid", "bailing_moe_v3"), _PLAIN),
    **dict.fromkeys(("exaone_moe", "mellum", "mimo_v2_flash"), _PLAIN),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), Family(zero_centred=True)),
    "mimo": Family(hidden_first=True),
    "ernie4_5_moe": Family(before_norm=True),
    "step3p5": Family(zero_centred=True, before_norm=True),
}

_NO_LAYERS = 1 << 30  # of a configuration without that key, whose layers are never appended ones
_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")

# Published names of the parts; what is not here belongs to the decoder layer.
_PARTS = {
    **dict.fromkeys(
        ("enorm", "pre_fc_norm_embedding", "token_layernorm", "mtp_emb_norm"), "embedding_norm"
    ),
    **dict.fromkeys(
        ("hnorm", "pre_fc_norm_hidden", "hidden_layernorm", "mtp_hidden_norm"), "hidden_norm"
    ),
    **dict.fromkeys(("eh_proj", "fc", "input_proj", "mtp_linear_proj"), "projection"),
    **dict.fromkeys(("shared_head.norm", "final_layernorm", "norm"), "norm"),
    **dict.fromkeys(("shared_head.head", "shared_head.output"), "head"),
    "embed_tokens": "embedding",
}
_LAYER_NAMES = {"pre_mlp_layernorm": "post_attention_layernorm"}

_PREFIX = r"(?:model\.|language_model\.)*"
_LAYERS = re.compile(_PREFIX + r"layers\.(\d+)\.(.+)")  # appended to the model's own
_MTP = re.compile(_PREFIX + r"mtp\.(?:layers\.(\d+)\.)?(.+)")
_MTP_LAYERS = re.compile(_PREFIX + r"mtp_layers\.(\d+)\.(.+)")
_MTP_PARTS = re.compile(_PREFIX + r"(mtp_\w+)\.(\d+)\.(.+)")


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a model's configuration, None if its modules are not supported."""
    return _FAMILIES.get(_model_type(config))


def num_modules(config: Mapping[str, Any]) -> int:
    """Number of modules that a ``config.json`` announces; 0 if it says nothing."""
    for scope in (_text_config(config), config):
        for key in _COUNTS:
            if isinstance(scope.get(key), int):
                return scope[key]
    return 0


def belongs_to_modules(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of a checkpoint is part of a module, of a supported family or not.

    A layer after the model's last one is a module's only if the configuration announces so many:
    else a wrong number of layers would pass for modules.
    """
    return _place(name, _appended(config)) is not None


def native_tensors(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Find the tensors of a checkpoint's modules.

    Args:
        names: the names of all its tensors, published or as in mlx-lm, quantised or not.
        config: its ``config.json``.

    Returns:
        The canonical name of each tensor of a module; nothing if the model has no modules, or if
        its family is not supported.
    """
    if family_of(config) is None:
        return {}
    appended = _appended(config)
    places = {name: _place(name, appended) for name in names}
    return {name: _canonical(*place) for name, place in places.items() if place is not None}


def module_indices(canonical: Iterable[str]) -> list[int]:
    """Return the indices of the modules that canonical names belong to, sorted."""
    return sorted({int(name.partition(".")[0]) for name in canonical})


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _model_type(config: Mapping[str, Any]) -> str:
    kinds = [scope.get("model_type") for scope in (_text_config(config), config)]
    names = [kind.removesuffix("_text") for kind in kinds if isinstance(kind, str)]
    return next((name for name in names if name in _FAMILIES), "")


def _appended(config: Mapping[str, Any]) -> range:
    """Numbers of the layers after the model's own that are modules'."""
    layers = _num_layers(config)
    return range(layers, layers + num_modules(config))


def _num_layers(config: Mapping[str, Any]) -> int:
    for scope in (_text_config(config), config):
        if isinstance(scope.get("num_hidden_layers"), int):
            return scope["num_hidden_layers"]
    return _NO_LAYERS


def _place(name: str, appended: range) -> tuple[int, str] | None:
    """Index of the module that a tensor belongs to, and its name there."""
    if match := _LAYERS.fullmatch(name):
        number = int(match[1])
        return (number - appended.start, match[2]) if number in appended else None
    if match := _MTP.fullmatch(name):
        return int(match[1] or 0), match[2]  # what is not in a layer is shared by all of them
    if match := _MTP_LAYERS.fullmatch(name):
        return int(match[1]), match[2]
    if match := _MTP_PARTS.fullmatch(name):
        rest = match[3] if match[1] == "mtp_block" else f"{match[1]}.{match[3]}"
        return int(match[2]), rest
    return None


def _canonical(index: int, name: str) -> str:
    name = name.removeprefix("transformer.")
    part, _, leaf = name.rpartition(".")
    if part in _PARTS:
        return f"{index}.{_PARTS[part]}.{leaf}"
    first, dot, rest = name.partition(".")
    return f"{index}.layer.{_LAYER_NAMES.get(first, first)}{dot}{rest}"
