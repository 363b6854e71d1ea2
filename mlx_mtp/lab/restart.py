"""Time to the first token of a long prompt after a restart: ``python -m mlx_mtp.lab.restart``.

Starts ``mlx-mtp serve``, sends a long prompt, restarts the server and sends the prompt again: its
beginning then comes from files.  Each server first answers a short prompt, so that no time to load
counts.  The answers must be equal.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import click

from mlx_mtp.cli.options import MODEL, option
from mlx_mtp.lab.commands import command, machine_info

_MAX_TOKENS = 8


@command
@MODEL
@option("--prompt-tokens", type=click.IntRange(1), default=6000, help="Tokens of the prompt.")
def restart(model: str | None, prompt_tokens: int) -> dict[str, Any]:
    """Measure the time to the first token with and without a kept beginning."""
    from mlx_mtp.bench.contexts import sections
    from mlx_mtp.loading import load

    _, tokenizer = load(model)
    ids = tokenizer.encode("\n\n".join(sections())[: 8 * prompt_tokens])[:prompt_tokens]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--prompt-cache-dir", folder, *(["--model", model] if model else [])]
        runs = []
        for _ in range(2):
            with _served(options) as url:
                _answer(url, ids[:20])
                runs.append(_answer(url, ids))
    (first, again) = runs
    if first["text"] != again["text"]:
        raise ValueError("the answers differ")
    return {
        "prompt_tokens": len(ids),
        "computed_first_token_s": round(first["first_token_s"], 3),
        "kept_first_token_s": round(again["first_token_s"], 3),
        "cached_tokens": again["cached_tokens"],
        "times_sooner": round(first["first_token_s"] / again["first_token_s"], 1),
        **machine_info(),
    }


@contextlib.contextmanager
def _served(options: list[str]) -> Iterator[str]:
    """Run a server; its address."""
    arguments = [sys.executable, "-m", "mlx_mtp", "serve", "--port", "0", *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(2)]  # listening, then serving
        if not lines[1].startswith("Serving"):
            raise ValueError("the server did not start")
        yield lines[0].split()[2]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _answer(url: str, ids: list[int]) -> dict[str, Any]:
    """Stream an answer; its text, the time to its first token, and the cached tokens."""
    body = {
        "prompt": ids,
        "max_tokens": _MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    began, first_token_s, text, usage = time.perf_counter(), 0.0, "", {}
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            first_token_s = first_token_s or time.perf_counter() - began
            text += "".join(choice["text"] for choice in chunk["choices"])
            usage = chunk.get("usage") or usage
    cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    return {"text": text, "first_token_s": first_token_s, "cached_tokens": cached_tokens}


if __name__ == "__main__":
    restart()
