"""Start-up of the command: what it must not wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

_RUN = """
import sys
from mlx_mtp.cli.main import main
sys.argv = ["mlx-mtp", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
import mlx_lm.tokenizer_utils  # imports transformers
print("torch" in sys.modules and sys.modules["torch"] is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "imported"),
    [
        (["generate", "--seed", "x"], False),
        (["chat", "--seed", "x"], False),
        (["verify", "--seed", "x"], False),
        (["benchmark", "--seed", "x"], False),
        (["generate", "--seed", "x", "--trust-remote-code"], True),
        (["inspect", "--seed", "x"], True),
    ],
)
def test_commands_that_decode_do_not_import_pytorch(args: list[str], imported: bool) -> None:
    command = [sys.executable, "-c", _RUN, *args]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str(imported)
