"""Loops, near-duplicates and empty texts are found; sound texts pass."""

from __future__ import annotations

import pytest

from mlx_mtp.train.data.clean import Seen, clean, why_degenerate
from mlx_mtp.train.data.records import Record

ASKED = {"role": "user", "content": "Why is the sky blue?"}
TOLD = {"role": "assistant", "content": "Because air scatters blue light."}
CHAT = Record((ASKED, TOLD))
PROSE = (
    "Light from the sun holds all colours. Air scatters short waves more than long ones, so blue "
    "reaches us from every side while red goes straight on. At dusk the way is longer, the blue "
    "is lost before it arrives, and what is left is orange and red. Dust makes it stronger still."
)


CODE = "\n\n".join(
    f"def is_{name}(value):\n    if value is None:\n        return False\n    return value > {n}"
    for n, name in enumerate(["big", "small", "odd", "even", "prime", "square"])
)


@pytest.mark.parametrize(
    "text", [PROSE, CODE, "\n".join(map(str, range(200))), "Yes.", "ha ha ha", "1. a\n2. b\n- " * 3]
)
def test_sound_text_passes(text):
    assert why_degenerate(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (PROSE + " and so on" * 20, "loop"),
        (
            PROSE + " I am sorry but I can not do that, please ask again later." * 5 + " I am",
            "loop",
        ),
        ("天" * 200, "loop"),
        ("我不知道。" * 40, "loop"),
        (
            " ".join(
                f"{n}. It is the case that the value of what is here is the value of that."
                for n in range(30)
            ),
            "loop",
        ),
        ("\n".join(f"{n}\nprint the value here" for n in range(12)), "repeated line"),
    ],
)
def test_loops_are_found(text, reason):
    assert why_degenerate(text) == reason


def test_near_duplicates_are_found():
    seen = Seen()
    assert seen.add("Write a short poem about the sea in winter, please, with rhymes.")
    assert not seen.add("write a short poem about the sea in winter please with rhymes")
    assert not seen.add("Write a short poem about the sea in winter, please, with some rhymes.")
    assert seen.add("Write a long story about a fox in summer.")
    assert seen.add("Hi") and not seen.add("hi!") and seen.add("Hi there")
    assert seen.add("你能解释一下量子力学的基本原理吗") and not seen.add(
        "你能解释一下量子力学的基本原理吗?"
    )
    assert seen.add("")


def test_cleaning_counts_what_it_drops():
    cut = Record((ASKED, {**TOLD, "content": "Because"}), meta={"cut": True})
    records = [
        cut,
        CHAT,
        Record((ASKED,)),
        Record(({**ASKED, "content": "x"}, {**TOLD, "content": " "})),
        Record(text="la " * 100),
    ]
    kept, dropped = clean(records)
    assert kept == [cut]
    assert dropped == {"duplicate": 1, "no answer": 1, "empty": 1, "loop": 1}
