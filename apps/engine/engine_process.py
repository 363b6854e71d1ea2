"""The child process that runs the model: it loads the model, then runs the jobs of the server.

It ends with the server.  It ignores Ctrl-C, which the server handles.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

from mlx_mtp.apps.engine.protocol import (
    Broken,
    Cancel,
    Event,
    JobMessage,
    Load,
    Ready,
    Submit,
    pack,
    read_command,
)
from mlx_mtp.terminal import one_line

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read commands from stdin and write events to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    _yield_to_server()
    commands, events = _take_pipes()

    def send(event: Event | JobMessage) -> None:
        events.write(pack(event))
        events.flush()

    load = read_command(commands)
    if not isinstance(load, Load):
        return
    waiting: list[Submit | Cancel] = []
    ending: list[Callable[[], None]] = []
    reader = _Reader(commands, waiting.append, ending)
    reader.start()
    try:
        scheduler = _load(load, send, ending)
    except (ValueError, OSError) as error:
        send(Broken(message=one_line(error)))
        return
    reader.redirect(scheduler.receive, waiting)
    scheduler.run()


class _Reader(threading.Thread):
    """Reads commands; ends the process at the end of the pipe or after an invalid command.

    Args:
        pipe: the commands.
        receive: called with each.
        ending: called before the end of the process.
    """

    def __init__(
        self, pipe: BinaryIO, receive: Callable[[Any], None], ending: list[Callable[[], None]]
    ) -> None:
        super().__init__(daemon=True, name="commands")
        self._ending = ending
        self._pipe = pipe
        self._receive = receive
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            while (command := read_command(self._pipe)) is not None:
                with self._lock:
                    self._receive(command)
        except ValueError:
            traceback.print_exc()
        try:
            for end in self._ending:
                end()
        finally:
            os._exit(0)

    def redirect(self, receive: Callable[[Any], None], waiting: list[Submit | Cancel]) -> None:
        """Pass the waiting commands and all later ones to ``receive``."""
        with self._lock:
            for command in waiting:
                receive(command)
            self._receive = receive


def _load(
    load: Load, send: Callable[[Event | JobMessage], None], ending: list[Callable[[], None]]
) -> Any:
    """Load the model, send ``Ready`` and return the scheduler; add to what ends the process."""
    if not load.trust_remote_code:
        sys.modules.setdefault("torch", cast(Any, None))  # transformers would import it
    import mlx.core as mx

    from mlx_mtp.apps.engine.encoding import encode
    from mlx_mtp.apps.engine.grammar import Grammars
    from mlx_mtp.apps.engine.prefix_setup import make_draft_prefix_cache, make_prefix_cache
    from mlx_mtp.apps.engine.preparing import Prepared, check_drafts, prepare, template_config
    from mlx_mtp.apps.engine.protocol import Job
    from mlx_mtp.apps.engine.scheduler import Scheduler
    from mlx_mtp.apps.engine.session import Engine, Session, must_wait, with_stored_blocks
    from mlx_mtp.apps.engine.token_text import TokenTexts
    from mlx_mtp.calibration.stored_costs import speculation_for
    from mlx_mtp.decoding.config import GenerationConfig
    from mlx_mtp.decoding.grouping import StepGrouper
    from mlx_mtp.decoding.step import run
    from mlx_mtp.loading import load_with_status

    _wire_memory(mx)
    mx.random.seed(int.from_bytes(os.urandom(7), "little"))
    config = GenerationConfig(
        drafter=load.drafter,
        layout=load.layout if load.mtp else "plain",
        lookup=load.lookup,
        num_draft_tokens=load.num_draft_tokens,
    )
    model, tokenizer = load_with_status(
        load.model,
        adapter_path=load.adapter_path,
        trust_remote_code=load.trust_remote_code,
        mtp=load.mtp,
        draft_model=load.draft_model,
        adapter=load.adapter,
        tokenizer_config={"chat_template": load.chat_template} if load.chat_template else None,
        extra_eos_token=load.extra_eos_token,
        config=config,
        show_drafters=False,  # the server does
    )
    drafters = check_drafts(model, config)
    grammars = Grammars(tokenizer)
    speculation = speculation_for(model)
    prefixes = make_prefix_cache(model, load, **load.cache)
    ending.append(prefixes.close)
    engine = Engine(
        model=model,
        tokenizer=tokenizer,
        speculation=speculation,
        prefixes=prefixes,
        draft_prefixes=make_draft_prefix_cache(model, load),
        texts=TokenTexts(tokenizer),
        prefill_step_size=load.prefill_step_size,
        lookup=load.lookup,
    )

    def prepare_job(values: dict[str, Any]) -> Any:
        job = Job.from_dict(values)
        job.drafter = job.drafter or load.drafter
        if job.messages is not None:
            job.template_config = template_config(job, tokenizer, load.chat_template_args)
        if job.only:
            return encode(job, tokenizer, vocab_size=model.vocab_size)
        return with_stored_blocks(prepare(job, model, tokenizer, grammars), engine)

    def begin(job: Prepared) -> Session:
        prefixes.pause_writing()
        return Session(job, engine)

    def rest() -> None:
        mx.clear_cache()
        prefixes.resume_writing()

    send(_ready(model, tokenizer, drafters))
    return Scheduler(
        prepare=prepare_job,
        begin=begin,
        group=StepGrouper(model, speculation).groups,
        run=lambda steps: run(model, steps),
        send=send,
        must_wait=lambda job, running: must_wait(job, running, engine),
        report=lambda: send(prefixes.counts()),
        rest=rest,
    )


def _ready(model: Any, tokenizer: Any, drafters: Sequence[str]) -> Ready:
    """The description of the model."""
    from mlx_mtp.text.reasoning import reasoning_marks

    return Ready(
        model=model.name,
        adapter=model.config is not None,
        draft_model=None if model.draft_model is None else model.draft_model.name,
        num_draft_tokens=model.num_draft_tokens,
        drafters=list(drafters),
        max_context=model.max_context,
        has_chat_template=tokenizer.has_chat_template,
        has_reasoning=reasoning_marks(tokenizer) is not None,
        chat_template=_template(tokenizer),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        facts=_facts(model),
    )


def _template(tokenizer: Any) -> str:
    """The source of the chat template; of several, the one for conversations without tools."""
    template = tokenizer.chat_template if tokenizer.has_chat_template else ""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def _facts(model: Any) -> dict[str, Any]:
    """The device and the costs of steps on it."""
    import mlx.core as mx

    from mlx_mtp.backends.cpu.blas import BLAS
    from mlx_mtp.backends.device import gpu_info, machine_name
    from mlx_mtp.calibration.stored_costs import speculation_for

    curve = speculation_for(model).costs.curve
    return {
        "device": machine_name(gpu_info()),
        "runs_on": "gpu" if mx.default_device().type == mx.gpu else "cpu",
        "blas": BLAS,
        "costs": curve.to_dict(),
        "measured": not curve.is_guess,
    }


def _wire_memory(mx: Any) -> None:
    """Keep the model in wired memory on a Mac for the life of the process."""
    if mx.metal.is_available():
        mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Use stdin and stdout for messages; the output of libraries goes to stderr."""
    commands = os.fdopen(os.dup(0), "rb")
    messages = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return commands, messages


def _yield_to_server() -> None:
    """On Linux, do not preempt the server when a thread wakes up.

    Unlike a lower priority, this does not reduce the engine's share of the cores.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _die_with_parent() -> None:
    """On Linux, be killed when the server ends, even during a long computation."""
    if sys.platform.startswith("linux"):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


if __name__ == "__main__":
    main()
