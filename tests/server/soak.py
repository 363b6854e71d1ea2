"""Wears a server out: many clients, made-up requests, a killed engine.

``python -m tests.server.soak --clients 64 --minutes 5 --requests 10000 --kills 50`` prints a report
of each in one line of JSON, then every limit that was passed, and ends with exit code 1 where there
is one.  With ``--fake-engine`` no model is loaded, and server and clients are one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.server.soak_clients import soak
from tests.server.soak_kills import kill_often
from tests.server.soak_requests import fuzz

if TYPE_CHECKING:
    from tests.server.command import Served
    from tests.server.host import Host

    Server = Served | Host

ARGUMENTS = ("--queue-size", "256", "--max-tokens", "8", "--client-timeout", "5")
FAKE: dict[str, Any] = {
    "engine": {"queue_size": 256}, "body_timeout_s": 5.0, "header_timeout_s": 2.5,
}  # fmt: skip

SHARED = ("health_ms_most", "server_growth")  # with the clients' own, over the fake engine
LIMITS: dict[str, dict[str, float]] = {
    "soak": {
        "lost": 0,
        "crossed": 0,
        "health_bad": 0,
        "health_ms_most": 200,
        "server_growth": 0.05,
        "engine_growth": 0.05,
    },
    "fuzz": {"bad": 0, "restarts": 0},
    "kills": {"unclean": 0, "error_s_most": 1, "return_beyond_load_s": 5},
}
"""The most of each number, by report; of a list, the most entries."""


def passed_limits(
    reports: Mapping[str, Mapping[str, Any]], *, but: Collection[str] = ()
) -> list[str]:
    """What is more than it may be, one line each; what a report leaves out is one too.

    Args:
        reports: by name, as in ``LIMITS``.
        but: numbers that are not judged.
    """
    found = []
    for name, report in reports.items():
        for what, most in LIMITS[name].items():
            if what in but:
                continue
            value = report.get(what)
            number = len(value) if isinstance(value, list) else value
            if number is None or number > most:
                found.append(f"{name}: {what} is {number}, and may be {most} at most")
    return found


def run(server: Server, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Do what the options ask for; every report is printed as soon as it is there."""
    reports: dict[str, dict[str, Any]] = {}

    def tell(name: str, report: dict[str, Any]) -> None:
        reports[name] = report
        print(json.dumps({name: report}), flush=True)

    if options.minutes:
        tell("soak", soak(server, clients=options.clients, seconds=60 * options.minutes))
    if options.requests:
        tell("fuzz", fuzz(server, requests=options.requests, seed=options.seed))
    if options.kills:
        tell("kills", kill_often(server, kills=options.kills))
    return reports


def main() -> None:
    """Wear out the server that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--fake-engine", action="store_true", help="one without a model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests.server.command import served
    from tests.server.host import hosted

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.fake_engine:
            server: Server = stack.enter_context(hosted(**FAKE))
            server.wait_for("ok")
        else:
            server = stack.enter_context(served(Path(folder), *ARGUMENTS))
        passed = passed_limits(run(server, options), but=SHARED if options.fake_engine else ())
    print("\n".join(passed) or "all within limits")
    sys.exit(bool(passed))


if __name__ == "__main__":
    main()
