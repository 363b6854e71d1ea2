"""Every command: its help text, the names of its options, and their former names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner

from mlx_mtp.cli.main import SECTIONS, cli
from mlx_mtp.cli.options import ListOf, Option, field_option
from mlx_mtp.decoding.config import setting

COMMANDS = sorted(cli.commands)
BANNED = re.compile(
    r"\b(held|holds?|behind|beside|tells?|told|stands?|wanted|given|found|guess|jump|pilot|"
    r"most|least|what|likewise|go on|goes on|whatever)\b",
    re.IGNORECASE,
)
ALLOWED = ("held out", "held-out", "most likely")
# Options whose meaning depends on the command, which their help text says.
VARIANTS = {
    "--adapter-path": "folder to read, or to write in train and average",
    "--drafter": "train: the one to train",
    "--max-tokens": "limit of an answer: for one, per prompt, or where a request sets none",
    "--min-p": "serve: where a request sets none",
    "--model": "convert and export: the base model",
    "--num-draft-tokens": "train: k of the adapter; verify: several numbers",
    "--num-prompts": "the default",
    "--output-file": "format of the report",
    "--plot": "format of the file",
    "--port": "the default",
    "--seed": "of sampling, of the bootstrap, of training, of the draws",
    "--thinking-budget": "serve: where a request sets none",
    "--temp": "serve: where a request sets none",
    "--top-k": "serve: where a request sets none",
    "--top-p": "serve: where a request sets none",
}


def options() -> Iterator[tuple[str, click.Option]]:
    for name, command in cli.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                yield name, parameter


def test_every_option_has_a_help_sentence() -> None:
    for name, parameter in options():
        text = parameter.help or ""
        assert text[:1].isupper() and text.endswith("."), f"{name} {parameter.opts}: {text!r}"


def test_an_option_has_one_meaning_and_type_in_all_commands() -> None:
    texts: dict[str, set[str | None]] = defaultdict(set)
    for _, parameter in options():
        texts[parameter.opts[0]].add(parameter.help)
    several = {name for name, helps in texts.items() if len(helps) > 1}
    assert several <= set(VARIANTS)
    flags: dict[str, set[bool]] = defaultdict(set)
    for _, parameter in options():
        flags[parameter.opts[0]].add(parameter.is_flag)
    assert all(len(kinds) == 1 for kinds in flags.values())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_plain_english(name: str) -> None:
    result = CliRunner().invoke(cli, [*name.split(), "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    assert not (match := BANNED.search(text)), match
    assert max(map(len, result.output.splitlines())) <= 100


def test_commands_are_listed_in_groups() -> None:
    listed = [command.name for section in SECTIONS for command in section.commands.values()]
    assert sorted(str(name) for name in listed) == COMMANDS
    for command in cli.commands.values():
        summary = (command.help or "").splitlines()[0]
        assert summary[0].isupper() and summary.endswith("."), command.name


FORMER = {
    ("benchmark", "--limit"): "--num-prompts",
    ("benchmark", "--output"): "--format",
    ("benchmark", "--picture"): "--plot",
    ("benchmark", "--warmup"): "--num-warmups",
    ("convert", "--layout"): "--checkpoint-layout",
    ("convert", "--layout-option"): "--checkpoint-option",
    ("doctor", "--output"): "--output-file",
    ("simulate", "--curve"): "--costs",
    ("simulate", "--k"): "--num-draft-tokens",
    ("simulate", "--picture"): "--plot",
    ("verify", "--depths"): "--num-draft-tokens",
    ("verify", "--draws"): "--num-draws",
    ("verify", "--receipt"): "--output-file",
}


@pytest.mark.parametrize(("command", "former"), FORMER)
def test_a_former_name_still_works(command: str, former: str) -> None:
    new = FORMER[command, former]
    context = click.Context(cli.commands[command])
    parser = cli.commands[command].make_parser(context)
    values, _, _ = parser.parse_args([former, "7"])
    parser = cli.commands[command].make_parser(context)
    assert parser.parse_args([new, "7"])[0] == values
    text = CliRunner().invoke(cli, [command, "--help"]).output
    assert new in text and not re.search(rf"{former}\b(?!-)", text)


def test_json_is_a_format_of_the_benchmark() -> None:
    command = cli.commands["benchmark"]
    for arguments, value in (([], "md"), (["--json"], "json"), (["-o", "csv"], "csv")):
        context = command.make_context("benchmark", arguments)
        assert context.params["output_format"] == value


@dataclass(frozen=True)
class Settings:
    count: int | None = setting(None, "A count.", min=1, default_text="all")
    share: float = setting(0.5, "A share.", min=0, max=1, max_open=True)
    kind: str = setting("a", "A kind.", choices=("a", "b"))
    fast: bool = setting(True, "Be fast.")
    careless: bool = setting(True, "Be careful.", flag="--careful")


def test_an_option_is_made_from_a_field() -> None:
    @click.command()
    @field_option(Settings, "count", "-n", former_names=("--number",))
    @field_option(Settings, "share")
    @field_option(Settings, "kind")
    @field_option(Settings, "fast")
    @field_option(Settings, "careless")
    def command(**values: object) -> None:
        click.echo(repr(values))

    def run(*arguments: str) -> str:
        return CliRunner().invoke(command, arguments).output

    text = " ".join(run("--help").split())
    assert "-n, --count INTEGER A count. [default: all; x>=1]" in text
    assert "--share FLOAT A share. [default: 0.5; 0<=x<1]" in text
    assert "--kind [a|b] A kind. [default: a]" in text
    assert "--fast / --no-fast Be fast." in text and "--careful Be careful." in text
    assert "'count': None, 'share': 0.5, 'kind': 'a', 'fast': True, 'careful': False" in run()
    assert "'count': 3" in run("--number", "3")
    assert "0 is not in the range x>=1" in run("--count", "0")
    assert "'fast': False, 'careful': True" in run("--no-fast", "--careful")


def test_lists_are_separated_by_commas() -> None:
    numbers = ListOf(int, min=1)
    assert numbers.convert("1, 2,", None, None) == (1, 2) and numbers.convert("", None, None) == ()
    for text, message in (("1,x", "'1,x' is not a list of numbers"), ("0", "0 is less than")):
        with pytest.raises(click.BadParameter, match=message):
            numbers.convert(text, None, None)
    assert ListOf(str).convert("a, b", None, None) == ("a", "b")
    assert isinstance(cli.commands["train"].params[0], Option)
