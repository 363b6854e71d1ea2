"""Where generated texts end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mlx_mtp.text.ending import GrowingText


def grow(
    ids: Sequence[int],
    *,
    stops: Sequence[Sequence[int]] = (),
    limit: int = 99,
    loop: int | None = 4,
) -> tuple[list[int], str | None]:
    text = GrowingText(max_tokens=limit, stops=stops, loop_length=loop)
    for token in ids:
        if reason := text.add(token):
            return text.ids, reason
    return text.ids, None


def test_texts_end_at_stops_and_at_their_length():
    assert grow([1, 2, 9, 3], stops=[[9]]) == ([1, 2], "stop")
    assert grow([1, 7, 8, 3], stops=[[9], [7, 8]]) == ([1, 7], "stop")
    assert grow([1, 2, 3], limit=3) == ([1, 2, 3], "length")
    assert grow([1, 2, 9], limit=3, stops=[[9]]) == ([1, 2], "stop")
    assert grow([1, 2]) == ([1, 2], None)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 6], [1, 2, 3, 4, 5]),
        ([7, 1, 2, 1, 2, 1, 2, 1, 2], [7, 1, 2]),
        ([5] * 9, [5]),
        ([1, 2, 3, 5, 1, 2, 3, 4, 1, 2, 3], [1, 2, 3, 5, 1, 2, 3, 4, 1, 2, 3]),
    ],
)
def test_a_text_ends_before_a_run_that_it_repeats(ids, kept):
    assert grow(ids) == (kept, None if kept == ids else "loop")
    assert grow(ids, loop=None) == (ids, None)
