"""The flow of ``mlx-mtp benchmark``: load, prepare the prompts, measure, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_mtp.bench import contexts as context_texts
from mlx_mtp.bench.machine_state import PowerMeter, swap_bytes
from mlx_mtp.bench.measure import measure
from mlx_mtp.bench.modes import (
    COUNTABLE,
    DRAFT,
    DRAFT_TOKENS,
    NEED_ADAPTER,
    STOCK,
    Mode,
    check_modes,
    draft_mode,
    load_stock,
    our_modes,
    parse_mode,
    stock_mode,
)
from mlx_mtp.bench.report import Setup, build_report
from mlx_mtp.bench.runs import Check
from mlx_mtp.bench.settings import Settings
from mlx_mtp.calibration.stored_costs import SPECULATIONS
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.planning.plan import AUTO

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel

OnStatus = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Configuration of a benchmark.

    Attributes:
        prompts, source: the prompts and the name of their source.
        modes: see ``modes.parse_mode``; the first is the baseline.
        contexts: numbers of ids of text before the prompts.
        max_tokens: maximum ids of an answer, at least 2.
        settings: the schedule.
        model, adapter_path, draft_model: folders or hub ids; see ``loading.load``.  The draft model
            is that of mode "draft" and of our drafting modes.
        adapter: whether the model's adapter is used.
        trust_remote_code: whether tokenizers may run their code.
        num_draft_tokens: drafts per step of our modes; the adapter's maximum for None.
        lookup: whether auto may verify looked-up drafts.
        seed: random seed of the confidence intervals.
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
    adapter: bool = True
    trust_remote_code: bool = False
    num_draft_tokens: int | None = None
    lookup: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_modes(self.modes, draft_model=self.draft_model)


@dataclass(frozen=True)
class Prepared:
    """Everything that a measurement needs, loaded and checked.

    Attributes:
        config: the configuration.
        model: the model of our modes.
        facts: what the report says about the model and its adapter.
        modes: in the order of the configuration.
        questions: the prompts with their contexts.
    """

    config: BenchmarkConfig
    model: MTPModel
    facts: dict[str, Any]
    modes: list[Mode]
    questions: list[context_texts.Question]


def prepare(config: BenchmarkConfig, *, on_status: OnStatus = lambda text: None) -> Prepared:
    """Load the models and put the contexts before the prompts.

    Args:
        config: the configuration.
        on_status: called with a line about the work in progress.

    Raises:
        ValueError: a model cannot be used, or a prompt does not fit into the model's context.
    """
    from mlx_mtp.loading import load

    kinds = {parse_mode(name)[0] for name in config.modes}
    drafts, uses_adapter = kinds & {AUTO, *COUNTABLE}, kinds & NEED_ADAPTER
    has_path = config.adapter_path is not None
    model, tokenizer = load(
        config.model,
        adapter_path=config.adapter_path,
        trust_remote_code=config.trust_remote_code,
        mtp=has_path or bool(drafts),
        adapter=config.adapter and (has_path or bool(uses_adapter)),
        draft_model=config.draft_model if drafts else None,
        progress=on_status,
    )
    _check_contexts(model, config)
    questions = context_texts.questions(
        tokenizer, config.prompts, config.contexts, on_status=on_status
    )
    context_texts.check_room(
        questions, max_tokens=config.max_tokens, max_context=model.max_context, model=model.name
    )
    modes = our_modes(
        config.modes,
        model,
        tokenizer.eos_token_ids,
        max_tokens=config.max_tokens,
        num_draft_tokens=config.num_draft_tokens,
        lookup=config.lookup,
        on_status=on_status,
    )
    modes += _stock_modes(config, tokenizer, on_status)
    modes.sort(key=lambda mode: config.modes.index(mode.name))
    return Prepared(config, model, _model_facts(config, model), modes, questions)


def _check_contexts(model: MTPModel, config: BenchmarkConfig) -> None:
    """Refuse early what cannot fit with any prompt."""
    longest = max(config.contexts)
    if model.max_context is not None and longest + config.max_tokens >= model.max_context:
        raise ValueError(
            f"{longest} tokens of text and {config.max_tokens} of answer do not fit into the "
            f"context of {model.name}, which is {model.max_context}"
        )


def _stock_modes(config: BenchmarkConfig, tokenizer: Any, on_status: OnStatus) -> list[Mode]:
    """The modes of mlx-lm itself, on the unchanged model folder."""
    from mlx_mtp.loading import check_draft_tokenizer, locate, resolve

    names = [name for name in config.modes if name in (STOCK, DRAFT)]
    if not names:
        return []
    on_status("Loading the model with mlx-lm ...")
    folder, _ = locate(config.model, None, mtp=False)
    trust = config.trust_remote_code
    stock, _ = load_stock(folder, trust_remote_code=trust)
    stop_ids, max_tokens = tokenizer.eos_token_ids, config.max_tokens
    modes = [stock_mode(stock, stop_ids, max_tokens=max_tokens)] if STOCK in names else []
    if DRAFT in names:
        assert config.draft_model is not None  # see ``check_modes``
        on_status("Loading the draft model ...")
        path = resolve(config.draft_model, kind="draft model")
        draft, draft_tokenizer = load_stock(path, trust_remote_code=trust)
        check_draft_tokenizer(config.draft_model, draft_tokenizer, tokenizer)
        modes.append(draft_mode(stock, draft, stop_ids, max_tokens=max_tokens))
    return modes


def run(prepared: Prepared, *, check: Check = lambda: None) -> dict[str, Any] | None:
    """Measure and report.

    Args:
        prepared: from ``prepare``.
        check: called after every step; if it raises KeyboardInterrupt, the measurement ends with
            the results so far.

    Returns:
        The report, see ``report.build_report``; None if nothing was measured before Ctrl-C.
    """
    from mlx_mtp.generate import wired_memory

    power, before = PowerMeter(), swap_bytes()
    with wired_memory():
        measurement = measure(
            prepared.questions,
            prepared.modes,
            prepared.config.settings,
            power=power,
            check=check,
        )
    if not measurement.answers:
        return None
    return build_report(
        _setup(prepared), measurement, swap_bytes=(before, swap_bytes()), no_power=power.reason
    )


def _setup(prepared: Prepared) -> Setup:
    config, model = prepared.config, prepared.model
    known = SPECULATIONS.get(model)
    return Setup(
        model=prepared.facts,
        modes=prepared.modes,
        prompts=config.prompts,
        source=config.source,
        contexts=config.contexts,
        filler=context_texts.filler_facts() if any(config.contexts) else None,
        settings=config.settings,
        decoding={
            "max_tokens": config.max_tokens,
            "num_draft_tokens": config.num_draft_tokens or model.num_draft_tokens,
            "draft_model_tokens": DRAFT_TOKENS if config.draft_model else None,
            "lookup": config.lookup,
        },
        seed=config.seed,
        cost_curve=known.costs.curve.to_dict() if known else None,
    )


def _model_facts(config: BenchmarkConfig, model: MTPModel) -> dict[str, Any]:
    from mlx_mtp.drafting.make import available_sources
    from mlx_mtp.loading import locate
    from mlx_mtp.model.mtp_model import fingerprint
    from mlx_mtp.storage.files import hash_weights

    adapter = None
    if model.config is not None:
        adapter = {"sha256": hash_weights(locate(config.model, config.adapter_path)[1])}
        adapter |= {"num_draft_tokens": model.num_draft_tokens, "rank": model.config.rank}
    return {
        "name": model.name,
        "type": model.base.model_type,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "fingerprint": fingerprint(model.base),
        "adapter": adapter,
        "drafters": list(available_sources(model)),
        "draft_model": config.draft_model,
    }
