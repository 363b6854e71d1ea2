"""Options together: with every pair of values there are the ids of plain decoding, or one line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_mtp import Sampling, stream_generate
from mlx_mtp.backends.cpu.float32 import to_float32
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.fixtures_generate import byte_tokenizer
from tests.helpers.pairwise import pairwise
from tests.helpers.tiny import BYTE_VOCAB, random_adapter, tiny_base

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": BYTE_VOCAB,
}
HEAD, PROMPT = "A beginning that is in a cache. ", "Tell me, tell me, tell me more. " * 2
OWN_CACHES = ("llama", "mistral", "gemma3_text", "ministral3")  # mlx-lm: max_kv_size has no effect
FACTORS: dict[str, list[Any]] = {
    "kind": [
        "llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "smollm3", "granite",
        "qwen3_moe", "ministral3",
    ],
    "dtype": [mx.float32, mx.bfloat16, mx.float16],
    "adapter": [True, False],
    "layout": ["quadratic", "linear", "auto", "plain"],
    "num_draft_tokens": [None, 0, 1],
    "lookup": [True, False],
    "cache": [
        {}, {"max_kv_size": 16}, {"max_kv_size": 600}, {"kv_bits": 8, "quantized_kv_start": 0},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 50},
        {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0},
        {"kv_bits": 4, "quantized_kv_start": 80}, {"kv_bits": 4, "max_kv_size": 16},
    ],
    "prompt_cache": [None, "ours", "mlx-lm", "mlx-lm quantised", "file", "file quantised"],
    "prefill_step_size": [5, 2048],
    "sampling": [
        {}, {"repetition_penalty": 1.5}, {"logit_bias": {65: 3.0}}, {"temp": 0.8},
        {"temp": 1.0, "top_p": 0.9, "min_p": 0.05}, {"temp": 1.0, "top_k": 20},
        {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    ],
    "processor": [None, "letters"],
}  # fmt: skip
ROWS = pairwise(FACTORS)
COUNT = {"max_tokens": 14}


def letters(tokens: mx.array, logits: mx.array) -> mx.array:
    del tokens
    return mx.where(mx.arange(logits.shape[-1]) < 128, logits, -mx.inf)


@cache
def models(kind: str, dtype: mx.Dtype, adapter: bool) -> tuple[Any, MTPModel]:
    """A model for mlx-lm and ours, of weights in a type; a CPU computes in float32, as in load."""
    bases = [tiny_base(kind, **SIZES) for _ in range(2)]
    for base in bases:
        base.update(tree_map(lambda x: x.astype(dtype), base.parameters()))
        if mx.default_device().type == mx.cpu:
            to_float32(base)
    config, weights = random_adapter(bases[1], k=3)
    options = {"config": config, "weights": weights} if adapter else {}
    return bases[0], MTPModel(bases[1], name=kind, **options)


def prompt_cache(row: dict[str, Any], base: Any, model: MTPModel, folder: Path) -> Any:
    """A cache with a beginning, made anew for every answer."""
    made = row["prompt_cache"]
    if made is None:
        return None
    ids = mx.array([byte_tokenizer().encode(HEAD)])
    if made == "ours":
        cache = model.make_cache()
        mx.eval(model(ids, cache=cache))
        return cache
    caches = make_prompt_cache(base)
    mx.eval(base(ids, cache=caches))
    if made.endswith("quantised"):
        caches = [cache.to_quantized(group_size=32, bits=8) for cache in caches]
    if made.startswith("mlx-lm"):
        return caches
    save_prompt_cache(str(folder / "prompt.safetensors"), caches)
    return model.load_prompt_cache(folder / "prompt.safetensors")[0]


def answer(row: dict[str, Any], folder: Path, **changed: Any) -> list[int] | str:
    """Ids of an answer, or the line that refuses the options."""
    base, model = models(row["kind"], row["dtype"], row["adapter"])
    names = ("layout", "num_draft_tokens", "lookup", "prefill_step_size")
    options = {name: row[name] for name in names} | row["cache"] | COUNT | changed
    if row["processor"]:
        options["logits_processors"] = [letters]
    sampling = Sampling(**row["sampling"])
    try:
        found = stream_generate(
            model,
            byte_tokenizer(),
            PROMPT,
            sampling=sampling,
            seed=3,
            prompt_cache=prompt_cache(row, base, model, folder),
            **options,
        )
        return [response.token for response in found]
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    except NotImplementedError:  # mlx-lm's own: a window is never quantised
        return "mlx-lm"


def of_mlx_lm(row: dict[str, Any], folder: Path) -> list[int]:
    base, model = models(row["kind"], row["dtype"], row["adapter"])
    options: dict[str, Any] = row["cache"] | COUNT
    processors = [*make_logits_processors(**row["sampling"]), *([letters] * bool(row["processor"]))]
    stock = mlx_lm.stream_generate(
        base,
        byte_tokenizer(),
        PROMPT,
        prompt_cache=prompt_cache(row, base, model, folder),
        prefill_step_size=row["prefill_step_size"],
        logits_processors=processors,
        **options,
    )
    return [response.token for response in stock]


def check(rows: list[dict[str, Any]], folder: Path) -> tuple[int, int]:
    """Check rows; return the number of answers, and of those that mlx-lm could be asked for."""
    answers = compared = 0
    for row in rows:
        ids = answer(row, folder)
        if isinstance(ids, str):
            assert ids == answer(row, folder, layout="plain"), row
            continue
        answers += 1
        if "temp" in row["sampling"]:
            assert ids == answer(row, folder) or row["layout"] == "auto", row  # the same seed
            continue
        assert ids == answer(row, folder, layout="plain"), row
        bounded = "max_kv_size" in row["cache"] and row["prompt_cache"] is None
        if not (bounded and row["kind"] in OWN_CACHES) and row["prompt_cache"] in (None, "mlx-lm"):
            compared += 1
            assert ids == of_mlx_lm(row, folder), row
    return answers, compared


def test_some_options_together(tmp_path: Path) -> None:
    assert check(ROWS[:12], tmp_path)[0] > 5


@pytest.mark.soak
def test_every_pair_of_options(tmp_path: Path, seed: int) -> None:
    answers, compared = check(ROWS + pairwise(FACTORS, seed=seed), tmp_path)
    assert answers > len(ROWS) and compared > 5


@pytest.mark.parametrize(
    ("kind", "bits", "start"),
    [
        pytest.param(kind, *ways, marks=() if index % 3 == number else pytest.mark.soak)
        for index, kind in enumerate(FACTORS["kind"])
        for number, ways in enumerate(((8, 0), (4, 50), (8, 70)))
    ],
)
def test_a_quantised_cache_gives_the_ids_of_mlx_lm(
    kind: str, bits: int, start: int, tmp_path: Path
) -> None:
    first = {name: values[0] for name, values in FACTORS.items()}
    settings = {"kv_bits": bits, "quantized_kv_start": start}
    row = first | {"kind": kind, "layout": "plain", "cache": settings}
    found = answer(row, tmp_path, layout="quadratic")
    if kind in ("gemma3_text", "ministral3"):
        assert found == "kv_bits cannot be combined with a sliding window or max_kv_size"
    else:
        assert found == of_mlx_lm(row, tmp_path) == answer(row, tmp_path)
