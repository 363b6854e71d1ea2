"""What to verify, and what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.decoding.loop import StepResult
from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.verify.near_tie import Divergence
from mlx_mtp.verify.sampling import SamplingTest
from mlx_mtp.verify.settings import VerifySettings


@dataclass(kw_only=True)
class Tally:
    """Outcomes of the comparisons with one reference, one per prompt."""

    identical: int = 0
    near_ties: int = 0
    mismatches: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    def add(self, divergences: Sequence[Divergence]) -> None:
        """Count one prompt: identical, apart from near-ties, or with a mismatch."""
        self.divergences += divergences
        if not divergences:
            self.identical += 1
        elif divergences[-1].near_tie:
            self.near_ties += 1
        else:
            self.mismatches += 1

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return dataclasses.asdict(self) | {
            "divergences": [divergence.to_dict() for divergence in self.divergences]
        }


@dataclass
class RunResult:
    """One way to decode, over all prompts; what was decoded again after near-ties counts too.

    Attributes:
        layout: the layout; "plain" for the plain run, which is held against stock mlx-lm alone.
        num_draft_tokens: drafts per step; 0 for the plain run.
        num_tokens: emitted ids.
        num_steps: forwards that emitted them.
        num_drafts: drafts verified.
        num_accepted: drafts accepted.
        against: outcomes by reference, "plain" and "stock".
    """

    layout: str
    num_draft_tokens: int
    num_tokens: int = 0
    num_steps: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    against: dict[str, Tally] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        """Emitted ids over steps."""
        return self.num_tokens / self.num_steps if self.num_steps else 0.0

    def count(self, step: StepResult) -> None:
        """Add a step to the counts."""
        self.num_steps += 1
        self.num_tokens += len(step.tokens)
        self.num_drafts += step.num_draft_tokens
        self.num_accepted += step.num_accepted

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        values = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "against"
        }
        against = {name: tally.to_dict() for name, tally in self.against.items()}
        return values | {"tokens_per_step": self.tokens_per_step, "against": against}


@dataclass
class VerifyReport:
    """Everything that was found.

    Attributes:
        settings: what was asked for.
        dtype: type that the model computes in.
        prompts: the prompts.
        num_tokens: ids of the plain run, which every other run was held against.
        runs: the plain run and the speculative ones.
        sampling_prompt: id of the prompt that was sampled; None without a sampling check.
        sampling: the tests of sampled tokens.
        seconds: duration.
    """

    settings: VerifySettings
    dtype: str
    prompts: list[Prompt]
    num_tokens: int = 0
    runs: list[RunResult] = field(default_factory=list)
    sampling_prompt: str | None = None
    sampling: list[SamplingTest] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tallies(self) -> list[Tally]:
        """The outcomes of all runs."""
        return [tally for run in self.runs for tally in run.against.values()]

    @property
    def num_mismatches(self) -> int:
        """Comparisons that no near-tie explains."""
        return sum(tally.mismatches for tally in self.tallies)

    @property
    def num_near_ties(self) -> int:
        """Comparisons that parted at near-ties alone."""
        return sum(tally.near_ties for tally in self.tallies)

    @property
    def num_failed_tests(self) -> int:
        """Sampling tests that failed."""
        return sum(not test.passed for test in self.sampling)

    @property
    def verdict(self) -> str:
        """``"identical"``, ``"near-ties"`` or ``"mismatch"`` (biased sampling is one too)."""
        if self.num_mismatches or self.num_failed_tests:
            return "mismatch"
        return "near-ties" if self.num_near_ties else "identical"

    @property
    def passed(self) -> bool:
        """Whether nothing was found that a near-tie does not explain."""
        return self.verdict != "mismatch"
