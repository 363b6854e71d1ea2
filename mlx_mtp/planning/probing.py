"""When plain decoding is left for a moment, to see whether drafts hold by now.

A try is a step with a few masks and the step that verifies their drafts.  It comes after a pause
that doubles as long as no draft holds, and never so soon that tries would take more than a small
share of the time.  Where the drafts of a try all held, or it took much less time than it should,
the next one follows at once, a few times in a row: what was believed may be wrong.  What they cost
is waited for afterwards.

What a try is thought to cost may be wrong too, for the costs may have been measured on a busy
machine; so no wait is endless, however dear it is thought to be.  A row costs a plain step at most,
as rows could be run one by one.  Then the two steps with three rows each of a try, and the time to
draft, of a plain step or little more, are six plain steps lost: 0.6% of the longest wait.
"""

from __future__ import annotations

FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # plain steps before drafting is tried again
AGAIN = 2  # the same behind a try that surprised
MUCH_LESS = 0.75  # of the time that a step should take
MOST_IN_A_ROW = 8  # tries that surprised
SHARE = 0.005  # of the time, at most, that tries may cost
LONGEST_WAIT = 1024  # plain steps for the sake of the costs of one try


class Probing:
    """Counts plain steps, from one answer to the next.

    Attributes:
        waits: whether the drafts of a try are to be verified in the next step.
    """

    def __init__(self) -> None:
        self.waits = False
        self._plain_steps = 0
        self._pause = FIRST_PAUSE
        self._surprised = self._was_cheap = False
        self._in_a_row = 0

    @property
    def may_be_due(self) -> bool:
        """Whether the pause is over."""
        return self._plain_steps >= (AGAIN if self._surprised else self._pause)

    def is_due(self, cost: float) -> bool:
        """Whether it is time for a try that costs so many plain steps more than it brings."""
        if not self.may_be_due or (self._surprised and self._in_a_row < MOST_IN_A_ROW):
            return self.may_be_due
        wait = min(cost / SHARE, LONGEST_WAIT) * max(self._in_a_row, 1)
        return self._plain_steps >= wait

    def observe(
        self, *, is_probe: bool, masks: int, drafts: int, num_accepted: int, of_expected: float
    ) -> bool:
        """Count a step; True if it ended a try.

        Args:
            is_probe: whether the step was one of a try.
            masks: of its largest group.
            drafts: mask drafts verified.
            num_accepted: drafts that held.
            of_expected: what it took over what it should have taken.
        """
        if is_probe:
            self._was_cheap |= of_expected < MUCH_LESS
        if is_probe and masks and not drafts:
            self.waits = True
        elif is_probe:
            goes_on = self._surprised and self._in_a_row < MOST_IN_A_ROW
            self._in_a_row = self._in_a_row + 1 if goes_on else 1
            self._surprised = num_accepted == drafts or self._was_cheap
            self._pause = FIRST_PAUSE if num_accepted else min(2 * self._pause, LONGEST_PAUSE)
            self.waits, self._was_cheap, self._plain_steps = False, False, 0
            return True
        elif masks or drafts:
            self._pause, self._surprised = FIRST_PAUSE, False
            self._plain_steps = self._in_a_row = 0
        else:
            self._plain_steps += 1
        return False
