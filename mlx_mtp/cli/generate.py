"""The command ``mlx-mtp generate``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloup

from mlx_mtp.cli.arguments import load_model, reasoning_arguments, stream_arguments
from mlx_mtp.cli.options import (
    ADAPTER,
    AS_JSON,
    DRAFT_MODEL,
    EXTRA_EOS_TOKEN,
    MTP,
    decoding_options,
    model_options,
    option,
    sampling_options,
    template_options,
    unsupported,
)
from mlx_mtp.storage.package import package_version
from mlx_mtp.terminal import INTERRUPTED, AnswerWriter, Interrupt, Status, show

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.generate import GenerationResponse
    from mlx_mtp.text.answer_printer import AnswerPrinter

_QUERY = "@@mlx-mtp-query@@"
_PROMPT_OPTIONS = (
    option(
        "--prompt",
        "-p",
        default="hello",
        metavar="TEXT",
        help="Message to answer; '-' reads it from stdin.",
    ),
    option(
        "--prompt-cache-file",
        metavar="FILE",
        help="File of mlx_lm.cache_prompt whose prompt comes before this one.",
    ),
    option(
        "--ignore-chat-template",
        is_flag=True,
        help="Use the prompt without the chat template.",
    ),
    option(
        "--use-default-chat-template",
        is_flag=True,
        help="Without effect, as in mlx-lm: the chat template is used if there is one.",
    ),
    option("--prefill-response", metavar="TEXT", help="Beginning of the answer."),
)
_UNSUPPORTED = (
    unsupported("--image", "prompts are text", multiple=True, takes_words=True),
    unsupported("--quantize-activations", "activations keep the model's type", "-qa", is_flag=True),
)


@cloup.command()
@model_options(DRAFT_MODEL, EXTRA_EOS_TOKEN, ADAPTER, MTP)
@template_options(*_PROMPT_OPTIONS)
@decoding_options(max_tokens=100)
@sampling_options()
@cloup.option_group("mlx-lm", *_UNSUPPORTED, hidden=True)
@cloup.option_group(
    "Output",
    option(
        "--verbose",
        default="True",
        metavar="True|False",
        help="Print rules and statistics around the answer.",
    ),
    AS_JSON,
)
def generate(verbose: str, as_json: bool, prompt_cache_file: str | None, **options: Any) -> None:
    """Generate an answer to a prompt."""
    from mlx_mtp.text.reasoning import Reasoning

    prompt = _read_prompt(options["prompt"])
    arguments = stream_arguments(options)
    metadata: dict[str, Any] = {}
    if prompt_cache_file is not None:
        if options["max_kv_size"] is not None:
            print(
                "--max-kv-size: --prompt-cache-file has its own size", file=sys.stderr, flush=True
            )
        metadata = _cache_metadata(prompt_cache_file)
        options["model"] = _cached_model(options["model"], metadata["model"], prompt_cache_file)
    mode = "json" if as_json else "plain" if verbose.lower() in ("false", "f") else "verbose"
    model, tokenizer = load_model(
        options, tokenizer_config=metadata.get("tokenizer_config"), is_quiet=mode != "verbose"
    )
    options["chat_template_config"], more = reasoning_arguments(options, tokenizer)
    ids = _prompt_ids(tokenizer, prompt, options, is_suffix=bool(metadata))
    reasoning = Reasoning.of(tokenizer, ids, prefill=options["prefill_response"] or "")
    arguments |= more | {"reasoning": reasoning}
    if prompt_cache_file is not None:
        arguments["prompt_cache"], _ = model.load_prompt_cache(Path(prompt_cache_file))
    if not _answer(model, tokenizer, ids, arguments, mode=mode, explain=options["explain"]):
        sys.exit(INTERRUPTED)


def _read_prompt(prompt: str) -> str:
    r"""Read the prompt from stdin if it is ``-``, else replace ``\n`` and ``\t`` as mlx-lm does."""
    if prompt != "-":
        prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
    else:
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError("the prompt is not UTF-8")
    return prompt


def _prompt_ids(
    tokenizer: TokenizerWrapper, prompt: str, options: dict[str, Any], *, is_suffix: bool
) -> list[int]:
    """Apply the chat template, if there is one, and encode the prompt.

    A suffix follows a cached prompt, which already has what the template puts before it.
    """
    from mlx_mtp.generate import chat_text, encode_prompt

    if options["ignore_chat_template"] or not tokenizer.has_chat_template:
        return encode_prompt(tokenizer, prompt, add_special_tokens=False if is_suffix else None)
    system, prefill = options["system_prompt"], options["prefill_response"]
    head = [] if system is None else [{"role": "system", "content": system}]
    tail = [] if prefill is None else [{"role": "assistant", "content": prefill}]

    def render(content: str) -> str:
        messages = [*head, {"role": "user", "content": content}, *tail]
        config = options["chat_template_config"]
        return chat_text(tokenizer, messages, template_config=config)

    text = render(prompt)
    if is_suffix:
        text = text[render(_QUERY).index(_QUERY) :]
    return encode_prompt(tokenizer, text, add_special_tokens=False)


def _answer(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    arguments: dict[str, Any],
    *,
    mode: str,
    explain: bool,
) -> bool:
    """Stream the answer to stdout; return False if Ctrl-C interrupted it.

    Modes: "verbose" with rules and statistics, "plain" the text alone, "json" one object at the
    end.
    """
    from mlx_mtp.generate import stats_text, stream_generate
    from mlx_mtp.stats import RULE
    from mlx_mtp.text.answer_printer import AnswerPrinter

    with Interrupt() as interrupt, Status(f"Prompt: {len(ids)} tokens ...") as status:
        output = AnswerWriter(status)

        def on_prefill(done: int, total: int) -> None:
            status.update(f"Prompt: {done}/{total} tokens ...")
            interrupt.check()

        stream = stream_generate(
            model,
            tokenizer,
            ids,
            prompt_progress_callback=on_prefill,
            explain=output.log if explain else None,
            **arguments,
        )
        if mode == "verbose":
            print(RULE, flush=True)
        printer = None if mode == "json" else AnswerPrinter(output, arguments["reasoning"])
        text, tokens, last = _consume(stream, interrupt, printer)
    finished = last is not None and last.finish_reason is not None
    show(_as_json(model.name, text, tokens, last) if mode == "json" else "")
    if mode == "verbose":
        print(RULE)
        if finished or text:
            print(stats_text(text, last))
    return finished


def _consume(
    stream: Generator[GenerationResponse, None, None],
    interrupt: Interrupt,
    output: AnswerPrinter | None,
) -> tuple[str, list[int], GenerationResponse | None]:
    """Write text as it is generated, until Ctrl-C; return text, ids and last response."""
    pieces: list[str] = []
    tokens: list[int] = []
    last = None
    with contextlib.closing(stream), contextlib.suppress(KeyboardInterrupt):
        for last in stream:
            pieces.append(last.text)
            tokens.append(last.token)
            if output:
                output.write(last.text)
            interrupt.check()
    if output:
        output.finish()
    return "".join(pieces), tokens, last


def _as_json(model: str, text: str, tokens: list[int], last: Any) -> str:
    """Return an answer as one line of JSON."""
    reason = last.finish_reason if last is not None else None
    answer = {
        "model": model,
        "text": text,
        "tokens": tokens,
        "finish_reason": reason or "interrupted",
        "stats": None if last is None else last.stats_dict(),
        "versions": {
            "mlx-mtp": package_version(),
            "mlx": importlib.metadata.version("mlx"),
            "mlx-lm": importlib.metadata.version("mlx-lm"),
        },
    }
    return json.dumps(answer, ensure_ascii=False, allow_nan=False)


def _cache_metadata(path: str) -> dict[str, Any]:
    """Read the model and the tokenizer settings of a prompt cache file.

    Returns:
        ``model`` and ``tokenizer_config`` as ``mlx_lm.cache_prompt`` wrote them.

    Raises:
        ValueError: the file is missing or not a prompt cache.
    """
    from mlx_lm.models.cache import load_prompt_cache

    if not os.path.isfile(path):
        raise ValueError(f"prompt cache {path} does not exist")
    try:
        _, metadata = load_prompt_cache(path, return_metadata=True)
        config = json.loads(metadata["tokenizer_config"])
        return {"model": str(metadata["model"]), "tokenizer_config": dict(config)}
    except Exception:  # MLX and mlx-lm raise many kinds of errors for other files
        raise ValueError(f"{path} is not a prompt cache of mlx_lm.cache_prompt") from None


def _cached_model(model: str | None, cached: str, path: str) -> str | None:
    """Choose the model that a prompt cache was made with.

    Args:
        model: value of ``--model``.
        cached: the model that the file names.
        path: of the file, for the message.

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
        with contextlib.suppress(ValueError):  # this installation has no embedded model
            return None if _same_model(cached, str(default_model_path())) else cached
    return cached


def _same_model(one: str, other: str) -> bool:
    """Whether two names are equal or name the same folder."""
    first, second = os.path.expanduser(one), os.path.expanduser(other)
    folders = os.path.isdir(first) and os.path.isdir(second)
    return one == other or (folders and os.path.samefile(first, second))
