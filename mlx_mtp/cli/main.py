"""The command ``mlx-mtp``; each command imports its module when it is called."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from mlx_mtp.cli.app import app
from mlx_mtp.cli.average import average
from mlx_mtp.cli.benchmark import benchmark
from mlx_mtp.cli.convert import convert, export, inspect
from mlx_mtp.cli.doctor import doctor
from mlx_mtp.cli.options import (
    cached_model,
    decoding_options,
    load_model,
    model_options,
    prompt_cache_metadata,
    sampling_options,
    stream_options,
    template_options,
)
from mlx_mtp.cli.serve import serve
from mlx_mtp.cli.simulate import simulate
from mlx_mtp.cli.train import train
from mlx_mtp.cli.tune import tune
from mlx_mtp.cli.verify import verify
from mlx_mtp.storage.package import package_version
from mlx_mtp.terminal import INTERRUPTED, Interrupt, PoliteGroup, Progress

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.generate import GenerationResponse

_QUERY = "@@mlx-mtp-query@@"
_WITHOUT_TORCH = (
    "average", "benchmark", "chat", "generate", "simulate", "train", "tune", "verify",
)  # fmt: skip


@click.group(cls=PoliteGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_version(), message="mlx-mtp %(version)s")
def cli() -> None:
    """Several tokens per step from a local language model, with unchanged output."""


@cli.command()
@click.option("--prompt", "-p", default="hello", help="The message; '-' reads stdin.")
@model_options
@template_options
@click.option("--ignore-chat-template", is_flag=True, help="Use the prompt as it is.")
@click.option("--prefill-response", help="How the answer begins.")
@decoding_options(max_tokens=100)
@sampling_options
@click.option("--prompt-cache-file", help="A file of mlx_lm.cache_prompt that the prompt follows.")
@click.option(
    "--verbose",
    default="True",
    metavar="True|False",
    show_default=True,
    help="Print the stats, or only the answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def generate(verbose: str, as_json: bool, prompt_cache_file: str | None, **options: Any) -> None:
    """Answer a prompt."""
    prompt = _read_prompt(options["prompt"])
    streaming = stream_options(options)
    metadata: dict[str, Any] = {}
    if prompt_cache_file is not None:
        for name in ("max_kv_size", "kv_bits"):
            if options[name] is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} cannot be combined with --prompt-cache-file")
        metadata = prompt_cache_metadata(prompt_cache_file)
        options["model"] = cached_model(options["model"], metadata["model"], prompt_cache_file)
    model, tokenizer = load_model(options, tokenizer_config=metadata.get("tokenizer_config"))
    ids = _prompt_ids(tokenizer, prompt, options, is_suffix=bool(metadata))
    if prompt_cache_file is not None:
        streaming["prompt_cache"], _ = model.load_prompt_cache(Path(prompt_cache_file))
    mode = "json" if as_json else "plain" if verbose.lower() in ("false", "f") else "verbose"
    if not _answer(model, tokenizer, ids, streaming, mode=mode):
        sys.exit(INTERRUPTED)


@cli.command()
@model_options
@template_options
@decoding_options(max_tokens=256)
@sampling_options
def chat(**options: Any) -> None:
    """Talk with a model; the conversation is kept until you leave."""
    from mlx_mtp.chat import run

    streaming = stream_options(options)
    model, tokenizer = load_model(options)
    run(
        model,
        tokenizer,
        system_prompt=options["system_prompt"],
        template_config=options["chat_template_config"],
        options=streaming,
    )


cli.add_command(app)
cli.add_command(average)
cli.add_command(benchmark)
cli.add_command(convert)
cli.add_command(doctor)
cli.add_command(export)
cli.add_command(inspect)
cli.add_command(serve)
cli.add_command(simulate)
cli.add_command(train)
cli.add_command(tune)
cli.add_command(verify)


def main() -> None:
    """Entry point of the installed command."""
    _spare_torch(sys.argv[1:])
    try:
        cli(prog_name="mlx-mtp")
    finally:
        # All is said: another Ctrl-C while Python tidies up would only spoil the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _spare_torch(args: list[str]) -> None:
    """Hide PyTorch from transformers, which imports it wherever it is installed.

    That takes over two seconds at every start and is of no use to commands that decode.  Code of a
    model's own folder may want it.
    """
    if args and args[0] in _WITHOUT_TORCH and "--trust-remote-code" not in args:
        sys.modules.setdefault("torch", cast(Any, None))


def _read_prompt(prompt: str) -> str:
    r"""Take the prompt from stdin if it is ``-``, else undo ``\n`` and ``\t`` as mlx-lm does."""
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
    """Put the prompt into the chat template, if there is one, and encode it.

    A suffix follows a cached prompt, which already holds what the template puts before it.
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
    model: Any, tokenizer: Any, ids: list[int], streaming: dict[str, Any], *, mode: str
) -> bool:
    """Stream the answer to stdout; return False if Ctrl-C cut it short.

    Modes: "verbose" with rules and stats, "plain" the text alone, "json" one object at the end.
    """
    from mlx_mtp.generate import stats_text, stream_generate
    from mlx_mtp.stats import RULE

    with Interrupt() as interrupt, Progress(f"Prompt: {len(ids)} tokens ...") as progress:

        def on_prefill(done: int, total: int) -> None:
            progress.say(f"Prompt: {done}/{total} tokens ...")
            interrupt.check()

        stream = stream_generate(
            model, tokenizer, ids, prompt_progress_callback=on_prefill, **streaming
        )
        _show(f"{RULE}\n" if mode == "verbose" else "")
        text, tokens, last = _consume(stream, interrupt, progress, quiet=mode == "json")
    finished = last is not None and last.finish_reason is not None
    if mode == "json":
        _show(_as_json(model.name, text, tokens, last) + "\n")
    else:
        _show("\n")
    if mode == "verbose":
        _show(f"{RULE}\n")
        _show(stats_text(text, last) + "\n" if finished or text else "")
    return finished


def _consume(
    stream: Generator[GenerationResponse, None, None],
    interrupt: Interrupt,
    progress: Progress,
    *,
    quiet: bool,
) -> tuple[str, list[int], GenerationResponse | None]:
    """Print text as it comes, up to Ctrl-C; return all of it, the ids and the last response."""
    pieces: list[str] = []
    tokens: list[int] = []
    last = None
    with contextlib.closing(stream), contextlib.suppress(KeyboardInterrupt):
        for last in stream:
            progress.stop()
            pieces.append(last.text)
            tokens.append(last.token)
            _show("" if quiet else last.text)
            interrupt.check()
    return "".join(pieces), tokens, last


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
