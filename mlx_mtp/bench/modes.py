"""The modes of a benchmark: our layouts and drafters, stock mlx-lm, and mlx-lm with a draft model.

All are greedy and start with empty caches, and none uses what the planner learns in another.  Stock
mlx-lm uses the unchanged model folder, as its own command does, so on a CPU its weights may be
quantised while ours are float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.bench.runs import Check, Step
from mlx_mtp.calibration.stored_costs import calibrate, speculation_for
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.limits import max_draft_tokens
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.setup import drafter_sources
from mlx_mtp.planning.plan import AUTO, DRAFT_MODEL, HEADS, MASK, SOURCES
from mlx_mtp.terminal import first_line

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel

PLAIN, STOCK, DRAFT = "plain", "stock", "draft"
_FIXED = ("linear", "quadratic", "tree")
OURS = (PLAIN, AUTO, *_FIXED, *SOURCES)
NAMES = (*OURS, STOCK, DRAFT)
COUNTABLE = (*_FIXED, *SOURCES)  # linear:2
NEED_ADAPTER = {AUTO, *_FIXED, MASK, HEADS}  # they use one that is there
DRAFT_TOKENS = 3  # default of mlx_lm.generate

Begin = Callable[[list[int], Check], Iterator[Step]]


@dataclass(frozen=True)
class Mode:
    """A way to decode.

    Attributes:
        name: see ``parse_mode``.
        begin: decodes prompt ids into steps; the check is called during prefill.
        is_ours: whether its ids must equal those of plain decoding.
        parameters: number of parameters of the model, without adapter and draft model.
        weight_bytes: bytes of all loaded weights.
    """

    name: str
    begin: Begin
    is_ours: bool
    parameters: int
    weight_bytes: int


def parse_mode(name: str) -> tuple[str, int | None]:
    """Split the name of a mode into its kind and its number of drafts per step, if any.

    Args:
        name: one of ``NAMES``, or one of ``COUNTABLE`` with a number of drafts: ``lookup:2``.

    Raises:
        ValueError: there is no such mode.
    """
    kind, colon, number = name.partition(":")
    if kind not in NAMES:
        raise ValueError(f"unknown mode {name!r}; modes: {', '.join(NAMES)}")
    if not colon:
        return kind, None
    if kind not in COUNTABLE or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"unknown mode {name!r}; a number, as in linear:2, may follow {', '.join(COUNTABLE)}"
        )
    return kind, int(number)


def check_modes(names: Sequence[str], *, draft_model: str | None) -> None:
    """Check that a list of modes can be measured.

    Raises:
        ValueError: a mode is unknown, repeated or lacks its draft model, or the list is empty.
    """
    for name in names:
        parse_mode(name)
        if names.count(name) > 1:
            raise ValueError(f"mode {name} is given twice")
    if not names:
        raise ValueError("no mode is given")
    needing = [name for name in names if parse_mode(name)[0] in (DRAFT, DRAFT_MODEL)]
    if needing and draft_model is None:
        raise ValueError(f"mode {needing[0]} needs --draft-model")


def our_modes(
    names: Sequence[str],
    model: MTPModel,
    stop_ids: Collection[int],
    *,
    max_tokens: int,
    num_draft_tokens: int | None = None,
    lookup: bool = True,
    on_status: Callable[[str], None] = lambda text: None,
) -> list[Mode]:
    """Make the modes that decode with mlx-mtp.

    Args:
        names: names of modes, of which others are left out.
        model: the model with all that they draft with.
        stop_ids: ids that end an answer.
        max_tokens: maximum ids of an answer.
        num_draft_tokens: maximum drafts per step of modes without a number.
        lookup: whether mode auto may look drafts up.
        on_status: called with a line about the work in progress.

    Raises:
        ValueError: the model lacks what a mode drafts with, or a mode has more drafts than the
            adapter.
    """
    configs = {
        name: _config(
            name, model, max_tokens=max_tokens, num_draft_tokens=num_draft_tokens, lookup=lookup
        )
        for name in names
        if parse_mode(name)[0] in OURS
    }
    if any(config.layout == AUTO for config in configs.values()):
        calibrate(model, on_status=on_status)
    modes = []
    for name, config in configs.items():
        known = copy.deepcopy(speculation_for(model)) if config.layout == AUTO else None
        options = {"config": config, "stop_ids": stop_ids, "speculation": known}
        begin = partial(_our_steps, model, options)
        modes.append(Mode(name, begin, True, _parameters(model.base), _bytes(model)))
    return modes


def _config(
    name: str, model: MTPModel, *, num_draft_tokens: int | None, **settings: Any
) -> GenerationConfig:
    """The settings of one of our modes.

    Raises:
        ValueError: the model lacks what it drafts with, or the adapter has fewer drafts.
    """
    kind, number = parse_mode(name)
    settings["num_draft_tokens"] = number or num_draft_tokens
    if kind in SOURCES:
        settings |= {"drafter": kind, "layout": "linear" if number else AUTO}
    else:
        settings["layout"] = kind
    config = GenerationConfig(**settings)
    try:
        sources = drafter_sources(model, config)
        if kind in _FIXED and not sources:
            raise ValueError(f"{model.name} has no drafter that drafts in every step")
        if MASK in sources:
            max_draft_tokens(model, config.num_draft_tokens)
    except ValueError as error:
        raise ValueError(f"mode {name}: {error}") from None
    return config


def _our_steps(
    model: MTPModel, options: dict[str, Any], ids: list[int], check: Check
) -> Iterator[Step]:
    """Decode with the ``options`` of ``decode``."""
    pending = None  # the first step also has the prompt's last rows
    for step in decode(model, ids, prompt_progress_callback=lambda *_: check(), **options):
        rows = step.num_rows - step.num_draft_tokens
        yield Step(
            tokens=step.tokens,
            num_draft_tokens=step.num_draft_tokens,
            num_accepted=step.num_accepted,
            num_masks=0 if pending is None else rows - pending,
            parts=step.parts,
        )
        pending = 1


def stock_mode(stock: Any, stop_ids: Collection[int], *, max_tokens: int) -> Mode:
    """Make the mode of stock mlx-lm with a model from ``mlx_lm.load``."""
    from mlx_lm.generate import generate_step

    def begin(ids: list[int], check: Check) -> Iterator[Step]:
        tokens = generate_step(
            mx.array(ids),
            stock,
            max_tokens=max_tokens,
            prompt_progress_callback=lambda *_: check(),
        )
        for token, _ in tokens:
            yield Step(tokens=[int(token)])
            if int(token) in stop_ids:
                return

    return Mode(STOCK, begin, False, _parameters(stock), _bytes(stock))


def draft_mode(
    stock: Any,
    draft: Any,
    stop_ids: Collection[int],
    *,
    max_tokens: int,
    num_draft_tokens: int = DRAFT_TOKENS,
) -> Mode:
    """Make the mode of mlx-lm's speculative decoding; both models are from ``mlx_lm.load``."""
    from mlx_lm.generate import speculative_generate_step

    def begin(ids: list[int], check: Check) -> Iterator[Step]:
        check()
        tokens = speculative_generate_step(
            mx.array(ids),
            stock,
            draft,
            num_draft_tokens=num_draft_tokens,
            max_tokens=max_tokens,
        )
        pairs = ((int(token), bool(from_draft)) for token, _, from_draft in tokens)
        return draft_steps(pairs, stop_ids, num_draft_tokens, max_tokens)

    return Mode(DRAFT, begin, False, _parameters(stock), _bytes(stock) + _bytes(draft))


def draft_steps(
    tokens: Iterator[tuple[int, bool]],
    stop_ids: Collection[int],
    num_draft_tokens: int,
    max_tokens: int,
) -> Iterator[Step]:
    """Group single ids into steps: accepted drafts and the model's bonus token.

    Args:
        tokens: ids, each with whether it comes from the draft model.
        stop_ids: ids that end an answer.
        num_draft_tokens: drafts per step; fewer near ``max_tokens``.
        max_tokens: maximum ids of the answer.
    """
    done = 0
    group: list[int] = []
    for token, from_draft in tokens:
        group.append(token)
        ends = token in stop_ids or done + len(group) == max_tokens
        if not from_draft or ends:
            num_drafts = min(num_draft_tokens, max_tokens - done)
            yield Step(
                tokens=group,
                num_draft_tokens=num_drafts,
                num_accepted=len(group) - (not from_draft),
                parts=((DRAFT_MODEL, num_drafts),),
            )
            done += len(group)
            group = []
        if ends:
            return


def load_stock(path: str | Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model folder or hub id with mlx-lm alone; returns model and tokenizer.

    Raises:
        ValueError: mlx-lm cannot load it.
    """
    from mlx_lm import load

    try:
        config = {"trust_remote_code": trust_remote_code}
        model, tokenizer, *_ = load(str(path), tokenizer_config=config)
    except Exception as error:  # mlx-lm and transformers raise many types
        raise ValueError(f"mlx-lm cannot load {path}: {first_line(error)}") from None
    return model, tokenizer


def _bytes(model: Any) -> int:
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return sum(value.nbytes for _, value in parameters)


def _parameters(base: Any) -> int:
    """Number of parameters of a model without adapter, quantised ones counted singly."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(base))
