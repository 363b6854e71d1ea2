"""The conversation over a scripted loop: cache reuse, commands, pipes, a real terminal."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_mtp.chat import COMMANDS, Conversation, Repl
from mlx_mtp.cli.main import cli
from mlx_mtp.generate import ContextOverflow
from tests.helpers.fixtures_generate import (
    ASSISTANT,
    EOS,
    SYSTEM,
    USER,
    FakeModel,
    byte_tokenizer,
    ids_of,
    scripted,
)
from tests.helpers.hybrid import hybrid_mtp
from tests.helpers.tiny import BYTE_VOCAB
from tests.test_terminal import Terminal

__all__ = ["scripted"]

PROMPT_SHOWN = r"\?2004h.*>"  # the editor asks for marked pastes whenever it prompts
FAKE_CLI = [sys.executable, str(Path(__file__).with_name("cli") / "fake_cli.py")]


def conversation(model: FakeModel, **options: Any) -> Conversation:
    return Conversation(model, byte_tokenizer(), options=options)  # type: ignore[arg-type]


def ask(talk: Conversation, text: str) -> str:
    return "".join(response.text for response in talk.ask(text))


def turn(user: str, *answer: str) -> list[int]:
    """Ids of a user's message and, if given, the finished answer."""
    ids = [USER, *ids_of(user), EOS, ASSISTANT]
    return [*ids, *ids_of(answer[0]), EOS] if answer else ids


def test_only_what_is_new_is_computed(scripted):
    scripted.answers = [[*ids_of("one"), EOS], [*ids_of("two"), EOS], [*ids_of("three"), EOS]]
    talk = conversation(scripted)
    assert [ask(talk, "a"), ask(talk, "b"), ask(talk, "c")] == ["one", "two", "three"]
    first, second, third = scripted.calls
    assert (first.cached, first.prompt) == ([], turn("a"))
    assert second.cached == turn("a", "one")[:-1]
    assert second.cached + second.prompt == turn("a", "one") + turn("b")
    assert third.cached == (turn("a", "one") + turn("b", "two"))[:-1]
    assert len(third.prompt) == 1 + len(turn("c"))
    assert [message["content"] for message in talk.messages] == [
        "a",
        "one",
        "b",
        "two",
        "c",
        "three",
    ]
    assert talk.last and talk.last.cached_tokens == len(third.cached)
    assert len(scripted.caches) == 1


def test_the_loop_knows_all_ids_of_the_conversation_and_of_files(scripted):
    scripted.answers = [[*ids_of("one"), EOS], [*ids_of("two"), EOS]]
    talk = conversation(scripted, lookup_texts=["file", "", "other"])
    assert [ask(talk, "a"), ask(talk, "b")] == ["one", "two"]
    for call in scripted.calls:
        assert call.cached_ids == call.cached
        assert call.lookup_ids == [ids_of("file"), ids_of("other")]


def test_an_answer_that_encodes_differently_is_computed_again_from_there(scripted):
    scripted.answers = [[*ids_of("ok \ud83d".encode("utf-8", "ignore").decode()), 0xF0, EOS], [EOS]]
    talk = conversation(scripted)
    assert ask(talk, "a") == "ok \ufffd"  # encoded as a character
    ask(talk, "b")
    assert scripted.calls[1].cached == turn("a") + ids_of("ok ")
    assert scripted.calls[1].prompt == [*ids_of("\ufffd"), EOS, *turn("b")]


def test_a_stop_string_leaves_no_trace_in_the_cache(scripted):
    scripted.group = 9
    scripted.answers = [[*ids_of("yes.no no"), EOS], [EOS]]
    talk = conversation(scripted, stop=["."])
    assert ask(talk, "a") == "yes"
    ask(talk, "b")
    assert scripted.calls[1].cached == turn("a") + ids_of("yes")
    assert scripted.calls[1].prompt == [EOS, *turn("b")]


def test_an_answer_broken_off_is_kept_as_far_as_it_got(scripted):
    scripted.answers = [[*ids_of("abcdef"), EOS], [EOS]]
    talk = conversation(scripted)
    stream = talk.ask("x")
    for response in stream:
        if response.text == "c":
            break
    stream.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "abc"}
    ask(talk, "y")
    assert scripted.calls[1].cached == turn("x") + ids_of("ab")
    assert scripted.calls[1].prompt == [ord("c"), EOS, *turn("y")]


def test_a_message_that_was_never_answered_is_forgotten(scripted):
    def refuse(done: int, total: int) -> None:
        raise KeyboardInterrupt

    scripted.answers = [[EOS], [*ids_of("ok"), EOS]]
    talk = conversation(scripted)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("x", progress=refuse))
    assert talk.messages == []
    assert ask(talk, "y") == "ok"
    assert scripted.calls[1].cached == []
    assert scripted.calls[1].prompt == turn("y")


def test_regenerate_answers_again(scripted):
    scripted.answers = [[*ids_of("one"), EOS], [*ids_of("two"), EOS]]
    talk = conversation(scripted, seed=5)
    with pytest.raises(ValueError, match="no message to answer again"):
        talk.regenerate()
    ask(talk, "a")
    assert "".join(response.text for response in talk.regenerate()) == "two"
    assert [message["content"] for message in talk.messages] == ["a", "two"]
    again = scripted.calls[1]
    assert again.cached + again.prompt == turn("a")
    assert len(again.prompt) == 1  # the last id is fed again, for its logits
    assert [call.seed for call in scripted.calls] == [5, 6]


def test_reset_forgets_and_the_system_prompt_stays(scripted):
    scripted.answers = [[*ids_of("one"), EOS], [EOS]]
    talk = Conversation(scripted, byte_tokenizer(), system_prompt="S")  # type: ignore[arg-type]
    ask(talk, "a")
    talk.reset()
    ask(talk, "b")
    assert scripted.calls[1].cached == []
    assert scripted.calls[1].prompt == [SYSTEM, ord("S"), EOS, *turn("b")]


def test_a_changed_system_prompt_is_computed_anew(scripted):
    scripted.answers = [[*ids_of("one"), EOS], [EOS]]
    talk = conversation(scripted)
    ask(talk, "a")
    talk.system_prompt = "S"
    ask(talk, "b")
    assert scripted.calls[1].cached == []
    assert scripted.calls[1].prompt == [SYSTEM, ord("S"), EOS, *turn("a", "one"), *turn("b")]


def test_a_cache_that_cannot_rewind_is_replaced(scripted):
    scripted.answers = [[*ids_of("one"), EOS], [EOS]]
    talk = conversation(scripted, max_kv_size=64, layout="linear")
    ask(talk, "a")
    talk.system_prompt = "S"
    scripted.caches[0].rewindable = False
    ask(talk, "b")
    assert len(scripted.caches) == 2 and scripted.cache_options == {"max_kv_size": 64}
    assert scripted.calls[1].layout == "linear"


def test_a_full_context_is_said_with_the_way_out(scripted, capsys):
    scripted.max_context = 20
    scripted.answers = [[*ids_of("0123456789"), EOS], [*ids_of("ok"), EOS]]
    talk = conversation(scripted)
    with pytest.raises(ContextOverflow):
        list(talk.ask("x" * 20))
    assert talk.messages == []
    Repl(talk).run(iter(["hello", "y" * 9, "/reset", "hi"]))
    lines = capsys.readouterr().out.splitlines()
    assert "the context is full: /reset starts a new conversation" not in lines[2]
    assert lines[3] == (
        "the prompt has 31 tokens, but fake takes fewer than 20: /reset starts a new conversation"
    )
    assert lines[4] == "started a new conversation"
    assert lines[5] == "ok"


def test_an_answer_that_fills_the_context_says_so(scripted, capsys):
    scripted.max_context = 15
    scripted.answers = [ids_of("0123456")]
    Repl(conversation(scripted, max_tokens=7)).run(iter(["hello"]))
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "the context is full: /reset starts a new conversation"
    )


def test_a_tokenizer_without_template_cannot_chat(scripted):
    with pytest.raises(ValueError, match="fake has no chat template"):
        Conversation(scripted, byte_tokenizer(template=None))  # type: ignore[arg-type]


def test_the_repl_obeys_commands(scripted, capsys):
    scripted.answers = [[*ids_of("one"), EOS], [*ids_of("two"), EOS], [*ids_of("three"), EOS]]
    lines = [
        "/stats", "/regenerate", "a\n", "", "   \n", "/stats", "/regenerate", "/system",
        "/system S", "/what now", " /spaced", "/help", "/quit", "never",
    ]  # fmt: skip
    Repl(conversation(scripted)).run(iter(lines))
    out = capsys.readouterr().out
    first, *rest = out.splitlines()
    assert all(command in first for command in COMMANDS)
    assert rest[0] == "no answer yet"
    assert rest[1] == "Error: there is no message to answer again"
    assert rest[2] == "one"
    assert re.fullmatch(r"4 tokens, \d+\.\d tokens/s, 2\.00 tokens/step", rest[3])
    assert rest[4].startswith("Prompt: 4 tokens, ")
    assert rest[7] == "MTP (mask): 2/3 drafts accepted (66.7%), 2.00 tokens/step"
    assert rest[8] == "two"
    assert rest[10:13] == [
        "system prompt: (none)",
        "system prompt: S",
        "unknown command /what; see /help, or start the message with a space to send it",
    ]
    assert rest[13] == "three"
    assert len(rest) == 15 + len(COMMANDS)
    assert scripted.calls[-1].prompt[:3] == [SYSTEM, ord("S"), EOS]
    assert len(scripted.calls) == 3


def test_ctrl_c_stops_the_answer_not_the_program(scripted, capsys, monkeypatch):
    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if text == "b":
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Out()
    monkeypatch.setattr(sys, "stdout", out)
    scripted.answers = [[*ids_of("abcdef"), EOS], [*ids_of("ok"), EOS]]
    talk = conversation(scripted)
    Repl(talk).run(iter(["x", "y"]))
    lines = out.getvalue().splitlines()
    assert lines[1] == "ab"
    assert lines[2].endswith(", stopped")
    assert lines[3] == "ok"
    assert [message["content"] for message in talk.messages] == ["x", "ab", "y", "ok"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_chat_reads_lines_from_a_pipe(scripted, monkeypatch):
    monkeypatch.setattr("mlx_mtp.loading.load", lambda *_, **__: (scripted, byte_tokenizer(), {}))
    scripted.answers = [[*ids_of("né"), EOS], [*ids_of("two"), EOS]]
    args = ["chat", "--system-prompt", "S", "--temp", "0.5", "--seed", "3", "--kv-bits", "8"]
    result = CliRunner().invoke(cli, args, input="hé\nb")
    assert result.exit_code == 0
    assert result.stderr == "Drafting with mask tokens and lookup\n"
    lines = result.stdout.splitlines()
    assert (lines[1], lines[3], len(lines)) == ("né", "two", 5)
    call = scripted.calls[0]
    assert call.prompt == [SYSTEM, ord("S"), EOS, *turn("hé")]
    assert (call.max_tokens, call.seed, call.sampling.temp) == (256, 3, 0.5)
    assert scripted.cache_options["kv_bits"] == 8


def test_chat_explains_each_step(scripted, monkeypatch):
    monkeypatch.setattr("mlx_mtp.loading.load", lambda *_, **__: (scripted, byte_tokenizer(), {}))
    scripted.answers = [[*ids_of("Hello."), EOS], [*ids_of("Hello."), EOS]]
    result = CliRunner().invoke(cli, ["chat", "--explain"], input="hi\n/regenerate\n")
    assert result.exit_code == 0
    steps = [f"step: {number} tokens" for number in (1, 3, 3)]
    assert result.stderr.splitlines() == ["Drafting with mask tokens and lookup", *steps, *steps]
    assert result.stdout.splitlines()[1:4:2] == ["Hello.", "Hello."]


class Screen:
    """The program under test at a terminal of its own."""

    def __init__(self, *args: str, **environment: str) -> None:
        pty = pytest.importorskip("pty")
        self._terminal, inner = pty.openpty()
        env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment
        env.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [*FAKE_CLI, *args], stdin=inner, stdout=inner, stderr=inner, env=env,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def wait_for(self, pattern: str, *, timeout_s: float = 60) -> str:
        """Read until the pattern comes; return what came, and begin anew."""
        end = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, self.seen
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.seen += os.read(self._terminal, 4096).decode(errors="replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_chat_at_a_terminal():
    screen = Screen("20", "chat")
    screen.wait_for("Commands: .*" + PROMPT_SHOWN)
    screen.type("hej\x7fy\r")  # a correction with backspace
    screen.wait_for("0 1 2 3")
    screen.type("\x03")
    text = screen.wait_for(PROMPT_SHOWN)
    assert re.search(
        r"\x1b\[2m\d+ tokens, [\d.]+ tokens/s, [\d.]+ tokens/step, stopped\x1b\[0m", text
    )
    screen.type("\x03")  # at the prompt it only clears the line
    screen.wait_for(PROMPT_SHOWN)
    time.sleep(0.5)  # the editor reads its history in the background
    screen.type("\x1b[A")  # the last message again
    screen.wait_for("hey")
    screen.type("\r")
    screen.wait_for("0 1 2 3")
    screen.type("\x03")
    screen.wait_for("stopped.*" + PROMPT_SHOWN)
    screen.type("\x04")
    assert screen.process.wait(timeout=60) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_terminal_does_not_obey_an_answer(command):
    screen = Screen("0", command, ANSWER="\x1b]52;c;eA==\x07\x1b[2K\r\u009b1mPassword: \tend")
    if command == "chat":
        screen.wait_for("Commands: .*" + PROMPT_SHOWN)
        screen.type("hey\r")
    text = screen.wait_for("end").rpartition("begun\r\n")[2]
    assert text == r"\x1b]52;c;eA==\x07\x1b[2K\x0d\u009b1mPassword: " + "\tend"
    screen.wait_for("tokens/step" + (".*" + PROMPT_SHOWN if command == "chat" else "\r\n"))
    if command == "chat":
        screen.type("\x04")
    assert screen.process.wait(timeout=60) == 0


def test_chat_shows_controls_in_answers_errors_and_prompts(scripted, monkeypatch):
    scripted.answers = [[*ids_of("a\x1b]0;b\x07\n\tc"), EOS]]
    for shown in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setenv("NO_COLOR", "1")
        scripted.answers *= 2
        Repl(conversation(scripted)).run(iter(["hi", "/system S\x1b[2K", "/\x1b[1A"]))
        text = shown.getvalue()
        assert ("\x1b" in text) is not shown.isatty()
        if shown.isatty():
            for line in ("a\\x1b]0;b\\x07\n\tc\n", "prompt: S\\x1b[2K\n", "command /\\x1b[1A;"):
                assert line in text
        else:
            assert "a\x1b]0;b\x07\n\tc\n" in text


@pytest.mark.slow
def test_the_real_model_answers_from_the_cache_as_it_does_afresh():
    from mlx_mtp import load

    model, tokenizer = load()
    options: dict[str, Any] = {"max_tokens": 24, "layout": "quadratic", "num_draft_tokens": 3}
    kept = Conversation(model, tokenizer, options=options)
    for question in ("My name is Ada.", "What is the capital of France?", "And of Italy?"):
        fresh = Conversation(model, tokenizer, options={"max_tokens": 24, "layout": "plain"})
        fresh.messages = list(kept.messages)
        assert ask(kept, question) == ask(fresh, question)
    assert kept.last and kept.last.cached_tokens > 60
    assert kept.last.prompt_tokens < 30


@pytest.mark.parametrize("kind", ["qwen3_5", "nemotron_h", "rwkv7"])
def test_a_model_with_recurrent_layers_goes_back_to_checkpoints(kind: str) -> None:
    """Each answer is that of a fresh conversation, and little is computed again."""
    model = hybrid_mtp(kind, vocab_size=BYTE_VOCAB)
    options: dict[str, Any] = {"max_tokens": 9, "layout": "quadratic"}
    talk = Conversation(model, byte_tokenizer(), options=options)
    texts = ["a question of some length", "another one, longer than a margin", "last"]
    answers, cached = [], []

    def note(stream: Any) -> None:
        answers.append("".join(response.text for response in stream))
        assert talk.last is not None
        cached.append(talk.last.cached_tokens)

    for text in texts:
        note(talk.ask(text))
    ends = [len(ids) for ids in [talk._cached_ids]]
    note(talk.regenerate())
    assert answers[3] == answers[2] and cached[3] == ends[0] - 8 - 1
    talk.messages = talk.messages[:2]
    note(talk.ask("an edited question after the first answer"))
    assert cached[0] == 0 and 0 < cached[1] < cached[2] and cached[4] == cached[1]
    fresh = Conversation(model, byte_tokenizer(), options=options)
    fresh.messages = talk.messages[:2]
    assert "".join(x.text for x in fresh.ask(talk.messages[2]["content"])) == answers[4]
