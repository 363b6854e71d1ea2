"""The commands: output, options, bad input, Ctrl-C, closed pipes."""

from __future__ import annotations

import errno
import importlib
import json
import re
import signal
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mlx_mtp.cli.main import CommandGroup, cli
from mlx_mtp.terminal import CLOSED_PIPE, INTERRUPTED, Interrupt
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

__all__ = ["scripted"]


@pytest.fixture
def loaded(scripted: FakeModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let ``load`` return the fake model; return what it was called with."""
    calls: dict[str, Any] = {}

    def load(path: str | None, **options: Any) -> tuple[FakeModel, Any, Any]:
        calls.update(options, path=path)
        if not options["mtp"]:
            scripted.k = None
        tokenizer = byte_tokenizer(template=calls.get("template", TEMPLATE))
        return scripted, tokenizer, calls.get("model_config", {})

    from tests.helpers.fixtures_generate import TEMPLATE

    monkeypatch.setattr("mlx_mtp.loading.load", load)
    return calls


DRAFTING = "Drafting with mask tokens and lookup\n"


def invoke(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), input=stdin)


def failure(*args: str, stdin: bytes | None = None) -> str:
    """Run a command that must fail politely; return its one line of error."""
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.removeprefix(DRAFTING).splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def test_generate_prints_text_and_stats_like_mlx_lm(loaded, scripted):
    scripted.answers = [[*ids_of("Hello."), EOS]]
    result = invoke("generate", "--prompt", "hi")
    assert (result.exit_code, result.stderr) == (0, DRAFTING)
    number = r"\d+\.\d{3}"
    assert re.fullmatch(
        rf"==========\nHello\.\n==========\n"
        rf"Prompt: 5 tokens, {number} tokens-per-sec\n"
        rf"Generation: 7 tokens, {number} tokens-per-sec\n"
        rf"Peak memory: {number} GB\n"
        rf"MTP \(mask\): 4/6 drafts accepted \(66\.7%\), 2\.33 tokens/step\n",
        result.stdout,
    )


def test_defaults_are_those_of_mlx_lm(loaded, scripted):
    scripted.answers = [[EOS]]
    assert invoke("generate").exit_code == 0
    call = scripted.calls[0]
    assert call.prompt == [USER, *ids_of("hello"), EOS, ASSISTANT]
    assert (call.max_tokens, call.seed, call.prefill_step_size) == (100, None, 2048)
    assert (call.layout, call.num_draft_tokens) == ("auto", None)
    assert call.lookup and call.explain is None and call.speculation is scripted.speculation
    sampling = call.sampling
    assert (sampling.temp, sampling.top_p, sampling.min_p, sampling.top_k) == (0, 1, 0, 0)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (None, None)
    assert scripted.cache_options == {
        "max_kv_size": None, "kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 5000,
    }  # fmt: skip
    assert loaded["path"] is loaded["adapter_path"] is None
    assert loaded["mtp"] and not loaded["trust_remote_code"]


def test_the_stats_name_the_drafter(loaded, scripted):
    scripted.answers = [[*ids_of("Hello."), EOS]]
    scripted.source = "lookup"
    result = invoke("generate", "--prompt", "hi")
    line = "MTP (lookup): 4/6 drafts accepted (66.7%), 2.33 tokens/step"
    assert result.stdout.splitlines()[-1] == line


def test_each_step_can_be_explained(loaded, scripted):
    scripted.answers = [[*ids_of("Hello."), EOS]]
    result = invoke("generate", "--explain", "--no-lookup")
    assert result.exit_code == 0 and result.stdout.splitlines()[1] == "Hello."
    steps = [f"step: {number} tokens" for number in (1, 3, 3)]
    assert result.stderr.splitlines() == ["Drafting with mask tokens", *steps]
    call = scripted.calls[0]
    assert not call.lookup and callable(call.explain)


def test_options_arrive(loaded, scripted):
    scripted.answers = [[*ids_of("yes! no"), EOS]]
    result = invoke(
        "generate", "--model", "M", "--adapter-path", "A", "--system-prompt", "S", "-p", r"a\nb",
        "-m", "-1", "--temp", "0.5", "--top-p", "0.9", "--min-p", "0.1", "--top-k", "7",
        "--min-tokens-to-keep", "2", "--seed", "3", "--max-kv-size", "64", "--kv-bits", "4",
        "--kv-group-size", "32", "--quantized-kv-start", "9", "--prefill-step-size", "16",
        "--num-draft-tokens", "2", "--layout", "linear", "--stop", "!", "--stop", "?",
        "--repetition-penalty", "1.1", "--repetition-context-size", "5", "--trust-remote-code",
        "--logit-bias", "5=-1.5", "--logit-bias", "6=2", "--prefill-response", "Oh ",
        "--extra-eos-token", "<user>", "258", "--verbose", "False",
    )  # fmt: skip
    assert (result.exit_code, result.stdout, result.stderr) == (0, "yes\n", "")
    assert (loaded["path"], loaded["adapter_path"]) == ("M", "A")
    assert loaded["trust_remote_code"]
    call = scripted.calls[0]
    assert call.prompt == [
        SYSTEM, ord("S"), EOS, USER, *ids_of("a\nb"), EOS, ASSISTANT, *ids_of("Oh "),
    ]  # fmt: skip
    assert (call.max_tokens, call.seed, call.prefill_step_size) == (-1, 3, 16)
    assert (call.layout, call.num_draft_tokens, call.stop_ids) == (
        "linear",
        2,
        {EOS, USER, ASSISTANT},
    )
    sampling = call.sampling
    assert (sampling.temp, sampling.top_p, sampling.min_p, sampling.top_k) == (0.5, 0.9, 0.1, 7)
    assert (sampling.repetition_penalty, sampling.repetition_context_size) == (1.1, 5)
    assert (sampling.logit_bias, sampling.min_tokens_to_keep) == ({5: -1.5, 6: 2.0}, 2)
    assert scripted.cache_options == {
        "max_kv_size": 64, "kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 9,
    }  # fmt: skip


def test_files_to_look_up_in_arrive_as_ids(loaded, scripted, tmp_path):
    scripted.answers = [[EOS]]
    one, other, empty = (tmp_path / name for name in ("one.txt", "other.txt", "empty.txt"))
    one.write_bytes("Grün\r\n".encode())
    other.write_text("b")
    empty.write_text("")
    names = [argument for path in (one, empty, other) for argument in ("--lookup-file", str(path))]
    assert invoke("generate", *names).exit_code == 0
    call = scripted.calls[0]
    assert call.lookup_ids == [ids_of("Grün\r\n"), ids_of("b")]
    other.write_bytes(b"\xff\xfe")
    assert f"{other} is not UTF-8" in failure("generate", *names)
    other.unlink()
    assert "other.txt" in failure("generate", *names)
    assert "--lookup-file" in failure("generate", "--lookup-file", str(tmp_path))


def test_the_prompt_may_come_from_stdin_or_skip_the_template(loaded, scripted):
    scripted.answers = [[EOS], [EOS]]
    assert invoke("generate", "-p", "-", stdin="é\\n\n").exit_code == 0
    assert scripted.calls[-1].prompt == [USER, *ids_of("é\\n\n"), EOS, ASSISTANT]
    assert invoke("generate", "-p", "hi", "--ignore-chat-template").exit_code == 0
    assert scripted.calls[-1].prompt == ids_of("hi")


def test_template_settings_reach_the_template(loaded, scripted):
    loaded["template"] = "{{ mood }}"
    scripted.answers = [[EOS]]
    invoke("generate", "--chat-template-config", '{"mood": "calm"}')
    assert scripted.calls[-1].prompt == ids_of("calm")


def test_no_mtp_is_plain_and_says_nothing(loaded, scripted):
    scripted.answers = [[*ids_of("abc"), EOS]]
    result = invoke("generate", "--no-mtp")
    assert scripted.calls[0].layout == "plain" and not loaded["mtp"]
    assert result.stderr == "" and "MTP" not in result.stdout


HINT = (
    "hint: fake could draft more with {}an adapter (mlx-mtp train --model fake) or a smaller model "
    "with the same tokenizer (--draft-model)"
)


def test_what_would_help_a_model_without_adapter(loaded, scripted):
    scripted.k, scripted.answers = None, [[*ids_of("abc"), EOS] for _ in range(2)]
    result = invoke("generate")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == ["Drafting with lookup", HINT.format("")]
    loaded["model_config"] = {"num_nextn_predict_layers": 1}
    modules = "its MTP modules (mlx-mtp convert keeps those of the original), "
    assert invoke("generate").stderr.splitlines()[1] == HINT.format(modules)


CHOICES = {
    "no adapter": (["--no-adapter"], "Drafting with lookup\n"),
    "lookup": (["--drafter", "lookup"], "Drafting with lookup\n"),
    "no lookup": (["--no-lookup"], ""),
    "no drafts": (["--num-draft-tokens", "0"], ""),
    "plain": (["--layout", "plain"], ""),
    "json": (["--json"], ""),
    "quiet": (["--verbose", "False"], ""),
}


@pytest.mark.parametrize(("args", "line"), CHOICES.values(), ids=CHOICES.keys())
def test_there_is_no_hint_about_what_was_chosen(loaded, scripted, args, line):
    scripted.k, scripted.answers = None, [[*ids_of("abc"), EOS]]
    result = invoke("generate", *args)
    assert (result.exit_code, result.stderr) == (0, line)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        ("mask", "fake has no adapter with mask tokens"),
        ("native", "fake has no MTP modules of its own"),
        ("heads", "fake has no adapter with heads"),
        ("draft-model", "fake has no draft model (draft_model, --draft-model)"),
    ],
)
def test_a_drafter_that_the_model_lacks(loaded, scripted, drafter, message):
    scripted.k = None
    line = failure("generate", "--drafter", drafter)
    assert line == f"Error: drafter is {drafter}, but {message}"


def test_json_is_one_object(loaded, scripted):
    scripted.answers = [[*ids_of("né"), EOS]]
    result = invoke("generate", "--json")
    assert result.stdout.count("\n") == 1
    answer = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert (answer["model"], answer["text"], answer["finish_reason"]) == ("fake", "né", "stop")
    assert answer["tokens"] == [*ids_of("né"), EOS]
    stats = answer["stats"]
    assert (stats["prompt_tokens"], stats["generation_tokens"]) == (8, 4)
    assert (stats["num_steps"], stats["num_draft_tokens"], stats["num_accepted"]) == (2, 3, 2)
    assert stats["tokens_per_step"] == 2.0
    assert set(answer["versions"]) == {"mlx-mtp", "mlx", "mlx-lm"}


def test_help_and_version_need_no_model():
    for command in ("generate", "chat", "convert"):
        assert invoke(command, "--help").exit_code == 0
    assert invoke("--version").stdout.startswith("mlx-mtp ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", " \\n"], "the prompt is empty"),
        (["-p", "\udcff"], "not UTF-8"),
        (["--temp", "-1"], "temp must be at least 0, got -1"),
        (["--temp", "nan"], "temp"),
        (["--temp", "hot"], "--temp"),
        (["--top-p", "1.5"], "top_p must be between 0 and 1, got 1.5"),
        (["--seed", "-3"], "--seed"),
        (["--layout", "cubic"], "'cubic'"),
        (["--num-draft-tokens", "5"], "num_draft_tokens must be at most 4"),
        (["--num-draft-tokens", "-1"], "--num-draft-tokens"),
        (["--stop", ""], "a stop string must not be empty"),
        (["--logit-bias", "3:4"], "'3:4' is not ID=VALUE"),
        (["--logit-bias", "3=nan"], "'3=nan' is not ID=VALUE"),
        (["--chat-template-config", "{"], "--chat-template-config"),
        (["--chat-template-config", "[]"], "must be a JSON object, got []"),
        (["--extra-eos-token", "<end>"], "--extra-eos-token <end>"),
        (["--extra-eos-token", "4711"], "--extra-eos-token 4711"),
        (["-p", "x" * 2000], "the prompt has 2003 tokens, but fake takes fewer than 1000"),
        (["--prompt-cache-file", "no-such-file"], "no-such-file does not exist"),
        (["--prompt-cache-file", __file__], "test_generate.py is not a prompt cache"),
        (["--image", "a.png", "b.png"], "--image is not supported: prompts are text"),
        (["--image", "a.png"], "--image is not supported: prompts are text"),
        (["-qa"], "--quantize-activations is not supported: activations keep"),
        (["--xtc-threshold", "0.7"], "xtc_threshold must be between 0 and 0.5, got 0.7"),
        (["--tempo", "3"], "--tempo"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(loaded, args, message):
    assert message in failure("generate", *args)


def test_bad_stdin_and_unknown_commands_are_one_line_too(loaded):
    assert "not UTF-8" in failure("generate", "-p", "-", stdin=b"\xff\xfe")
    assert "the prompt is empty" in failure("generate", "-p", "-", stdin=b"\n")
    assert "generat" in failure("generat")
    assert "--mtp-path" in failure("convert", "--mlx-path", "x")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("model X\n  is broken"), "Error: model X is broken"),
        (FileNotFoundError(errno.ENOENT, "No such file", "X"), "Error: X: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "Error: No space left on device"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_loading_raises_becomes_one_line(monkeypatch, command, error, line):
    monkeypatch.setattr("mlx_mtp.loading.load", raiser(error))
    assert failure(command) == line


def test_a_bug_is_not_dressed_up(monkeypatch):
    monkeypatch.setattr("mlx_mtp.loading.load", raiser(RuntimeError("a bug")))
    assert isinstance(invoke("generate").exception, RuntimeError)


def raiser(error: Exception) -> Any:
    def load(*args: Any, **options: Any) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), INTERRUPTED), (BrokenPipeError(), CLOSED_PIPE)]
)
def test_interruptions_outside_an_answer_end_quietly(error, code):
    @click.group(cls=CommandGroup)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.output) == (code, "")


def test_the_second_interrupt_is_immediate():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_prompt_cache_names_its_model(loaded, scripted, monkeypatch, tmp_path):
    """The prompt is what follows the cached one; the model is the one that the file names."""
    path = prompt_cache_file(tmp_path, model="M")
    cache = scripted.make_cache()
    cache.ids = [USER, *ids_of("long")]
    monkeypatch.setattr(FakeModel, "load_prompt_cache", lambda *_: (cache, {}), raising=False)
    scripted.answers = [[EOS]]
    result = invoke("generate", "--prompt-cache-file", path, "-p", " text")
    assert result.exit_code == 0, result.output
    assert loaded["path"] == "M"
    assert scripted.calls[0].cached == [USER, *ids_of("long")]
    assert scripted.calls[0].prompt == [*ids_of(" text"), EOS, ASSISTANT]
    line = failure("generate", "--prompt-cache-file", path, "--model", "N")
    assert line == f"Error: {path} was made with M, not with N"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_flag_of_mlx_lm_exists(command):
    theirs = importlib.import_module(f"mlx_lm.{command}").setup_arg_parser()
    ours = {name for parameter in cli.commands[command].params for name in parameter.opts}
    assert {name for action in theirs._actions for name in action.option_strings} <= ours | {
        "-h",
        "--help",
    }


def test_xtc_keeps_the_line_break_and_the_end_tokens(loaded, scripted):
    scripted.answers = [[EOS]]
    flags = ("--temp", "1", "--xtc-probability", "0.5", "--use-default-chat-template")
    assert invoke("generate", "-p", "hi", *flags).exit_code == 0
    sampling = scripted.calls[0].sampling
    assert (sampling.xtc_probability, sampling.xtc_threshold) == (0.5, 0.1)
    assert sampling.xtc_special_tokens == (ord("\n"), EOS)


def prompt_cache_file(folder: Path, *, model: str) -> str:
    """Write a file as ``mlx_lm.cache_prompt`` does."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, save_prompt_cache

    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, 1, 5, 8)), mx.zeros((1, 1, 5, 8)))
    path = str(folder / "prompt.safetensors")
    save_prompt_cache(path, [cache], {"model": model, "tokenizer_config": "{}"})
    return path


@pytest.mark.slow
def test_the_real_model_answers_from_the_command_line():
    options = ("-m", "20", "--json", "--layout", "quadratic", "--num-draft-tokens", "3")
    result = invoke("generate", "-p", "What is the capital of France?", *options)
    assert result.exit_code == 0 and result.stderr == ""
    answer = json.loads(result.stdout)
    assert answer["text"] == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"
    assert answer["stats"]["mtp"] and answer["stats"]["tokens_per_step"] > 1
