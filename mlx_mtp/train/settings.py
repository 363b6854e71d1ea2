"""Settings of a training run.

Each field describes itself in its metadata, from which ``mlx-mtp train`` makes its options and
which the checks below read.  The keys, all optional but for ``help`` and ``group``:

    help            what the field decides, a sentence
    group           heading of the option in the help text
    min, max        bounds, inclusive
    min_open, max_open      True excludes the bound
    choices         the values that are allowed
    flag            name of the option where it is not the field's; ``--no-...`` sets False
    default_text    what the help text shows as the default of None

This module imports neither MLX nor NumPy, so that the help text is printed at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel

MASK_DRAFTER, HEADS_DRAFTER = "mask", "heads"
HEAD_KINDS = ("mlp", "layer")
ADAPTER_KINDS = ("lora", "vera")
BITS = (0, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
ADAPTED = ("attention", "shared", "all")
TEACHERS = ("argmax", "sample", "dist")
EVEN, REACH = "even", "reach"
AUTO, MLX, TORCH = "auto", "mlx", "torch"  # back-ends
ROW_WEIGHTS = (EVEN, REACH)
PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)
DATA, ADAPTER, TRAINING = "Data", "Adapter and loss", "Training"  # groups of options
NUM_RECORDS = 1000
PROMPT_TOKENS = {"distil": 256, "continue": 512}
ANSWER_TOKENS = 512


def _setting(default: Any, help: str, group: str, **metadata: Any) -> Any:
    """A field with the metadata that the module docstring lists."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group} | metadata)


def _adapter(default: Any, help: str, **metadata: Any) -> Any:
    return _setting(default, help, ADAPTER, **metadata)


def _training(default: Any, help: str, **metadata: Any) -> Any:
    return _setting(default, help, TRAINING, **metadata)


def _data(default: Any, help: str, **metadata: Any) -> Any:
    return _setting(default, help, DATA, **metadata)


def check_fields(settings: Any) -> None:
    """Compare the fields of a dataclass with the bounds and choices in their metadata.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """
    for field in dataclasses.fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata
        choices, low, high = bounds.get("choices"), bounds.get("min"), bounds.get("max")
        if choices is not None and value not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        if value is None or isinstance(value, bool | str | tuple):
            continue
        is_low = low is not None and (value <= low if bounds.get("min_open") else value < low)
        is_high = high is not None and (value >= high if bounds.get("max_open") else value > high)
        if is_low or is_high or not math.isfinite(value):
            raise ValueError(f"{field.name} must be {_range_text(bounds)}, got {value}")


def _range_text(bounds: Mapping[str, Any]) -> str:
    """The bounds of a number in words."""
    texts = []
    if "min" in bounds:
        low = bounds["min"]
        texts.append(f"above {low}" if bounds.get("min_open") else f"at least {low}")
    if "max" in bounds:
        high = bounds["max"]
        texts.append(f"below {high}" if bounds.get("max_open") else f"at most {high}")
    return " and ".join(texts) or "finite"


def option_name(field: dataclasses.Field[Any]) -> str:
    """Name of the option that sets a field, with underscores."""
    return field.metadata.get("flag", field.name).lstrip("-").replace("-", "_")


def values_from_options(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields that are among the options, by field."""
    values = {}
    for field in dataclasses.fields(cls):
        name = option_name(field)
        if name in options:
            values[field.name] = not options[name] if name.startswith("no_") else options[name]
    return values


def parse_ranks(text: str) -> list[tuple[str | range, int]]:
    """Parse ``rank_by_layer``: names of linear layers or numbers of layers, with their ranks.

    Raises:
        ValueError: a part is not LAYERS=RANK.
    """
    ranks: list[tuple[str | range, int]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        layers, _, rank = (piece.strip() for piece in part.partition("="))
        first, dash, last = layers.partition("-")
        if not (layers and rank.isdecimal() and int(rank)):
            raise ValueError(f"rank_by_layer must be LAYERS=RANK with ranks from 1, got {part!r}")
        if not first.isdecimal():
            ranks.append((layers, int(rank)))
        elif (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"rank_by_layer: {layers} are not numbers of layers such as 0-9")
        else:
            ranks.append((range(int(first), int(last if dash else first) + 1), int(rank)))
    return ranks


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of the loss."""

    base: float = 1.0
    sampler: float = 1.0
    lcm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the training loop; see the ``help`` of each field.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    drafter: str = _adapter(
        MASK_DRAFTER,
        "Drafter to train: mask tokens, or independent heads on the frozen model.",
        choices=(MASK_DRAFTER, HEADS_DRAFTER),
    )
    head: str = _adapter(
        HEAD_KINDS[0], "Kind of the heads: an MLP block or a decoder layer.", choices=HEAD_KINDS
    )
    num_draft_tokens: int = _adapter(
        8,
        "Number of mask tokens or heads (k), the maximum number of draft tokens per step.",
        min=1,
    )
    rank: int = _adapter(32, "Rank of the LoRA weights.", min=1)
    scale: float = _adapter(2.0, "Factor of the LoRA product.")
    target_modules: tuple[str, ...] = _adapter(
        PROJECTIONS,
        "Names of the linear layers to adapt, separated by commas.",
        default_text="all projections",
    )
    adapt: str = _adapter(
        "shared",
        "Layers to adapt: those of attention, also dense ones and shared experts, or all experts.",
        choices=ADAPTED,
    )
    rank_by_layer: str = _adapter(
        "",
        "Ranks of some layers, as LAYERS=RANK separated by commas; LAYERS are the name of a linear "
        "layer, such as down_proj, or numbers of layers, such as 0-9; the last match counts.",
        default_text="the same in all layers",
    )
    adapter_kind: str = _adapter(
        ADAPTER_KINDS[0],
        "Kind of the low-rank weights: trained matrices, or random ones with trained vectors "
        "(VeRA), which are far smaller and need a higher rank.",
        choices=ADAPTER_KINDS,
    )
    adapter_bits: int = _adapter(
        0,
        "Bits of the quantized LoRA weights, 8 or 4 for example; 0 is float16.",
        min=0,
        max=8,
    )
    sampler_bits: int | None = _adapter(
        None,
        "Bits of the sampler head's quantized weights; 0 is float16.",
        min=0,
        max=8,
        default_text="those of --adapter-bits",
    )
    adapter_group_size: int = _adapter(
        64, "Number of quantized weights with the same scale.", min=32, max=128
    )
    quantized_share: float = _adapter(
        0.2,
        "Fraction of the training steps, the last ones, whose gradients are those of the "
        "quantized weights.",
        min=0,
        max=1,
    )
    sampler: bool = _adapter(True, "Train without a sampler head.", flag="--no-sampler")
    iters: int = _training(1000, "Number of training steps.", min=1)
    batch_size: int = _training(4, "Number of texts per training step.", min=1)
    learning_rate: float = _training(5e-4, "Peak learning rate.", min=0, min_open=True)
    warmup: int = _training(50, "Number of steps in which the learning rate rises from 0.", min=0)
    min_learning_rate: float = _training(
        0.05, "Final learning rate of the cosine schedule, as a fraction of the peak.", min=0
    )
    weight_decay: float = _training(
        0.01, "Weight decay of AdamW; norms, biases and mask embeddings have none.", min=0
    )
    lora_b_rate: float = _training(
        1.0, "Learning rate of lora_b as a multiple of the others (LoRA+).", min=0, min_open=True
    )
    ema: float = _training(
        0.995,
        "Maximum decay of the exponential moving average of the weights, which is evaluated next "
        "to the newest weights; 0 turns it off.",
        min=0,
        max=1,
        max_open=True,
    )
    clip: float = _training(1.0, "Maximum norm of the gradient; 0 turns clipping off.", min=0)
    num_anchors: int = _adapter(32, "Number of mask blocks per text.", min=1)
    drop_late: float = _adapter(
        0.0,
        "Probability that a mask block ends before each mask after the first.",
        min=0,
        max=1,
        max_open=True,
    )
    draft_ramp: int = _adapter(
        0,
        "Number of steps in which the masks of a block grow from 1 to k.",
        min=0,
    )
    teacher: str = _adapter(
        "argmax",
        "Target of the mask tokens: the model's most likely token, the token in the text, or the "
        "model's whole distribution.",
        choices=TEACHERS,
    )
    base_weight: float = _adapter(1.0, "Weight of the cross-entropy.", min=0)
    sampler_weight: float = _adapter(1.0, "Weight of the sampler head's cross-entropy.", min=0)
    lcm_weight: float = _adapter(1.0, "Weight of the latent consistency loss.", min=0)
    row_weights: str = _adapter(
        EVEN,
        "Weights of the mask rows in the cross-entropies: all equal, or more for drafts that a "
        "decode is likely to reach.",
        choices=ROW_WEIGHTS,
    )
    candidates: int = _training(
        0,
        "Number of likely tokens over which the losses are computed; 0 uses the whole vocabulary, "
        "which takes longer on a CPU.",
        min=0,
    )
    max_seq_length: int = _data(2048, "Maximum number of tokens of a text.", min=1)
    rows_per_forward: int = _training(
        128, "Maximum number of mask rows per forward; fewer save memory.", min=1
    )
    workers: int = _training(
        0, "Number of processes; 0 is one per core on a Linux CPU, otherwise one.", min=0
    )
    backend: str = _training(
        AUTO,
        "Library that computes gradients; auto takes PyTorch in bfloat16 instead of MLX on a CPU.",
        choices=(AUTO, MLX, TORCH),
    )
    grad_checkpoint: bool = _training(
        False, "Recompute layers for the gradient, to save memory.", flag="--grad-checkpoint"
    )
    gate: bool = _adapter(
        True,
        "Train ordinary LoRA, which changes the model's output; for comparison only.",
        flag="--no-gate",
    )
    steps_per_report: int = _training(10, "Number of steps between reports.", min=1)
    steps_per_eval: int = _training(100, "Number of steps between evaluations.", min=1)
    save_every: int = _training(100, "Number of steps between checkpoints.", min=1)
    val_batches: int = _training(
        16, "Number of held-out texts per evaluation; -1 uses all.", min=-1
    )
    seed: int = _training(0, "Random seed.", min=0, max=2**63 - 1)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.target_modules:
            raise ValueError("target_modules must name at least one layer")
        if not (self.base_weight or self.sampler_weight or self.lcm_weight):
            raise ValueError("all weights of the loss are 0")
        if self.drafter == HEADS_DRAFTER and not self.base_weight:
            raise ValueError("base_weight is 0, and heads have no other loss")
        if self.drafter == HEADS_DRAFTER and not self.gate:
            raise ValueError("heads are trained on the frozen model: they have no gate to omit")
        if self.drafter == HEADS_DRAFTER and self.grad_checkpoint:
            raise ValueError("grad_checkpoint is for mask rows, which heads do not have")
        if self.row_weights == REACH and self.teacher == "dist":
            raise ValueError(
                "row_weights reach needs one target token per mask, which the teacher dist has not"
            )
        if self.grad_checkpoint and not self.gate:  # ordinary rows would get no gradient
            raise ValueError("grad_checkpoint cannot be used without the gate")
        self._check_size()
        if self.val_batches == 0:
            raise ValueError("val_batches must be at least 1, or -1 for all texts, got 0")

    def _check_size(self) -> None:
        """Check the settings that decide how large the adapter is."""
        known = {"adapter_bits": BITS, "sampler_bits": BITS, "adapter_group_size": GROUP_SIZES}
        for name, choices in known.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}, got {value}"
                )
        if self.drafter == HEADS_DRAFTER:
            if self.adapter_bits or self.sampler_bits:
                raise ValueError("adapter_bits are for mask tokens: heads are not quantised")
            if self.adapter_kind != ADAPTER_KINDS[0] or self.rank_by_layer:
                raise ValueError(
                    "adapter_kind and rank_by_layer are for mask tokens, not for heads"
                )
        if self.adapter_kind == "vera" and self.adapter_bits:
            raise ValueError("adapter_bits cannot be used with vera, which stores vectors only")
        parse_ranks(self.rank_by_layer)

    @property
    def bits_of_sampler(self) -> int:
        """Bits of the sampler head's weights; 0 is float16."""
        return self.adapter_bits if self.sampler_bits is None else self.sampler_bits

    def rank_of(self, path: str) -> int:
        """Rank of the layer at a module path, as ``rank`` and ``rank_by_layer`` have it."""
        *owners, leaf = path.split(".")
        number = next((int(name) for name in owners if name.isdigit()), -1)
        fitting = [
            rank
            for layers, rank in parse_ranks(self.rank_by_layer)
            if layers == leaf or (isinstance(layers, range) and number in layers)
        ]
        return fitting[-1] if fitting else self.rank

    @property
    def loss_weights(self) -> LossWeights:
        """Weight of each term of the loss."""
        return LossWeights(self.base_weight, self.sampler_weight, self.lcm_weight)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Build settings from the result of ``to_dict``.

        Raises:
            ValueError: a key is unknown or a value is out of range.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        values = dict(values)
        if "target_modules" in values:
            values["target_modules"] = tuple(values["target_modules"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Settings of the training text; see the ``help`` of each field.

    Raises:
        ValueError: a value is out of range, or settings contradict each other.
    """

    data: str | None = _data(
        None,
        "JSONL file, folder or Hugging Face id with prompts for the model to answer. Without it, "
        "the model generates the prompts too.",
    )
    as_is: bool = _data(False, "Train on the answers in the data.", flag="--data-as-is")
    num_records: int | None = _data(
        None,
        "Number of conversations to generate.",
        min=1,
        default_text=f"{NUM_RECORDS}, or all of the data",
    )
    topics: tuple[str, ...] | None = _data(
        None,
        "File with one topic per line; a line that ends in ... begins the user's message.",
        default_text="messages made by construction",
    )
    max_prompt_tokens: int | None = _data(
        None,
        "Maximum number of tokens of a prompt.",
        min=1,
        default_text=f"{PROMPT_TOKENS['distil']}, or {PROMPT_TOKENS['continue']} with --data",
    )
    max_answer_tokens: int | None = _data(
        None, "Maximum number of tokens of an answer.", min=1, default_text=str(ANSWER_TOKENS)
    )
    batch_size: int | None = _data(
        None,
        "Number of texts generated together.",
        min=1,
        flag="--distil-batch-size",
        default_text="16, or up to 128 with PyTorch",
    )
    held_out: float = _data(
        0.05,
        "Fraction of the texts held out for evaluation.",
        min=0,
        max=1,
        min_open=True,
        max_open=True,
    )
    seed: int = 0  # the seed of TrainSettings
    backend: str = "auto"  # the back-end of TrainSettings

    def __post_init__(self) -> None:
        check_fields(self)
        if self.data is not None and not self.data.strip():
            raise ValueError("data is empty")
        if self.as_is and self.data is None:
            raise ValueError("--data-as-is needs --data")
        if self.topics is not None and self.data is not None:
            raise ValueError("--topics cannot be used with --data")

    @property
    def method(self) -> str:
        """ "distil", "continue" or "as is"."""
        return "as is" if self.as_is else "distil" if self.data is None else "continue"

    def token_limits(self, model: MTPModel) -> tuple[int, int]:
        """Maximum tokens of a prompt and of an answer; defaults shrink to fit the context."""
        prompt = self.max_prompt_tokens or PROMPT_TOKENS.get(self.method, 0)
        answer = self.max_answer_tokens or ANSWER_TOKENS
        context = model.max_context
        if context is None or prompt + answer <= context:
            return prompt, answer
        if self.max_prompt_tokens is None:
            rest = context - (self.max_answer_tokens or 2 * context // 3)
            prompt = max(1, min(prompt, rest))
        if self.max_answer_tokens is None:
            answer = max(1, min(answer, context - prompt))
        return prompt, answer
