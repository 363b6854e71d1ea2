"""Settings of the ``benchmark`` command."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mtp.decoding.config import setting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How often each prompt is answered, and at which pace; see the ``help`` of each field."""

    repeats: int = setting(1, "Number of passes over all prompts.", min=1)
    warmup: int = setting(
        1,
        "Number of answers per mode and context before the measurement begins.",
        min=0,
        flag="--num-warmups",
    )
    cooldown_s: float = setting(
        0.0, "Seconds to wait before each answer.", min=0, max=3600, flag="--cooldown"
    )
