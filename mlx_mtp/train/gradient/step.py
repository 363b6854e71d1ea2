"""The gradient of one training step: some sequences, their anchors, and the losses after these.

Ordinary rows are computed once per sequence; its mask rows follow in forwards of a limited number
of rows, whose gradients add up to that of the mean over all mask rows of the step.  The seed and
the number of a step alone determine its sequences, anchors and masks, so that a resumed run
continues as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_mtp.evaluation.forward import FixedLayerCache, OrdinaryRows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.evaluation.recurrent_rows import StatesAtAnchors
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.recurrence import differentiable
from mlx_mtp.model.wrappers import Wrapper, replace
from mlx_mtp.train.gradient.anchors import choose_anchors, chunks, count_masks
from mlx_mtp.train.gradient.losses import (
    Targets,
    is_plain_head,
    loss_terms,
    make_targets,
    total_loss,
)
from mlx_mtp.train.settings import TrainSettings

_ORDER, _ANCHORS = 1, 2  # purposes of random draws
_ORDINARY_ROW = 0.25  # cost in mask rows, which have a gradient and a loss


Parameters = dict[str, mx.array]
Part = tuple[Parameters, float, dict[str, float]]  # gradients, loss, terms


@dataclass(frozen=True)
class StepResult:
    """Result of a training step.

    Attributes:
        gradients: of the trainable parameters, float32.
        loss: weighted sum of all terms.
        terms: each term by name.
        num_tokens: number of ids of the sequences.
        num_rows: number of mask rows.
    """

    gradients: Parameters
    loss: float
    terms: dict[str, float]
    num_tokens: int
    num_rows: int


def sequences_of_step(step: int, *, num_sequences: int, batch_size: int, seed: int) -> list[int]:
    """Indices of a step's sequences: every sequence once per epoch.

    Args:
        step: number of the step, from 0.
        num_sequences: number of all sequences.
        batch_size: number of sequences per step.
        seed: determines the order of each epoch.
    """
    indices, orders = [], {}
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(place, num_sequences)
        if epoch not in orders:
            rng = np.random.default_rng([seed, _ORDER, epoch])
            orders[epoch] = rng.permutation(num_sequences)
        indices.append(int(orders[epoch][position]))
    return indices


def blocks_of(sequence: TokenSequence, settings: TrainSettings, *, key: Sequence[int]) -> MaskRows:
    """Draw the mask blocks of a sequence; none if the answer is too short.

    Args:
        sequence: the text.
        settings: of the run.
        key: number of the step, and the sequence's place in it.
    """
    rng = np.random.default_rng([settings.seed, _ANCHORS, *key])
    anchors = choose_anchors(sequence.answer, count=settings.num_anchors, rng=rng)
    counts = count_masks(
        sequence.answer,
        anchors,
        max_masks=max_masks(settings, step=key[0]),
        drop_late=settings.drop_late,
        rng=rng,
    )
    return MaskRows(anchors, counts)


def max_masks(settings: TrainSettings, *, step: int) -> int:
    """Maximum number of masks of a block in a step: all, or fewer during ``draft_ramp``."""
    k, ramp = settings.num_draft_tokens, settings.draft_ramp
    return k if step >= ramp else 1 + (k - 1) * step // ramp


class OtherProcesses(Protocol):
    """What computes part of a step elsewhere; see ``workers.Workers``."""

    @property
    def count(self) -> int:
        """Number of processes, including this one."""
        ...

    def start(
        self,
        parameters: Parameters,
        chosen: Sequence[int],
        shared: Sequence[Sequence[int]],
        *,
        step: int,
        total: int,
    ) -> None:
        """Start a training step there."""
        ...

    def collect(self) -> Iterator[Part]:
        """Wait for the parts of those that had sequences."""
        ...


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Divide work so that all shares take about the same time.

    The most expensive remaining piece goes to the share with the lowest cost (Graham 1969, longest
    processing time first), so no share costs more than 4/3 of the optimum.

    Args:
        costs: of the pieces.
        count: number of shares.

    Returns:
        Indices of the pieces of each share, ascending.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        lowest = loads.index(min(loads))
        loads[lowest] += costs[piece]
        parts[lowest].append(piece)
    return [sorted(part) for part in parts]


class StepGradient:
    """Computes the gradient of steps.

    Args:
        model: from ``adapter.new_adapter``.
        settings: of the run.

    Attributes:
        shares_cores: whether several processes, one per core, are faster than one.
    """

    shares_cores = True

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
        workers: OtherProcesses | None = None,
    ) -> StepResult:
        """Compute the gradient of a step.

        Args:
            parameters: from ``adapter.trainable``.
            data: all sequences.
            chosen: indices of the step's sequences.
            step: number of the step, which determines the anchors.
            workers: processes that compute a part.

        Raises:
            ValueError: no sequence has room for a mask.
        """
        places = [(place, data[index]) for place, index in enumerate(chosen)]
        rows = [
            blocks_of(sequence, self._settings, key=(step, place)).num_rows
            for place, sequence in places
        ]
        total = sum(rows)
        if total == 0:
            raise ValueError(f"step {step}: no sequence has an answer of three tokens")
        tokens = sum(len(sequence.ids) for _, sequence in places)
        if workers is None:
            part = self.part(parameters, places, step=step, total=total)
            assert part is not None
            return StepResult(*part, tokens, total)
        costs = [
            count + _ORDINARY_ROW * len(sequence.ids) if count else 0.0
            for count, (_, sequence) in zip(rows, places, strict=True)
        ]
        shared = shares(costs, workers.count)
        if self._is_warm:
            workers.start(parameters, chosen, shared, step=step, total=total)
        own = self.part(parameters, [places[index] for index in shared[0]], step=step, total=total)
        if not self._is_warm:  # now the workers find the code that MLX has compiled
            workers.start(parameters, chosen, shared, step=step, total=total)
            self._is_warm = True
        parts = [part for part in (own, *workers.collect()) if part is not None]
        return StepResult(*_sum(parts), tokens, total)

    def part(
        self,
        parameters: Parameters,
        places: Sequence[tuple[int, TokenSequence]],
        *,
        step: int,
        total: int,
    ) -> Part | None:
        """Compute the part of some sequences in a step: gradients, loss and terms.

        Args:
            parameters: see ``__call__``.
            places: sequences with their places in the step.
            step: number of the step.
            total: number of mask rows of the whole step.

        Returns:
            None if there are no mask rows.
        """
        result: Part | None = None
        for place, sequence in places:
            rows = blocks_of(sequence, self._settings, key=(step, place))
            for mean, num_rows in self._forwards(parameters, sequence, rows):
                weighted = _scaled(mean, num_rows / total)
                result = weighted if result is None else _sum([result, weighted])
                mx.eval(result[0])
        self.load(parameters)
        return result

    def _forwards(
        self, parameters: Parameters, sequence: TokenSequence, rows: MaskRows
    ) -> Iterator[tuple[Part, int]]:
        """Yield the mean of each forward of a sequence and its number of rows.

        Weights in the step are applied later, in float32: gradients scaled by a thousandth would
        be lost in half precision.
        """
        if not rows.anchors:
            return
        ids = mx.array(sequence.ids)
        ordinary = ordinary_rows(self._model, ids)
        mx.eval(ordinary.arrays)
        for part in chunks(rows, max_rows=self._settings.rows_per_forward):
            targets = make_targets(self._model, ordinary, ids, part, teacher=self._settings.teacher)
            with differentiable(self._model.base):
                (loss, terms), gradients = self._value_and_grad(
                    parameters, ids, ordinary, part, targets
                )
            mx.eval(gradients, loss, terms)
            numbers = {name: _number(term) for name, term in terms.items()}
            yield (gradients, _number(loss), numbers), part.num_rows

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
        terms = loss_terms(
            self._model,
            ordinary,
            rows,
            targets,
            candidates=self._candidates,
            weights=self._settings.row_weights,
        )
        return total_loss(terms, self._settings.loss_weights), terms

    def load(self, parameters: Parameters) -> None:
        """Set the model's parameters, cast to its type."""
        values = [(name, value.astype(self._dtype)) for name, value in parameters.items()]
        self._model.update(tree_unflatten(values))


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
    """Add parts, in their order."""
    gradients, loss, terms = parts[0]
    for part in parts[1:]:
        gradients = {name: value + part[0][name] for name, value in gradients.items()}
        loss += part[1]
        terms = {name: terms[name] + part[2][name] for name in terms}
    return gradients, loss, terms


class CheckpointedLayer(Wrapper):
    """A layer whose activations are recomputed for the gradient instead of being stored.

    All arrays that have a gradient go in and out by its arguments and results, those that layers
    pass on through their caches too (``FixedLayerCache.carried``): MLX gives no gradient to others.
    """

    def __init__(self, layer: nn.Module, scope: StepScope) -> None:
        super().__init__(layer)
        self._scope = scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer."""
        layout, leaves = self._scope.layout, [leaf for _, leaf in _flat((args, kwargs))]
        caches = [x for x in leaves if isinstance(x, FixedLayerCache | StatesAtAnchors)]
        inputs = (args, kwargs, [cache.carried for cache in caches])
        outputs: Any = None

        def run(parameters: Any, arrays: Parameters) -> Parameters:
            nonlocal outputs
            args, kwargs, carried = _with_arrays(inputs, arrays)
            for cache, value in zip(caches, carried, strict=True):
                cache.carried = value
            before, self._scope.layout = self._scope.layout, layout  # the forward is over by then
            try:
                self.wrapped.update(parameters)
                result = self.wrapped(*args, **kwargs)
            finally:
                self._scope.layout = before
            outputs = (result, [cache.carried for cache in caches])
            return _arrays(outputs)

        arrays = mx.checkpoint(run)(self.wrapped.trainable_parameters(), _arrays(inputs))
        result, carried = _with_arrays(outputs, arrays)
        for cache, value in zip(caches, carried, strict=True):
            cache.carried = value
        return result


def checkpoint_layers(model: MTPModel) -> None:
    """Make the layers of a model recompute their activations for the gradient, in place."""
    layers = {id(layer) for layer in model.base.layers}
    found = [(path, x) for path, x in model.base.named_modules() if id(x) in layers]
    replace(model.base, {path: CheckpointedLayer(x, model.scope) for path, x in found})


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return cast(Any, tree_flatten(tree))


def _arrays(tree: Any) -> Parameters:
    """The arrays of a tree that may have a gradient, by their places."""

    def has_gradient(leaf: Any) -> bool:
        return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)

    return {place: leaf for place, leaf in _flat(tree) if has_gradient(leaf)}


def _with_arrays(tree: Any, arrays: Parameters) -> Any:
    """A tree with other arrays at some places."""
    return tree_map_with_path(lambda place, leaf: arrays.get(place, leaf), tree)
