"""Adapters compared on the same held-out texts: paired differences with standard errors.

Tokens per step of an adapter is R = T / S, tokens over steps of all texts.  By the delta method,
the difference of two such ratios has the influence of text i

    u_i = (T_i - R_a S_ai) / mean(S_a) - (T_i - R_b S_bi) / mean(S_b)

and the standard error sqrt(var(u) / n) over the n texts, which are the clusters: steps within a
text are not independent.  With several seeds, u_i is the mean over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_mtp.bench.interval import CONFIDENCE, student_quantile
from mlx_mtp.evaluation.acceptance import Answer, count_answers, walk
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.mtp_model import MTPModel


@dataclass(frozen=True)
class TextSteps:
    """Tokens and steps of each text.

    Attributes:
        tokens: ``[N]``.
        steps: ``[N]``.
    """

    tokens: np.ndarray
    steps: np.ndarray

    @property
    def tokens_per_step(self) -> float:
        """Of all texts together."""
        return float(self.tokens.sum() / self.steps.sum())

    @property
    def influence(self) -> np.ndarray:
        """Influence of each text on ``tokens_per_step``, ``[N]``; the sum is 0."""
        return (self.tokens - self.tokens_per_step * self.steps) / self.steps.mean()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference in tokens per step.

    Attributes:
        mean: of the seeds.
        error: standard error, clustered by text.
        by_seed: of each seed.
    """

    mean: float
    error: float
    by_seed: tuple[float, ...]


def text_steps(
    model: MTPModel,
    sequences: Sequence[TokenSequence],
    *,
    rows_per_forward: int,
) -> TextSteps:
    """Count tokens and steps of each text's answers, quadratic and greedy.

    Args:
        model: with its adapter.
        sequences: the texts.
        rows_per_forward: maximum mask rows per forward.

    Raises:
        ValueError: the model has no adapter.
    """
    if model.adapter_config is None:
        raise ValueError(f"{model.name} has no adapter, so there are no drafts to compare")
    answers = list(count_answers(model, sequences, rows_per_forward=rows_per_forward))
    k = model.adapter_config.num_draft_tokens
    return steps_of(answers, num_texts=len(sequences), num_draft_tokens=k)


def steps_of(
    answers: Sequence[Answer], *, num_texts: int, num_draft_tokens: int, layout: str = "quadratic"
) -> TextSteps:
    """Add up the tokens and steps of counted answers by text; see ``acceptance.summarise``."""
    tokens, steps = np.zeros(num_texts), np.zeros(num_texts)
    for answer in answers:
        tokens[answer.sequence] += answer.num_tokens
        steps[answer.sequence] += walk(
            answer.counts,
            first=answer.first,
            last=answer.last,
            num_draft_tokens=num_draft_tokens,
            layout=layout,
        )
    return TextSteps(tokens, steps)


def interval(seeds: Sequence[TextSteps]) -> tuple[float, float]:
    """Mean of seeds in tokens per step and half the width of its 95% interval over texts.

    Raises:
        ValueError: there is no seed.
    """
    if not seeds:
        raise ValueError("there are no runs to evaluate")
    mean = float(np.mean([steps.tokens_per_step for steps in seeds]))
    error = _error(np.mean([steps.influence for steps in seeds], axis=0))
    count = len(seeds[0].tokens)
    return mean, student_quantile((1 + CONFIDENCE) / 2, count - 1) * error if count > 1 else error


def _error(influence: np.ndarray) -> float:
    """Standard error of a mean over texts from the influence of each ``[N]``; NaN of one text."""
    count = len(influence)
    return float(np.sqrt(influence.var(ddof=1) / count)) if count > 1 else float("nan")


def difference(ours: Sequence[TextSteps], control: Sequence[TextSteps]) -> Difference:
    """Compare runs with their controls, which have the same seeds in the same order.

    Raises:
        ValueError: there is no pair, or the texts differ.
    """
    pairs = list(zip(ours, control, strict=True))
    if not pairs:
        raise ValueError("there are no runs to compare")
    if any(not np.array_equal(a.tokens, b.tokens) for a, b in pairs):
        raise ValueError("the runs were evaluated on different texts")
    by_seed = tuple(a.tokens_per_step - b.tokens_per_step for a, b in pairs)
    influence = np.mean([a.influence - b.influence for a, b in pairs], axis=0)
    return Difference(mean=float(np.mean(by_seed)), error=_error(influence), by_seed=by_seed)


def table(results: Mapping[str, Sequence[TextSteps]], *, control: str) -> str:
    """Return a Markdown table of all variants against the control."""
    lines = [
        "| variant | tokens per step | difference | by seed |",
        "|---|---|---|---|",
    ]
    for name, runs in results.items():
        values = " ".join(f"{run.tokens_per_step:.3f}" for run in runs)
        if name == control:
            lines.append(f"| **{name}** | {values} | | |")
            continue
        found = difference(runs, results[control])
        seeds = " ".join(f"{value:+.3f}" for value in found.by_seed)
        lines.append(f"| {name} | {values} | {found.mean:+.3f} ± {found.error:.3f} | {seeds} |")
    return "\n".join(lines) + "\n"
