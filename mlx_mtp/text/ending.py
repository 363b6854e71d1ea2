"""Where a generated text ends: at a stop sequence, at its maximum length, or where it repeats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

STOP, LENGTH, LOOP = "stop", "length", "loop"


class GrowingText:
    """Ids of a text while it is generated.

    Args:
        max_tokens: maximum number of ids.
        stops: sequences of ids that end the text.
        loop_length: a run of so many ids that occurs a second time ends the text, which then lacks
            the second occurrence; None allows repetition.
    """

    def __init__(
        self, *, max_tokens: int, stops: Iterable[Sequence[int]], loop_length: int | None = None
    ) -> None:
        self.ids: list[int] = []
        self._max_tokens = max_tokens
        self._stops = [list(stop) for stop in stops]
        self._loop_length = loop_length
        self._runs: set[tuple[int, ...]] = set()

    def add(self, token: int) -> str | None:
        """Append an id; return why the text ends with it: "stop", "length" or "loop", or None.

        The last id of a stop sequence is not part of the text.
        """
        self.ids.append(token)
        if any(self.ids[-len(stop) :] == stop for stop in self._stops):
            self.ids.pop()
            return STOP
        if self._repeats():
            assert self._loop_length is not None
            del self.ids[-self._loop_length :]
            return LOOP
        return LENGTH if len(self.ids) >= self._max_tokens else None

    def _repeats(self) -> bool:
        """Whether the last ids occurred before; remembers them."""
        if self._loop_length is None or len(self.ids) < self._loop_length:
            return False
        run = tuple(self.ids[-self._loop_length :])
        if run in self._runs:
            return True
        self._runs.add(run)
        return False
