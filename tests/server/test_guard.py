"""Who may ask the server, and bodies that it refuses before anybody reads their fields."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from mlx_mtp.apps.server.api.openai_completions import CompletionRequest
from mlx_mtp.apps.server.body import MAX_CONTAINERS, MAX_VALUES, parse
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.cli.main import cli
from tests.server.host import PATHS, Host, hosted


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with hosted(allowed_origins=("https://app.example",)) as running:
        running.wait_for("ok")
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Host]:
    with hosted(api_key="secret") as running:
        running.wait_for("ok")
        yield running


def test_image_urls_are_refused_and_never_fetched(host):
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/cat.png"
        parts = {
            "/v1/chat/completions": {"type": "image_url", "image_url": {"url": url}},
            "/v1/messages": {"type": "image", "source": {"type": "url", "url": url}},
        }
        for path, part in parts.items():
            body = PATHS[path] | {"messages": [{"role": "user", "content": [part]}]}
            reply = host.client.post(path, json=body)
            assert reply.status_code == 400 and "not supported" in reply.text
        item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
        assert host.client.post("/v1/responses", json={"input": [item]}).status_code == 400
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "JSON"),
        (b"[1]", "object"),
        (b"0.0", "object"),
        (b"null", "object"),
        (b'"text"', "object"),
        (b"{", "JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "deep"),
        (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "16384 lists and objects"),
        (b'{"prompt": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}", "deep"),
        (b'{"prompt": ' + b"[" * 10_000, "deep"),
        (b'{"prompt": [' + b"1," * MAX_VALUES + b"1]}", "262144 values"),
        (b'{"prompt": [' + b'"",' * MAX_VALUES + b'""]}', "262144 strings"),
        (b'{"prompt": [' + b'"\\\\",' * MAX_VALUES + b'""]}', "262144 strings"),
        (b"{" + b",".join(b'"%d": 1' % at for at in range(5000)) + b"}", "4096 keys"),
    ],
)
def test_bodies_that_are_no_json_get_400(host, data, word):
    reply = host.client.post("/v1/completions", content=data)
    assert reply.status_code == 400, reply.text
    assert word in reply.json()["error"]["message"]


@pytest.mark.parametrize("text", [",[" * MAX_VALUES, '",[{\\' * MAX_CONTAINERS])
def test_a_long_text_is_not_taken_for_many_values(text):
    data = json.dumps({"prompt": text}).encode()
    assert parse(data, CompletionRequest).prompt == text


@pytest.mark.parametrize("most", [MAX_CONTAINERS - 1, 2 * MAX_VALUES])
def test_a_million_faults_take_no_time(most):
    data = b'{"prompt": [' + b",".join([b"[]"] * most) + b"]}"
    began = time.process_time()
    with pytest.raises(ApiError) as refusal:
        parse(data, CompletionRequest)
    assert refusal.value.status == 400
    assert time.process_time() - began < 1  # it was 4 s


def raw(host: Host, request: bytes, *, wait_s: float = 20) -> bytes:
    """Send bytes and read until the server closes."""
    with socket.create_connection(host.address, timeout=wait_s) as connection:
        connection.sendall(request)
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def test_huge_bodies_are_refused_before_they_are_read(host):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    assert b" 413 " in raw(host, head + b"Content-Length: 10000000000\r\n\r\n{")
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with socket.create_connection(host.address, timeout=20) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(20):
                connection.sendall(chunk)
            seen = connection.recv(65536)
        except ConnectionError:
            seen = b" 413 "  # it closed while we were still sending
    assert b" 413 " in seen


def test_slow_senders_are_shown_the_door():
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    with hosted(body_timeout_s=0.3, header_timeout_s=0.6) as host:
        assert b" 408 " in raw(host, head)
        assert raw(host, b"GET /health HTTP/1.1\r\nHost: loc") == b""


def flooded(host: Host, *, buffer_bytes: int) -> socket.socket:
    """Ask for 2 MiB and what follows; nothing is read of it yet."""
    host.wait_for("ok")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(20)
    connection.connect(host.address)
    body = json.dumps({"messages": [{"role": "user", "content": "flood"}], "stream": True})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    deadline = time.monotonic() + 20
    while not host.engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return connection


def test_a_client_that_takes_nothing_loses_its_place():
    with (
        hosted(engine={"max_concurrent": 1}, send_timeout_s=0.4) as host,
        flooded(host, buffer_bytes=4096) as connection,
    ):
        assert host.chat("hello").json()["choices"][0]["message"]["content"] == "hello"
        counted = host.client.get("/metrics").text
        assert "mlx_mtp_stalled_clients_total 1.0" in counted
        assert 'mlx_mtp_answers_total{reason="cancelled"} 1.0' in counted
        taken = 0
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(2**16):
                taken += len(piece)
        assert taken < 2**20


def test_a_client_that_takes_little_at_a_time_keeps_its_place():
    with (
        hosted(send_timeout_s=0.8) as host,
        flooded(host, buffer_bytes=2**16) as connection,
    ):
        until, taken = time.monotonic() + 1.6, 0
        while time.monotonic() < until:
            taken += len(connection.recv(2**14))
            time.sleep(0.02)
        assert 0 < taken < 2**21  # so that all the while there was more
        assert host.engine.running == 1
        assert "mlx_mtp_stalled_clients_total 0.0" in host.client.get("/metrics").text


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io"])
def test_foreign_hosts_are_refused(host, name):
    reply = host.client.get("/health", headers={"Host": name})
    assert reply.status_code == 403


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:99", "127.0.0.1:8080", "[::1]:8080"])
def test_loopback_hosts_are_known(host, name):
    assert host.client.get("/health", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil", "x"])
def test_foreign_origins_are_refused(host, origin):
    for path, body in PATHS.items():
        reply = host.client.post(path, json=body, headers={"Origin": origin})
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers


def test_an_allowed_origin_may_ask_and_no_other_is_named(host):
    asking = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    reply = host.client.options("/v1/chat/completions", headers=asking)
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in reply.headers["access-control-allow-headers"]
    reply = host.client.get("/v1/models", headers={"Origin": "https://app.example"})
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    own = host.client.get("/v1/models", headers={"Origin": host.url})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_an_api_key_is_asked_for(locked):
    assert locked.client.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "sécret".encode()}):
        reply = locked.client.get("/v1/models", headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    for headers in ({"Authorization": "Bearer secret"}, {"X-Api-Key": "secret"}):
        assert locked.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"host": "0.0.0.0"}, "--api-key"),
        ({"host": "::"}, "--api-key"),
        ({"host": "192.168.1.2"}, "--api-key"),
        ({"api_key": " "}, "empty"),
        ({"allowed_origins": ("*",)}, "'*'"),
        ({"allowed_origins": ("https://a.example/path",)}, "path"),
        ({"temp": 9.0}, "--temp"),
    ],
)
def test_unsafe_settings_are_refused(fields, word):
    with pytest.raises(ValueError, match=word.replace("*", r"\*")):
        Settings(**fields)


@pytest.mark.parametrize(
    ("arguments", "patience"), [((), (30, 15, 30)), (("--client-timeout", "90"), (90, 45, 90))]
)
def test_slow_links_can_be_given_time(monkeypatch, arguments, patience):
    seen: list[Settings] = []
    monkeypatch.setattr(
        "mlx_mtp.apps.server.run.serve", lambda app, engine, settings: seen.append(settings)
    )
    assert CliRunner().invoke(cli, ["serve", *arguments]).exit_code == 0
    (found,) = seen
    assert (found.body_timeout_s, found.header_timeout_s, found.send_timeout_s) == patience
