"""Sends a server thousands of requests that nobody in his senses would send."""

from __future__ import annotations

import itertools
import json
import random
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx

from tests.server.nasty import DEEP_BODIES, MANY_BODIES, NASTY_BODIES, NASTY_VALUES, PATHS

if TYPE_CHECKING:
    from tests.server.command import Served
    from tests.server.host import Host

    Server = Served | Host

AT_ONCE = 8
MOST_WAIT_S = 120.0  # for an answer, on a machine that has much else to do
LEAVE_S = 0.5  # so long does one wait who has asked for a million tokens
SHARES = {"deep": 50, "many": 100, "declared": 100, "endless": 500, "slow": 250}  # one in so many
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
JSON = {"Content-Type": "application/json"}
STRANGE = ("echo", "system", "instructions", "max_tokens", "", "__proto__")  # to most paths


def fuzz(server: Server, *, requests: int, seed: int) -> dict[str, Any]:
    """Send requests that schemathesis makes from our OpenAPI document, mutated and hostile ones.

    What is sent depends on the seed alone, not on what comes back or in which order.

    Returns:
        How many were sent, their statuses by kind; those answered by a 5xx other than 503, or not
        at all where an answer was due; how often the engine died.
    """
    before = server.client.get("/health").json()["engine_restarts"]
    document = server.client.get("/openapi.json").json()
    with _Senders(server.url) as senders:
        _hostile(senders, requests, random.Random(seed))
        _generate(document, requests // 2, seed, senders)
        rng, names = random.Random(seed + 1), _names(document)
        for _ in range(requests - senders.count):
            _mutate(senders, rng, names)
    after = server.client.get("/health").json()["engine_restarts"]
    return {
        "requests": senders.count,
        "statuses": {kind: dict(sorted(told.items())) for kind, told in senders.told.items()},
        "bad": senders.bad,
        "restarts": after - before,
    }


class _Senders:
    """Sends requests, some at once, and notes what came back.

    Attributes:
        count: how many were given to it.
        told: how often each status came, by kind.
        bad: what was answered as no request may be.
    """

    def __init__(self, url: str) -> None:
        self.count = 0
        self.told: dict[str, dict[str, int]] = {}
        self.bad: list[str] = []
        self._address = (url.removeprefix("http://").split(":")[0], int(url.rpartition(":")[2]))
        self._client = httpx.Client(
            base_url=url,
            timeout=MOST_WAIT_S,
            verify=False,
            limits=httpx.Limits(max_connections=AT_ONCE),
        )
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._lock = threading.Lock()
        self._sent: list[Future[None]] = []

    def __enter__(self) -> _Senders:
        return self

    def __exit__(self, *fault: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=fault[0] is not None)
        self._client.close()
        for each in self._sent:
            each.result()

    def post(self, kind: str, path: str, content: bytes, *, leaves: bool = False) -> None:
        """Send a body; ``leaves`` after ``LEAVE_S``, whatever has come by then."""

        def send() -> str:
            wait_s = LEAVE_S if leaves else MOST_WAIT_S
            try:
                reply = self._client.post(path, content=content, headers=JSON, timeout=wait_s)
            except httpx.TimeoutException as error:
                return "left" if leaves else type(error).__name__
            return str(reply.status_code)

        self._give(kind, f"{path} {content[:500]!r}", send)

    def raw(self, kind: str, talk: Callable[[socket.socket], None]) -> None:
        """Open a connection, say something on it, read what comes: "closed" where nothing does."""

        def send() -> str:
            with socket.create_connection(self._address, MOST_WAIT_S) as connection:
                try:
                    talk(connection)
                    head = connection.recv(100)
                except (ConnectionError, BrokenPipeError):
                    head = b""
            return head[9:12].decode("ascii", "replace") or "closed"

        self._give(kind, kind, send)

    def _give(self, kind: str, shown: str, send: Callable[[], str]) -> None:
        self.count += 1
        self._sent.append(self._pool.submit(self._note, kind, shown, send))

    def _note(self, kind: str, shown: str, send: Callable[[], str]) -> None:
        try:
            status = send()
        except (httpx.HTTPError, OSError) as error:
            status = type(error).__name__
        due = not kind.startswith(("slow", "endless"))  # these are left, told or not
        fault = not status.isdecimal() and status != "left" and (due or status != "closed")
        with self._lock:
            counts = self.told.setdefault(kind, {})
            counts[status] = counts.get(status, 0) + 1
            if fault or (status.isdecimal() and int(status) >= 500 and status != "503"):
                self.bad.append(f"{kind}: {status} {shown}")


def _hostile(senders: _Senders, requests: int, rng: random.Random) -> None:
    """Bodies too deep, too many values, more bytes than allowed, and bytes that hardly come."""
    paths = itertools.cycle(PATHS)
    for kind, bodies in (("deep", DEEP_BODIES), ("many", MANY_BODIES)):
        for _ in range(requests // SHARES[kind]):
            senders.post(kind, next(paths), rng.choice(bodies))
    for _ in range(requests // SHARES["declared"]):
        senders.raw("declared 10 GB", _declare)
    for _ in range(requests // SHARES["endless"]):
        senders.raw("endless", _stream_endlessly)
    for _ in range(requests // SHARES["slow"] // 2):
        senders.raw("slow headers", _send_headers_slowly)
        senders.raw("slow body", _send_body_slowly)


def _head(path: str, *more: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more)
    return "\r\n".join((*lines, "", "")).encode()


def _declare(connection: socket.socket) -> None:
    connection.sendall(_head("/v1/completions", f"Content-Length: {10 * 10**9}") + b'{"prompt": "')


def _stream_endlessly(connection: socket.socket) -> None:
    """Send pieces until there is an answer, or nobody who takes them."""
    connection.sendall(_head("/v1/completions", "Transfer-Encoding: chunked"))
    piece = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    connection.setblocking(False)
    for _ in range(2**12):  # 256 MiB, far more than is taken
        connection.settimeout(MOST_WAIT_S)
        connection.sendall(piece)
        if _answered(connection, 0.0):
            return


def _send_headers_slowly(connection: socket.socket) -> None:
    _dribble(connection, _head("/v1/completions", "X-Slow: " + "y" * 1000))


def _send_body_slowly(connection: socket.socket) -> None:
    body = json.dumps({"prompt": "x" * 1000}).encode()
    connection.sendall(_head("/v1/completions", f"Content-Length: {len(body)}"))
    _dribble(connection, body)


def _dribble(connection: socket.socket, data: bytes) -> None:
    """Send five bytes a second until there is an answer or an end."""
    for at in range(len(data)):
        connection.sendall(data[at : at + 1])
        if _answered(connection, 0.2):
            return


def _answered(connection: socket.socket, wait_s: float) -> bool:
    """Whether there is something to read, the end included."""
    connection.settimeout(wait_s)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, TimeoutError):
        return False
    finally:
        connection.settimeout(MOST_WAIT_S)
    return True


def _generate(document: Any, count: int, seed: int, senders: _Senders) -> None:
    """Send requests made from the document, some of them against it."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from schemathesis import GenerationMode

    results: list[Any] = list(schemathesis.openapi.from_dict(document).get_all_operations())
    posts = [each for each in (one.ok() for one in results) if each.method.upper() == "POST"]
    checks: list[Any] = list(HealthCheck)
    quiet = settings(
        max_examples=max(1, count // (2 * len(posts))), deadline=None, database=None,
        suppress_health_check=checks, phases=[Phase.generate],
    )  # fmt: skip
    for operation in posts:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @quiet
            @seeded(seed)
            @given(case=operation.as_strategy(generation_mode=mode))
            def take(case: Any) -> None:
                text = case.body if isinstance(case.body, bytes) else _written(case.body)
                senders.post("generated", case.path, text)

            take()


def _written(body: Any) -> bytes:
    """A made-up body as JSON, asking for short answers: it is the request that is tested."""
    if isinstance(body, dict):
        for name in LENGTHS:
            if isinstance(body.get(name), int) and body[name] > 4:
                body = body | {name: 4}
    return json.dumps(body, default=str).encode("utf-8", "surrogatepass")


def _names(document: Any) -> dict[str, list[str]]:
    """The fields of each path, and some that it does not have."""
    found = {}
    for path in PATHS:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        fields = document["components"]["schemas"][schema]["properties"]
        found[path] = [*fields, *STRANGE]
    return found


def _mutate(senders: _Senders, rng: random.Random, names: dict[str, list[str]]) -> None:
    """Send a good request with something wrong in it, or no request at all."""
    if rng.random() < 0.9:
        path, body = _mutated(rng, names)
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
        asks_much = any(isinstance(body.get(name), int) and body[name] > 100 for name in LENGTHS)
        kind = "mutated and left" if asks_much else "mutated"
        senders.post(kind, path, text.encode("utf-8", "surrogatepass"), leaves=asks_much)
    else:
        senders.post("garbled", *_garbled(rng))


def _mutated(rng: random.Random, names: dict[str, list[str]]) -> tuple[str, dict[str, Any]]:
    """A good request with one or two nasty values in it."""
    path = rng.choice(list(PATHS))
    body: dict[str, Any] = json.loads(json.dumps(PATHS[path]))
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(names[path])
        body[name] = rng.choice(NASTY_VALUES)
    return path, body


def _garbled(rng: random.Random) -> tuple[str, bytes]:
    """A body that is no request, or a good one with bytes changed."""
    path = rng.choice(list(PATHS))
    if rng.random() < 0.3:
        return path, rng.choice(NASTY_BODIES)
    data = bytearray(json.dumps(PATHS[path]).encode())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return path, bytes(data)
