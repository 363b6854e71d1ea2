"""Cost of a hybrid's step next to an attention model's: ``python -m mlx_mtp.lab.hybrid_step``.

Two random models of one family (qwen3_5) have the same projections: in the one all layers attend,
in the other three of four are Gated DeltaNet.  Steps of both take turns, so that
other programs slow both; a step is a forward, its evaluation, and the rewind.  The last line of
the output is one JSON line.
"""

from __future__ import annotations

import json
import time
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.qwen3_5 import Model, ModelArgs

from mlx_mtp.backends.cpu.float32 import to_float32
from mlx_mtp.backends.cpu.recurrence import use_fast_recurrences
from mlx_mtp.model.layout import StepLayout, plain_layout, quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel

_HEAD_DIM = 128
_VOCABULARY = 512
_PROMPT = 100


def random_model(*, hidden: int, layers: int, interval: int, fast: bool = True) -> MTPModel:
    """Make a random float32 model whose layers other than each ``interval``-th are recurrent.

    A recurrent layer's projections are those of an attention layer: to 6 x hidden, and back from
    2 x hidden.

    Args:
        hidden: width, a multiple of 128.
        layers: number of layers.
        interval: every so many layers, one attends.
        fast: use the functions of the CPU back-end.
    """
    heads = 2 * hidden // _HEAD_DIM
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": _HEAD_DIM,
        "vocab_size": _VOCABULARY,
        "linear_num_value_heads": heads,
        "linear_num_key_heads": heads // 2,
        "linear_key_head_dim": _HEAD_DIM,
        "linear_value_head_dim": _HEAD_DIM,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": interval,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    base: Any = Model(ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": text}))
    rng = np.random.default_rng(0)

    def draw(name: str, like: mx.array) -> mx.array:
        if like.ndim < 2:  # norms stay near one, and gates of the state near a half
            return mx.array((("norm" in name) + 0.1 * rng.standard_normal(like.shape)), mx.float32)
        values = rng.standard_normal(like.shape, np.float32) / np.sqrt(like.shape[-1])
        return mx.array(values.astype(np.float32))

    flat: Any = tree_flatten(base.parameters())
    base.update(tree_unflatten([(name, draw(name, value)) for name, value in flat]))
    base.eval()
    if fast:
        to_float32(base)
    mx.eval(base.parameters())
    model = MTPModel(base)
    if fast:
        use_fast_recurrences(model.base)
    return model


class Steps:
    """Steps of one layout after a prompt; half of the drafts of each are accepted.

    Args:
        model: the model.
        layout: of the steps.
    """

    def __init__(self, model: MTPModel, layout: StepLayout) -> None:
        self.model, self.layout = model, layout
        rows = range(layout.num_ordinary)
        self.ids = mx.array([[*(3 * row + 1 for row in rows), *layout.mask_offsets.tolist()]])
        self.cache = model.make_cache()
        mx.eval(model(mx.arange(_PROMPT)[None], cache=self.cache))

    def seconds(self) -> tuple[float, float]:
        """Run a step; return its time, and the processor time of all threads."""
        began, used = time.perf_counter(), time.process_time()
        hidden = self.model(self.ids, cache=self.cache, layout=self.layout)
        mx.eval(self.model.logits(hidden))
        kept = 1 + self.layout.num_draft_tokens // 2
        self.cache.rewind(self.layout.num_rows - kept)
        return time.perf_counter() - began, time.process_time() - used


@click.command()
@click.option("--hidden", default=1024, show_default=True, help="Width of the models.")
@click.option("--layers", default=8, show_default=True, help="Number of layers.")
@click.option("--interval", default=4, show_default=True, help="One of so many layers attends.")
@click.option("--rounds", default=40, show_default=True, help="Number of timed steps of each.")
def main(hidden: int, layers: int, interval: int, rounds: int) -> None:
    """Time steps of a hybrid model against those of an attention model."""
    attention, hybrid = (
        random_model(hidden=hidden, layers=layers, interval=every) for every in (1, interval)
    )
    layouts = {
        "plain": plain_layout(),
        "quadratic, 1 draft": quadratic_layout(num_pending=1, num_draft_tokens=1, num_masks=3),
        "quadratic, 3 drafts": quadratic_layout(num_pending=1, num_draft_tokens=3, num_masks=1),
    }
    results: dict[str, Any] = {"hidden": hidden, "layers": layers, "rounds": rounds}
    for name, layout in layouts.items():
        pair = [Steps(model, layout) for model in (attention, hybrid)]
        times = np.array([[steps.seconds() for steps in pair] for _ in range(rounds + 3)])[3:]
        ratio, cpu_ratio = np.median(times[:, 1] / times[:, 0], axis=0)
        attention_ms, hybrid_ms = 1e3 * np.median(times[:, :, 0], axis=0)
        print(
            f"{name}, {layout.num_rows} rows: attention {attention_ms:.1f} ms, hybrid "
            f"{hybrid_ms:.1f} ms, ratio {ratio:.3f}, of processor time {cpu_ratio:.3f}"
        )
        results[name] = {"rows": layout.num_rows, "ratio": ratio, "cpu_ratio": cpu_ratio}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
