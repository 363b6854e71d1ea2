"""Settings of the cache of beginnings of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_mtp.decoding.config import setting

GB = 10**9
_DEFAULT_MEMORY = (GB, 8 * GB)  # minimum and maximum of an eighth of the machine's


@dataclass(frozen=True, kw_only=True)
class PromptCacheConfig:
    """Where the keys and values of earlier prompts are kept, and how many."""

    prompt_cache_bytes: int | None = setting(
        None,
        "Maximum memory for the keys and values of earlier prompts, such as 4GB; 0 keeps none.",
        default_text="an eighth of the memory, 1GB to 8GB",
    )
    prompt_cache_files: bool = setting(
        True, "Also keep them in files, which survive a restart and contain the prompts."
    )
    prompt_cache_files_bytes: int = setting(8 * GB, "Maximum size of these files, such as 8GB.")
    prompt_cache_dir: str | None = setting(
        None, "Folder of these files.", default_text="prompts in mlx-mtp's cache folder"
    )

    def load_fields(self) -> dict[str, Any]:
        """Return the fields of ``Load``."""
        memory = self.prompt_cache_bytes
        return {
            "prefix_cache_bytes": _default_memory() if memory is None else memory,
            "prefix_files_bytes": self.prompt_cache_files_bytes if self.prompt_cache_files else 0,
            "prefix_files_folder": self.prompt_cache_dir,
        }


def _default_memory() -> int:
    import psutil

    low, high = _DEFAULT_MEMORY
    return min(max(psutil.virtual_memory().total // 8, low), high)
