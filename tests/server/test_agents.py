"""Claude Code and Codex run a task against the server: read files, call tools, answer.

An engine without a model plays the model, except in the last test, where it is a tiny one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_mtp.storage.default_model import default_model_path
from tests.helpers.default_folder import cache
from tests.helpers.tiny import save_tiny_pair
from tests.server.command import serving
from tests.server.host import Host, hosted

__all__ = ["cache"]

BIN = Path(__file__).with_name("npm") / "node_modules" / ".bin"
ENGINE = (sys.executable, "-S", str(Path(__file__).with_name("agent_engine.py")))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("node") is None or not (BIN / "claude").exists(),
        reason="make test installs the agents where there is npm",
    ),
]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted(command=ENGINE) as running:
        running.wait_for("ok")
        yield running


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with two files to read."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "note.txt").write_text("The first number is [forty two].\n")
    (folder / "other.txt").write_text("The second number is [seven].\n")
    return folder


def prompt(*rounds: list[dict[str, Any]], more: str = "") -> str:
    return f"Which numbers are in the files?\ncalls: {json.dumps(rounds)}\n{more}"


def claude(host: Any, work: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start Claude Code in a folder, with a home of its own and more of its environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(work.parent),
        "ANTHROPIC_BASE_URL": host.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
    } | more
    command = [str(BIN / "claude"), *arguments, "--output-format", "json"]
    return started([*command, "--allowedTools", "Read,Bash,Edit,Write"], environment, work)


def codex(host: Host, work: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start Codex in a folder, with the configuration of docs/agents.md."""
    home = work.parent / ".codex"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        'model = "local"\nmodel_provider = "mlx-mtp"\n[model_providers.mlx-mtp]\n'
        f'name = "mlx-mtp"\nbase_url = "{host.url}/v1"\n'
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(work.parent), "CODEX_HOME": str(home)}
    options = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json")
    return started([str(BIN / "codex"), "exec", *options, *arguments], environment, work)


def started(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, cwd=folder, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output(run: subprocess.Popen[str]) -> str:
    out, error = run.communicate(timeout=120)
    assert run.returncode == 0, out + error
    return out


def replies(host: Host) -> list[tuple[str, str, int, str]]:
    """The replies to requests with a body since the last call; no reply is an error."""
    seen, host.recorder.replies = host.recorder.replies, []
    assert [reply for reply in seen if reply[2] >= 400] == []
    return [reply for reply in seen if reply[0] == "POST"]


def read(path: Path) -> dict[str, Any]:
    return {"name": "Read", "arguments": {"file_path": str(path)}}


def shell(command: str, *, name: str = "exec_command", field: str = "cmd") -> dict[str, Any]:
    return {"name": name, "arguments": {field: command}}


def test_claude_code_calls_tools_and_answers(host, work):
    first = [read(work / "note.txt"), shell("cat other.txt", name="Bash", field="command")]
    run = claude(host, work, "-p", prompt(first, [read(work / "other.txt")]))
    assert json.loads(output(run))["result"] == "The results: forty two, seven, seven"
    assert len(replies(host)) == 3
    run = claude(host, work, "-p", "--continue", prompt([read(work / "note.txt")]))
    assert json.loads(output(run))["result"] == "The results: forty two, seven, seven"
    assert len(replies(host)) == 1


@pytest.mark.parametrize("start", [claude, codex])
def test_a_long_task_returns_every_thought(host, work, start):
    if start is claude:
        run = claude(host, work, "-p", prompt(*[[read(work / "note.txt")]] * 12, more="thoughts"))
        answer = json.loads(output(run))["result"]
    else:
        run = codex(host, work, prompt(*[[shell("cat note.txt")]] * 12, more="thoughts"))
        answer = answers(output(run))[-1]
    assert answer == f"The results: {'forty two, ' * 12}12 thoughts"
    assert len(replies(host)) == 13


PATCH = """apply_patch <<'EOF'
*** Begin Patch
*** Update File: note.txt
@@
-The first number is [forty two].
+The first number is [nine].
*** End Patch
EOF"""


@pytest.mark.parametrize("start", [claude, codex])
def test_agents_edit_files(host, work, start):
    note = work / "note.txt"
    edit = {"file_path": str(note), "old_string": "forty two", "new_string": "nine"}
    if start is claude:
        rounds = [[read(note)], [{"name": "Edit", "arguments": edit}], [read(note)]]
        output(claude(host, work, "-p", prompt(*rounds)))
    else:
        output(codex(host, work, prompt([shell(PATCH)], [shell("cat note.txt")])))
    assert note.read_text() == "The first number is [nine].\n"
    replies(host)


def test_claude_code_compacts_its_conversation(host, work):
    output(claude(host, work, "-p", prompt([read(work / "note.txt")])))
    run = claude(host, work, "-p", "--continue", "/compact")
    assert json.loads(output(run))["local_command"] == "compact"
    replies(host)


def test_codex_compacts_its_conversation(host, work):
    output(codex(host, work, prompt([shell("cat note.txt")])))
    assert len(replies(host)) == 2
    limit = ("-c", "model_auto_compact_token_limit=1")
    output(codex(host, work, *limit, "resume", "--last", prompt()))
    assert len(replies(host)) > 1  # a summary and the answer


def test_several_agents_at_once(host, tmp_path, work):
    runs = []
    for number in range(4):
        folder = tmp_path / str(number) / "work"
        shutil.copytree(work, folder)
        (folder / "note.txt").write_text(f"[number {number}]")
        if number % 2:
            runs.append(codex(host, folder, prompt([shell("cat note.txt")])))
        else:
            runs.append(claude(host, folder, "-p", prompt([read(folder / "note.txt")])))
    for number, run in enumerate(runs):
        assert f"The results: number {number}" in output(run)
    replies(host)


def test_claude_code_goes_on_after_a_tool_fails(host, work):
    run = claude(host, work, "-p", prompt([read(work / "missing.txt"), read(work / "note.txt")]))
    assert json.loads(output(run))["result"] == "The results: forty two"
    replies(host)


def test_claude_code_counts_tokens(host, work):
    assert "Tokens" in json.loads(output(claude(host, work, "-p", "/context")))["result"]
    assert {path for _, path, _, _ in replies(host)} == {"/v1/messages/count_tokens"}


def answers(lines: str) -> list[str]:
    """The messages of Codex."""
    events = [json.loads(line) for line in lines.splitlines()]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"]


def test_codex_calls_tools_and_answers(host, work):
    rounds = [[shell("cat note.txt"), shell("cat other.txt")], [shell("cat note.txt")]]
    run = codex(host, work, prompt(*rounds))
    assert answers(output(run))[-1] == "The results: forty two, seven, forty two"
    assert len(replies(host)) == 3
    run = codex(host, work, "resume", "--last", prompt([shell("cat other.txt")]))
    assert answers(output(run))[-1] == "The results: forty two, seven, forty two"
    replies(host)


@pytest.mark.parametrize("start", [claude, codex])
def test_stopping_an_agent_cancels_its_answer(host, work, start):
    options = ["-p"] if start is claude else []
    run = start(host, work, *options, prompt(more="wait"))
    deadline = time.monotonic() + 60
    while not host.engine.running and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=60)
    while host.engine.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not host.engine.running


def test_a_session_reuses_its_long_beginning(cache, tmp_path, work):
    model, adapter = save_tiny_pair(tmp_path, vocab_size=49152, max_position_embeddings=65536)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_MTP_CACHE", str(cache))
        for file in default_model_path().glob("*token*"):
            shutil.copy(file, model)
    usages = []
    with serving(tmp_path, "--model", str(model), "--adapter-path", str(adapter)) as server:
        for arguments in (["-p", "Hello."], ["-p", "--continue", "More."]):
            run = claude(server, work, *arguments, CLAUDE_CODE_MAX_OUTPUT_TOKENS="16")
            usages.append(json.loads(run.communicate(timeout=300)[0])["usage"])
    first, second = usages
    assert first["input_tokens"] > 5000, first
    assert second["cache_read_input_tokens"] > 0.9 * first["input_tokens"], second
    assert second["input_tokens"] < 0.2 * first["input_tokens"], second  # computed in any request
