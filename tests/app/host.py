"""The chat app over an engine without a model, in a thread of the test process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from mlx_mtp.apps.chat_app.app import app_settings, create_chat_app
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.connection import protocol_class
from tests.server.host import listening

ENGINE = (sys.executable, "-S", str(Path(__file__).with_name("engine.py")))


class AppHost:
    """A running app.

    Attributes:
        url: where it is.
        token: of this launch.
        engine: its engine.
        client: an HTTP client with a session cookie.
    """

    def __init__(self, url: str, token: str, engine: Engine) -> None:
        self.url = url
        self.token = token
        self.engine = engine
        self.client = httpx.Client(base_url=f"{url}/app/api", timeout=30)
        self.wait_for("ok")
        shown = self.client.post("/session", json={"token": token})
        assert shown.status_code == 204, shown.text

    @property
    def address(self) -> str:
        """The address that mlx-mtp app prints and opens."""
        return f"{self.url}/#token={self.token}"

    def wait_for(self, state: str) -> None:
        """Wait until the engine has a state."""
        deadline = time.monotonic() + 30
        while self.engine.state != state:
            assert time.monotonic() < deadline, f"still {self.engine.state}"
            time.sleep(0.01)

    def new_conversation(self, **values: Any) -> int:
        """Create a conversation; returns its id."""
        return self.client.post("/conversations", json=values).json()["id"]

    def conversation(self, number: int) -> dict[str, Any]:
        """A conversation with its messages."""
        return self.client.get(f"/conversations/{number}").json()

    def start(self, number: int, text: str | None, parent: int | None = None) -> int:
        """Start an answer; returns the id of its message."""
        body = {"parent": parent} | ({} if text is None else {"text": text})
        reply = self.client.post(f"/conversations/{number}/answer", json=body)
        assert reply.status_code == 201, reply.text
        return reply.json()["messages"][-1]["id"]

    def events(self, answer: int) -> list[dict[str, Any]]:
        """All events of an answer."""
        return events_of(self.client.get(f"/answers/{answer}").text)

    def ask(self, number: int, text: str | None, parent: int | None = None) -> int:
        """Wait for a complete answer; returns the id of its message."""
        answer = self.start(number, text, parent)
        assert self.events(answer)[-1]["type"] == "end"
        return answer


def events_of(text: str) -> list[dict[str, Any]]:
    """Parse server-sent events; comments, which only keep the connection alive, are skipped."""
    events = [part for part in text.split("\n\n") if part.startswith("data: ")]
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextlib.contextmanager
def hosted_app(history: Path, *, send_timeout_s: float = 30.0, **options: Any) -> Iterator[AppHost]:
    """Run the app.

    Args:
        history: the file of the history.
        send_timeout_s: as in ``Settings``.
        options: arguments of ``create_chat_app``.
    """
    engine = Engine({}, command=ENGINE)
    settings = dataclasses.replace(app_settings(), send_timeout_s=send_timeout_s)
    made = create_chat_app(engine, settings, history, **options)
    http = protocol_class(settings, engine.metrics)
    try:
        with listening(made.gate, http=http, lifespan="on") as port:
            host = AppHost(f"http://127.0.0.1:{port}", made.gate.token, engine)
            try:
                yield host
            finally:
                host.client.close()
    finally:  # once the last answer is in it
        made.archive.close()
