"""The command ``mlx-mtp``: its commands, and how each of them ends.

Bad input ends with one line ``Error: ...`` on stderr and exit code 2, Ctrl-C with exit code 130,
and a closed pipe silently with exit code 141, as for a program that the signal kills.  Any other
exception is a bug and shows its traceback.

A command imports the code that does its work when it is called, so that help is printed at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, cast

import click
import cloup

from mlx_mtp.cli.app import app
from mlx_mtp.cli.average import average
from mlx_mtp.cli.benchmark import benchmark
from mlx_mtp.cli.chat import chat
from mlx_mtp.cli.compress import compress
from mlx_mtp.cli.convert import convert, export, inspect
from mlx_mtp.cli.doctor import doctor
from mlx_mtp.cli.evaluate import evaluate
from mlx_mtp.cli.generate import generate
from mlx_mtp.cli.options import CONTEXT
from mlx_mtp.cli.serve import serve
from mlx_mtp.cli.simulate import simulate
from mlx_mtp.cli.train import train
from mlx_mtp.cli.tune import tune
from mlx_mtp.cli.verify import verify
from mlx_mtp.storage.package import package_version
from mlx_mtp.terminal import CLOSED_PIPE, INTERRUPTED, BadInput, one_line

SECTIONS = (
    cloup.Section("Generate", [generate, chat]),
    cloup.Section("Serve", [serve, app]),
    cloup.Section("Convert and train", [convert, export, inspect, train, average, compress]),
    cloup.Section("Measure", [benchmark, evaluate, verify, tune, doctor, simulate]),
)
WITHOUT_TORCH = (
    average, benchmark, chat, compress, convert, evaluate, export, generate, inspect, simulate,
    tune, verify,
)  # fmt: skip
WITH_TORCH = {"--trust-remote-code", "--against-pytorch", "--allow-pickle", "--verify"}


class CommandGroup(cloup.Group):
    """A group whose commands all end as described in the module docstring."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the arguments name."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for terminals without UTF-8
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else ctx.command_path
            hint = f"{error.format_message().rstrip('.')} (see {command} --help)"
            raise BadInput(" ".join(hint.split())) from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                print(file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            _discard_stdout()
            sys.exit(CLOSED_PIPE)
        except (ValueError, OSError) as error:
            raise BadInput(one_line(error)) from error


@cloup.group(cls=CommandGroup, sections=SECTIONS, context_settings=CONTEXT)
@cloup.version_option(package_version(), message="mlx-mtp %(version)s")
def cli() -> None:
    """Generate several tokens per step with a local language model, with unchanged output."""


def main() -> None:
    """Entry point of the installed command."""
    _hide_torch(sys.argv[1:])
    try:
        cli(prog_name="mlx-mtp")
    finally:
        # Another Ctrl-C during Python's shutdown would only change the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hide_torch(args: list[str]) -> None:
    """Hide PyTorch from transformers, which imports it wherever it is installed.

    The import takes over two seconds at every start, and most commands do not need it.  Code in a
    model's own folder may, and so do PyTorch files and comparisons with PyTorch.
    """
    names = [command.name for command in WITHOUT_TORCH]
    if args and args[0] in names and not WITH_TORCH & set(args):
        sys.modules.setdefault("torch", cast(Any, None))


def _discard_stdout() -> None:
    """Redirect stdout to nowhere, so that Python's final flush of it raises no error."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, io.UnsupportedOperation):
        sys.stdout = io.StringIO()
