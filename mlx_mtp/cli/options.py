"""Options that the commands share, and what is made of them.

Names and defaults are mlx-lm's.  Each decorator adds a family of options; the functions below turn
the parsed values into the arguments of ``load`` and ``stream_generate``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.backends.cpu.blas import BLAS, SWITCH
from mlx_mtp.terminal import Progress

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel

Command = Callable[..., Any]
LAYOUTS = ("auto", "linear", "quadratic")
STREAM_OPTIONS = (
    "max_tokens", "stop", "seed", "num_draft_tokens", "max_kv_size", "kv_bits", "kv_group_size",
    "quantized_kv_start", "prefill_step_size", "lookup",
)  # fmt: skip
SAMPLING_OPTIONS = (
    "temp", "top_p", "min_p", "top_k", "min_tokens_to_keep", "repetition_penalty",
    "repetition_context_size",
)  # fmt: skip


def model_options(command: Command) -> Command:
    """Add the options that say which model."""
    return _add(
        command,
        click.option("--model", help="Model folder or hub id; the embedded model by default."),
        click.option("--adapter-path", help="Adapter folder or hub id."),
        click.option(
            "--mtp/--no-mtp", default=True, help="Several tokens per step, or plain decoding."
        ),
        click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer run its code."),
        click.option(
            "--extra-eos-token",
            multiple=True,
            help="Another token that ends the text; repeatable.",
        ),
    )


def template_options(command: Command) -> Command:
    """Add the options of the chat template."""
    return _add(
        command,
        click.option("--system-prompt", help="System prompt for the chat template."),
        click.option(
            "--chat-template-config",
            callback=_json_object,
            help="JSON object with settings for the chat template.",
        ),
    )


def sampling_options(command: Command) -> Command:
    """Add the options that say how tokens are chosen."""
    return _add(
        command,
        click.option("--temp", default=0.0, show_default=True, help="Temperature; 0 is greedy."),
        click.option("--top-p", default=1.0, show_default=True, help="Nucleus; 1 keeps all."),
        click.option("--min-p", default=0.0, show_default=True, help="Least share of the best."),
        click.option("--top-k", default=0, show_default=True, help="Best k; 0 keeps all."),
        click.option(
            "--min-tokens-to-keep", default=1, show_default=True, help="Tokens that min-p leaves."
        ),
        click.option("--repetition-penalty", type=float, help="Divides recent tokens' logits."),
        click.option(
            "--repetition-context-size",
            default=20,
            show_default=True,
            help="How many are recent.",
        ),
        click.option(
            "--logit-bias",
            multiple=True,
            metavar="ID=VALUE",
            callback=_logit_bias,
            help="Added to the logit of a token id; repeatable.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 1), help="Makes sampling repeatable."
        ),
    )


def decoding_options(*, max_tokens: int) -> Callable[[Command], Command]:
    """Add the options of the loop and the cache."""

    def decorate(command: Command) -> Command:
        return _add(
            command,
            click.option(
                "--max-tokens", "-m", default=max_tokens, show_default=True,
                help="Most tokens to generate; -1 for no limit.",
            ),
            click.option("--stop", multiple=True, help="Text that ends the answer; repeatable."),
            click.option(
                "--num-draft-tokens", type=click.IntRange(0), help="Drafts per step; the adapter's."
            ),
            click.option(
                "--layout", type=click.Choice(LAYOUTS), default="auto", show_default=True,
                help="Where mask tokens go.",
            ),
            click.option(
                "--lookup/--no-lookup", default=True,
                help="With layout auto: drafts from the text so far, where they pay.",
            ),
            click.option(
                "--explain", is_flag=True, help="Tell on stderr what each step does and why."
            ),
            click.option("--max-kv-size", type=int, help="Most rows that the cache keeps."),
            click.option("--kv-bits", type=int, help="Quantise the cache to that many bits."),
            click.option(
                "--kv-group-size", default=64, show_default=True, help="Group size for --kv-bits."
            ),
            click.option(
                "--quantized-kv-start", default=5000, show_default=True,
                help="Context length from which --kv-bits applies.",
            ),
            click.option(
                "--prefill-step-size", default=2048, show_default=True,
                help="Prompt tokens per forward.",
            ),
        )  # fmt: skip

    return decorate


def stream_options(options: dict[str, Any]) -> dict[str, Any]:
    """Pick the arguments of ``stream_generate`` out of the parsed values.

    Raises:
        ValueError: a sampling option is out of range.
    """
    from mlx_mtp.decoding.sampling import Sampling

    sampling = Sampling(
        logit_bias=options["logit_bias"], **{name: options[name] for name in SAMPLING_OPTIONS}
    )
    layout = options["layout"] if options["mtp"] else "plain"
    picked = {name: options[name] for name in STREAM_OPTIONS}
    if options["explain"]:
        picked["explain"] = lambda line: print(line, file=sys.stderr, flush=True)
    return picked | {"sampling": sampling, "layout": layout}


def load_model(
    options: dict[str, Any], *, tokenizer_config: dict[str, Any] | None = None
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load what the model options name; say on stderr if it decodes plainly.

    Raises:
        ValueError: the model or adapter cannot be used, or an end token does not exist.
    """
    from mlx_mtp.calibration.stored_costs import speculation_for
    from mlx_mtp.loading import load

    with Progress("Loading the model ...") as progress:
        model, tokenizer = load(
            options["model"],
            adapter_path=options["adapter_path"],
            tokenizer_config=tokenizer_config,
            trust_remote_code=options["trust_remote_code"],
            mtp=options["mtp"],
            progress=progress.say,
        )
        if options["mtp"] and options.get("layout") == "auto" and model.config is not None:
            speculation_for(model, say=progress.say)
    for token in options["extra_eos_token"]:
        _add_eos_token(tokenizer, token)
    if options["mtp"] and model.config is None:
        print(
            f"{model.name} has no MTP adapter: it decodes plainly, one token per step",
            file=sys.stderr,
        )
    _hint_at_blas()
    return model, tokenizer


def prompt_cache_metadata(path: str) -> dict[str, Any]:
    """Read for which model a prompt cache file was made.

    Returns:
        ``model`` and ``tokenizer_config`` as ``mlx_lm.cache_prompt`` wrote them.

    Raises:
        ValueError: the file is missing or no prompt cache.
    """
    from mlx_lm.models.cache import load_prompt_cache

    if not os.path.isfile(path):
        raise ValueError(f"prompt cache {path} does not exist")
    try:
        _, metadata = load_prompt_cache(path, return_metadata=True)
        config = json.loads(metadata["tokenizer_config"])
        return {"model": str(metadata["model"]), "tokenizer_config": dict(config)}
    except Exception:  # MLX and mlx-lm raise many kinds for a foreign file
        raise ValueError(f"{path} is not a prompt cache of mlx_lm.cache_prompt") from None


def cached_model(model: str | None, cached: str, path: str) -> str | None:
    """Choose the model that a prompt cache was made with.

    Args:
        model: what ``--model`` says.
        cached: what the file says.
        path: the file, for the message.

    Returns:
        A folder or hub id, or None for the embedded model.

    Raises:
        ValueError: the two are different models.
    """
    if model is not None:
        if not _same_model(model, cached):
            raise ValueError(f"{path} was made with {cached}, not with {model}")
        return model
    from mlx_mtp.storage.default_model import default_model_path

    if os.path.isdir(cached):
        with contextlib.suppress(ValueError):  # no embedded model here: it was another one
            return None if _same_model(cached, str(default_model_path())) else cached
    return cached


def _same_model(one: str, other: str) -> bool:
    """Tell whether two names mean one model: equal, or the same folder."""
    first, second = os.path.expanduser(one), os.path.expanduser(other)
    folders = os.path.isdir(first) and os.path.isdir(second)
    return one == other or (folders and os.path.samefile(first, second))


def _add(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def _logit_bias(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[int, float] | None:
    """Parse ``ID=VALUE`` pairs."""
    del context, parameter
    bias = {}
    for value in values:
        token, _, amount = value.partition("=")
        try:
            bias[int(token)] = float(amount)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=VALUE") from None
        if math.isnan(bias[int(token)]):
            raise click.BadParameter(f"{value!r} is not ID=VALUE")
    return bias or None


def _json_object(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> dict[str, Any]:
    """Parse a JSON object."""
    del context, parameter
    if value is None:
        return {}
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise click.BadParameter(f"must be a JSON object, got {value}")
    return parsed


def _add_eos_token(tokenizer: TokenizerWrapper, token: str) -> None:
    """Let a token, by text or id, end an answer."""
    known = tokenizer.get_vocab().values() if token.isdecimal() else tokenizer.get_vocab()
    if (int(token) if token.isdecimal() else token) not in known:
        raise ValueError(f"--extra-eos-token {token}: the tokenizer has no such token")
    tokenizer.add_eos_token(token)


def _hint_at_blas() -> None:
    """Say at a terminal that a Linux CPU could be much faster."""
    import mlx.core as mx

    if (
        BLAS == "reference"
        and SWITCH not in os.environ
        and mx.default_device() == mx.Device(mx.DeviceType.cpu)
        and sys.stderr.isatty()
    ):
        print("hint: install OpenBLAS (libopenblas0-pthread) for speed", file=sys.stderr)
