"""The chat app over an engine without a model, as a separate process that can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_mtp.apps.chat_app.app import app_settings, create_chat_app
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server.run import serve
from tests.app.host import ENGINE


def main() -> None:
    """Serve the history file in the argument; the first line of output is address and token."""
    engine, settings = Engine({}, command=ENGINE), app_settings()
    made = create_chat_app(engine, settings, Path(sys.argv[1]))
    serve(made.gate, engine, settings, greet=lambda url: print(url, made.gate.token, flush=True))


if __name__ == "__main__":
    main()
