"""What an operator decides about the server."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are taken and what they get where they say nothing.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_key: what clients must show; None asks for nothing.
        allowed_origins: web pages of other origins that may use the server, as
            ``scheme://host[:port]``.
        allowed_hosts: more names under which the server may be called.
        model_name: what the model is called; None takes the model's own name.
        max_tokens: most tokens of an answer that asks for no number.
        temp: temperature of an answer that asks for none; likewise the next three.
        top_p: nucleus.
        top_k: likeliest k.
        min_p: least share of the likeliest.
        layout: where mask tokens go; "plain" decodes plainly.
        num_draft_tokens: drafts per step; None takes the adapter's number.
        max_body_bytes: longest request.
        body_timeout_s: how long a client may take to send one.
        header_timeout_s: how long it may take to send its headers.
        send_timeout_s: how long it may take nothing of what is ready for it.
        ping_s: how long a stream may be silent before a comment is sent.

    Raises:
        ValueError: the combination is not safe or makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    model_name: str | None = None
    max_tokens: int = 512
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    layout: str = "auto"
    num_draft_tokens: int | None = None
    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 30.0
    header_timeout_s: float = 15.0
    send_timeout_s: float = 30.0
    ping_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.temp <= 2:
            raise ValueError(f"--temp must be between 0 and 2, got {self.temp}")
        if not (0 <= self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError("--top-p and --min-p must be between 0 and 1")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be at least 0, got {self.top_k}")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty")
        if not is_loopback(self.host) and self.api_key is None:
            raise ValueError(
                f"--host {self.host} can be reached from other machines and needs --api-key"
            )
        for origin in self.allowed_origins:
            parts = urlsplit(origin)
            if not parts.scheme or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin:
                raise ValueError(f"--allowed-origins {origin!r} is not scheme://host[:port]")

    def knows_host(self, header: str) -> bool:
        """Whether a ``Host`` header, which a web page cannot forge, is a name of this server."""
        name = host_name(header)
        known = {*LOOPBACK_NAMES, self.host, *self.allowed_hosts}
        if name in map(str.lower, known):
            return True
        if is_loopback(self.host):
            return False
        return _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether an origin is the server's own or an allowed one."""
        return origin in self.allowed_origins or origin.lower() == f"http://{host.lower()}"


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return the name in a ``Host`` header without port and brackets; empty if malformed."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
