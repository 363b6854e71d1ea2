"""The report of a benchmark: one JSON object with everything needed to read and repeat it."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_mtp.bench import machine_state, summary
from mlx_mtp.bench.measure import Measurement
from mlx_mtp.bench.modes import Mode
from mlx_mtp.bench.settings import Settings
from mlx_mtp.evaluation.prompts import Prompt, hash_prompts
from mlx_mtp.storage.package import versions

SCHEMA = 1
COMPLETE, INTERRUPTED = "complete", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was measured, and how.

    Attributes:
        model: facts about the model, its adapter and the draft model.
        modes: the modes; the first is the baseline.
        prompts: all prompts.
        source: name of the source of the prompts.
        contexts: numbers of ids of text before the prompts.
        filler: facts about that text, or None.
        settings: the schedule.
        decoding: options of decoding, as JSON-ready values.
        seed: random seed of the confidence intervals.
        cost_curve: costs that auto planned with, from ``CostCurve.to_dict``, or None.
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
    measurement: Measurement,
    *,
    swap_bytes: tuple[int | None, int | None],
    no_power: str,
) -> dict[str, Any]:
    """Summarise a measurement.

    Args:
        setup: what was measured.
        measurement: at least one answer.
        swap_bytes: swap in use before and after.
        no_power: reason why energy could not be read, or "".

    Returns:
        JSON-ready values, all numbers finite; ``answers`` lists every answer, and the rest is
        computed from them.
    """
    names = [mode.name for mode in setup.modes]
    ours = [mode.name for mode in setup.modes if mode.is_ours]
    ours.sort(key=lambda name: name != "plain")
    weights = {mode.name: mode.weight_bytes for mode in setup.modes}
    answers = measurement.answers
    report = _head(setup, measurement) | {
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


def _head(setup: Setup, measurement: Measurement) -> dict[str, Any]:
    """Everything except the results."""
    return {
        "benchmark": "mlx-mtp",
        "schema": SCHEMA,
        "status": INTERRUPTED if measurement.interrupted else COMPLETE,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": setup.model,
        "modes": [
            {"name": mode.name, "parameters": mode.parameters, "weight_bytes": mode.weight_bytes}
            for mode in setup.modes
        ],
        "prompts": {
            "from": setup.source,
            "count": len(setup.prompts),
            "kinds": dict(Counter(prompt.kind for prompt in setup.prompts)),
            "sha256": hash_prompts(setup.prompts),
        },
        "contexts": list(setup.contexts),
        "filler": setup.filler,
        "settings": asdict(setup.settings) | setup.decoding | {"seed": setup.seed},
        "warmups": measurement.warmups,
        "seconds": measurement.seconds,
        "machine": machine_state.machine(),
        "versions": versions(),
    }


def without_answers(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the single answers."""
    return {key: value for key, value in report.items() if key != "answers"}
