"""The command ``mlx-mtp serve``."""

from __future__ import annotations

from typing import Any

import click
import cloup

from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.cli.options import (
    EXTRA_EOS_TOKEN,
    MTP,
    field_option,
    field_options,
    model_options,
    option,
)
from mlx_mtp.decoding.config import GenerationConfig

GIB = 2**30
ENGINE_OPTIONS = (
    "model",
    "adapter_path",
    "mtp",
    "trust_remote_code",
    "extra_eos_token",
    "layout",
    "lookup",
    "prefill_step_size",
)
SETTINGS = (
    "host",
    "port",
    "api_key",
    "model_name",
    "strict_model",
    "max_tokens",
    "temp",
    "top_p",
    "top_k",
    "min_p",
    "thinking_budget",
    "reasoning_format",
    "num_draft_tokens",
)


@cloup.command()
@model_options(
    EXTRA_EOS_TOKEN,
    MTP,
    field_option(Settings, "model_name", metavar="NAME", show_default="the model's own name"),
    field_option(Settings, "strict_model"),
)
@cloup.option_group(
    "Server",
    *field_options(Settings, "host", "port"),
    field_option(Settings, "api_key", metavar="KEY", envvar="MLX_MTP_API_KEY", show_envvar=True),
    field_option(Settings, "allowed_origins", multiple=True, metavar="ORIGIN"),
    field_option(Settings, "allowed_hosts", multiple=True, metavar="NAME"),
    option(
        "--max-concurrent",
        type=click.IntRange(1, 64),
        default=4,
        help="Maximum number of answers generated at the same time.",
    ),
    option(
        "--queue-size",
        type=click.IntRange(0, 100_000),
        default=64,
        help="Maximum number of waiting requests; more are refused with status 429.",
    ),
    option(
        "--engine-timeout",
        type=click.FloatRange(1),
        default=120.0,
        metavar="SECONDS",
        help="Seconds without a reply after which a busy engine is restarted.",
    ),
    option(
        "--client-timeout",
        type=click.FloatRange(1),
        default=30.0,
        metavar="SECONDS",
        help="Maximum number of seconds for a client to send a request (half of it for the "
        "headers), and to read nothing while data is pending.",
    ),
)
@cloup.option_group(
    "Request defaults",
    field_option(Settings, "max_tokens", "-m"),
    *field_options(Settings, "temp", "top_p", "top_k", "min_p"),
    *field_options(Settings, "thinking_budget", "reasoning_format"),
)
@cloup.option_group(
    "Decoding",
    *field_options(GenerationConfig, "layout", "num_draft_tokens", "lookup"),
    field_option(GenerationConfig, "prefill_step_size", default=256),
)
@cloup.option_group(
    "Cache",
    option(
        "--prefix-cache-gb",
        type=click.FloatRange(0),
        default=1.0,
        metavar="GIB",
        help="Memory for the caches of earlier conversations, in GiB; 0 turns it off.",
    ),
)
def serve(**options: Any) -> None:
    """Serve a model over the OpenAI and Anthropic APIs.

    The model runs in a child process, which is restarted if it ends.
    """
    settings = _settings(options)
    try:
        from mlx_mtp.apps.engine.supervisor import Engine
        from mlx_mtp.apps.server.app import create_app
        from mlx_mtp.apps.server.run import serve as serve_app
    except ImportError as error:
        raise ValueError(f'{error.name} is missing: pip install "mlx-mtp[server]"') from None
    engine = Engine(
        {name: options[name] for name in ENGINE_OPTIONS}
        | {"prefix_cache_bytes": int(options["prefix_cache_gb"] * GIB)},
        max_concurrent=options["max_concurrent"],
        queue_size=options["queue_size"],
        timeout_s=options["engine_timeout"],
    )
    serve_app(create_app(engine, settings), engine, settings)


def _settings(options: dict[str, Any]) -> Settings:
    """Make the server's settings from the options.

    Raises:
        ValueError: the combination is not safe.
    """

    def split(values: tuple[str, ...]) -> tuple[str, ...]:
        items = (item.strip() for value in values for item in value.split(","))
        return tuple(item for item in items if item)

    return Settings(
        **{name: options[name] for name in SETTINGS},
        layout=options["layout"] if options["mtp"] else "plain",
        allowed_origins=split(options["allowed_origins"]),
        allowed_hosts=split(options["allowed_hosts"]),
        body_timeout_s=options["client_timeout"],
        header_timeout_s=options["client_timeout"] / 2,
        send_timeout_s=options["client_timeout"],
    )
