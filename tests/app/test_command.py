"""The command ``mlx-mtp app``: its address, its exit, and its errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import cli
from tests.helpers.tiny import save_tiny_pair


def start(tmp_path: Path, *args: str) -> tuple[subprocess.Popen[str], str, str]:
    """Start the app; returns the process, its address and its token."""
    command = [sys.executable, "-m", "mlx_mtp", "app", "--no-browser", *args]
    environment = os.environ | {"MLX_MTP_DATA": str(tmp_path), "MLX_MTP_CACHE": str(tmp_path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout
    line = process.stdout.readline()
    found = re.fullmatch(r"Chat at (http://127\.0\.0\.1:\d+)/#token=(\S{40,})\n", line)
    if not found:
        raise AssertionError(line + process.communicate()[1])
    return process, found[1], found[2]


@pytest.mark.slow
def test_a_tiny_model_answers_and_ctrl_c_ends_it(tmp_path):
    model, adapter = save_tiny_pair(tmp_path)
    process, url, token = start(tmp_path, "--model", str(model), "--adapter-path", str(adapter))
    headers = {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(base_url=f"{url}/app/api", headers=headers, timeout=120) as client:
            deadline = time.monotonic() + 120
            while (state := client.get("/state").json())["state"] != "ok":
                assert time.monotonic() < deadline, state
                time.sleep(0.1)
            assert state["model"]["adapter"] and state["model"]["num_draft_tokens"] == 4
            assert not client.get("/facts").json()["measured"]  # no start measures costs
            options = {"max_tokens": 24}
            number = client.post("/conversations", json={"options": options}).json()["id"]
            begun = client.post(f"/conversations/{number}/answer", json={"text": "Hello"})
            answer = begun.json()["messages"][-1]["id"]
            events = client.get(f"/answers/{answer}").text
            assert '"type":"end"' in events
            message = client.get(f"/conversations/{number}").json()["messages"][1]
            pieces = [token for group in message["groups"] for token in group["tokens"]]
            assert len(pieces) <= 24 and "".join(pieces) == message["text"]
            race = client.post("/race", json={"text": "Hello", "options": options}).text
            assert '"identical":true' in race, race
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "history.sqlite3").is_file()


def test_a_taken_port_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        args = ["app", "--no-browser", "--port", port, "--data-dir", str(tmp_path)]
        result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2 and f"port {port}" in result.output


def test_a_damaged_history_is_one_line(tmp_path):
    (tmp_path / "history.sqlite3").write_bytes(b"no database, but long enough to be read" * 50)
    result = CliRunner().invoke(cli, ["app", "--no-browser", "--data-dir", str(tmp_path)])
    assert result.exit_code == 2 and "as a conversation history" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_window_without_pywebview_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    result = CliRunner().invoke(cli, ["app", "--window"])
    assert result.exit_code == 2 and "mlx-mtp[app]" in result.output


@pytest.mark.slow
def test_a_window_shows_the_address_of_a_server_and_ends_it(monkeypatch, tmp_path):
    stub = tmp_path / "webview.py"
    stub.write_text(
        "import os\n"
        "def create_window(title, url, **options):\n"
        "    print('window', title, url.partition('#')[0], flush=True)\n"
        "def start(**options): pass\n",
        encoding="utf-8",
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "mlx_mtp", "app", "--window", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.match(r"window mlx-mtp http://127\.0\.0\.1:\d+/", done.stdout)
