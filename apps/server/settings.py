"""Settings of the server."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlx_mtp.decoding.config import setting

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the server, and defaults of requests.

    Attributes:
        layout: as in ``GenerationConfig``; "plain" generates one token per step.
        num_draft_tokens: draft tokens per step; None is the adapter's maximum.
        max_body_bytes: maximum size of a request.
        body_timeout_s: maximum time for a client to send a request.
        header_timeout_s: maximum time for a client to send the headers.
        send_timeout_s: maximum time for a client to read nothing while data is pending.
        ping_s: maximum silence of a stream before a comment is sent.

    Raises:
        ValueError: the combination is not safe or makes no sense.
    """

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8080, "Port to listen on; 0 chooses a free one.", min=0, max=65535)
    api_key: str | None = setting(None, "API key that clients must send.")
    allowed_origins: tuple[str, ...] = setting(
        (),
        "Origin of web pages that may use the server, as scheme://host[:port]; repeatable, or "
        "separated by commas.",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), "Additional host name of the server; repeatable, or separated by commas."
    )
    log_level: str = setting(
        "WARNING",
        "Minimum level of messages to log; INFO includes a line for each request.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    model_name: str | None = setting(None, "Name of the model in replies.")
    strict_model: bool = setting(
        False,
        "Refuse requests for other models with status 404; by default, any name is answered.",
        flag="--strict-model",
    )
    max_tokens: int = setting(
        512, "Maximum number of tokens to generate when a request does not set it.", min=1
    )
    temp: float = setting(0.0, "Sampling temperature when a request does not set it.")
    top_p: float = setting(1.0, "Value of top-p when a request does not set it.")
    top_k: int = setting(0, "Value of top-k when a request does not set it; 0 keeps all tokens.")
    thinking_budget: int | None = setting(
        None, "Maximum number of tokens of reasoning when a request does not set it.", min=0
    )
    reasoning_format: str = setting(
        "auto",
        "Report reasoning apart from the text of answers, or leave it there.",
        choices=("auto", "none"),
    )
    min_p: float = setting(0.0, "Value of min-p when a request does not set it.")
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
