"""The gradient of one optimiser step: some sequences, their anchors, and the losses behind these.

Ordinary rows are computed once a sequence; its mask rows follow in forwards of a bounded number of
rows, whose gradients add up to that of the mean over all mask rows of the step.  Which sequences,
anchors and masks a step has is decided by the seed and the step's number alone, so a run that is
resumed goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_mtp.evaluation.forward import OrdinaryRows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.train.gradient.anchors import choose_anchors, chunks, count_masks
from mlx_mtp.train.gradient.losses import (
    Targets,
    is_plain_head,
    loss_terms,
    make_targets,
    total_loss,
)
from mlx_mtp.train.gradient.workers import Workers, shares
from mlx_mtp.train.settings import TrainSettings

_ORDER, _ANCHORS = 1, 2  # what a random draw is for
_ORDINARY_ROW = 0.25  # its cost in mask rows, which have a gradient and a loss besides


Parameters = dict[str, mx.array]
Part = tuple[Parameters, float, dict[str, float]]  # gradients, loss, terms


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        gradients: of the trainable parameters, float32.
        loss: all terms, weighted.
        terms: each term by name.
        num_tokens: ids of the sequences.
        num_rows: mask rows.
    """

    gradients: Parameters
    loss: float
    terms: dict[str, float]
    num_tokens: int
    num_rows: int


def sequences_of_step(step: int, *, num_sequences: int, batch_size: int, seed: int) -> list[int]:
    """Indices of a step's sequences: every sequence once before any comes again.

    Args:
        step: the step's number, from 0.
        num_sequences: how many there are.
        batch_size: how many a step has.
        seed: decides the order of each round.
    """
    found, orders = [], {}
    for place in range(step * batch_size, (step + 1) * batch_size):
        number, at = divmod(place, num_sequences)
        if number not in orders:
            orders[number] = np.random.default_rng([seed, _ORDER, number]).permutation(
                num_sequences
            )
        found.append(int(orders[number][at]))
    return found


def blocks_of(sequence: TokenSequence, settings: TrainSettings, *, key: Sequence[int]) -> MaskRows:
    """Draw the mask blocks of a sequence; there is none where the answer is too short."""
    rng = np.random.default_rng([settings.seed, _ANCHORS, *key])
    anchors = choose_anchors(sequence.answer, count=settings.num_anchors, rng=rng)
    counts = count_masks(
        sequence.answer,
        anchors,
        most=settings.num_draft_tokens,
        drop_late=settings.drop_late,
        rng=rng,
    )
    return MaskRows(anchors, counts)


class StepGradient:
    """Computes the gradient of steps.

    Args:
        model: from ``adapter.new_adapter``.
        settings: of the run.
    """

    def __init__(self, model: MTPModel, settings: TrainSettings) -> None:
        self._model = model
        self._settings = settings
        self._dtype = model.dtype
        self._is_warm = False
        self._candidates = settings.candidates if is_plain_head(model) else 0
        self._value_and_grad = mx.value_and_grad(self._loss)

    def __call__(
        self,
        parameters: Parameters,
        data: Sequence[TokenSequence],
        chosen: Sequence[int],
        *,
        step: int,
        workers: Workers | None = None,
    ) -> StepResult:
        """Compute the gradient of a step.

        Args:
            parameters: from ``adapter.trainable``, as they are now.
            data: all sequences.
            chosen: indices of those of the step.
            step: its number, which decides the anchors.
            workers: processes that take a part.

        Raises:
            ValueError: none of the sequences has a place for a mask.
        """
        places = [(at, data[index]) for at, index in enumerate(chosen)]
        rows = [blocks_of(each, self._settings, key=(step, at)).num_rows for at, each in places]
        total = sum(rows)
        if total == 0:
            raise ValueError(f"step {step}: no sequence has an answer of three tokens")
        tokens = sum(len(each.ids) for _, each in places)
        if workers is None:
            part = self.part(parameters, places, step=step, total=total)
            assert part is not None
            return StepResult(*part, tokens, total)
        costs = [
            each + _ORDINARY_ROW * len(sequence.ids) if each else 0.0
            for each, (_, sequence) in zip(rows, places, strict=True)
        ]
        shared = shares(costs, workers.count)
        if self._is_warm:
            workers.start(parameters, chosen, shared, step=step, total=total)
        own = self.part(parameters, [places[at] for at in shared[0]], step=step, total=total)
        if not self._is_warm:  # the code that MLX compiled meanwhile is there for all
            workers.start(parameters, chosen, shared, step=step, total=total)
            self._is_warm = True
        parts = [each for each in (own, *workers.collect()) if each is not None]
        return StepResult(*_sum(parts), tokens, total)

    def part(
        self,
        parameters: Parameters,
        places: Sequence[tuple[int, TokenSequence]],
        *,
        step: int,
        total: int,
    ) -> Part | None:
        """Compute what some sequences add to a step: gradients, loss and terms.

        Args:
            parameters: as for ``__call__``.
            places: sequences with their places in the step.
            step: its number.
            total: mask rows of the whole step.

        Returns:
            None where there is nothing to add.
        """
        found: Part | None = None
        for at, sequence in places:
            rows = blocks_of(sequence, self._settings, key=(step, at))
            for new, num_rows in self._forwards(parameters, sequence, rows):
                weighted = _scaled(new, num_rows / total)
                found = weighted if found is None else _sum([found, weighted])
                mx.eval(found[0])
        self.load(parameters)
        return found

    def _forwards(
        self, parameters: Parameters, sequence: TokenSequence, rows: MaskRows
    ) -> Iterator[tuple[Part, int]]:
        """Yield what each forward of a sequence gives, a mean, and over how many rows.

        The share in the step comes in later, in float32: gradients of a thousandth of a row would
        be lost in half precision.
        """
        if not rows.anchors:
            return
        ids = mx.array(sequence.ids)
        ordinary = ordinary_rows(self._model, ids)
        mx.eval(ordinary.hidden, ordinary.keys_and_values)
        for part in chunks(rows, most_rows=self._settings.rows_per_forward):
            targets = make_targets(self._model, ordinary, ids, part, teacher=self._settings.teacher)
            (value, terms), slope = self._value_and_grad(parameters, ids, ordinary, part, targets)
            mx.eval(slope, value, terms)
            numbers = {name: _number(term) for name, term in terms.items()}
            yield (slope, _number(value), numbers), part.num_rows

    def _loss(
        self,
        parameters: Parameters,
        ids: mx.array,
        ordinary: OrdinaryRows,
        rows: MaskRows,
        targets: Targets,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        self.load(parameters)
        if not self._model.scope.gated:  # then ordinary rows depend on the parameters too
            ordinary = ordinary_rows(self._model, ids, gradient=True)
        terms = loss_terms(self._model, ordinary, rows, targets, candidates=self._candidates)
        return total_loss(terms, self._settings.loss_weights), terms

    def load(self, parameters: Parameters) -> None:
        """Put the parameters into the model, in the type that it computes in."""
        cast_ones = [(name, value.astype(self._dtype)) for name, value in parameters.items()]
        self._model.update(tree_unflatten(cast_ones))


def _number(x: mx.array) -> float:
    return float(cast(Any, x.item()))


def _scaled(part: Part, factor: float) -> Part:
    gradients, loss, terms = part
    return (
        {name: value * factor for name, value in gradients.items()},
        loss * factor,
        {name: value * factor for name, value in terms.items()},
    )


def _sum(parts: Sequence[Part]) -> Part:
    """Add parts up, in their order."""
    gradients, loss, terms = parts[0]
    for more, value, others in parts[1:]:
        gradients = {name: value + more[name] for name, value in gradients.items()}
        loss += value
        terms = {name: terms[name] + others[name] for name in terms}
    return gradients, loss, terms


class CheckpointedLayer(nn.Module):
    """A layer whose inner values are computed again for the gradient instead of being kept."""

    def __init__(self, layer: nn.Module, scope: StepScope) -> None:
        super().__init__()
        dict.update(self, layer)  # the same modules under the same names
        self.__dict__.update(layer.__dict__)
        self._layer: Any = layer
        self._scope = scope

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Map ``[1, L, D]`` as the layer does."""
        layout = self._scope.layout

        def run(parameters: Any, x: mx.array) -> mx.array:
            before, self._scope.layout = self._scope.layout, layout  # the forward is over by then
            try:
                self._layer.update(parameters)
                return self._layer(x, *args, **kwargs)
            finally:
                self._scope.layout = before

        return mx.checkpoint(run)(self._layer.trainable_parameters(), x)


def checkpoint_layers(model: MTPModel) -> None:
    """Let the layers of a model compute again what their gradient needs, in place."""
    layers = model.base.layers
    for index, layer in enumerate(layers):
        layers[index] = CheckpointedLayer(layer, model.scope)
