"""What the research commands share: options, one-line errors, progress and the final JSON line."""

from __future__ import annotations

import functools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.bench.contexts import prompt_ids
from mlx_mtp.cli.options import MODEL, PROMPTS, field_option, option
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.evaluation.greedy_texts import GreedyText, greedy_texts
from mlx_mtp.evaluation.prompt_sets import prompts_of
from mlx_mtp.evaluation.prompts import KINDS
from mlx_mtp.storage.package import versions
from mlx_mtp.terminal import INTERRUPTED, BadInput, Status, one_line
from mlx_mtp.train.run.folder import RunFolder
from mlx_mtp.train.run.history import read_history

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.model.mtp_model import MTPModel

Progress = Callable[[int, int], None]


def command(function: Callable[..., dict[str, Any]]) -> click.Command:
    """Make a command of a function that has options and returns the JSON line to print.

    An error in the input is printed as one line.  The exit code is 130 if the result has a key
    ``finished`` that is false.
    """

    @functools.wraps(function)  # copies the options too
    def run(**arguments: Any) -> None:
        try:
            result = function(**arguments)
        except (ValueError, OSError) as error:
            raise BadInput(one_line(error)) from None
        print(json.dumps(result))
        if not result.get("finished", True):
            sys.exit(INTERRUPTED)

    return click.command()(run)


def text_options(function: Any) -> Any:
    """Add the options of commands that evaluate greedy answers; see ``answer_prompts``."""
    options = (
        MODEL,
        PROMPTS,
        option("--every", default=1, help="Use every n-th prompt."),
        field_option(GenerationConfig, "max_tokens", default=64),
        option("--texts", type=click.Path(path_type=Path), help="File that stores the answers."),
    )
    return functools.reduce(lambda made, add: add(made), options[::-1], function)


def answer_prompts(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    *,
    prompts: str,
    every: int,
    max_tokens: int,
    texts: Path | None,
    batch_size: int = 16,
) -> list[GreedyText]:
    """Answer every n-th prompt of a set greedily, or read the answers from the file ``texts``."""
    with counting("Answering the prompts") as progress:
        return greedy_texts(
            model,
            tokenizer,
            prompts_of(prompts, builtin_kinds=KINDS)[::every],
            encode=prompt_ids,
            max_tokens=max_tokens,
            path=texts,
            batch_size=batch_size,
            progress=progress,
        )


@contextmanager
def counting(text: str) -> Iterator[Progress]:
    """Show a text on stderr, with the numbers (done, total) that the yielded function gets."""
    with Status(f"{text} ...", delay_s=0) as status:
        yield lambda done, total: status.update(f"{text} {done}/{total} ...")


def machine_info(*packages: str) -> dict[str, Any]:
    """What a measurement was made with; ``packages`` are further packages to list."""
    return {
        "blas": BLAS,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions() | {name: version(name) for name in packages},
    }


def evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """The evaluations in the history of a training run; empty without a history."""
    records = read_history(folder.history) if folder.history.is_file() else []
    return [record for record in records if record.get("kind") == "evaluation"]
