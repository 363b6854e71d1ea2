"""Makes the cache of beginnings of a loaded model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.apps.engine.prefix_cache import BLOCK_SIZE, PrefixCache
from mlx_mtp.apps.engine.prefix_files import FORMAT, PrefixFiles
from mlx_mtp.apps.engine.protocol import Load
from mlx_mtp.backends.cpu.blas import BLAS, SWITCH
from mlx_mtp.backends.device import gpu_info, gpu_marks
from mlx_mtp.model.caches.blocks import CacheBlocks
from mlx_mtp.model.identity import model_identity
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.storage.package import versions
from mlx_mtp.storage.paths import cache_dir

FOLDER = "prompts"
DRAFT_SHARE = 4  # a draft model has this part of the memory


def make_draft_prefix_cache(model: MTPModel, load: Load) -> PrefixCache | None:
    """Make the cache of beginnings of the draft model; None without one."""
    if model.draft_model is None:
        return None
    blocks = CacheBlocks(model.draft_model, chunk_size=load.prefill_step_size)
    return PrefixCache(blocks, max_bytes=load.prefix_cache_bytes // DRAFT_SHARE)


def make_prefix_cache(model: MTPModel, load: Load, **options: Any) -> PrefixCache:
    """Make the cache of beginnings.

    Args:
        model: the model.
        load: its sizes, the folder of files, and the settings on which rows depend.
        options: options of ``model.make_cache``.
    """
    blocks = CacheBlocks(model, chunk_size=load.prefill_step_size, **options)
    files = None
    if load.prefix_files_bytes and load.prefix_cache_bytes:
        files = PrefixFiles(
            Path(load.prefix_files_folder or cache_dir() / FOLDER).expanduser(),
            key=_key(model, load, options),
            signatures=blocks.signatures(),
            max_bytes=load.prefix_files_bytes,
            block_size=BLOCK_SIZE,
        )
    max_bytes = load.prefix_cache_bytes
    max_bytes -= 0 if model.draft_model is None else max_bytes // DRAFT_SHARE
    return PrefixCache(blocks, max_bytes=max_bytes, files=files)


def _key(model: MTPModel, load: Load, options: dict[str, Any]) -> str:
    """Hash of everything that keys and values depend on, apart from the ids."""
    device = [str(mx.default_device()), *gpu_marks(gpu_info()), BLAS, os.environ.get(SWITCH, "")]
    settings = [str(load.prefill_step_size), str(BLOCK_SIZE), repr(sorted(options.items()))]
    parts = [FORMAT, repr(versions()), *device, *settings, model_identity(model.base)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
