"""The constants of the ``auto`` planner, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlannerSettings:
    """How the planner estimates, and when it looks for a better policy.

    Attributes:
        replan_steps: steps after which acceptance and costs are compared with those that the
            policy was computed for.
        early_replans: numbers of steps after which that is also done, while little is known.
        moved: change of a probability, or of a cost in plain steps, that makes a policy stale.
        probe_masks: masks of a probe, which tries drafting where plain decoding wins.
        first_pause: plain steps before the first probe.
        max_pause: maximum plain steps between probes; the pause doubles up to it.
        surprise_pause: plain steps after a probe that went better than expected.
        surprise_share: share of the expected time below which a probe was surprisingly cheap.
        max_surprises: maximum number of probes in a row after surprises.
        probe_share: maximum share of the time that probes may cost.
        max_probe_wait: maximum plain steps to wait because of what one probe costs.
        keep: what is left of a position's counts when it is observed again; 0.96 remembers about
            25 observations.
        keep_long: the same in the long memory; 0.998 remembers about 500.
        long_weight: observations that the long memory counts for next to the short one.
        chance_variance: squared standard deviations by which the two memories differ by chance.
        prior_weight: observations that a prior counts for.
        unknown_prob: acceptance probability of a draft where nothing is known.
    """

    replan_steps: int = 32
    early_replans: tuple[int, ...] = (2, 4, 8, 16)
    moved: float = 0.05
    probe_masks: int = 2
    first_pause: int = 16
    max_pause: int = 512
    surprise_pause: int = 2
    surprise_share: float = 0.75
    max_surprises: int = 8
    probe_share: float = 0.005
    max_probe_wait: int = 1024
    keep: float = 0.96
    keep_long: float = 0.998
    long_weight: float = 60.0
    chance_variance: float = 4.0
    prior_weight: float = 20.0
    unknown_prob: float = 0.5


DEFAULTS = PlannerSettings()
