"""Chat with a model in the terminal.

``Conversation`` keeps the messages and the cache.  For every answer the chat template is
applied to the whole conversation, which is then encoded.  The cache is rewound to the ids that it
shares with the conversation, and these are not computed again.  Recurrent layers can only be
rewound to checkpoints, at the ends of prompts and answers, so some ids are computed again there.
The number of cached ids is the cache's own offset, so an answer that was interrupted, or whose text
encodes to other ids, costs time but never correctness.

``Repl`` reads lines and prints.  At a terminal prompt_toolkit edits them: it is small and pure
Python, and brings history, pasted blocks and wide characters on every platform, where Python's own
readline may be libedit or missing.  History stays in memory.  A pipe is read line by line.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_mtp.generate import (
    ContextOverflow,
    GenerationResponse,
    chat_text,
    encode_lookup,
    encode_prompt,
    stream_generate,
)
from mlx_mtp.terminal import AnswerWriter, Interrupt, Status, dim, one_line
from mlx_mtp.text.answer_printer import AnswerPrinter
from mlx_mtp.text.reasoning import Reasoning, split_reasoning

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.caches.mtp_cache import MTPCache
    from mlx_mtp.model.mtp_model import MTPModel

CACHE_OPTIONS = ("max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start")
COMMANDS = {
    "/help": "list the commands",
    "/reset": "start a new conversation",
    "/system": "set the system prompt (/system TEXT), or show it",
    "/regenerate": "answer the last message again",
    "/stats": "show statistics of the last answer",
    "/quit": "quit (or Ctrl-D)",
}
GREETING = f"Commands: {' '.join(COMMANDS)} - Ctrl-C stops an answer, Ctrl-D quits."
PROMPT = "> "


class Conversation:
    """The messages so far, and a cache of their ids.

    Args:
        model: from ``load``.
        tokenizer: from ``load``.
        system_prompt: first message, if any.
        template_config: settings for the chat template.
        options: arguments of ``stream_generate``; the seed increases by one with every answer, so
            that ``regenerate`` gives a different one.

    Raises:
        ValueError: the tokenizer has no chat template.

    Attributes:
        system_prompt: may be changed at any time.
        messages: of user and assistant in turn, without the system prompt.
        last: the last response of the last answer.
        reasoning: the marks of its reasoning, if the model has any.
    """

    def __init__(
        self,
        model: MTPModel,
        tokenizer: TokenizerWrapper,
        *,
        system_prompt: str | None = None,
        template_config: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.has_chat_template:
            raise ValueError(f"{model.name} has no chat template; use mlx-mtp generate")
        self.system_prompt = system_prompt
        self.messages: list[dict[str, str]] = []
        self.last: GenerationResponse | None = None
        self.reasoning: Reasoning | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._template_config = template_config
        self._options = dict(options or {})
        self._cache_options = {
            name: self._options.pop(name) for name in CACHE_OPTIONS if name in self._options
        }
        if texts := self._options.pop("lookup_texts", ()):
            self._options["lookup_ids"] = encode_lookup(tokenizer, texts)
        self._seed = self._options.pop("seed", None)
        self._answers = itertools.count()
        self._cache = self._new_cache()
        self._cached_ids: list[int] = []

    @property
    def is_full(self) -> bool:
        """Whether the last answer reached the end of the model's context."""
        if self.last is None or self._model.max_context is None:
            return False
        last = self.last
        length = last.cached_tokens + last.prompt_tokens + last.generation_tokens
        return length >= self._model.max_context

    def reset(self) -> None:
        """Clear the messages and the cache; keep the system prompt."""
        self.messages = []
        self.last = None
        self._clear_cache()

    def ask(
        self,
        text: str,
        *,
        progress: Callable[[int, int], None] | None = None,
        explain: Callable[[str], None] | None = None,
    ) -> Generator[GenerationResponse, None, None]:
        """Answer a message.

        An interrupted answer is kept up to its last token; the message of an answer without
        any token is dropped.

        Args:
            text: the message.
            progress: called with (ids prefilled, ids to prefill).
            explain: called with a line about each step.

        Raises:
            ContextOverflow: the conversation no longer fits the model's context.
            ValueError: the message is empty or the template rejects it.
        """
        if not text.strip():
            raise ValueError("the message is empty")
        return self._answer([*self.messages, {"role": "user", "content": text}], progress, explain)

    def regenerate(
        self,
        *,
        progress: Callable[[int, int], None] | None = None,
        explain: Callable[[str], None] | None = None,
    ) -> Generator[GenerationResponse, None, None]:
        """Drop the last answer and answer again.

        Raises:
            ValueError: there is no answer yet.
        """
        if not self.messages:
            raise ValueError("there is no message to answer again")
        return self._answer(self.messages[:-1], progress, explain)

    def _answer(
        self,
        messages: list[dict[str, str]],
        progress: Callable[[int, int], None] | None,
        explain: Callable[[str], None] | None,
    ) -> Generator[GenerationResponse, None, None]:
        """Stream the answer to the last message, then add both to the conversation."""
        pieces, emitted = [], []
        ids = self._encode(messages)
        self.reasoning = Reasoning.of(self._tokenizer, ids)
        prompt = self._rewind_to_common(ids)
        options = self._options
        if self._seed is not None:
            options = options | {"seed": self._seed + next(self._answers)}
        try:
            stream = stream_generate(
                self._model,
                self._tokenizer,
                prompt,
                prompt_cache=self._cache,
                cached_ids=ids[: self._cache.offset],
                reasoning=self.reasoning,
                prompt_progress_callback=progress,
                explain=explain,
                **options,
            )
            with contextlib.closing(stream):
                for response in stream:
                    self.last = response
                    pieces.append(response.text)
                    emitted.append(response.token)
                    yield response
        except KeyboardInterrupt:  # in the middle of a step: layers may be at different rows
            self._clear_cache()
            raise
        finally:
            self._cache.checkpoint()
            self._cached_ids = [*ids, *emitted][: self._cache.offset]
            if emitted:
                parts = split_reasoning(self.reasoning, "".join(pieces))
                answer = {"role": "assistant", "content": parts.content}
                if parts.reasoning:
                    answer["reasoning_content"] = parts.reasoning
                self.messages = [*messages, answer]

    def _encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Turn a conversation into ids."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        config = self._template_config
        text = chat_text(self._tokenizer, [*system, *messages], template_config=config)
        return encode_prompt(self._tokenizer, text, add_special_tokens=False)

    def _rewind_to_common(self, ids: list[int]) -> list[int]:
        """Rewind the cache to what it shares with ``ids``; return the rest, at least one id."""
        pairs = zip(self._cached_ids, ids[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        start = self._cache.rewind_point(shared)
        surplus = self._cache.offset - start
        if self._cache.can_rewind(surplus):
            self._cache.rewind(surplus)
        else:
            self._clear_cache()
        return ids[start:]

    def _clear_cache(self) -> None:
        self._cache = self._new_cache()
        self._cached_ids = []

    def _new_cache(self) -> MTPCache:
        """Make a cache that a changed message can be rewound to, which needs checkpoints."""
        cache = self._model.make_cache(**self._cache_options)
        cache.keeps_checkpoints = True
        return cache


class Repl:
    """Reads messages and commands, prints answers."""

    def __init__(self, conversation: Conversation, *, explain: bool = False) -> None:
        self._conversation = conversation
        self._explain = explain

    def run(self, lines: Iterator[str]) -> None:
        """Read until the lines end or ``/quit``."""
        print(dim(GREETING), flush=True)
        for line in lines:
            text = line.rstrip("\r\n")
            if not text.strip():
                continue
            if not text.startswith("/"):
                self._print(partial(self._conversation.ask, text))
            elif not self._execute(*text.partition(" ")[::2]):
                return

    def _execute(self, command: str, argument: str) -> bool:
        """Execute a command; return False to quit."""
        conversation = self._conversation
        match command:
            case "/quit":
                return False
            case "/reset":
                conversation.reset()
                self._note("started a new conversation")
            case "/system":
                if argument.strip():
                    conversation.system_prompt = argument.strip()
                self._note(f"system prompt: {conversation.system_prompt or '(none)'}")
            case "/regenerate":
                self._print(conversation.regenerate)
            case "/stats":
                self._note(*(conversation.last.lines() if conversation.last else ["no answer yet"]))
            case "/help":
                self._note(*(f"{name:12} {meaning}" for name, meaning in COMMANDS.items()))
            case _:
                self._note(
                    f"unknown command {command}; see /help, or start the message with a space "
                    "to send it"
                )
        return True

    def _print(self, answer: Callable[..., Generator[GenerationResponse, None, None]]) -> None:
        """Print an answer while it is generated; Ctrl-C stops it."""
        try:
            with Interrupt() as interrupt, Status("Reading ...") as status:
                last = self._write(answer, interrupt, status)
        except ContextOverflow as error:
            self._note(f"{one_line(error)}: /reset starts a new conversation")
        except ValueError as error:
            self._note(f"Error: {one_line(error)}")
        else:
            if last is None:
                self._note("stopped; the message was dropped")
            else:
                self._note(_summary(last))
                if self._conversation.is_full:
                    self._note("the context is full: /reset starts a new conversation")

    def _write(
        self,
        answer: Callable[..., Generator[GenerationResponse, None, None]],
        interrupt: Interrupt,
        status: Status,
    ) -> GenerationResponse | None:
        """Print the answer; return its last response, or None if Ctrl-C came before the first."""
        output = AnswerWriter(status)
        printer: AnswerPrinter | None = None

        def on_prefill(done: int, total: int) -> None:
            status.update(f"Reading {done}/{total} tokens ...")
            interrupt.check()

        last = None
        stream = answer(progress=on_prefill, explain=output.log if self._explain else None)
        try:
            for last in stream:
                printer = printer or AnswerPrinter(output, self._conversation.reasoning)
                printer.write(last.text)
                interrupt.check()
        except KeyboardInterrupt:
            pass
        finally:
            stream.close()
        if printer:
            printer.finish()
        print(flush=True)
        return last

    def _note(self, *lines: str) -> None:
        for line in lines:
            print(dim(line), flush=True)


def run(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    *,
    system_prompt: str | None = None,
    template_config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    explain: bool = False,
) -> None:
    """Chat on stdin and stdout; see ``Conversation`` for the arguments.

    With ``explain`` a line about each step is printed on stderr.
    """
    conversation = Conversation(
        model,
        tokenizer,
        system_prompt=system_prompt,
        template_config=template_config,
        options=options,
    )
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    repl = Repl(conversation, explain=explain)
    repl.run(_edited_lines() if at_terminal else iter(sys.stdin.readline, ""))


def _edited_lines() -> Iterator[str]:
    """Lines typed at the terminal, until Ctrl-D; Ctrl-C clears the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        completer=WordCompleter(list(COMMANDS), sentence=True), complete_while_typing=False
    )
    while True:
        try:
            yield session.prompt(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _summary(last: GenerationResponse) -> str:
    """The line after an answer."""
    line = (
        f"{last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s, "
        f"{last.tokens_per_step:.2f} tokens/step"
    )
    if last.finish_reason is None:
        line += ", stopped"
    elif last.finish_reason == "length":
        line += ", stopped at the token limit"
    return line
