"""How server and engine talk: JSON objects, each behind its length in four bytes, over two pipes.

To the engine go ``load`` (once, first), ``submit`` and ``cancel``.  From it come ``ready`` or
``broken`` once, then for every job ``refused`` or ``started``, any number of ``prefill`` and
``group``, and one ``finished`` or ``failed`` at the end.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, BinaryIO

Message = dict[str, Any]
_LENGTH_BYTES = 4


def pack(message: Message) -> bytes:
    """One message as bytes.

    Raises:
        ValueError: it holds NaN or infinity, which JSON cannot say.
    """
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def read(pipe: BinaryIO) -> Message | None:
    """Read one message; None where the pipe has ended."""
    head = pipe.read(_LENGTH_BYTES)
    size = int.from_bytes(head, "little")
    body = pipe.read(size) if len(head) == _LENGTH_BYTES else b""
    return json.loads(body) if body and len(body) == size else None


async def read_async(pipe: asyncio.StreamReader) -> Message | None:
    """Read one message without blocking; None where the pipe has ended."""
    try:
        size = int.from_bytes(await pipe.readexactly(_LENGTH_BYTES), "little")
        return json.loads(await pipe.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
