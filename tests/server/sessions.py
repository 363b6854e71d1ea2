"""Sessions of the engine, run without its scheduler."""

from __future__ import annotations

import json
from typing import Any

from mlx_mtp.apps.engine.preparing import prepare
from mlx_mtp.apps.engine.protocol import Event, Job, JobMessage, pack
from mlx_mtp.apps.engine.session import Engine, Session, with_stored_blocks
from mlx_mtp.decoding import step


def messages_of(engine: Engine, job: dict[str, Any]) -> list[dict[str, Any]]:
    """All messages of one job."""
    prepared = prepare(Job.from_dict(job), engine.model, engine.tokenizer)
    session = Session(with_stored_blocks(prepared, engine), engine)
    messages: list[JobMessage] = [session.started()]
    while not session.finished:
        [outcome] = step.run(engine.model, [session.plan()])
        messages += session.commit(outcome)
    session.close()
    return [as_sent(message) for message in messages]


def as_sent(message: Event | JobMessage) -> dict[str, Any]:
    """A message as the server reads it, without its length."""
    return json.loads(pack(message)[4:])
