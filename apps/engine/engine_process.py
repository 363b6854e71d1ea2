"""The child process that holds the model: loads it, then answers what the server sends.

It ends when the server does, and lets Ctrl-C pass: the server decides.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any, BinaryIO, cast

from mlx_mtp.apps.engine.protocol import Message, pack, read

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the pipes that stdin and stdout are."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    _push_nobody_aside()
    commands, messages = _take_pipes()

    def send(message: Message) -> None:
        messages.write(pack(message))
        messages.flush()

    options = read(commands)
    if options is None:
        return
    waiting: list[Message] = []
    reader = _Reader(commands, waiting.append)
    reader.start()
    try:
        scheduler = _load(options, send)
    except (ValueError, OSError) as error:
        send({"type": "broken", "message": " ".join(str(error).split())})
        return
    reader.hand_over(scheduler.receive, waiting)
    scheduler.run()


class _Reader(threading.Thread):
    """Reads commands; ends the process with the pipe, whatever the other threads do."""

    def __init__(self, pipe: BinaryIO, receive: Any) -> None:
        super().__init__(daemon=True, name="commands")
        self._pipe = pipe
        self._receive = receive
        self._lock = threading.Lock()

    def run(self) -> None:
        while (message := read(self._pipe)) is not None:
            with self._lock:
                self._receive(message)
        os._exit(0)

    def hand_over(self, receive: Any, waiting: list[Message]) -> None:
        """Send commands there from now on, those that waited first."""
        with self._lock:
            for message in waiting:
                receive(message)
            self._receive = receive


def _load(options: Message, send: Any) -> Any:
    """Load the model and say what it is; return the scheduler."""
    if not options["trust_remote_code"]:
        sys.modules.setdefault("torch", cast(Any, None))  # transformers would import it
    began = time.monotonic()
    import mlx.core as mx

    from mlx_mtp.apps.engine.grammar import Grammars
    from mlx_mtp.apps.engine.prefix_cache import PrefixCache
    from mlx_mtp.apps.engine.preparing import prepare
    from mlx_mtp.apps.engine.scheduler import Scheduler
    from mlx_mtp.apps.engine.session import Bench, Session
    from mlx_mtp.apps.engine.token_text import TokenTexts
    from mlx_mtp.calibration.stored_costs import speculation_for
    from mlx_mtp.cli.options import load_model
    from mlx_mtp.decoding.grouping import StepGrouper
    from mlx_mtp.decoding.step import run

    _wire_memory(mx)
    mx.random.seed(int.from_bytes(os.urandom(7), "little"))
    model, tokenizer = load_model(options)
    grammars = Grammars(tokenizer)
    speculation = speculation_for(model, measure=False)
    bench = Bench(
        model=model,
        tokenizer=tokenizer,
        speculation=speculation,
        prefixes=PrefixCache(most_bytes=options["prefix_cache_bytes"]),
        texts=TokenTexts(tokenizer),
        prefill_step_size=options["prefill_step_size"],
        lookup=options["lookup"],
    )
    send(_ready(model, tokenizer) | {"load_s": round(time.monotonic() - began, 2)})
    return Scheduler(
        prepare=lambda job: prepare(job, model, tokenizer, grammars),
        begin=lambda job: Session(job, bench),
        group=StepGrouper(model, speculation).groups,
        run=lambda steps: run(model, steps),
        send=send,
        rest=mx.clear_cache,
    )


def _ready(model: Any, tokenizer: Any) -> Message:
    """What the model is."""
    from mlx_mtp.apps.engine.tool_calls import calls_are_json

    return {
        "type": "ready",
        "model": model.name,
        "adapter": model.config is not None,
        "num_draft_tokens": model.num_draft_tokens,
        "vocab_size": model.vocab_size,
        "max_context": model.max_context,
        "has_chat_template": tokenizer.has_chat_template,
        "has_tools": tokenizer.has_chat_template and tokenizer.has_tool_calling,
        "holds_tools": tokenizer.has_tool_calling and calls_are_json(tokenizer),
        "facts": _facts(model),
    }


def _facts(model: Any) -> Message:
    """On what steps run here and what they cost."""
    import mlx.core as mx

    from mlx_mtp.backends.cpu.blas import BLAS
    from mlx_mtp.backends.device import gpu_info, machine_name
    from mlx_mtp.calibration.stored_costs import speculation_for
    from mlx_mtp.planning.costs import UNMEASURED

    curve = speculation_for(model, measure=False).costs.curve
    return {
        "device": machine_name(gpu_info()),
        "runs_on": "gpu" if mx.default_device().type == mx.gpu else "cpu",
        "blas": BLAS,
        "costs": curve.to_dict(),
        "measured": curve is not UNMEASURED,
    }


def _wire_memory(mx: Any) -> None:
    """Keep the model in the memory that a Mac's GPU may wire, as long as the process lives."""
    if mx.metal.is_available():
        mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for messages; what libraries print goes to stderr."""
    commands = os.fdopen(os.dup(0), "rb")
    messages = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return commands, messages


def _push_nobody_aside() -> None:
    """Linux: let a thread that wakes up wait for its turn rather than interrupt the server.

    A share of the cores is not given up by that, as it would be with a lower priority.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _die_with_parent() -> None:
    """Linux: be killed when the server is gone, even in the middle of a long computation."""
    if sys.platform.startswith("linux"):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


if __name__ == "__main__":
    main()
