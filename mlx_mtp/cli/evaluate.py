"""The command ``mlx-mtp evaluate``: how many drafts of an adapter are accepted, and which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from mlx_mtp.cli.options import (
    AS_JSON,
    KINDS_OPTION,
    PROMPTS,
    all_prompts,
    field_option,
    model_options,
    num_prompts,
    option,
)
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.terminal import Status, show

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.evaluation.acceptance import Answer
    from mlx_mtp.evaluation.greedy_texts import GreedyText
    from mlx_mtp.model.mtp_model import MTPModel
    from mlx_mtp.model.statistics import AdapterStatistics


@cloup.command()
@model_options()
@cloup.option_group(
    "Text",
    PROMPTS,
    KINDS_OPTION,
    num_prompts("all"),
    field_option(
        GenerationConfig,
        "max_tokens",
        "-m",
        type=click.IntRange(2),
        default=64,
        help="Maximum number of tokens to generate per prompt.",
    ),
    option(
        "--texts",
        type=click.Path(path_type=Path),
        help="Read answers from this JSONL file, and append missing ones.",
    ),
    option(
        "--training-text",
        multiple=True,
        metavar="FILE",
        help="JSONL file of training text, in whose answers the tokens are counted; repeatable.",
        show_default="keep the counts of the adapter",
    ),
)
@cloup.option_group(
    "Output",
    option("--save", is_flag=True, help="Store the result in the folder of the adapter."),
    AS_JSON,
)
def evaluate(save: bool, as_json: bool, **options: Any) -> None:
    """Measure the acceptance rate of an adapter by position and kind of text.

    The model answers prompts greedily, and the drafts after each token of the answers are compared
    with the tokens that follow. With --save, layout auto starts from the result, and mlx-mtp
    inspect shows it.
    """
    from mlx_mtp.evaluation.acceptance import (
        MAX_RANK,
        checked_num_masks,
        count_answers,
        summarise,
    )
    from mlx_mtp.loading import load, locate
    from mlx_mtp.model.statistics import summary_lines, update_adapter

    prompts = all_prompts(options["prompts"], options["kinds"])
    with Status("Loading the model ...") as status:
        _, folder = locate(options["model"], options["adapter_path"], progress=status.update)
        before = _weights_time(folder, save=save)
        model, tokenizer = load(
            options["model"],
            adapter_path=options["adapter_path"],
            trust_remote_code=options["trust_remote_code"],
            progress=status.update,
        )
        k = checked_num_masks(model, None)
        texts = _texts(model, tokenizer, prompts, options, status)
        answers = list(
            count_answers(
                model,
                [text.sequence for text in texts],
                max_tokens=options["max_tokens"],
                num_candidates=MAX_RANK,
                progress=lambda done, total: status.update(f"Evaluated {done}/{total}"),
            )
        )
        steps = {
            name: round(summarise(group, num_draft_tokens=k).tokens_per_step, 3)
            for name, group in _by_kind(answers).items()
        }
        statistics = _statistics(model, tokenizer, texts, answers, options, status)
    if save:
        assert folder is not None and model.adapter_config is not None
        if _weights_time(folder, save=True) != before:
            raise ValueError(f"the adapter in {folder} was replaced during the evaluation")
        update_adapter(folder, model.adapter_config, statistics)
    summary = statistics.summary()
    if as_json:
        show(json.dumps({"model": model.name, "tokens_per_step": steps} | summary))
        return
    lines = [f"tokens per step {steps.pop('all')}"]
    lines[0] += "".join(f", {kind} {value}" for kind, value in steps.items())
    lines += summary_lines(summary)
    show("\n".join(lines + ([f"saved in {folder}"] if save else [])))


def _weights_time(folder: Path | None, *, save: bool) -> int | None:
    """Time of the adapter's weights; refuses a folder that must not be changed."""
    from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE

    if folder is None or not save:
        return None
    if (folder / CONFIG_FILE).is_symlink():
        raise ValueError(f"{folder} consists of links, as a download does: copy it for --save")
    return (folder / WEIGHTS_FILE).stat().st_mtime_ns


def _texts(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Any],
    options: dict[str, Any],
    status: Status,
) -> list[GreedyText]:
    """Answer the prompts greedily, or read the answers of a file."""
    from mlx_mtp.bench.contexts import prompt_ids
    from mlx_mtp.evaluation.greedy_texts import greedy_texts
    from mlx_mtp.evaluation.prompt_sets import spread

    return greedy_texts(
        model,
        tokenizer,
        spread(prompts, options["num_prompts"]),
        encode=prompt_ids,
        max_tokens=options["max_tokens"],
        path=options["texts"],
        progress=lambda done, total: status.update(f"Answered {done}/{total}"),
    )


def _by_kind(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by kind, and all of them as ``all``; only these if there is one kind."""
    kinds = dict.fromkeys(answer.kind for answer in answers)
    groups = {kind: [each for each in answers if each.kind == kind] for kind in kinds}
    return (groups if len(groups) > 1 else {}) | {"all": list(answers)}


def _statistics(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    texts: Sequence[GreedyText],
    answers: Sequence[Answer],
    options: dict[str, Any],
    status: Status,
) -> AdapterStatistics:
    """The statistics of the answers, with the vocabulary of ``--training-text`` or the old one."""
    from mlx_mtp.evaluation.acceptance import checked_num_masks, summarise
    from mlx_mtp.evaluation.statistics import count_vocabulary
    from mlx_mtp.train.data.sequences import encode_all
    from mlx_mtp.train.data.sources import read_data
    from mlx_mtp.train.settings import TrainSettings

    k = checked_num_masks(model, None)
    known = model.statistics and model.statistics.vocabulary
    if options["training_text"]:
        status.update("Counting tokens ...")
        records = [record for path in options["training_text"] for record in read_data(path)]
        encoded = encode_all(records, tokenizer, max_seq_length=TrainSettings().max_seq_length)
        unique = {tuple(sequence.ids): sequence for sequence in encoded.sequences}
        known = count_vocabulary(list(unique.values()), [text.sequence for text in texts])
    name = Path(options["prompts"]).name
    source = (
        f"{len(texts)} greedy answers of at most {options['max_tokens']} tokens, prompts {name}"
    )
    found = summarise(answers, num_draft_tokens=k).statistics(source, known)
    assert found is not None
    return found
