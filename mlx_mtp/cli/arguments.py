"""From the options of a command to the arguments of ``load`` and ``stream_generate``."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.decoding.sampling import Sampling

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel


def stream_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``stream_generate`` for the options of a command.

    Raises:
        ValueError: a sampling option is out of range, or a file is not text.
        OSError: a file cannot be read.
    """
    drawn = [field.name for field in fields(Sampling) if field.name in options]
    sampling = Sampling(**{name: options[name] for name in drawn})
    names = [field.name for field in (*fields(GenerationConfig), *fields(CacheConfig))]
    layout = options["layout"] if options["mtp"] else "plain"
    chosen = {name: options[name] for name in names if name in options}
    texts = [_read_text(path) for path in options["lookup_files"]]
    return chosen | {"sampling": sampling, "layout": layout, "lookup_texts": texts}


def reasoning_arguments(
    options: dict[str, Any], tokenizer: TokenizerWrapper
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of the chat template, and those of ``stream_generate`` for reasoning.

    A line on stderr says so if the model has no marks to which a budget could apply.
    """
    from mlx_mtp.text.reasoning import reasoning_marks, template_settings

    config, limit = options["chat_template_config"], options["thinking_budget"]
    if limit is not None and reasoning_marks(tokenizer) is None:
        print("--thinking-budget: the model has no marks of reasoning", file=sys.stderr, flush=True)
    enable = config.get("enable_thinking", options["enable_thinking"])
    enable = enable if isinstance(enable, bool) else None
    settings, budget = template_settings(tokenizer, enable=enable, budget=limit)
    return settings | config, {"thinking_budget": budget}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None


def load_model(
    options: dict[str, Any],
    *,
    tokenizer_config: dict[str, Any] | None = None,
    is_quiet: bool = False,
) -> tuple[MTPModel, TokenizerWrapper]:
    """Load the model that the options name; print on stderr what drafts its tokens.

    Args:
        options: of the command.
        tokenizer_config: arguments of the tokenizer.
        is_quiet: whether to print nothing but errors.

    Raises:
        ValueError: the model or adapter cannot be used, or an end token does not exist.
    """
    from mlx_mtp.loading import load_with_status

    arguments = stream_arguments(options)
    settings = {field.name: arguments[field.name] for field in fields(GenerationConfig)}
    return load_with_status(
        options["model"],
        adapter_path=options["adapter_path"],
        tokenizer_config=tokenizer_config,
        trust_remote_code=options["trust_remote_code"],
        mtp=options["mtp"],
        draft_model=options["draft_model"],
        adapter=options["adapter"],
        extra_eos_token=options["extra_eos_token"],
        config=GenerationConfig(**settings),
        show_drafters=not is_quiet,
        show_hints=not is_quiet,
    )
