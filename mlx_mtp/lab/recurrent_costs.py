"""Memory and state traffic of steps of Gated DeltaNet: ``python -m mlx_mtp.lab.recurrent_costs``.

Everything is computed from the shapes of well-known models; no model runs.  S is the state of all
layers.  What a step reads and writes of it:

- plain decoding, and our kernel in any layout: 2 S;
- mlx-lm's functions, a linear step: the rows that were kept run again, then one call, 4 S;
- mlx-lm's functions, a quadratic step: the same rows, a call for each ordinary row, and one for the
  mask groups, whose states are first put together: ``2 + 2 (k + 1) + 4 (k + 1)`` S.

The last line of the output is one JSON line.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import click

_BITS = 4.5  # of a quantised weight, with its scales
_HALF, _FLOAT = 2, 4  # bytes


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Shape of a model with Gated DeltaNet layers.

    Attributes:
        weights: number of them.
        layers: recurrent ones.
        key_heads: Hk.
        heads: Hv.
        key_dim: Dk.
        value_dim: Dv.
        taps: of the convolution.
        kv_bytes: of one token's keys and values in the attention layers, half precision.
    """

    weights: float
    layers: int
    key_heads: int = 16
    heads: int
    key_dim: int = 128
    value_dim: int = 128
    taps: int = 4
    kv_bytes: int

    @property
    def state_bytes(self) -> int:
        """The state of one layer."""
        return self.heads * self.value_dim * self.key_dim * _FLOAT

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def captured_bytes(self) -> int:
        """What one layer captures of one row: k, v, a, b and the convolution's input."""
        recurrence = self.key_heads * self.key_dim + self.heads * self.value_dim + 2 * self.heads
        return (recurrence + self.conv_width) * _HALF


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Bytes of all layers, and traffic of the state per step as shares of the weights' bytes.

    Attributes:
        state: S.
        conv_state: last inputs of the convolutions.
        captured_row: captured of one row.
        captured: kept between steps, S with the captured ordinary rows of a step.
        snapshots: S after each ordinary row instead.
        checkpoint_tokens: tokens whose keys and values take as much as one checkpoint.
        plain: traffic of plain decoding.
        stock_linear: with mlx-lm's functions, masks after the last draft.
        stock_quadratic: with mlx-lm's functions, masks after each row.
        ours: with our kernel, any layout; captured rows are written and read once.
    """

    state: int
    conv_state: int
    captured_row: int
    captured: int
    snapshots: int
    checkpoint_tokens: int
    plain: float
    stock_linear: float
    stock_quadratic: float
    ours: float


def costs(model: DeltaNet, *, num_draft_tokens: int) -> Costs:
    """Compute the costs of steps with so many drafts."""
    rows = num_draft_tokens + 1
    state, row = model.layers * model.state_bytes, model.layers * model.captured_bytes
    weights = model.weights * _BITS / 8
    return Costs(
        state=state,
        conv_state=model.layers * (model.taps - 1) * model.conv_width * _HALF,
        captured_row=row,
        captured=state + rows * row,
        snapshots=(rows + 1) * state,
        checkpoint_tokens=round(state / model.kv_bytes),
        plain=2 * state / weights,
        stock_linear=4 * state / weights,
        stock_quadratic=(2 + 6 * rows) * state / weights,
        ours=(2 * state + 2 * rows * row) / weights,
    )


MODELS = {  # from third-party copies of their configurations
    "Qwen3.5-4B": DeltaNet(weights=4.2e9, layers=24, heads=32, kv_bytes=8 * 2 * 4 * 256 * _HALF),
    "Qwen3.5-9B": DeltaNet(weights=9.0e9, layers=24, heads=32, kv_bytes=8 * 2 * 4 * 256 * _HALF),
    "Qwen3.5-27B": DeltaNet(weights=27e9, layers=48, heads=48, kv_bytes=16 * 2 * 4 * 256 * _HALF),
}


@click.command()
@click.option("--num-draft-tokens", default=3, show_default=True, help="Drafts of a step.")
def main(num_draft_tokens: int) -> None:
    """Print memory and state traffic of steps of Gated DeltaNet models."""
    found = {
        name: costs(model, num_draft_tokens=num_draft_tokens) for name, model in MODELS.items()
    }
    for name, each in found.items():
        print(
            f"{name}: state {each.state / 1e6:.0f} MB, convolutions {each.conv_state / 1e6:.1f} "
            f"MB, captured {each.captured_row / 1e6:.2f} MB per row; between steps "
            f"{each.captured / 1e6:.0f} MB (as snapshots {each.snapshots / 1e6:.0f} MB)\n"
            f"  state traffic per step, of the weights: plain {each.plain:.1%}, mlx-lm linear "
            f"{each.stock_linear:.1%}, mlx-lm quadratic {each.stock_quadratic:.1%}, our kernel "
            f"{each.ours:.1%}; a checkpoint is {each.checkpoint_tokens} tokens of keys and values"
        )
    print(json.dumps({name: asdict(each) for name, each in found.items()}))


if __name__ == "__main__":
    main()
