"""Gemma 3 270M from its GGUF file: the ids of mlx-lm's own layers, across the window's wrap.

Local layers see 512 rows, and every sixth layer sees all.  The embedding's factor is the wrapper's,
which is exact in float32, where mlx-lm rounds it to bfloat16.  ``make test`` runs the first six
layers with an eighth of the vocabulary, ``make soak`` the whole model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

from mlx_mtp.backends.cpu.float32 import DenseEmbedding
from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.loading import load
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import ExactlyScaled
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.train.gradient.adapter import new_adapter, trainable
from mlx_mtp.train.gradient.step import StepGradient
from mlx_mtp.train.settings import TrainSettings
from tests.helpers.gemma_folder import gemma_folder
from tests.helpers.tiny import random_adapter

__all__ = ["gemma_folder"]

pytestmark = pytest.mark.slow
WINDOW = 512
K = 2
LAYERS, ROWS = 6, 32_768
CHEAP_ROWS = CostCurve(rows=(1, 64), contexts=(0,), forward_ms=((10.0, 11.0),), draft_ms=(0.0, 9.0))
REPEATING = "The list: apple, pear, plum, fig, apple, pear, plum, fig, apple, pear,"


class Gemma:
    """The model, mlx-lm's class with the same weights, and one with a random adapter.

    Args:
        folder: of the model.
        small: only the first layers and rows of the vocabulary.
    """

    def __init__(self, folder: Path, *, small: bool) -> None:
        config = json.loads((folder / "config.json").read_text())
        model, self.tokenizer = load(str(folder), mtp=False)
        base: Any = model.base
        if small:
            config |= {"num_hidden_layers": LAYERS, "vocab_size": ROWS}
            base.args.num_hidden_layers, base.args.vocab_size = LAYERS, ROWS
            base.model.layers = base.model.layers[:LAYERS]
            table = base.model.embed_tokens  # it has its weights as blocks too
            rows = mx.contiguous(table.weight[:ROWS])
            base.model.embed_tokens = DenseEmbedding(rows, helper=table.helper)
        self.rows = config["vocab_size"]
        weights: Any = tree_flatten(base.parameters())
        self._config = config
        self._weights = [(name.replace(".wrapped", ""), value) for name, value in weights]
        self.stock = self.mlx_lm_model()
        options: Any = {"k": K, "rank": 2, "sampler": False, "scale_of_weights": 0.02}
        adapter, tensors = random_adapter(base, **options)
        self.drafting = MTPModel(base, name="gemma", config=adapter, weights=tensors)

    def mlx_lm_model(self) -> Any:
        """mlx-lm's model class with its own linear layers and the same float32 weights."""
        model_class, args_class = _get_classes(self._config)
        model: Any = model_class(args_class.from_dict(self._config))
        model.sanitize({})
        model.load_weights(self._weights, strict=True)
        model.model = ExactlyScaled(model.model)
        return model

    def ids(self, text: str, length: int | None = None) -> list[int]:
        return [i for i in self.tokenizer.encode(text) if i < self.rows][:length]

    def check(self, prompt: list[int], count: int, layout: str) -> None:
        """Compare the ids of a layout with those of mlx-lm."""
        assert len(prompt) + count > WINDOW + 25
        stock = generate_step(mx.array(prompt), self.stock, max_tokens=count)
        expected = [int(token) for token, _ in stock]
        steps = steps_of(self.drafting, prompt, count, layout)
        assert [token for step in steps for token in step.tokens] == expected
        if layout == "auto":
            assert max(len(step.tokens) for step in steps) > 1  # drafts were accepted


def steps_of(model: MTPModel, prompt: list[int], count: int, layout: str) -> list[Any]:
    """Decode; with ``auto``, drafts come from the text alone, wherever it repeats."""
    if layout != "auto":
        return list(decode(model, prompt, max_tokens=count, layout=layout))
    known = Speculation(LiveCosts(CHEAP_ROWS, learns=False), Acceptance([0.001] * K))
    return list(decode(model, prompt, max_tokens=count, layout=layout, speculation=known))


@pytest.fixture(scope="module")
def small(gemma_folder: Path) -> Gemma:
    return Gemma(gemma_folder, small=True)


@pytest.fixture(scope="module")
def whole(gemma_folder: Path) -> Gemma:
    return Gemma(gemma_folder, small=False)


def test_the_folder(gemma_folder: Path) -> None:
    sizes = [path.stat().st_size for path in gemma_folder.iterdir() if path.is_file()]
    assert sum(sizes) < 300e6
    assert "license: gemma" in (gemma_folder / "README.md").read_text()
    config = json.loads((gemma_folder / "config.json").read_text())
    assert (config["sliding_window"], config["sliding_window_pattern"]) == (WINDOW, 6)
    assert config["eos_token_id"] == [1, 106]


@pytest.mark.parametrize("layout", [pytest.param("quadratic", marks=pytest.mark.soak), "auto"])
def test_ids_across_the_wrap(small: Gemma, layout: str) -> None:
    """The prompt fills the window; it wraps while a short list repeats."""
    text = "\n\n".join(prompt.text for prompt in builtin_prompts())
    prompt = small.ids(text, WINDOW - 10) + small.ids(REPEATING)[1:]
    small.check(prompt, 45, layout)


@pytest.mark.soak
def test_training_lowers_the_loss(small: Gemma) -> None:
    settings = TrainSettings(
        num_draft_tokens=K, rank=4, num_anchors=16, candidates=64, rows_per_forward=32, warmup=0
    )
    model = new_adapter(MTPModel(small.mlx_lm_model(), name="gemma"), settings)
    ids = small.ids(builtin_prompts()[3].text * 2, 100)
    data = [TokenSequence(ids, [place >= 10 for place in range(len(ids))])]
    gradient, parameters = StepGradient(model, settings), trainable(model)
    optimiser = optim.AdamW(learning_rate=2e-3, bias_correction=True)
    losses = []
    for _ in range(6):
        result = gradient(parameters, data, [0], step=0, workers=None)
        losses.append(result.loss)
        parameters = optimiser.apply_gradients(result.gradients, parameters)
        gradient.load(parameters)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic", "auto"])
def test_a_thousand_ids(whole: Gemma, layout: str) -> None:
    whole.check(whole.ids("The history of the bicycle begins"), 1000, layout)
