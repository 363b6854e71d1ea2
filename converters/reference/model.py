"""The PyTorch model of a verification: the original files, run by transformers and PEFT.

The base model is transformers' own, in float32, with the adapter of the original checkpoint
(``adapters``).  A gate removes the low-rank weights on ordinary rows.  It is slow and simple: its
results are what a converted model is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_mtp.converters.base.files import (
    CONFIG_FILE,
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    weight_files,
)
from mlx_mtp.converters.pytorch.checkpoint import torch_to_safetensors
from mlx_mtp.converters.reference.adapters import INSTALL, Adapter, Gate, attach
from mlx_mtp.model.aliases import as_known, norm_groups
from mlx_mtp.storage.contents import ADAPTER_CONFIG
from mlx_mtp.storage.safetensors import read_json_object

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """What one step computes.

    Attributes:
        ordinary: logits of the prompt's rows ``[n, V]``.
        masks: logits of the mask rows ``[k, V]``; no rows without an adapter.
        hidden: final hidden states of the mask rows ``[k, D]``.
    """

    ordinary: np.ndarray
    masks: np.ndarray
    hidden: np.ndarray


@dataclass(kw_only=True)
class Reference:
    """A transformers model with a gated adapter, or without one.

    Attributes:
        model: the causal language model.
        vocab_size: rows of the base model's own embedding table.
        gate: switches its low-rank layers.
        adapter: None for a base model alone.
    """

    model: Any
    vocab_size: int
    gate: Gate = field(default_factory=Gate)
    adapter: Adapter | None = None

    def step(self, prompt: Sequence[int]) -> StepRows:
        """Run a prompt of n ids, followed by the mask rows."""
        import torch

        with torch.no_grad():
            embedded = self._embed(prompt)
            if self.adapter is not None:
                embedded = torch.cat([embedded, self.adapter.mask_rows])
            self.gate.split = split = len(prompt)
            hidden, logits = self._run(embedded)
        return StepRows(ordinary=logits[:split], masks=logits[split:], hidden=hidden[split:])

    def sampler_logits(self, hidden: np.ndarray, previous: Sequence[int]) -> np.ndarray:
        """Return the sampler head's logits ``[k, V]`` after ``previous``, one id per row."""
        import torch

        assert self.adapter is not None and self.adapter.sampler is not None
        with torch.no_grad():
            embedded = self._embed(previous)
            states = self.adapter.sampler(embedded, torch.tensor(hidden))
            return self._run(embedded, final=states)[1]

    def embedding_rows(self, count: int) -> np.ndarray:
        """Return the first rows of the embedding table, at most ``[count, D]``."""
        return self.model.get_input_embeddings().weight[:count].detach().numpy().copy()

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        import torch

        return self.model.get_input_embeddings()(torch.tensor(list(ids)))

    def _run(
        self, embedded: torch.Tensor, *, final: torch.Tensor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return hidden states and logits of rows ``[L, D]``; ``final`` replaces the former.

        The model's own forward computes the logits, so that they include what it does after its
        head (scaling, capping).
        """
        caught: list[torch.Tensor] = []

        def catch(module: Any, args: Any, output: Any) -> Any:
            del module, args
            if final is not None:
                output.last_hidden_state = final[None]
            caught.append(output.last_hidden_state)
            return output

        handle = self.model.base_model.register_forward_hook(catch)
        try:
            logits = self.model(inputs_embeds=embedded[None], use_cache=False).logits
        finally:
            handle.remove()
        return caught[0][0].numpy(), logits[0, :, : self.vocab_size].numpy()


def load_reference(
    hf_path: Path,
    checkpoint: Path | None,
    *,
    scratch: Path,
    layout: str | None = None,
    options: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
) -> Reference:
    """Load the original files.

    Args:
        hf_path: Hugging Face folder of the base model.
        checkpoint: adapter checkpoint; None for the base model alone.
        scratch: empty folder for temporary files.
        layout: layout of the checkpoint; detected if None.
        options: layout options of the conversion.
        allow_pickle: whether PyTorch files may be read, in a sandbox.

    Raises:
        ValueError: a file cannot be read or a package is missing; one line.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(
            f"verifying a conversion needs torch and transformers: {INSTALL}"
        ) from None
    model = _load_base(hf_path, scratch=scratch, allow_pickle=allow_pickle)
    reference = Reference(model=model, vocab_size=model.get_input_embeddings().weight.shape[0])
    if checkpoint is None:
        return reference
    reference.adapter = attach(
        model,
        checkpoint,
        base=hf_path,
        gate=reference.gate,
        scratch=scratch,
        layout=layout,
        options=dict(options or {}),
        allow_pickle=allow_pickle,
    )
    return reference


def _load_base(hf_path: Path, *, scratch: Path, allow_pickle: bool) -> Any:
    """Load a causal language model in float32, PyTorch files by way of safetensors."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = _safe_folder(hf_path, scratch / "base", allow_pickle=allow_pickle)
    quiet = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loader: Any = AutoModelForCausalLM
        model, loaded = loader.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises many kinds for what it cannot load
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"transformers cannot load {hf_path}: {reason[:300]}") from None
    finally:
        if quiet:
            logging.enable_progress_bar()
    if missing := sorted(loaded["missing_keys"]):  # it would draw them at random
        raise ValueError(f"transformers finds no {missing[0]} in {hf_path}")
    return model.eval()


def _safe_folder(hf_path: Path, target: Path, *, allow_pickle: bool) -> Path:
    """Return the folder itself, or a copy that transformers reads safely and under a known name.

    PyTorch files are converted; a PEFT adapter is left out, which transformers would add.
    """
    shards = weight_files(hf_path)
    is_safe = shards[0].suffix == ".safetensors"
    given = read_json_object(hf_path / CONFIG_FILE)
    if norm_groups(given) > 1:
        raise ValueError(f"transformers has no {given['model_type']} to verify with")
    config = as_known(given)
    if is_safe and config == given and not (hf_path / ADAPTER_CONFIG).is_file():
        return hf_path
    target.mkdir()
    for file in hf_path.glob("*.json"):
        if file.name != ADAPTER_CONFIG:
            (target / file.name).write_bytes(file.read_bytes())
    (target / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    if is_safe:
        for shard in shards:
            (target / shard.name).symlink_to(shard.resolve())
        return target
    written = {}
    for shard in shards:
        path, _ = torch_to_safetensors(shard, target, allow_pickle=allow_pickle)
        written[shard.name] = path.name
    index = hf_path / TORCH_INDEX
    if not index.is_file():
        (target / written[shards[0].name]).rename(target / "model.safetensors")
        return target
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {k: written[name] for k, name in content["weight_map"].items()}
    (target / SAFETENSORS_INDEX).write_text(json.dumps(content), encoding="utf-8")
    return target
