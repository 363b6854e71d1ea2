"""Requests that a server must survive."""

from __future__ import annotations

from typing import Any

_HI = [{"role": "user", "content": "hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _HI, "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": _HI, "max_tokens": 2},
}
NASTY_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, 1e-300, 1e300, -0.0, 2**31, 2**63, -(2**63), 2**64, 10**30,
    10**9, float("nan"), float("inf"), "", "a", "\x00", "\ufeff", "\ud800", "\u202e\u2028",
    "<eos><user>", "x" * 5000, "0", "NaN", [], [[]], [None], {}, [1, 2, 3], [-5], [259, 260],
    ["a", ""], {"a": 1}, {"": ""}, {"-5": 1.0}, {"99999999": 5}, {"1": 1e9}, {"65": 100},
    {"type": "json_object"}, {"type": "text"}, {"type": "auto"}, {"details": True},
    {"layout": "quadratic"}, {"num_draft_tokens": 0}, {"num_draft_tokens": -1},
    {"include_usage": True}, "none", "auto", "required", [{"type": "function"}],
    [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}],
    [{"role": "assistant", "content": "on"}], [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": "{{ 7 * 7 }}{% raise %}"}],
]  # fmt: skip
NASTY_BODIES: list[bytes] = [
    b"", b"null", b"[]", b"\xff\xfe\x00", b'{"prompt": "\xc0\xaf"}', b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", b'{"prompt": "a", "top_p": NaN}',
    b'{"prompt": "a", "prompt": "b"}', b'{"prompt": 1e400}', b"\x00" * 1000, b" " * 100_000,
    b'{"prompt": "' + b"y" * 100_000 + b'"}',
]  # fmt: skip
DEEP_BODIES: list[bytes] = [
    b"{" * 200_000, b"[" * 200_000 + b"]" * 200_000, b'{"a":' * 200_000,
    b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", b'{"a":' * 500 + b"1" + b"}" * 500,
]  # fmt: skip
MANY_BODIES: list[bytes] = [
    b'{"prompt": [' + b",".join([b"1"] * 2_000_000) + b"]}",
    b'{"prompt": [' + b",".join([b"[]"] * 2_000_000) + b"]}",
    b'{"messages": [' + b",".join([b'{"role": 1}'] * 500_000) + b"]}",
    b"{" + b",".join(b'"%d": 1' % at for at in range(500_000)) + b"}",
    b'{"prompt": [' + b",".join([b'"\\""'] * 1_000_000) + b"]}",
    b'{"prompt": [' + b",".join([b"true"] * 200_000) + b"]}",
]
"""Bodies of up to 8 MB that would take a server seconds, were it to look at each value."""
