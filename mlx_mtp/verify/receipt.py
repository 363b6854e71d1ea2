"""The receipt: what was verified with what, as one JSON file that others can check."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.backends.cpu.blas import BLAS
from mlx_mtp.evaluation.prompts import Prompt, hash_prompts
from mlx_mtp.model.mtp_model import MTPModel, fingerprint
from mlx_mtp.storage.files import hash_weights, write_atomically
from mlx_mtp.storage.package import versions
from mlx_mtp.verify.near_tie import EPS, NEAR_TIE_EPS
from mlx_mtp.verify.report import VerifyReport
from mlx_mtp.verify.sampling import ALPHA

RECEIPT_VERSION = 1


def build_receipt(
    report: VerifyReport,
    model: MTPModel,
    *,
    model_folder: Path | None = None,
    adapter_folder: Path | None = None,
    prompts_from: str = "built-in",
) -> dict[str, Any]:
    """Return everything that is needed to repeat a verification.

    Args:
        report: the outcome.
        model: the model that was verified.
        model_folder: folder of the weights, which are hashed.
        adapter_folder: folder of the adapter, which is hashed.
        prompts_from: source of the prompts.
    """
    adapter = None
    if (config := model.adapter_config) is not None:
        adapter = {"sha256": hash_weights(adapter_folder), "config": config.to_dict()}
    return {
        "receipt_version": RECEIPT_VERSION,
        "quick": report.settings.is_quick,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": report.verdict,
        "passed": report.passed,
        "versions": versions() | {"platform": platform.platform()},
        "device": _device(),
        "model": {
            "name": model.name,
            "type": model.base.model_type,
            "dtype": report.dtype,
            "fingerprint": fingerprint(model.base),
            "sha256": hash_weights(model_folder),
        },
        "adapter": adapter,
        "prompts": _prompts(report.prompts, prompts_from),
        "settings": dataclasses.asdict(report.settings),
        **_outcome(report),
    }


def _prompts(prompts: Sequence[Prompt], prompts_from: str) -> dict[str, Any]:
    return {
        "from": prompts_from,
        "count": len(prompts),
        "kinds": dict(Counter(prompt.kind for prompt in prompts)),
        "ids": [prompt.id for prompt in prompts],
        "sha256": hash_prompts(prompts),
    }


def _outcome(report: VerifyReport) -> dict[str, Any]:
    return {
        "greedy": {
            "num_tokens": report.num_tokens,
            "near_tie_bounds": {
                str(dtype).removeprefix("mlx.core."): NEAR_TIE_EPS[dtype] * EPS[dtype]
                for dtype in EPS
            },
            "steps": report.steps.to_dict(),
            "rows_against_plain": report.rows_against("plain").to_dict(),
            "nearest_tie": report.nearest_tie and dataclasses.asdict(report.nearest_tie),
            "runs": [run.to_dict() for run in report.runs],
        },
        "sampling": {
            "prompt": report.sampling_prompt,
            "alpha": ALPHA,
            "tests": [test.to_dict() for test in report.sampling],
        },
        "seconds": round(report.seconds, 3),
    }


def receipt_json(receipt: dict[str, Any], *, indent: int | None = None) -> str:
    """Format a receipt as JSON; numbers that are not finite become null."""
    return json.dumps(_finite(receipt), indent=indent, ensure_ascii=False, allow_nan=False)


def check_writable(path: Path) -> None:
    """Check that a receipt can be written, before hours of work.

    Raises:
        ValueError: the folder does not exist or is not writable, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"receipt {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"receipt {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"receipt {path}: the folder {path.parent} cannot be written to")


def write_receipt(receipt: dict[str, Any], path: Path) -> None:
    """Write a receipt atomically.

    Raises:
        ValueError: it cannot be written; an earlier file is unchanged.
    """
    try:
        write_atomically(path, receipt_json(receipt, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write the receipt {path}: {error.strerror}") from None


def _device() -> dict[str, Any]:
    info = mx.device_info()
    return {
        "kind": "cpu" if mx.default_device().type == mx.cpu else "gpu",
        "name": info.get("device_name"),
        "architecture": info.get("architecture"),
        "cores": os.cpu_count(),
        "blas": BLAS,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
