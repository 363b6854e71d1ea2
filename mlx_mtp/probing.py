"""When plain decoding is left for a moment, to see whether drafts hold by now.

A try is a step with a few masks and the step that verifies their drafts.  It comes after a pause
that doubles as long as no draft holds, and never so soon that tries would take more than a small
share of the time.  Where the drafts of a try all held, the next one follows at once: what was
believed may be wrong.
"""

from __future__ import annotations

FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # plain steps before drafting is tried again
AGAIN = 2  # the same behind a try whose drafts held
SHARE = 0.005  # of the time, at most, that tries may cost


class Probing:
    """Counts plain steps, from one answer to the next.

    Attributes:
        waits: whether the drafts of a try are to be verified in the next step.
    """

    def __init__(self) -> None:
        self.waits = False
        self._plain_steps = 0
        self._pause = FIRST_PAUSE
        self._held = False

    @property
    def may_be_due(self) -> bool:
        """Whether the pause is over."""
        return self._plain_steps >= (AGAIN if self._held else self._pause)

    def is_due(self, cost: float) -> bool:
        """Whether it is time for a try that costs so many plain steps more than it brings."""
        return self.may_be_due and (self._held or self._plain_steps * SHARE >= cost)

    def give_up(self) -> None:
        """Begin a longer pause without a try."""
        self._held, self._plain_steps = False, 0
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def observe(self, *, is_probe: bool, masks: int, drafts: int, num_accepted: int) -> bool:
        """Count a step; True if it ended a try.

        Args:
            is_probe: whether the step was one of a try.
            masks: of its largest group.
            drafts: mask drafts verified.
            num_accepted: drafts that held.
        """
        if is_probe and masks and not drafts:
            self.waits = True
        elif is_probe:
            self.give_up()
            self.waits, self._held = False, num_accepted == drafts
            if num_accepted:
                self._pause = FIRST_PAUSE
            return True
        elif masks or drafts:
            self._plain_steps, self._pause, self._held = 0, FIRST_PAUSE, False
        else:
            self._plain_steps += 1
        return False
