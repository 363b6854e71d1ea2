"""The command ``mlx-mtp serve``."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import cloup

from mlx_mtp.apps.engine.prefix_settings import PromptCacheConfig
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.cli.options import (
    ADAPTER,
    DRAFT_MODEL,
    EXTRA_EOS_TOKEN,
    MTP,
    Size,
    field_option,
    field_options,
    json_object,
    model_options,
    option,
    unsupported,
)
from mlx_mtp.decoding.config import CacheConfig, GenerationConfig

CACHE_OPTIONS = tuple(field.name for field in fields(CacheConfig))
PROMPT_CACHE = tuple(field.name for field in fields(PromptCacheConfig))
ENGINE_OPTIONS = (
    "model",
    "adapter_path",
    "draft_model",
    "adapter",
    "mtp",
    "trust_remote_code",
    "extra_eos_token",
    "drafter",
    "layout",
    "lookup",
    "prefill_step_size",
)
TEMPLATE_OPTIONS = ("chat_template", "chat_template_args")
SETTINGS = (
    "host",
    "port",
    "log_level",
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


def _template(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Read a template from a file, unless it is the text of one."""
    del context, parameter
    if value is None or "{" in value or "\n" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value} is neither a template nor a file: {error}") from None


@cloup.command()
@model_options(
    DRAFT_MODEL,
    EXTRA_EOS_TOKEN,
    ADAPTER,
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
    field_option(Settings, "log_level"),
    option(
        "--max-concurrent",
        former_names=("--decode-concurrency",),
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
    "mlx-lm",
    unsupported("--pipeline", "the model runs on one device", is_flag=True),
    unsupported("--prompt-concurrency", "--max-concurrent limits prompts and answers together"),
    unsupported("--prompt-cache-size", "--prompt-cache-bytes limits the prompt cache"),
    hidden=True,
)
@cloup.option_group(
    "Prompt",
    option(
        "--chat-template",
        metavar="TEXT|FILE",
        callback=_template,
        help="Chat template that replaces the model's, as text or file.",
        show_default="the model's own",
    ),
    option(
        "--use-default-chat-template",
        is_flag=True,
        expose_value=False,
        help="Without effect, as in mlx-lm: the chat template is used if there is one.",
    ),
    option(
        "--chat-template-args",
        metavar="JSON",
        callback=json_object,
        former_names=("--chat-template-kwargs", "--chat-template-config"),
        help="JSON object with arguments of the chat template; requests may set others.",
        show_default=False,
    ),
)
@cloup.option_group(
    "Decoding",
    *field_options(GenerationConfig, "drafter", "layout", "num_draft_tokens", "lookup"),
    field_option(GenerationConfig, "prefill_step_size", default=256),
)
@cloup.option_group(
    "Cache",
    field_option(PromptCacheConfig, "prompt_cache_bytes", type=Size(), metavar="SIZE"),
    field_option(PromptCacheConfig, "prompt_cache_files"),
    field_option(
        PromptCacheConfig,
        "prompt_cache_files_bytes",
        type=Size(),
        metavar="SIZE",
        show_default="8GB",
    ),
    field_option(PromptCacheConfig, "prompt_cache_dir", metavar="FOLDER"),
    *field_options(CacheConfig, *CACHE_OPTIONS),
    option("--prefix-cache-gb", type=click.FloatRange(0), hidden=True),  # the former option
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
        {name: options[name] for name in ENGINE_OPTIONS + TEMPLATE_OPTIONS}
        | {"cache": _cache_options(options)}
        | _prompt_cache(options).load_fields(),
        max_concurrent=options["max_concurrent"],
        queue_size=options["queue_size"],
        timeout_s=options["engine_timeout"],
    )
    serve_app(create_app(engine, settings), engine, settings)


def _cache_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the key-value caches; none if they are neither limited nor quantised."""
    values = {name: options[name] for name in CACHE_OPTIONS}
    return values if options["max_kv_size"] or options["kv_bits"] else {}


def _prompt_cache(options: dict[str, Any]) -> PromptCacheConfig:
    """Make the settings of the prompt cache from the options."""
    config = PromptCacheConfig(**{name: options[name] for name in PROMPT_CACHE})
    if options["prefix_cache_gb"] is not None:
        return replace(config, prompt_cache_bytes=int(options["prefix_cache_gb"] * 2**30))
    return config


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
