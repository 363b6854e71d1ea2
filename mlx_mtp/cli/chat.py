"""The command ``mlx-mtp chat``."""

from __future__ import annotations

from typing import Any

import cloup

from mlx_mtp.cli.arguments import load_model, reasoning_arguments, stream_arguments
from mlx_mtp.cli.options import (
    ADAPTER,
    DRAFT_MODEL,
    EXTRA_EOS_TOKEN,
    MTP,
    decoding_options,
    model_options,
    sampling_options,
    template_options,
    unsupported,
)

_ONE_DEVICE = "the model runs on one device"


@cloup.command()
@model_options(DRAFT_MODEL, EXTRA_EOS_TOKEN, ADAPTER, MTP)
@template_options()
@decoding_options(max_tokens=256)
@sampling_options()
@cloup.option_group("mlx-lm", unsupported("--pipeline", _ONE_DEVICE, is_flag=True), hidden=True)
def chat(**options: Any) -> None:
    """Chat with a model in the terminal."""
    from mlx_mtp.chat import run

    arguments = stream_arguments(options)
    model, tokenizer = load_model(options)
    template_config, more = reasoning_arguments(options, tokenizer)
    run(
        model,
        tokenizer,
        system_prompt=options["system_prompt"],
        template_config=template_config,
        options=arguments | more,
        explain=options["explain"],
    )
