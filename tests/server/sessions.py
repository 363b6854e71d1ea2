"""Sessions of the engine, run without its scheduler."""

from __future__ import annotations

from typing import Any

from mlx_mtp.apps.engine.preparing import prepare
from mlx_mtp.apps.engine.session import Engine, Session
from mlx_mtp.decoding import step


def messages_of(engine: Engine, job: dict[str, Any]) -> list[dict[str, Any]]:
    """All messages of one job."""
    session = Session(prepare(job, engine.model, engine.tokenizer), engine)
    messages = [session.started()]
    while not session.finished:
        [outcome] = step.run(engine.model, [session.plan()])
        messages += session.commit(outcome)
    session.close()
    return messages
