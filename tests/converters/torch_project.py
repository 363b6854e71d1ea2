"""A live training project: its modules, what it wrote, and what it computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.converters.torch_modules import Gate, load_model


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one step computes: logits of n ordinary rows ``[n, V]`` and of k mask rows ``[k, V]``,
    and the mask rows' final hidden states ``[k, D]``."""

    ordinary: np.ndarray
    masks: np.ndarray
    hidden: np.ndarray


@dataclass(kw_only=True)
class Project:
    """A training project and what it wrote.

    Attributes:
        base: Hugging Face folder of the base model.
        checkpoint: the file or folder that was written.
        layout: name of its layout.
        model: the live model, called with ids or embeddings.
        backbone: the transformers model inside it.
        k: mask rows of a step.
        mask_ids: ids of the mask rows, where they are tokens of the live model.
        mask_rows: embeddings of the mask rows ``[k, D]``, where they are not.
        gate: the gate of the modules; None where PEFT gates by itself.
        sampler: the sampler head.
        options: layout options that a user must give.
        pickled: whether the checkpoint is a PyTorch pickle.
        foreign_columns: ids whose logits the project itself changed, which the base never emits.
    """

    base: Path
    checkpoint: Path
    layout: str
    model: nn.Module
    backbone: Any
    k: int
    mask_ids: list[int] = field(default_factory=list)
    mask_rows: torch.Tensor | None = None
    gate: Gate | None = None
    sampler: nn.Module | None = None
    options: dict[str, str] = field(default_factory=dict)
    pickled: bool = False
    foreign_columns: tuple[int, ...] = ()

    @property
    def columns(self) -> np.ndarray:
        """Vocabulary ids whose logits can be compared."""
        size = json.loads((self.base / "config.json").read_text())["vocab_size"]
        return np.setdiff1d(np.arange(size), self.foreign_columns)

    @torch.no_grad()
    def rows(self, prompt: Sequence[int]) -> Rows:
        """Run the prompt with the mask rows behind it."""
        caught: list[torch.Tensor] = []
        norm = self.backbone.model.norm
        handle = norm.register_forward_hook(lambda *args: caught.append(args[-1]))
        if self.gate is not None:
            self.gate.split = len(prompt)
        try:
            logits = self.model(**self._inputs(prompt), use_cache=False).logits[0]
        finally:
            handle.remove()
            if self.gate is not None:
                self.gate.split = None
        logits = logits[:, self.columns].numpy()
        split = len(prompt)
        return Rows(
            ordinary=logits[:split], masks=logits[split:], hidden=caught[0][0, split:].numpy()
        )

    def _inputs(self, prompt: Sequence[int]) -> dict[str, torch.Tensor]:
        if self.mask_rows is None:
            return {"input_ids": torch.tensor([[*prompt, *self.mask_ids]])}
        ordinary = self.backbone.get_input_embeddings()(torch.tensor([list(prompt)]))
        return {"inputs_embeds": torch.cat([ordinary, self.mask_rows[None]], dim=1)}

    @torch.no_grad()
    def sampler_logits(self, hidden: np.ndarray, previous: Sequence[int]) -> np.ndarray:
        """Logits ``[k, V]`` of mask rows with hidden states ``[k, D]`` after these tokens."""
        assert self.sampler is not None
        embedded = self.backbone.get_input_embeddings()(torch.tensor(list(previous)))
        states = self.sampler(embedded, torch.tensor(hidden))
        return self.backbone.get_output_embeddings()(states)[:, self.columns].numpy()


def greedy_answer(base: Path, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """What transformers generates greedily in float32, end tokens or not.

    Returns:
        The ids, and the smallest distance between the two best logits of a row over the row's
        largest: an answer with a tie in it could rightly go on in two ways.
    """
    model = load_model(base)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([list(prompt)])
    out: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)  # [count, V]
    best, second = logits.topk(2).values.T
    margin = ((best - second) / logits.abs().amax(dim=1)).min()
    return out.sequences[0, len(prompt) :].tolist(), float(margin)
