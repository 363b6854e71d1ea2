"""When to try drafting where plain decoding wins.

A probe is a step with a few masks and the step that verifies their drafts.  It comes after a pause
that doubles as long as no draft is accepted, and never so soon that probes would take more than a
small share of the time.  After a probe whose drafts were all accepted, or that took much less time
than expected, the next one follows almost at once, a few times in a row, because the estimates may
be wrong.  The time that these probes cost is made up for by a longer wait afterwards.

The estimated cost of a probe may be wrong too, because costs may have been measured on a busy
machine, so the wait has a maximum.  A row costs at most a plain step, since rows could be run one
by one; then a probe (two steps of three rows each, and drafting) loses at most six plain steps,
which is 0.6% of the maximum wait.
"""

from __future__ import annotations

from mlx_mtp.planning.settings import DEFAULTS, PlannerSettings


class Probing:
    """Counts plain steps, from one answer to the next.

    Args:
        settings: pauses and limits.

    Attributes:
        is_verifying: whether the next step verifies the drafts of a probe.
    """

    def __init__(self, settings: PlannerSettings = DEFAULTS) -> None:
        self.is_verifying = False
        self._settings = settings
        self._plain_steps = 0
        self._pause = settings.first_pause
        self._was_surprised = self._was_cheap = False
        self._num_in_a_row = 0

    @property
    def may_be_due(self) -> bool:
        """Whether the pause is over."""
        pause = self._settings.surprise_pause if self._was_surprised else self._pause
        return self._plain_steps >= pause

    def is_due(self, cost: float) -> bool:
        """Whether it is time for a probe.

        Args:
            cost: plain steps that a probe takes longer than the tokens that it emits.
        """
        limits = self._settings
        repeats = self._was_surprised and self._num_in_a_row < limits.max_surprises
        if not self.may_be_due or repeats:
            return self.may_be_due
        wait = min(cost / limits.probe_share, limits.max_probe_wait) * max(self._num_in_a_row, 1)
        return self._plain_steps >= wait

    def observe(
        self, *, is_probe: bool, masks: int, drafts: int, num_accepted: int, of_expected: float
    ) -> bool:
        """Count a step.

        Args:
            is_probe: whether the step was one of a probe.
            masks: masks of its largest group.
            drafts: mask drafts verified.
            num_accepted: drafts accepted.
            of_expected: its time divided by the expected time.

        Returns:
            Whether the step ended a probe.
        """
        limits = self._settings
        if is_probe:
            self._was_cheap |= of_expected < limits.surprise_share
        if is_probe and masks and not drafts:
            self.is_verifying = True
        elif is_probe:
            repeats = self._was_surprised and self._num_in_a_row < limits.max_surprises
            self._num_in_a_row = self._num_in_a_row + 1 if repeats else 1
            self._was_surprised = num_accepted == drafts or self._was_cheap
            doubled = min(2 * self._pause, limits.max_pause)
            self._pause = limits.first_pause if num_accepted else doubled
            self.is_verifying, self._was_cheap, self._plain_steps = False, False, 0
            return True
        elif masks or drafts:
            self._pause, self._was_surprised = limits.first_pause, False
            self._plain_steps = self._num_in_a_row = 0
        else:
            self._plain_steps += 1
        return False
