"""The command ``mlx-mtp serve``."""

from __future__ import annotations

from typing import Any

import click

from mlx_mtp.cli.options import LAYOUTS, model_options

GIB = 2**30
ENGINE_OPTIONS = (
    "model", "adapter_path", "mtp", "trust_remote_code", "extra_eos_token", "layout", "lookup",
    "prefill_step_size",
)  # fmt: skip


@click.command()
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
    help="Port to listen on; 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--api-key", envvar="MLX_MTP_API_KEY", help="Key that clients must show [MLX_MTP_API_KEY]."
)
@click.option(
    "--allowed-origins", multiple=True, metavar="ORIGIN",
    help="Web pages of this origin may use the server; repeatable, or separated by commas.",
)  # fmt: skip
@click.option(
    "--allowed-hosts", multiple=True, metavar="NAME",
    help="Another name under which the server is called; repeatable, or separated by commas.",
)  # fmt: skip
@click.option("--model-name", help="What the model is called in answers; its own name by default.")
@click.option(
    "--max-concurrent", type=click.IntRange(1, 64), default=4, show_default=True,
    help="Answers made at once.",
)  # fmt: skip
@click.option(
    "--queue-size", type=click.IntRange(0, 100_000), default=64, show_default=True,
    help="Answers that may wait; more are refused with 429.",
)  # fmt: skip
@click.option(
    "--max-tokens", "-m", type=click.IntRange(1), default=512, show_default=True,
    help="Most tokens of an answer that asks for no number.",
)  # fmt: skip
@click.option("--temp", default=0.0, show_default=True, help="Temperature where none is asked for.")
@click.option("--top-p", default=1.0, show_default=True, help="Nucleus, likewise.")
@click.option("--top-k", default=0, show_default=True, help="Best k, likewise.")
@click.option("--min-p", default=0.0, show_default=True, help="Least share of the best, likewise.")
@click.option("--num-draft-tokens", type=click.IntRange(0), help="Drafts per step; the adapter's.")
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default="auto", show_default=True,
    help="Where mask tokens go.",
)  # fmt: skip
@click.option("--lookup/--no-lookup", default=True, help="With layout auto: drafts from the text.")
@click.option(
    "--prefill-step-size", type=click.IntRange(1), default=256, show_default=True,
    help="Prompt tokens per forward, after which other answers have their turn.",
)  # fmt: skip
@click.option(
    "--prefix-cache-gb", type=click.FloatRange(0), default=1.0, show_default=True,
    help="Memory for the beginnings of conversations; 0 keeps none.",
)  # fmt: skip
@click.option(
    "--engine-timeout", type=click.FloatRange(1), default=120.0, show_default=True,
    help="Seconds of silence after which a working engine is killed and started again.",
)  # fmt: skip
@click.option(
    "--client-timeout", type=click.FloatRange(1), default=30.0, show_default=True,
    help="Seconds that a client may take to send a request (half of it for the headers), or take "
    "nothing of an answer that is ready; more for slow links.",
)  # fmt: skip
def serve(**options: Any) -> None:
    """Serve OpenAI's and Anthropic's APIs on this machine.

    The model runs in a child process, which is started again should it die.
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


def _settings(options: dict[str, Any]) -> Any:
    """The operator's settings out of the parsed values.

    Raises:
        ValueError: the combination is not safe.
    """
    from mlx_mtp.apps.server.settings import Settings

    def split(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each.strip() for value in values for each in value.split(",") if each.strip())

    same = (
        "host", "port", "api_key", "model_name", "max_tokens", "temp", "top_p", "top_k", "min_p",
        "num_draft_tokens",
    )  # fmt: skip
    return Settings(
        **{name: options[name] for name in same},
        layout=options["layout"] if options["mtp"] else "plain",
        allowed_origins=split(options["allowed_origins"]),
        allowed_hosts=split(options["allowed_hosts"]),
        body_timeout_s=options["client_timeout"],
        header_timeout_s=options["client_timeout"] / 2,
        send_timeout_s=options["client_timeout"],
    )
