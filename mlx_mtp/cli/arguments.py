"""From the options of a command to the arguments of ``load`` and ``stream_generate``."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mlx_mtp.backends.cpu.blas import BLAS, SWITCH
from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.terminal import Status

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel


def stream_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``stream_generate`` for the options of a command.

    Raises:
        ValueError: a sampling option is out of range.
    """
    sampling = Sampling(**{field.name: options[field.name] for field in fields(Sampling)})
    names = [field.name for field in (*fields(GenerationConfig), *fields(CacheConfig))]
    layout = options["layout"] if options["mtp"] else "plain"
    chosen = {name: options[name] for name in names if name in options}
    return chosen | {"sampling": sampling, "layout": layout}


def load_model(
    options: dict[str, Any], *, tokenizer_config: dict[str, Any] | None = None
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load the model that the options name; print a line on stderr if it has no adapter.

    Args:
        options: of the command.
        tokenizer_config: arguments of the tokenizer.

    Raises:
        ValueError: the model or adapter cannot be used, or an end token does not exist.
    """
    from mlx_mtp.calibration.stored_costs import speculation_for
    from mlx_mtp.loading import load

    with Status("Loading the model ...") as status:
        model, tokenizer = load(
            options["model"],
            adapter_path=options["adapter_path"],
            tokenizer_config=tokenizer_config,
            trust_remote_code=options["trust_remote_code"],
            mtp=options["mtp"],
            progress=status.update,
        )
        if options["mtp"] and options.get("layout") == "auto" and model.config is not None:
            speculation_for(model, say=status.update)
    for token in options["extra_eos_token"]:
        _add_eos_token(tokenizer, token)
    if options["mtp"] and model.config is None:
        line = f"{model.name} has no MTP adapter: it generates one token per step"
        print(line, file=sys.stderr)
    _hint_at_blas()
    return model, tokenizer


def _add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    """Let a token, by text or id, end an answer."""
    vocabulary = tokenizer.get_vocab().values() if token.isdecimal() else tokenizer.get_vocab()
    if (int(token) if token.isdecimal() else token) not in vocabulary:
        raise ValueError(f"--extra-eos-token {token}: the tokenizer has no such token")
    tokenizer.add_eos_token(token)


def _hint_at_blas() -> None:
    """Print on a terminal that a faster BLAS can be installed."""
    import mlx.core as mx

    if (
        BLAS == "reference"
        and SWITCH not in os.environ
        and mx.default_device() == mx.Device(mx.DeviceType.cpu)
        and sys.stderr.isatty()
    ):
        print("hint: install OpenBLAS (libopenblas0-pthread) for speed", file=sys.stderr)
