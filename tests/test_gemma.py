"""Gemma 3 270M from its GGUF file: the ids of mlx-lm's own layers, across the window's wrap.

Local layers see 512 rows, and every sixth layer sees all.  The embedding's factor is the wrapper's,
which is exact in float32, where mlx-lm rounds it to bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

from mlx_mtp.decoding.loop import decode
from mlx_mtp.evaluation.prompts import builtin_prompts
from mlx_mtp.loading import load
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.wrappers import ExactlyScaled
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from tests.helpers.gemma_folder import gemma_folder
from tests.helpers.tiny import random_adapter

__all__ = ["gemma_folder"]

pytestmark = pytest.mark.slow
WINDOW = 512
K = 2
CHEAP_ROWS = CostCurve(rows=(1, 64), contexts=(0,), forward_ms=((10.0, 11.0),), draft_ms=(0.0, 9.0))


@pytest.fixture(scope="module")
def plain(gemma_folder: Path) -> tuple[Any, Any]:
    return load(str(gemma_folder), mtp=False)


@pytest.fixture(scope="module")
def stock(gemma_folder: Path, plain: Any) -> Any:
    """mlx-lm's model class with its own linear layers and our float32 weights."""
    config = json.loads((gemma_folder / "config.json").read_text())
    model_class, args_class = _get_classes(config)
    model: Any = model_class(args_class.from_dict(config))
    model.sanitize({})
    weights: Any = tree_flatten(plain[0].base.parameters())
    model.load_weights([(name.replace(".wrapped", ""), value) for name, value in weights])
    model.model = ExactlyScaled(model.model)
    return model


@pytest.fixture(scope="module")
def drafting(plain: Any) -> MTPModel:
    """The model with a random adapter, whose drafts are mostly rejected."""
    base = plain[0].base
    config, weights = random_adapter(base, k=K, rank=2, sampler=False, scale_of_weights=0.02)
    return MTPModel(base, name="gemma", config=config, weights=weights)


def looked_up() -> Speculation:
    """Costs and acceptance with which drafts come from the text alone, wherever it repeats."""
    return Speculation(LiveCosts(CHEAP_ROWS, learns=False), Acceptance([0.001] * K))


def expected_ids(stock: Any, prompt: list[int], count: int) -> list[int]:
    steps = generate_step(mx.array(prompt), stock, max_tokens=count)
    return [int(token) for token, _ in steps]


def steps_of(model: MTPModel, prompt: list[int], count: int, layout: str) -> list[Any]:
    known = {"speculation": looked_up()} if layout == "auto" else {}
    return list(decode(model, prompt, max_tokens=count, layout=layout, **known))


def long_prompt(tokenizer: Any, length: int) -> list[int]:
    text = "\n\n".join(prompt.text for prompt in builtin_prompts())
    return tokenizer.encode(text)[:length]


def check(stock: Any, model: MTPModel, prompt: list[int], count: int, layouts: Any) -> None:
    expected = expected_ids(stock, prompt, count)
    assert len(prompt) + count > WINDOW + 25
    for layout in layouts:
        steps = steps_of(model, prompt, count, layout)
        assert [token for step in steps for token in step.tokens] == expected, layout
        if layout == "auto":
            assert max(len(step.tokens) for step in steps) > 1  # drafts were accepted


def test_ids_across_the_wrap(stock: Any, drafting: MTPModel, plain: Any) -> None:
    """Local layers have dropped their first rows from the prompt's end on."""
    tokenizer = plain[1]
    text = "The list: apple, pear, plum, fig, apple, pear, plum, fig, apple, pear,"
    prompt = long_prompt(tokenizer, 590) + tokenizer.encode(text)[1:]
    check(stock, drafting, prompt, 10, ("quadratic", "auto"))


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic", "auto"])
def test_a_thousand_ids(stock: Any, drafting: MTPModel, plain: Any, layout: str) -> None:
    prompt = plain[1].encode("The history of the bicycle begins")
    check(stock, drafting, prompt, 1000, (layout,))


def test_conversion_is_quick(gemma_folder: Path) -> None:
    sizes = [path.stat().st_size for path in gemma_folder.iterdir() if path.is_file()]
    assert sum(sizes) < 300e6
    assert "gemma" in (gemma_folder / "README.md").read_text()
