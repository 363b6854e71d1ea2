"""transformers' model of a loaded ``MTPModel``, with the same weights.

The configuration is that of mlx-lm's class: ``model.settings`` lets a model load only if what the
class does not read is transformers' default.  What both compute is nevertheless compared before
the model is used, so a model that transformers computes otherwise is refused, not trained wrongly.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from mlx_mtp.model.experts import is_switch
from mlx_mtp.model.fingerprint import model_args
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.plain_weights import plain_weights
from mlx_mtp.model.settings import transformers_config
from mlx_mtp.model.wrappers import WindowLayer

if TYPE_CHECKING:
    import torch

INSTALL = 'pip install "mlx-mtp[torch]"'
_CHECKED_ROWS, _LONGEST_CHECK = 48, 512
_MAX_ERROR = {"torch.float32": 1e-3, "torch.bfloat16": 0.06, "torch.float16": 0.02}


def torch_device(name: str | None = None) -> torch.device:
    """Return a device of PyTorch; None is an NVIDIA GPU if there is one, else the CPU.

    Raises:
        ValueError: PyTorch is missing, or it has no such device.
    """
    torch = _torch()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"PyTorch cannot use {name!r}: {_first_line(error)}") from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by instructions of its own."""
    torch = _torch()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))


def torch_dtype(device: torch.device) -> torch.dtype:
    """The type in which a device computes fastest: bfloat16, or float32 without it."""
    torch = _torch()
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def torch_model(
    model: MTPModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "sdpa",
) -> Any:
    """Build transformers' causal language model with the base model's weights, frozen.

    Args:
        model: with or without an adapter, which is not part of the result.
        dtype: of the weights; None is ``torch_dtype``.
        device: None is ``torch_device``.
        attention: name of a function of ``transformers.AttentionInterface``.

    Returns:
        A ``PreTrainedModel`` in evaluation mode.

    Raises:
        ValueError: PyTorch is missing, or transformers does not compute what this model computes;
            the message names the architecture.
    """
    place = torch_device(device) if device is None or isinstance(device, str) else device
    dtype = torch_dtype(place) if dtype is None else dtype
    result = _build(model, dtype=dtype).to(place)
    _check(model, result, dtype=dtype)
    result.set_attn_implementation(attention)
    return result


def tensor(value: mx.array) -> torch.Tensor:
    """Copy an MLX array to a tensor on the CPU; floating-point values become float32."""
    if mx.issubdtype(value.dtype, mx.floating):
        value = value.astype(mx.float32)
    return _torch().from_numpy(np.array(value))


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Turn final hidden states ``[B, L, D]`` into logits ``[B, L, V]``.

    The forward of the causal language model does so, with a backbone that returns the states:
    it may scale or cap what its head computes.
    """
    torch = _torch()
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Given(torch.nn.Module):
        def forward(self, *args: Any, **options: Any) -> BaseModelOutputWithPast:
            del args, options
            return BaseModelOutputWithPast(last_hidden_state=cast(Any, hidden))

    name = model.base_model_prefix
    backbone = getattr(model, name)
    setattr(model, name, Given())
    try:
        return model(input_ids=hidden.new_zeros((1, 1), dtype=torch.long)).logits
    finally:
        setattr(model, name, backbone)


def refusal(model: MTPModel, reason: str) -> ValueError:
    """The error for a model that this back-end cannot compute."""
    return ValueError(f"PyTorch cannot run {model.name} ({model.base.model_type}): {reason}")


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ValueError(f"PyTorch is missing: {INSTALL}") from None
    return torch


def _build(model: MTPModel, *, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = _config(model)
    loader: Any = AutoModelForCausalLM
    try:
        with no_init_weights():
            result = loader.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise refusal(model, _first_line(error)) from None
    result.tie_weights()  # as the initialisation, which is left out, does
    result.eval().requires_grad_(False)
    empty = dict(result.named_parameters())
    for name, value in plain_weights(model.base):
        target = empty.pop(name, None)
        if target is None or tuple(target.shape) != tuple(value.shape):
            raise refusal(model, f"transformers has no weight {name} of shape {value.shape}")
        target.copy_(tensor(value))
    if empty:
        raise refusal(model, f"transformers needs a weight {next(iter(empty))}")
    return result


def _config(model: MTPModel) -> Any:
    """The configuration of transformers' class."""
    if model.is_recurrent:
        raise refusal(model, "it has recurrent layers")
    if any(map(is_switch, model.base.modules())):
        raise refusal(model, "it has experts")
    args: Any = model_args(model.base)
    values = {k: copy.deepcopy(v) for k, v in vars(args).items() if v is not None}
    values.setdefault("model_type", model.base.model_type)
    values["pad_token_id"] = None  # its default may be beyond the vocabulary
    windows = [x.window if isinstance(x, WindowLayer) else None for x in model.base.layers]
    if any(windows):
        values |= {
            "sliding_window": next(filter(None, windows)),
            "use_sliding_window": True,
            "layer_types": ["sliding_attention" if x else "full_attention" for x in windows],
        }
    elif "sliding_window" not in values:
        values["sliding_window"] = None  # its default is a window
        if values["model_type"] == "mistral":
            values.pop("layer_types", None)  # with which it would be another class
    config = transformers_config(values)
    if config is None:
        raise refusal(model, "transformers does not have this architecture")
    return config


def _check(model: MTPModel, result: Any, *, dtype: torch.dtype) -> None:
    """Compare final hidden states and logits of a random text."""
    torch = _torch()
    windows = (getattr(layer, "window", None) or 0 for layer in model.make_cache().layers)
    longest = max([_CHECKED_ROWS, *(x + 16 for x in windows if x <= _LONGEST_CHECK)])
    length = min(longest, model.max_context or longest)
    ids = np.random.default_rng(0).integers(model.vocab_size, size=length)
    expected = model(mx.array(ids[None]), cache=model.make_cache())
    with torch.no_grad():
        rows = torch.from_numpy(ids[None]).to(result.device)
        hidden = result.base_model(input_ids=rows, use_cache=False).last_hidden_state
        actual = [hidden[0], head_logits(result, hidden[:, -4:])[0]]
    wanted = [tensor(expected[0]), tensor(model.logits(expected[:, -4:])[0])]
    for a, b in zip(actual, wanted, strict=True):
        error = float((a.float().cpu() - b).norm() / b.norm())
        if not error <= _MAX_ERROR[str(dtype)]:
            raise refusal(model, f"transformers computes something else (by {error:.1g})")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
