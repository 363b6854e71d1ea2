"""The flow of ``mlx-mtp benchmark``: load, prepare the prompts, measure, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_mtp.bench import contexts as text_before
from mlx_mtp.bench.machine_state import PowerMeter, swap_bytes
from mlx_mtp.bench.measure import Settings, measure
from mlx_mtp.bench.modes import (
    DRAFT,
    DRAFT_TOKENS,
    PLAIN,
    STOCK,
    Mode,
    check_modes,
    draft_mode,
    load_stock,
    our_modes,
    stock_mode,
)
from mlx_mtp.bench.report import Setup, build_report
from mlx_mtp.bench.runs import Check
from mlx_mtp.calibration.stored_costs import SPECULATIONS
from mlx_mtp.evaluation.prompts import Prompt

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be measured.

    Attributes:
        prompts, source: the prompts and where they are from.
        modes: see ``modes.parsed``; the first is the base.
        contexts: ids of text before the prompts.
        max_tokens: most ids of an answer, at least 2.
        settings: of the schedule.
        model, adapter_path, draft_model: folders or hub ids; see ``loading.load``.
        trust_remote_code: let tokenizers run their code.
        num_draft_tokens: drafts per step of our modes; None is the adapter's number.
        lookup: whether auto may take drafts from the text.
        seed: of the intervals.
    """

    prompts: Sequence[Prompt]
    source: str
    modes: Sequence[str]
    contexts: Sequence[int] = (0,)
    max_tokens: int = 96
    settings: Settings = Settings()
    model: str | None = None
    adapter_path: str | None = None
    draft_model: str | None = None
    trust_remote_code: bool = False
    num_draft_tokens: int | None = None
    lookup: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_modes(self.modes, draft_model=self.draft_model)


@dataclass(frozen=True)
class Prepared:
    """All that a measurement needs, loaded and checked.

    Attributes:
        wanted: what is to be measured.
        model: ours.
        facts: what a report says of the model and its adapter.
        modes: in the wanted order.
        questions: what is asked.
    """

    wanted: Wanted
    model: MTPModel
    facts: dict[str, Any]
    modes: list[Mode]
    questions: list[text_before.Question]


def prepare(wanted: Wanted, *, say: Say = lambda text: None) -> Prepared:
    """Load the models and put the prompts behind their text.

    Args:
        wanted: what is to be measured.
        say: called with a line about what is going on.

    Raises:
        ValueError: a model cannot be used, or a prompt does not fit its context.
    """
    from mlx_mtp.loading import load

    drafting = any(name not in (PLAIN, STOCK, DRAFT) for name in wanted.modes)
    model, tokenizer = load(
        wanted.model,
        adapter_path=wanted.adapter_path,
        trust_remote_code=wanted.trust_remote_code,
        mtp=wanted.adapter_path is not None or drafting,
        progress=say,
    )
    _check_contexts(model, wanted)
    questions = text_before.questions(tokenizer, wanted.prompts, wanted.contexts, say=say)
    text_before.check_room(
        questions, max_tokens=wanted.max_tokens,
        max_context=model.max_context, model=model.name,
    )  # fmt: skip
    found = our_modes(
        wanted.modes,
        model,
        tokenizer.eos_token_ids,
        max_tokens=wanted.max_tokens,
        num_draft_tokens=wanted.num_draft_tokens,
        lookup=wanted.lookup,
        say=say,
    )
    found += _stock_modes(wanted, tokenizer, say)
    found.sort(key=lambda mode: wanted.modes.index(mode.name))
    return Prepared(wanted, model, _model_facts(wanted, model), found, questions)


def _check_contexts(model: MTPModel, wanted: Wanted) -> None:
    """Refuse early what cannot fit whatever the prompt is."""
    longest = max(wanted.contexts)
    if model.max_context is not None and longest + wanted.max_tokens >= model.max_context:
        raise ValueError(
            f"{longest} tokens of text and {wanted.max_tokens} of answer do not fit "
            f"{model.name}, which has a context of {model.max_context}"
        )


def _stock_modes(wanted: Wanted, tokenizer: Any, say: Say) -> list[Mode]:
    """The modes that are mlx-lm's own, on the model folder as it is."""
    from mlx_mtp.loading import locate, resolve

    names = [name for name in wanted.modes if name in (STOCK, DRAFT)]
    if not names:
        return []
    say("Loading the model with mlx-lm ...")
    folder, _ = locate(wanted.model, None)
    trust = wanted.trust_remote_code
    stock, _ = load_stock(folder, trust_remote_code=trust)
    stop_ids, limit = tokenizer.eos_token_ids, wanted.max_tokens
    found = [stock_mode(stock, stop_ids, max_tokens=limit)] if STOCK in names else []
    if DRAFT in names:
        assert wanted.draft_model is not None  # see ``check_modes``
        say("Loading the draft model ...")
        path = resolve(wanted.draft_model, kind="draft model")
        draft, draft_tokenizer = load_stock(path, trust_remote_code=trust)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"draft model {wanted.draft_model} has {draft_tokenizer.vocab_size} tokens, "
                f"the model {tokenizer.vocab_size}: it needs the same tokenizer"
            )
        found.append(draft_mode(stock, draft, stop_ids, max_tokens=limit))
    return found


def run(
    prepared: Prepared, *, check: Check = lambda: None, say: Say = lambda text: None
) -> dict[str, Any] | None:
    """Measure and report.

    Args:
        prepared: from ``prepare``.
        check: called after every step; KeyboardInterrupt out of it ends with what is there.
        say: called with a line about what is going on.

    Returns:
        The report, see ``report.build_report``; None if nothing was measured before Ctrl-C.
    """
    from mlx_mtp.generate import wired_memory

    power, before = PowerMeter(), swap_bytes()
    with wired_memory():
        measured = measure(
            prepared.questions,
            prepared.modes,
            prepared.wanted.settings,
            power=power,
            check=check,
            say=say,
        )
    if not measured.answers:
        return None
    return build_report(
        _setup(prepared), measured, swap_bytes=(before, swap_bytes()), no_power=power.reason
    )


def _setup(prepared: Prepared) -> Setup:
    wanted, model = prepared.wanted, prepared.model
    known = SPECULATIONS.get(model)
    curve = known.costs.curve.to_dict() if known else None
    return Setup(
        model=prepared.facts,
        modes=prepared.modes,
        prompts=wanted.prompts,
        source=wanted.source,
        contexts=wanted.contexts,
        filler=text_before.source() if any(wanted.contexts) else None,
        settings=wanted.settings,
        decoding={
            "max_tokens": wanted.max_tokens,
            "num_draft_tokens": wanted.num_draft_tokens or model.num_draft_tokens,
            "draft_model_tokens": DRAFT_TOKENS if wanted.draft_model else None,
            "lookup": wanted.lookup,
        },
        seed=wanted.seed,
        cost_curve=curve,
    )


def _model_facts(wanted: Wanted, model: MTPModel) -> dict[str, Any]:
    from mlx_mtp.loading import locate
    from mlx_mtp.model.mtp_model import fingerprint
    from mlx_mtp.storage.files import hash_weights

    adapter = None
    if model.config is not None:
        adapter = {"sha256": hash_weights(locate(wanted.model, wanted.adapter_path)[1])}
        adapter |= {"num_draft_tokens": model.num_draft_tokens, "rank": model.config.rank}
    return {
        "name": model.name,
        "type": model.base.model_type,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "fingerprint": fingerprint(model.base),
        "adapter": adapter,
        "draft_model": wanted.draft_model,
    }
