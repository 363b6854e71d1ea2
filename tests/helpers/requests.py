"""Loops that run several requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.step import run


def finish_alone(model: Any, requests: Sequence[Request]) -> list[list[int]]:
    """Run requests one after the other; their emitted ids."""
    emitted: list[list[int]] = [[] for _ in requests]
    for ids, one in zip(emitted, requests, strict=True):
        while not one.finished:
            ids += one.commit(run(model, [one.plan()])[0]).tokens
    return emitted


def step_together(model: Any, requests: Sequence[Request]) -> list[list[int]]:
    """Run one step of each request in one batch; the ids that each emitted."""
    outcomes = run(model, [one.plan() for one in requests])
    return [one.commit(outcome).tokens for one, outcome in zip(requests, outcomes, strict=True)]
