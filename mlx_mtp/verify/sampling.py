"""Do speculative draws follow the model's distribution?  A test of the first three tokens.

One prompt is answered many times, each time with another seed, with every layout and depth.  Every
drawn token is compared with the exact distribution of plain decoding after the tokens drawn before
it, which comes from one plain forward for each context that occurred.  Token 1 is drawn without
drafts; tokens 2 and 3 are accepted drafts or what replaced rejected ones.

Counts are taken over the ids that are expected often enough, and over blocks of ranks of the drawn
token among the likely ones (drafts are likely tokens, so a bias towards drafts shows there even if
every context favours other ids); all others share one bin.  ``chi_square`` has the test; its
p-values are adjusted for the number of tests by Holm's method.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling, target_probs
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.verify.chi_square import MIN_EXPECTED, Group, chi_square, holm, simulated_p_value
from mlx_mtp.verify.near_tie import near_tie_bound
from mlx_mtp.verify.prefill import prefilled, rewound
from mlx_mtp.verify.settings import DEFAULT_SAMPLING, Way

ALPHA = 0.001
NUM_TOKENS = 3
_TESTS_PER_WAY = 2 * NUM_TOKENS
_TINY_P_VALUE = 1e-15  # so small that no simulation is needed
_KEPT_IDS = 128
_MAX_BINS = 24

Context = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingTest:
    """One test: a layout and depth, a sampling setting, a position, a kind of bins.

    Attributes:
        sampling: the setting in words.
        layout: layout of the steps.
        num_draft_tokens: drafts per step.
        token: position of the token, from 1.
        bins_by: ``"id"`` or ``"rank"``.
        num_draws: number of draws that were counted.
        num_contexts: number of distributions that they came from.
        num_bins: number of bins, including the shared one.
        statistic: chi-square statistic.
        df: its degrees of freedom; 0 if the draws are too few or too certain for a test.
        p_value: None without a test; 0 if a draw was impossible; simulated if the chi-square
            distribution gives less than ``ALPHA``.
        adjusted_p_value: after Holm's correction.
        num_impossible: number of draws that the filters exclude even with rounding errors.
    """

    sampling: str
    layout: str
    num_draft_tokens: int
    token: int = 0
    bins_by: str = "id"
    num_draws: int = 0
    num_contexts: int = 0
    num_bins: int = 0
    statistic: float = 0.0
    df: int = 0
    p_value: float | None = None
    adjusted_p_value: float | None = None
    num_impossible: int = 0

    @property
    def passed(self) -> bool:
        """Whether the draws are consistent with the distribution."""
        return self.adjusted_p_value is None or self.adjusted_p_value >= ALPHA

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class Target:
    """The distribution after a context, truncated to its most likely ids.

    Attributes:
        ids: in descending order of probability, ``[M]``.
        probs: their probabilities, ``[M]``; the remainder to 1 is that of all other ids.
        impossible: drawn ids that the filters exclude.
    """

    ids: np.ndarray
    probs: np.ndarray
    impossible: frozenset[int]


def check_sampling(
    model: MTPModel,
    prompt: Sequence[int],
    *,
    ways: Sequence[Way],
    settings: Sequence[Sampling] = DEFAULT_SAMPLING,
    num_draws: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[SamplingTest]:
    """Test every layout and depth with every sampling setting.

    Args:
        model: the model.
        prompt: ids of the prompt.
        ways: layouts and depths.
        settings: sampling settings.
        num_draws: number of draws of three tokens per layout, depth and setting.
        seed: seed of the first draw; further draws count up from it.
        progress: called with (draws done, number of draws).
    """
    source = _Source(model, prompt)
    per_setting = len(ways) * num_draws
    # Enough replicates for one test of all to fail after Holm's correction.
    num_replicates = round(2 * _TESTS_PER_WAY * len(settings) * len(ways) / ALPHA)
    tests = []
    for number, sampling in enumerate(settings):
        draws: dict[Way, list[Context]] = defaultdict(list)
        for i in range(per_setting):
            done = number * per_setting + i
            way = ways[i // num_draws]
            draws[way].append(source.draw(way, sampling, seed=seed + done))
            if progress:
                progress(done + 1, per_setting * len(settings))
        targets = source.targets(sampling, (tokens for drawn in draws.values() for tokens in drawn))
        for way in ways:
            test = SamplingTest(sampling=describe(sampling), layout=way[0], num_draft_tokens=way[1])
            tests += _test_way(test, draws[way], targets, num_replicates=num_replicates, seed=seed)
    return _adjusted(tests)


class _Source:
    """Draws continuations of one prompt, which is prefilled once."""

    def __init__(self, model: MTPModel, prompt: Sequence[int]) -> None:
        self.model = model
        self.prompt = list(prompt)
        self.cache = prefilled(model, prompt)

    def draw(self, way: Way, sampling: Sampling, *, seed: int) -> Context:
        """Draw the first three tokens.

        ``max_tokens`` is larger, so that tokens 2 and 3 can come from drafts.
        """
        layout, num_draft_tokens = way
        steps = decode(
            self.model,
            self.prompt[-1:],
            max_tokens=NUM_TOKENS + num_draft_tokens,
            sampling=sampling,
            layout=layout,
            num_draft_tokens=num_draft_tokens,
            cache=self.cache,
            seed=seed,
        )
        tokens: list[int] = []
        for step in steps:
            tokens += step.tokens
            if len(tokens) >= NUM_TOKENS:
                break
        self._rewind()
        return tuple(tokens[:NUM_TOKENS])

    def targets(self, sampling: Sampling, draws: Iterable[Context]) -> dict[Context, Target]:
        """Compute the distribution after every context that occurred in the draws."""
        drawn: dict[Context, set[int]] = defaultdict(set)
        for tokens in draws:
            for i, token in enumerate(tokens):
                drawn[tokens[:i]].add(token)
        return {
            context: self._target(context, sampling, tokens) for context, tokens in drawn.items()
        }

    def _target(self, context: Context, sampling: Sampling, drawn: set[int]) -> Target:
        greedy = dataclasses.replace(sampling, temp=0.0)
        ids = [self.prompt[-1], *context]
        step = next(decode(self.model, ids, max_tokens=1, sampling=greedy, layout="plain",
                           cache=self.cache))  # fmt: skip
        logits = step.logits[0].astype(mx.float32)
        probs = np.array(target_probs(logits, sampling), dtype=np.float64)
        allowed = np.array(_allowed(logits, sampling, near_tie_bound(logits, self.model.dtype)))
        self._rewind()
        order = np.argsort(-probs, kind="stable")[:_KEPT_IDS]
        impossible = frozenset(token for token in drawn if not allowed[token])
        return Target(order, probs[order] / probs.sum(), impossible)

    def _rewind(self) -> None:
        self.cache = rewound(self.model, self.cache, self.prompt)


def _allowed(logits: mx.array, sampling: Sampling, slack: float) -> mx.array:
    """Ids that the filters keep if logits have errors up to ``slack``, bool ``[V]``."""
    loose = dataclasses.replace(
        sampling,
        temp=1.0,
        top_p=min(1.0, sampling.top_p + slack) if sampling.top_p > 0 else 0.0,
        min_p=sampling.min_p * max(0.0, 1 - slack),
        top_k=0,
    )
    allowed = target_probs(logits, loose) > 0
    if 0 < sampling.top_k < logits.size:
        allowed = allowed & (logits >= mx.topk(logits, sampling.top_k).min() - slack)
    return allowed


def _test_way(
    blank: SamplingTest,
    draws: Sequence[Context],
    targets: dict[Context, Target],
    *,
    num_replicates: int,
    seed: int,
) -> list[SamplingTest]:
    """Test the draws of one layout, depth and setting at every position."""
    tests = []
    for position in range(NUM_TOKENS):
        counted: dict[Context, Counter[int]] = defaultdict(Counter)
        for tokens in draws:
            if len(tokens) > position:
                counted[tokens[:position]][tokens[position]] += 1
        # With one context there is one ranking, so ranks would repeat the test of ids.
        for bins_by in ("id", "rank")[: len(counted)]:
            test = dataclasses.replace(blank, token=position + 1, bins_by=bins_by)
            tests.append(_tested(test, counted, targets, num_replicates=num_replicates, seed=seed))
    return tests


def _tested(
    test: SamplingTest,
    counted: dict[Context, Counter[int]],
    targets: dict[Context, Target],
    *,
    num_replicates: int,
    seed: int,
) -> SamplingTest:
    """Fill in the outcome; a p-value below ``ALPHA`` is simulated."""
    impossible = sum(
        count
        for context, counts in counted.items()
        for token, count in counts.items()
        if token in targets[context].impossible
    )
    groups, num_bins = _groups(counted, targets, by_rank=test.bins_by == "rank")
    result = chi_square(groups)
    p_value = result.p_value if result else None
    if p_value is not None and _TINY_P_VALUE < p_value < ALPHA and not impossible:
        p_value = simulated_p_value(groups, num_replicates=num_replicates, seed=seed)
    return dataclasses.replace(
        test,
        num_draws=sum(counts.total() for counts in counted.values()),
        num_contexts=len(counted),
        num_bins=num_bins,
        statistic=result.statistic if result else 0.0,
        df=result.df if result else 0,
        p_value=0.0 if impossible else p_value,
        num_impossible=impossible,
    )


def _groups(
    counted: dict[Context, Counter[int]], targets: dict[Context, Target], *, by_rank: bool
) -> tuple[list[Group], int]:
    """Count draws in bins: one for each label that is expected often enough, and a shared one.

    A label is an id or a rank; only a target's most likely ids have one.
    """

    def labels(context: Context) -> list[int]:
        ids = targets[context].ids
        return list(range(ids.size)) if by_rank else ids.tolist()

    expected: dict[int, float] = defaultdict(float)
    for context, counts in counted.items():
        size = counts.total()
        for label, prob in zip(labels(context), targets[context].probs, strict=True):
            expected[label] += size * float(prob)
    bins = _rank_bins(expected) if by_rank else _id_bins(expected)
    rest = max(bins.values(), default=-1) + 1
    groups = []
    for context, counts in counted.items():
        target = targets[context]
        group = Group(np.zeros(rest + 1), np.zeros(rest + 1))
        for token, label, prob in zip(target.ids, labels(context), target.probs, strict=True):
            group.counts[bins.get(label, rest)] += counts[int(token)]
            group.probs[bins.get(label, rest)] += prob
        group.counts[rest] += counts.total() - group.counts.sum()
        group.probs[rest] += max(0.0, 1 - group.probs.sum())
        groups.append(Group(group.counts, group.probs / group.probs.sum()))
    return groups, rest + 1


def _id_bins(expected: dict[int, float]) -> dict[int, int]:
    """One bin for each id that is expected often enough."""
    often = [label for label in expected if expected[label] >= MIN_EXPECTED]
    often = sorted(often, key=lambda label: -expected[label])[:_MAX_BINS]
    return {label: i for i, label in enumerate(often)}


def _rank_bins(expected: dict[int, float]) -> dict[int, int]:
    """One bin for each block of ranks that is expected often enough."""
    bins: dict[int, int] = {}
    block: list[int] = []
    for rank in sorted(expected):
        block.append(rank)
        if sum(expected[label] for label in block) >= MIN_EXPECTED:
            bins |= dict.fromkeys(block, max(bins.values(), default=-1) + 1)
            block = []
    return bins


def _adjusted(tests: list[SamplingTest]) -> list[SamplingTest]:
    """Add the p-values adjusted for the number of tests."""
    tested = [test for test in tests if test.p_value is not None]
    adjusted = iter(holm([test.p_value for test in tested if test.p_value is not None]))
    return [
        test if test.p_value is None else dataclasses.replace(test, adjusted_p_value=next(adjusted))
        for test in tests
    ]


def describe(sampling: Sampling) -> str:
    """The settings that differ from their defaults, in words."""
    parts = [f"temp {sampling.temp:g}"]
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if field.name != "temp" and value != field.default:
            parts.append(f"{field.name.replace('_', '-')} {value}")
    return ", ".join(parts)
