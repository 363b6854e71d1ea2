"""Start-up of the command: what it must not wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_mtp.cli.main import main

_RUN = """
import sys
from mlx_mtp.cli.main import main
sys.argv = ["mlx-mtp", *sys.argv[1:]]
try:
    main()
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "is_hidden"),
    [
        (["generate", "--seed", "x"], True),
        (["chat", "--seed", "x"], True),
        (["verify", "--seed", "x"], True),
        (["benchmark", "--seed", "x"], True),
        (["generate", "--seed", "x", "--trust-remote-code"], False),
        (["inspect", "--seed", "x"], True),
        (["convert", "--seed", "x"], True),
        (["inspect", "--seed", "x", "--allow-pickle"], False),
        (["convert", "--seed", "x", "--verify"], False),
        (["serve", "--seed", "x"], False),
    ],
)
def test_commands_without_pytorch_hide_it(monkeypatch, args: list[str], is_hidden: bool) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # main ignores SIGINT at its end
    monkeypatch.setattr("sys.argv", ["mlx-mtp", *args])
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(SystemExit):
        main()
    assert ("torch" in sys.modules and sys.modules["torch"] is None) is is_hidden


@pytest.mark.slow
def test_help_imports_neither_models_nor_servers() -> None:
    command = [sys.executable, "-c", _RUN, "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: mlx-mtp train")
    heavy = {"mlx_lm", "transformers", "starlette", "pydantic", "scipy", "matplotlib"}
    assert not heavy & set(done.stderr.split())
