"""``mlx-mtp`` over a scripted loop, to be run as a program: ``python fake_cli.py STEP_MS ARGS``.

Every answer is the environment's ANSWER, or counts on for 1,889 ids, some per step.  stderr says
when it begins.  Nothing is loaded.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.modules["torch"] = None  # type: ignore[assignment]  # as the command does

import mlx_mtp.decoding.loop  # noqa: E402
import mlx_mtp.loading  # noqa: E402
from mlx_mtp.cli.main import main  # noqa: E402
from tests.helpers.fixtures_generate import (  # noqa: E402
    EOS,
    FakeModel,
    byte_tokenizer,
    fake_decode,
    ids_of,
)

STEP_S = int(sys.argv.pop(1)) / 1000
COUNT = os.environ.get("ANSWER") or " ".join(str(number) for number in range(500))


def slow_decode(*args: Any, **options: Any) -> Any:
    print("begun", file=sys.stderr, flush=True)
    for step in fake_decode(*args, **options):
        time.sleep(STEP_S)
        yield step


def load(*args: Any, **options: Any) -> tuple[Any, Any, Any]:
    return FakeModel(answers=[[*ids_of(COUNT), EOS]] * 9, max_context=None), byte_tokenizer(), {}


if __name__ == "__main__":
    mlx_mtp.decoding.loop.decode = slow_decode
    mlx_mtp.loading.load = load
    main()
