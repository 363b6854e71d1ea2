"""Compiles a grammar in a process that may crash, hang or run out of memory.

Run as a script, because the compiler's limits do not cover all of its work: a chain of 3000
references overflows its stack, and an intersection of 24 regular expressions takes minutes.  Reads
the grammar from stdin and prints its error, if there is one.
"""

from __future__ import annotations

import contextlib
import sys
import threading

CPU_S = 3
MEMORY_BYTES = 2**31
STACK_BYTES = 2**21  # less than any thread of the engine has: what passes here passes there
FIRST_STEPS = 8  # enough to expand most of a hostile grammar


def main() -> None:
    """Compile the grammar from stdin."""
    _limit()
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=_try, args=(sys.stdin.buffer.read().decode(),))
    worker.start()
    worker.join()


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _try(grammar: str) -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    bytes_only = LLTokenizer("byte")
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(bytes_only, grammar, log_level=0, limits=limits)
    for _ in range(FIRST_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or not bits:
            break
        matcher.consume_token((bits & -bits).bit_length() - 1)
    if matcher.is_error():
        print(matcher.get_error())


if __name__ == "__main__":
    main()
