"""The command ``mlx-mtp app``."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any

import click
import cloup

from mlx_mtp.apps.engine.prefix_settings import PromptCacheConfig
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.cli.options import DRAFT_MODEL, field_option, model_options, option
from mlx_mtp.cli.serve import ENGINE_OPTIONS

PREFILL_ROWS = 256
MODEL_OPTIONS = ("model", "adapter_path", "draft_model", "trust_remote_code")
_CLOSE_S = 5.0


@cloup.command()
@model_options(DRAFT_MODEL)
@cloup.option_group(
    "Server",
    field_option(Settings, "port", default=0, show_default="a free port"),
    option(
        "--data-dir",
        type=click.Path(path_type=Path),
        envvar="MLX_MTP_DATA",
        show_envvar=True,
        metavar="FOLDER",
        help="Folder of the conversation history.",
    ),
)
@cloup.option_group(
    "Cache",
    # Off by default: a conversation that is deleted should leave no copy.
    field_option(PromptCacheConfig, "prompt_cache_files", default=False),
)
@cloup.option_group(
    "Browser",
    option(
        "--no-browser",
        is_flag=True,
        help="Print the address without opening a browser.",
    ),
    option(
        "--window",
        is_flag=True,
        help="Open the page in its own window instead of the browser.",
    ),
)
def app(window: bool, no_browser: bool, **options: Any) -> None:
    """Open a chat page in the browser.

    The page is served on 127.0.0.1 only, and its address contains a secret key that is new at every
    start. Conversations are saved in a file on this machine.
    """
    if window:
        _run_in_window(options)
    else:
        _run(options, browse=not no_browser)


def _run(options: dict[str, Any], *, browse: bool) -> None:
    """Serve until Ctrl-C."""
    try:
        from mlx_mtp.apps.chat_app.app import app_settings, create_chat_app
        from mlx_mtp.apps.engine.supervisor import Engine
        from mlx_mtp.apps.server.run import serve
    except ImportError as error:
        raise ValueError(f'{error.name} is missing: pip install "mlx-mtp[server]"') from None
    from mlx_mtp.storage.paths import HISTORY_FILE, data_dir

    settings = app_settings(options["port"])
    engine = Engine(_engine_options(options))
    page = create_chat_app(
        engine,
        settings,
        (options["data_dir"] or data_dir()) / HISTORY_FILE,
        model=options["model"],
        adapter_path=options["adapter_path"],
    )

    def greet(url: str) -> None:
        address = f"{url}/#token={page.gate.token}"
        print(f"Chat at {address}", flush=True)
        if browse:  # in a thread, because some systems block
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    try:
        serve(page.gate, engine, settings, greet=greet)
    finally:
        page.archive.close()


def _engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the engine; each conversation decides the others."""
    engine = {
        "adapter": True,
        "drafter": "auto",
        "mtp": True,
        "extra_eos_token": (),
        "layout": "auto",
        "lookup": True,
        "prefill_step_size": PREFILL_ROWS,
    } | {name: options[name] for name in MODEL_OPTIONS}
    assert set(engine) == set(ENGINE_OPTIONS)
    cache = PromptCacheConfig(prompt_cache_files=options["prompt_cache_files"])
    return engine | cache.load_fields()


def _run_in_window(options: dict[str, Any]) -> None:
    """Show the page in a window; the server is a child process, as windows need the main thread.

    Raises:
        ValueError: pywebview is missing, or the server did not start.
    """
    if importlib.util.find_spec("webview") is None:
        raise ValueError('--window needs pywebview: pip install "mlx-mtp[app]"')
    webview: Any = importlib.import_module("webview")
    command = [sys.executable, "-m", "mlx_mtp", "app", "--no-browser"]
    command += ["--port", str(options["port"])]
    for name in ("model", "adapter_path", "draft_model", "data_dir"):
        if options[name] is not None:
            command += [f"--{name.replace('_', '-')}", str(options[name])]
    command += ["--prompt-cache-files"] if options["prompt_cache_files"] else []
    command += ["--trust-remote-code"] if options["trust_remote_code"] else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        head, _, address = server.stdout.readline().strip().partition(" at ")
        if head != "Chat":
            raise ValueError("the chat server did not start")
        webview.create_window("mlx-mtp", address, width=1200, height=820)
        webview.start(private_mode=True)
    finally:
        _end(server)


def _end(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
