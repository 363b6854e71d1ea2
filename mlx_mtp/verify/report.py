"""The outcome of a verification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.decoding.loop import StepResult
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.verify.near_tie import Divergence
from mlx_mtp.verify.rows import NearestTie, RowTally
from mlx_mtp.verify.sampling import SamplingTest
from mlx_mtp.verify.settings import VerifySettings


@dataclass(kw_only=True)
class Tally:
    """Outcomes of the comparisons with one reference, counted by prompt."""

    identical: int = 0
    near_ties: int = 0
    mismatches: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    def add(self, divergences: Sequence[Divergence]) -> None:
        """Count one prompt: identical, with near-ties only, or with a mismatch."""
        self.divergences += divergences
        if not divergences:
            self.identical += 1
        elif divergences[-1].near_tie:
            self.near_ties += 1
        else:
            self.mismatches += 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self) | {
            "divergences": [divergence.to_dict() for divergence in self.divergences]
        }


@dataclass
class RunResult:
    """One layout and depth over all prompts, including what was decoded again after near-ties.

    Attributes:
        layout: the layout; "plain" for the plain run, which is compared with stock mlx-lm only.
        num_draft_tokens: drafts per step; 0 for the plain run.
        num_tokens: number of emitted ids.
        num_steps: number of decoding steps.
        num_drafts: number of verified drafts.
        num_accepted: number of accepted drafts.
        against: outcomes by reference, "plain" and "stock".
        rows: rows of logits compared with those of a reference.
    """

    layout: str
    num_draft_tokens: int
    num_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    against: dict[str, Tally] = field(default_factory=dict)
    rows: dict[str, RowTally] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        """Emitted ids per step."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0

    def count(self, step: StepResult) -> None:
        """Add a step to the counts."""
        self.num_steps += 1
        self.num_tokens += len(step.tokens)
        self.num_drafts += step.num_draft_tokens
        self.num_accepted += step.num_accepted

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("against", "rows")
        }
        against = {name: tally.to_dict() for name, tally in self.against.items()}
        rows = {name: tally.to_dict() for name, tally in self.rows.items()}
        return values | {
            "tokens_per_step": self.tokens_per_step,
            "against": against,
            "rows": rows,
        }


@dataclass
class VerifyReport:
    """The outcome of all comparisons and tests.

    Attributes:
        settings: the settings.
        dtype: type in which the model computes.
        prompts: the prompts.
        num_tokens: ids of the plain run, with which every other run was compared.
        runs: the plain run and the speculative ones.
        steps: rows of single steps, compared with the same rows computed one at a time.
        nearest_tie: where plain decoding's best two tokens were closest; None without any row.
        sampling_prompt: id of the prompt that was sampled; None without a sampling check.
        sampling: the tests of sampled tokens.
        seconds: duration.
    """

    settings: VerifySettings
    dtype: str
    prompts: list[Prompt]
    num_tokens: int = 0
    runs: list[RunResult] = field(default_factory=list)
    steps: RowTally = field(default_factory=RowTally)
    nearest_tie: NearestTie | None = None
    sampling_prompt: str | None = None
    sampling: list[SamplingTest] = field(default_factory=list)
    seconds: float = 0.0

    def add_tie(self, tie: NearestTie | None) -> None:
        """Keep the nearer tie, in relation to the largest logit."""
        ties = [found for found in (self.nearest_tie, tie) if found is not None]
        self.nearest_tie = min(ties, key=lambda found: found.relative_margin, default=None)

    def rows_against(self, reference: str) -> RowTally:
        """Rows of all runs that were compared with a reference, "plain" or "stock"."""
        tallies = (run.rows[reference] for run in self.runs if reference in run.rows)
        return sum(tallies, RowTally())

    @property
    def tallies(self) -> list[Tally]:
        """The outcomes of all runs."""
        return [tally for run in self.runs for tally in run.against.values()]

    @property
    def num_mismatches(self) -> int:
        """Number of comparisons with a mismatch."""
        return sum(tally.mismatches for tally in self.tallies)

    @property
    def num_near_ties(self) -> int:
        """Number of comparisons that diverged at near-ties only."""
        return sum(tally.near_ties for tally in self.tallies)

    @property
    def num_failed_tests(self) -> int:
        """Number of sampling tests that failed."""
        return sum(not test.passed for test in self.sampling)

    @property
    def verdict(self) -> str:
        """``"identical"``, ``"near-ties"`` or ``"mismatch"`` (biased sampling is one too)."""
        if self.num_mismatches or self.num_failed_tests:
            return "mismatch"
        return "near-ties" if self.num_near_ties else "identical"

    @property
    def passed(self) -> bool:
        """Whether near-ties explain all differences."""
        return self.verdict != "mismatch"
