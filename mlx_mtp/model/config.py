"""What an adapter is, as data: the one configuration that travels with its weights.

``adapter_config.json`` is one of these dataclasses and nothing else: ``MTPConfig`` of mask tokens
or ``HeadsConfig`` of independent heads.  mlx-lm would load an adapter folder as
plain, ungated LoRA if it found its own keys (``num_layers``, ``lora_parameters``) in it, and the
output would change silently; those two names are therefore never used here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
BUNDLED_ADAPTER = "adapter"  # folder in a model's folder, as published bundles have it
FORMAT_VERSION = 1
MASKS, HEADS = "mtp", "mtp-heads"  # values of fine_tune_type
MLP, LAYER = "mlp", "layer"
HEAD_KINDS = (MLP, LAYER)
SAMPLER_NORMS = ("layer", "rms")
SAMPLER_RESIDUALS = ("hidden", "inner", "none")
ADAPTER_KINDS = LORA, VERA = ("lora", "vera")
BITS = (2, 3, 4, 5, 6, 8)  # of ``mx.quantize``
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """How a sampler head computes, with ``block = norm(silu(linear(x)))``.

    Attributes:
        norm: ``"layer"`` (weight and bias) or ``"rms"`` (weight).
        norm_eps: epsilon of the normalisation.
        bias: whether the linear layers have one.
        residual: ``"hidden"`` gives ``z + block_2(h)`` with ``h = block_1([E(previous); z])``,
            ``"inner"`` gives ``h + block_2(h)``, ``"none"`` gives ``block_2(h)``.

    Raises:
        ValueError: a value is not one of those.
    """

    norm: str = "layer"
    norm_eps: float = 1e-5
    bias: bool = True
    residual: str = "hidden"

    def __post_init__(self) -> None:
        if self.norm not in SAMPLER_NORMS:
            raise ValueError(f"sampler_norm must be one of {SAMPLER_NORMS}, got {self.norm!r}")
        if self.residual not in SAMPLER_RESIDUALS:
            raise ValueError(
                f"sampler_residual must be one of {SAMPLER_RESIDUALS}, got {self.residual!r}"
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ValueError(f"sampler_norm_eps must be 0 or more, got {self.norm_eps}")


class AdapterConfig:
    """What the configurations of all kinds of adapters have in common.

    Attributes:
        num_draft_tokens: k, the maximum number of drafts of a step.
        base_model: name of the base model, for messages and model cards.
        base_model_type: mlx-lm's ``model_type`` of the base model.
        base_hidden_size: width D of the base model.
        base_num_layers: number of its layers.
        base_vocab_size: rows of its embedding table.
        base_fingerprint: hash that identifies that base (``mtp_model.fingerprint``).
        format_version: version of this folder format.
        acceptance: rate at which each draft was accepted, with all drafts before it, when the
            adapter was last evaluated, ``[k]``; empty if it never was.
    """

    num_draft_tokens: int
    base_model: str
    base_model_type: str
    base_hidden_size: int
    base_num_layers: int
    base_vocab_size: int
    base_fingerprint: str
    fine_tune_type: str
    format_version: int
    acceptance: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from parsed JSON.

        Raises:
            ValueError: a key is unknown, missing, or of the wrong type; the message names it.
        """
        fields = {field.name: field for field in _fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"unknown keys: {', '.join(unknown)}")
        missing = [
            name for name, field in fields.items() if _is_required(field) and name not in values
        ]
        if missing:
            raise ValueError(f"missing keys: {', '.join(missing)}")
        hints = typing.get_type_hints(cls)
        return cls(**{name: _coerce(name, value, hints[name]) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready values, keys in declaration order.

        What came after the first version of the format is left out where it is the default, so
        that older readers understand what they can.
        """
        values = dataclasses.asdict(cast(Any, self))
        for field in _fields(type(self)):
            if field.name in _LATER and values[field.name] == _default(field):
                del values[field.name]
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return values | lists

    def describe(self) -> str:
        """Describe the adapter in a paragraph, for model cards."""
        raise NotImplementedError

    def _check(self, *, fine_tune_type: str) -> None:
        """Refuse values that no adapter has."""
        for name in ("num_draft_tokens", "base_hidden_size", "base_num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fine_tune_type != fine_tune_type:
            raise ValueError(
                f"fine_tune_type must be {fine_tune_type!r}, got {self.fine_tune_type!r}"
            )
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is not supported (this is {FORMAT_VERSION})"
            )
        shares = self.acceptance
        falls = all(1 >= a >= b >= 0 for a, b in itertools.pairwise((1.0, *shares)))
        if shares and (len(shares) != self.num_draft_tokens or not falls):
            raise ValueError(
                f"acceptance must be {self.num_draft_tokens} shares that fall from 1 to 0, "
                f"got {list(shares)}"
            )


@dataclass(frozen=True, kw_only=True)
class MTPConfig(AdapterConfig):
    """The shape of an adapter of mask tokens and the base model it was trained for.

    Attributes:
        num_draft_tokens: k, the number of learned mask tokens, or of mask rows with random ids.
        rank: rank of the gated LoRA weights, but for the layers in ``rank_pattern``.
        scale: factor of the LoRA product, ``y += scale * (x @ lora_a) @ lora_b``, but for the
            layers in ``scale_pattern``.
        target_modules: leaf names of the adapted linear layers, such as ``q_proj``.
        sampler: kind of the sampler head (``"mlp"``) or None when the adapter has none.
        base_model, base_model_type, base_hidden_size, base_num_layers, base_vocab_size,
            base_fingerprint, format_version, acceptance: see ``AdapterConfig``.
        fine_tune_type: always ``"mtp"``, the kind of adapter.
        sampler_norm, sampler_norm_eps, sampler_bias, sampler_residual: see ``SamplerKind``.
        rank_pattern: rank by full module path, of layers whose rank is another.
        scale_pattern: scale by full module path, of layers whose scale is another.
        noise_ids: (low, high) if mask rows are random tokens, whose ids are drawn from low to
            high - 1 in every step; empty if there are mask tokens.
        bits: bits of a quantised low-rank weight in the file, see ``adapter_file``; 0 if these
            weights are not quantised.
        sampler_bits: the same of the sampler head's linear layers.
        group_size: number of quantised weights that share a scale.
        adapter_kind: ``"lora"``, or ``"vera"`` if the low-rank weights are scaled random ones, see
            ``vera``.
        vera_seed: seed of the random weights.
        vera_dims: input dimensions by leaf name of the adapted layers; empty if the low-rank
            weights are stored.
    """

    num_draft_tokens: int
    rank: int
    scale: float
    target_modules: tuple[str, ...]
    sampler: str | None
    base_model: str
    base_model_type: str
    base_hidden_size: int
    base_num_layers: int
    base_vocab_size: int
    base_fingerprint: str
    fine_tune_type: str = MASKS
    format_version: int = FORMAT_VERSION
    sampler_norm: str = "layer"
    sampler_norm_eps: float = 1e-5
    sampler_bias: bool = True
    sampler_residual: str = "hidden"
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    scale_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    acceptance: tuple[float, ...] = ()
    noise_ids: tuple[int, ...] = ()
    bits: int = 0
    sampler_bits: int = 0
    group_size: int = 64
    adapter_kind: str = LORA
    vera_seed: int = 0
    vera_dims: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(fine_tune_type=MASKS)
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale}")
        if self.sampler not in (None, "mlp"):
            raise ValueError(f"sampler must be 'mlp' or null, got {self.sampler!r}")
        for path, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank_pattern: {path} must be at least 1, got {rank}")
        for path, scale in self.scale_pattern.items():
            if not math.isfinite(scale):
                raise ValueError(f"scale_pattern: {path} must be a finite number, got {scale}")
        self._check_noise()
        self._check_storage()
        self._sampler_values()

    @property
    def sampler_kind(self) -> SamplerKind | None:
        """How the sampler head computes; None when the adapter has none."""
        return None if self.sampler is None else self._sampler_values()

    def _check_noise(self) -> None:
        ids = self.noise_ids
        if ids and not (len(ids) == 2 and 0 <= ids[0] < ids[1] <= self.base_vocab_size):
            raise ValueError(
                f"noise_ids must be [low, high] within the {self.base_vocab_size} tokens of the "
                f"base model, got {list(ids)}"
            )

    def _check_storage(self) -> None:
        """Refuse what no file has."""
        for name in ("bits", "sampler_bits"):
            if getattr(self, name) not in (0, *BITS):
                raise ValueError(f"{name} must be one of {_words(BITS)}, got {getattr(self, name)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be one of {_words(GROUP_SIZES)}, got {self.group_size}"
            )
        if self.adapter_kind not in ADAPTER_KINDS:
            raise ValueError(
                f"adapter_kind must be one of {_words(ADAPTER_KINDS)}, got {self.adapter_kind!r}"
            )
        if self.adapter_kind == LORA:
            return
        missing = sorted(set(self.target_modules) ^ set(self.vera_dims))
        if missing:
            raise ValueError(f"vera_dims and target_modules differ in {missing[0]}")
        if self.bits:
            raise ValueError(f"bits is {self.bits}, but adapter_kind vera has no low-rank weights")
        if self.vera_seed < 0:
            raise ValueError(f"vera_seed must be 0 or more, got {self.vera_seed}")
        for name, dims in self.vera_dims.items():
            if dims < 1:
                raise ValueError(f"vera_dims: {name} must be at least 1, got {dims}")

    def as_plain(self) -> MTPConfig:
        """The configuration of the same adapter in a file of float16 low-rank weights."""
        return dataclasses.replace(
            self,
            bits=0,
            sampler_bits=0,
            group_size=64,
            adapter_kind=LORA,
            vera_seed=0,
            vera_dims={},
        )

    def _sampler_values(self) -> SamplerKind:
        return SamplerKind(
            norm=self.sampler_norm,
            norm_eps=self.sampler_norm_eps,
            bias=self.sampler_bias,
            residual=self.sampler_residual,
        )

    def rank_of(self, path: str) -> int:
        """Rank of the layer at that module path."""
        return self.rank_pattern.get(path, self.rank)

    def scale_of(self, path: str) -> float:
        """Scale of the layer at that module path."""
        return self.scale_pattern.get(path, self.scale)

    def storage_words(self) -> str:
        """How the weights are stored if they are not float16 matrices, or an empty text."""
        if self.adapter_kind == VERA:
            parts = [f"vectors of shared random matrices (VeRA, seed {self.vera_seed})"]
        else:
            parts = [f"low-rank weights {self.bits} bits"] if self.bits else []
        parts += [f"sampler head {self.sampler_bits} bits"] if self.sampler_bits else []
        if self.bits or self.sampler_bits:
            parts.append(f"groups of {self.group_size}")
        return ", ".join(parts)

    def describe(self) -> str:
        """Describe the adapter in a paragraph, for model cards."""
        stored = f" The file has {words}." if (words := self.storage_words()) else ""
        sampler = "a sampler head" if self.sampler else "no sampler head"
        masks = "mask rows of random tokens" if self.noise_ids else "mask tokens"
        return (
            f"An mlx-mtp adapter: {self.num_draft_tokens} {masks}, gated LoRA of rank "
            f"{self.rank} on {', '.join(self.target_modules)}, and {sampler}. The base model "
            "drafts several tokens a step with it and checks them itself, so the output stays "
            f"the base model's own.{stored}"
        )


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(AdapterConfig):
    """The shape of independent heads and the base model they were trained for.

    Attributes:
        head: ``"mlp"`` or ``"layer"``, see ``draft_heads``.
        num_attention_heads: of a layer; 0 for an MLP.
        intermediate_size: of a layer's feed-forward part; 0 for an MLP.
        num_draft_tokens, base_model, base_model_type, base_hidden_size, base_num_layers,
            base_vocab_size, base_fingerprint, format_version, acceptance: see ``AdapterConfig``;
            there are as many heads as drafts.
        fine_tune_type: always ``"mtp-heads"``, the kind of adapter.
    """

    num_draft_tokens: int
    head: str
    base_model: str
    base_model_type: str
    base_hidden_size: int
    base_num_layers: int
    base_vocab_size: int
    base_fingerprint: str
    num_attention_heads: int = 0
    intermediate_size: int = 0
    fine_tune_type: str = HEADS
    format_version: int = FORMAT_VERSION
    acceptance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self._check(fine_tune_type=HEADS)
        if self.head not in HEAD_KINDS:
            raise ValueError(f"head must be one of {', '.join(HEAD_KINDS)}, got {self.head!r}")
        if self.head == MLP:
            return
        heads = self.num_attention_heads
        if heads < 1 or self.base_hidden_size % (2 * heads):  # rotary embeddings turn pairs
            raise ValueError(
                f"num_attention_heads must divide half of {self.base_hidden_size}, got {heads}"
            )
        if self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, got {self.intermediate_size}")

    def describe(self) -> str:
        """Describe the adapter in a paragraph, for model cards."""
        kind = "a residual MLP block" if self.head == MLP else "a decoder layer"
        return (
            f"An mlx-mtp adapter: {self.num_draft_tokens} independent heads of {kind} each on the "
            "final hidden states of the frozen base model, whose own output head they share. The "
            "base model checks the drafts itself, so the output stays the base model's own."
        )


_LATER = (
    "sampler_norm",
    "sampler_norm_eps",
    "sampler_bias",
    "sampler_residual",
    "rank_pattern",
    "scale_pattern",
    "acceptance",
    "noise_ids",
    "bits",
    "sampler_bits",
    "group_size",
    "adapter_kind",
    "vera_seed",
    "vera_dims",
)


def _words(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def read_config(folder: Path) -> MTPConfig:
    """Read ``adapter_config.json`` of an adapter of mask tokens.

    Raises:
        ValueError: see ``read_any_config``, or the adapter has heads.
    """
    config = read_any_config(folder)
    if not isinstance(config, MTPConfig):
        raise ValueError(f"{folder} has independent heads, not mask tokens")
    return config


def read_any_config(folder: Path) -> MTPConfig | HeadsConfig:
    """Read ``adapter_config.json`` of an adapter folder.

    Raises:
        ValueError: the file is missing, is not JSON, or does not describe an adapter of ours; the
            message names the file.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    if "peft_type" in values:
        raise ValueError(
            f"{folder} is a PEFT checkpoint, not an adapter folder: convert it first "
            "(mlx-mtp convert --mtp-path)"
        )
    kind = HeadsConfig if values.get("fine_tune_type") == HEADS else MTPConfig
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check one value against its type hint; lists become tuples, whole numbers become floats."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        kind = typing.get_args(hint)[0]
        try:
            return tuple(_coerce(name, item, kind) for item in _listed(value))
        except ValueError:
            what = "strings" if kind is str else "numbers"
            raise ValueError(f"{name} must be a list of {what}, got {value!r}") from None
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r}")
        kind = typing.get_args(hint)[1]
        return {key: _coerce(f"{name}: {key}", item, kind) for key, item in value.items()}
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return value


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    return value
