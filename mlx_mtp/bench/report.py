"""The report of a benchmark: one JSON object with all that is needed to read and repeat it."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_mtp.bench import machine_state, summary
from mlx_mtp.bench.measure import Measurement, Settings
from mlx_mtp.bench.modes import Mode
from mlx_mtp.evaluation.prompts import Prompt, hash_prompts
from mlx_mtp.storage.package import versions

SCHEMA = 1
COMPLETE, INTERRUPTED = "complete", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was measured, and with what.

    Attributes:
        model: its name, fingerprint, type and parameters, and what its adapter and draft model are.
        modes: the first is the base.
        prompts: all that were asked.
        source: where the prompts are from.
        contexts: ids of text before them.
        filler: which text that was, None where there was none.
        settings: of the schedule.
        decoding: options of decoding, as JSON-ready values.
        seed: of the intervals.
        cost_curve: what auto planned by, as ``CostCurve.to_dict`` gives it, or None.
    """

    model: dict[str, Any]
    modes: Sequence[Mode]
    prompts: Sequence[Prompt]
    source: str
    contexts: Sequence[int]
    filler: dict[str, str] | None
    settings: Settings
    decoding: dict[str, Any]
    seed: int
    cost_curve: dict[str, Any] | None


def build_report(
    setup: Setup,
    measured: Measurement,
    *,
    swap_bytes: tuple[int | None, int | None],
    no_power: str,
) -> dict[str, Any]:
    """Sum up a measurement.

    Args:
        setup: what was measured.
        measured: the answers, at least one.
        swap_bytes: swap in use before and after.
        no_power: why energy could not be read, or "".

    Returns:
        JSON-ready values, all numbers finite; ``answers`` holds every answer, the rest is made of
        them.
    """
    names = [mode.name for mode in setup.modes]
    ours = sorted(
        (mode.name for mode in setup.modes if mode.ours), key=lambda name: name != "plain"
    )
    weights = {mode.name: mode.weight_bytes for mode in setup.modes}
    answers = measured.answers
    report = _head(setup, measured) | {
        "swap_bytes": dict(zip(("before", "after"), swap_bytes, strict=True)),
        "power": no_power or "read",
        "drift": summary.drift(answers, names[0]),
        "outputs": summary.outputs(answers, ours),
        "figures": summary.figures(answers, names, weights=weights, seed=setup.seed),
        "layouts": summary.layouts(answers),
        "cost_curve": setup.cost_curve,
        "answers": [answer.to_dict() for answer in answers],
    }
    return summary.finite(report)


def _head(setup: Setup, measured: Measurement) -> dict[str, Any]:
    """All but what was found."""
    return {
        "benchmark": "mlx-mtp",
        "schema": SCHEMA,
        "status": INTERRUPTED if measured.interrupted else COMPLETE,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": setup.model,
        "modes": [
            {"name": each.name, "parameters": each.parameters, "weight_bytes": each.weight_bytes}
            for each in setup.modes
        ],
        "prompts": {
            "from": setup.source,
            "count": len(setup.prompts),
            "kinds": dict(Counter(each.kind for each in setup.prompts)),
            "sha256": hash_prompts(setup.prompts),
        },
        "contexts": list(setup.contexts),
        "filler": setup.filler,
        "settings": asdict(setup.settings) | setup.decoding | {"seed": setup.seed},
        "warmups": measured.warmups,
        "seconds": measured.seconds,
        "machine": machine_state.machine(),
        "versions": versions(),
    }


def without_answers(report: dict[str, Any]) -> dict[str, Any]:
    """The report in one short line: all figures, not the answers that they are made of."""
    return {key: value for key, value in report.items() if key != "answers"}
