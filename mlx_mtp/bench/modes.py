"""The ways to decode that a benchmark compares: ours, stock mlx-lm, and mlx-lm with a draft model.

All are greedy and begin with empty caches.  Stock mlx-lm runs on the model folder as it is, as its
own command would, so on a CPU it has quantised weights where ours are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.bench.runs import Check, Step
from mlx_mtp.calibration.stored_costs import calibrate, speculation_for
from mlx_mtp.decoding.loop import decode
from mlx_mtp.planning.plan import FIXED_LAYOUTS, LAYOUTS

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel

PLAIN, STOCK, DRAFT = "plain", "stock", "draft"
NAMES = (PLAIN, *(each for each in LAYOUTS if each != PLAIN), STOCK, DRAFT)
PLANNED = tuple(each for each in FIXED_LAYOUTS if each != PLAIN)
DRAFT_MODEL = "draft model"  # source of its drafts
DRAFT_TOKENS = 3  # default of mlx_lm.generate

Begin = Callable[[list[int], Check], Iterator[Step]]


@dataclass(frozen=True)
class Mode:
    """A way to decode.

    Attributes:
        name: see ``parsed``.
        begin: from prompt ids to steps; a check is called now and then during prefill.
        ours: whether its ids must be those of plain decoding.
        parameters: of the model, without adapter and draft model.
        weight_bytes: of everything that it has loaded.
    """

    name: str
    begin: Begin
    ours: bool
    parameters: int
    weight_bytes: int


def parsed(name: str) -> tuple[str, int | None]:
    """A mode's layout, or its name, and how many drafts it has in a step, if the name says so.

    Args:
        name: one of ``NAMES``, or a fixed layout with a number behind it: ``linear:2``.

    Raises:
        ValueError: there is no such mode.
    """
    layout, colon, number = name.partition(":")
    if layout not in NAMES:
        raise ValueError(f"no mode {name!r}: there are {', '.join(NAMES)}")
    if not colon:
        return layout, None
    if layout not in PLANNED or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"no mode {name!r}: a number of drafts goes with {' and '.join(PLANNED)}, as linear:2"
        )
    return layout, int(number)


def check_modes(names: Sequence[str], *, draft_model: str | None) -> None:
    """Refuse a list of modes that cannot be measured.

    Raises:
        ValueError: it names the mode.
    """
    for name in names:
        parsed(name)
        if names.count(name) > 1:
            raise ValueError(f"mode {name} is named twice")
    if not names:
        raise ValueError("no mode is named")
    if DRAFT in names and draft_model is None:
        raise ValueError("mode draft needs --draft-model")


def our_modes(
    names: Sequence[str],
    model: MTPModel,
    stop_ids: Collection[int],
    *,
    max_tokens: int,
    num_draft_tokens: int | None = None,
    lookup: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Mode]:
    """Those of the modes that are ours.

    Raises:
        ValueError: the model has no adapter, so that they would decode plainly, or a mode has more
            drafts than the adapter.
    """
    names = [name for name in names if parsed(name)[0] in LAYOUTS]
    drafting = [name for name in names if name != PLAIN]
    if drafting and model.config is None:
        raise ValueError(
            f"mode {drafting[0]} needs an MTP adapter, and {model.name} has none; "
            "measure it with --modes plain,stock"
        )
    for name in drafting:
        if (parsed(name)[1] or 0) > model.num_draft_tokens:
            raise ValueError(f"mode {name}: the adapter drafts {model.num_draft_tokens} at most")
    if "auto" in names:
        calibrate(model, on_status=say)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "stop_ids": stop_ids,
        "speculation": speculation_for(model) if "auto" in names else None,
        "lookup": lookup,
    }
    found = []
    for name in names:
        layout, number = parsed(name)
        own = {"layout": layout, "num_draft_tokens": number or num_draft_tokens}
        begin = partial(_our_steps, model, options | own)
        found.append(Mode(name, begin, True, _parameters(model.base), _bytes(model)))
    return found


def _our_steps(
    model: MTPModel, options: dict[str, Any], ids: list[int], check: Check
) -> Iterator[Step]:
    """Decode; ``options`` are those of ``decode``."""
    pending = None  # rows of the prompt's last chunk, in the first step
    for step in decode(model, ids, prompt_progress_callback=lambda *_: check(), **options):
        rows = step.num_rows - step.num_draft_tokens
        yield Step(
            tokens=step.tokens,
            num_draft_tokens=step.num_draft_tokens,
            num_accepted=step.num_accepted,
            num_masks=0 if pending is None else rows - pending,
            source=step.source,
        )
        pending = 1


def stock_mode(stock: Any, stop_ids: Collection[int], *, max_tokens: int) -> Mode:
    """Stock mlx-lm on a model from ``mlx_lm.load``."""
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
    """mlx-lm's speculative decoding with a draft model; both from ``mlx_lm.load``."""
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
    """Put ids that came one by one back into steps: a run of drafts, and the model's own id.

    Args:
        tokens: ids, each with whether it is from the draft model.
        stop_ids: ids that end an answer.
        num_draft_tokens: drafts of a step; fewer where ``max_tokens`` is nearer.
        max_tokens: ids of the answer.
    """
    done = 0
    group: list[int] = []
    for token, from_draft in tokens:
        group.append(token)
        ends = token in stop_ids or done + len(group) == max_tokens
        if not from_draft or ends:
            yield Step(
                tokens=group,
                num_draft_tokens=min(num_draft_tokens, max_tokens - done),
                num_accepted=len(group) - (not from_draft),
                source=DRAFT_MODEL,
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
        found = load(str(path), tokenizer_config=config)
    except Exception as error:  # mlx-lm and transformers raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"mlx-lm cannot load {path}: {reason[0]}") from None
    return found[0], found[1]


def _bytes(model: Any) -> int:
    parameters = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return sum(value.nbytes for _, value in parameters)


def _parameters(base: Any) -> int:
    """Weights of a model, packed ones counted singly, without an adapter's."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(base))
