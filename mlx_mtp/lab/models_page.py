"""``docs/models.md`` from the results of ``lab.models``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx_lm

from mlx_mtp.lab.model_checks import BITS, FAILED, REFUSED

KNOWN = {
    "Klear": "Klear 46B-A2.5B",
    "afm7": "Apple's foundation model of the adapter toolkit",
    "afmoe": "Arcee Trinity",
    "apertus": "Apertus 8B, 70B",
    "baichuan_m1": "Baichuan-M1 14B",
    "bailing_hybrid": "Ring and Ling 2.5",
    "bailing_moe": "Ling lite, plus, mini, flash",
    "bailing_moe_linear": "Ring linear 2.0",
    "bailing_moe_v3": "later Ling and Ring",
    "bitnet": "BitNet b1.58 2B",
    "cohere": "Command R, R+",
    "cohere2": "Command R7B, Command A",
    "dbrx": "DBRX",
    "deepseek": "DeepSeek-MoE 16B",
    "deepseek_v2": "DeepSeek-V2, V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3, R1; Kimi K2",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v41": "DeepSeek-V4.1",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B",
    "exaone": "EXAONE 3, 3.5",
    "exaone4": "EXAONE 4",
    "exaone_moe": "K-EXAONE",
    "falcon_h1": "Falcon-H1",
    "gemma": "Gemma, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n": "Gemma 3n E2B, E4B",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4, text only",
    "glm": "GLM-4 9B, GLM-Edge",
    "glm4": "GLM-4-0414, GLM-Z1",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neox": "Pythia, GPT-NeoX 20B",
    "gpt_oss": "gpt-oss 20B, 120B",
    "gptj": "GPT-J 6B",
    "granite": "Granite 3, dense",
    "granitemoe": "Granite 3 1B-A400M, 3B-A800M",
    "granitemoehybrid": "Granite 4",
    "helium": "Helium 1",
    "hunyuan": "Hunyuan Large",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "internlm2": "InternLM 2, 2.5",
    "internlm3": "InternLM 3",
    "iquestloopcoder": "IQuest-Coder Loop",
    "jamba": "Jamba",
    "kimi_k25": "Kimi K2.5",
    "kimi_k3": "Kimi K3",
    "kimi_linear": "Kimi Linear 48B-A3B",
    "kimi_vl": "Kimi-VL A3B",
    "lfm2": "LFM2 350M to 2.6B",
    "lfm2-vl": "LFM2-VL",
    "lfm2_moe": "LFM2 8B-A1B",
    "lille-130m": "Lille 130M",
    "llama": "Llama 2, 3; Mistral 7B; SmolLM2; Yi; DeepSeek-R1-Distill-Llama",
    "llama4": "Llama 4 Scout, Maverick",
    "llama4_text": "MobileLLM-R1",
    "longcat_flash": "LongCat-Flash",
    "longcat_flash_ngram": "LongCat-Flash-Lite",
    "mamba": "Mamba, Falcon Mamba",
    "mamba2": "Mamba 2, Codestral Mamba",
    "mellum": "Mellum",
    "mimo": "MiMo 7B",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minicpm": "MiniCPM 1B, 2B",
    "minicpm3": "MiniCPM3 4B",
    "minimax": "MiniMax-M2",
    "minimax_m3_vl": "MiniMax-M3",
    "ministral3": "Ministral 3",
    "mistral3": "Mistral Small 3.1, 3.2",
    "mistral4": "Mistral Small 4",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "muse_spark": "Muse Spark",
    "nanochat": "nanochat",
    "nemotron": "Minitron 4B, 8B",
    "nemotron-nas": "Llama-Nemotron Super, Ultra",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2 and 3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "Olmo 3",
    "olmo_hybrid": "Olmo Hybrid",
    "olmoe": "OLMoE 1B-7B",
    "openelm": "OpenELM",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4",
    "phi3small": "Phi-3-small",
    "phimoe": "Phi-3.5-MoE",
    "phixtral": "Phixtral",
    "pixtral": "Pixtral 12B",
    "plamo": "PLaMo 13B",
    "plamo2": "PLaMo 2",
    "plamo3": "PLaMo 3",
    "qwen": "Qwen, first generation",
    "qwen2": "Qwen1.5, 2, 2.5; QwQ; DeepSeek-R1-Distill-Qwen",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen2_vl": "Qwen2-VL, Qwen2.5-VL",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_5": "Qwen3.5 and later, dense",
    "qwen3_5_moe": "Qwen3.5 and later, with experts",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen3_vl": "Qwen3-VL, dense",
    "qwen3_vl_moe": "Qwen3-VL, with experts",
    "recurrent_gemma": "RecurrentGemma",
    "rwkv7": "RWKV-7",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM3 3B",
    "solar_open": "Solar Open 100B",
    "stablelm": "StableLM 3B, StableLM 2",
    "starcoder2": "StarCoder2",
    "step3p5": "Step 3.5 Flash",
    "telechat3": "TeleChat3",
    "youtu_llm": "Youtu-LLM 2B",
}
"""Well-known models by ``model_type``, from general knowledge; none of them was run."""

_YES_OR_NO = ("training", "batches")
_REFUSABLE = {
    "drafts": "Drafts are refused",
    "bfloat16": "bfloat16 was not run",
    "4-bit": "4-bit weights were not run",
    "training": "There is no training",
    "batches": "There are no batched steps",
    "max_kv_size": "`--max-kv-size` is refused",
    "kv_bits": "`--kv-bits` is refused",
}

HEADER = """\
# Models

What mlx-mtp does with each model file of mlx-lm {version}. This page is written by

```shell
python -m mlx_mtp.lab.models --long {num_long} --json results.jsonl --write-docs
```

from checks on tiny random models: four layers of width 128, every kind of layer that the file
has, random weights, a random adapter. They ran on a CPU; no row was run on a Mac, and no model of
this list was downloaded. {counts}

**Check your own model** before you rely on a row:

```shell
mlx-mtp inspect MODEL
mlx-mtp verify --model MODEL --quick
```

The columns:

- **Family**: the file of mlx-lm, which is the `model_type` of `config.json`.
- **Plain**: greedy decoding without drafts against mlx-lm's, in float32. *bits*: the logits are
  equal bit by bit. *ids*: the ids are equal, the logits to rounding, because keys and values are
  summed in another order.
- **Drafts**: right and wrong drafts of lookup and mask tokens in linear, quadratic and irregular
  layouts against plain decoding. Products are computed row by row here, as our kernels do, so that
  equal means *bits*. *ids*: the ids are equal, the logits to rounding.
- **bfloat16**: the same over {num_long} tokens; experts have 8 bits, because MLX multiplies theirs
  on a CPU in float32 or quantised only.
- **4-bit**: the same with quantised weights.
- **Training**: mask rows in training are those of decoding, and the gradient reaches the adapter.
- **Batches**: whether answers share steps in the server; otherwise they take turns.
- **Kernels**: what our Metal kernels would compute, by the model's structure: `lora` for adapters,
  `qmm` for 4-bit weights, `attention`, `gated delta`, `ssm`. They are checked on each machine when
  a model loads.

"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        results: reports by family, as ``lab.models`` writes them.
    """
    counts = Counter(result["status"] for result in results.values())
    text = (
        f"Of {len(results)} families, {counts['exact']} decode with drafts and their output stays "
        f"what it is without, {counts['plain']} decode without drafts only, and "
        f"{counts[REFUSED]} are refused before any work; the reasons stand below."
    )
    if counts[FAILED]:
        text += f" {counts[FAILED]} fail a check."
    text = text.strip()
    num_long = min((result["num_long"] for result in results.values()), default=0)
    parts = [HEADER.format(version=mlx_lm.__version__, counts=text, num_long=num_long)]
    parts.append(
        "| Family | Models | Layers | Plain | Drafts | bfloat16 | 4-bit | Training | Batches "
        "| Kernels |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    names = sorted(results, key=str.lower)
    shown = [name for name in names if _decodes(results[name])]
    parts += [row(results[name]) + "\n" for name in shown]
    parts.append("\n## What is missing\n\n" + _reasons(results, shown))
    left = [name for name in names if name not in shown]
    if left:
        parts.append("\n## Refused models\n\n| Family | Models | Reason |\n|---|---|---|\n")
        parts += [row(results[name]) + "\n" for name in left]
    return "".join(parts)


def _reasons(results: Mapping[str, Mapping[str, Any]], shown: list[str]) -> str:
    """Why a cell says no, and what options are refused: a line per reason, with its families."""
    lines = []
    for check, what in _REFUSABLE.items():
        reasons: dict[str, list[str]] = {}
        for name in shown:
            outcome = results[name]["checks"].get(check, "")
            if outcome.startswith((REFUSED, FAILED)):
                reasons.setdefault(_reason(outcome), []).append(name)
        lines += [
            f"- {what} for {', '.join(names)}: {reason}.\n"
            for reason, names in sorted(reasons.items())
        ]
    return "".join(lines)


def _reason(outcome: str) -> str:
    """The reason without names, so that families can share it."""
    text = _plain_text(outcome.partition(": ")[2])
    if "No Metal back-end" in text:
        return "not run: mlx-lm has kernels for Metal only"
    text = text.removeprefix("kv_bits cannot be used with ")
    names = r"^[\w-]+( \([\w-]+\))?( models)?( cannot (be used|take mask rows))?: "
    return re.sub(names, "", text).replace("mlx-lm itself:", "mlx-lm:")


def row(result: Mapping[str, Any]) -> str:
    """The line of one family."""
    name, checks = result["family"], result["checks"]
    head = f"| {name} | {KNOWN.get(name, '')} |"
    if not _decodes(result):
        return f"{head} {_reason(REFUSED + ': ' + result['reason'])} |"
    cells = [", ".join(result["layers"]["kinds"])]
    cells += [_short(checks.get(key, "")) for key in ("plain", "drafts", "bfloat16", "4-bit")]
    cells += ["no" if _short(checks.get(key, "")) == "no" else "yes" for key in _YES_OR_NO]
    cells.append(_kernels(result))
    return f"{head} {' | '.join(cells)} |"


def _decodes(result: Mapping[str, Any]) -> bool:
    """Whether its plain output is mlx-lm's."""
    return _short(result["checks"].get("plain", "")) != "no"


def _short(outcome: str) -> str:
    if not outcome or outcome.startswith((REFUSED, FAILED)):
        return "no"
    return BITS if outcome.startswith(BITS) else "ids"


def _kernels(result: Mapping[str, Any]) -> str:
    layers = result["layers"]
    names = ["lora", "qmm"]
    names += ["attention"] if layers["seam"] else []
    names += ["gated delta"] if "gated delta" in layers["kinds"] else []
    names += ["ssm"] if "Mamba2" in layers["kinds"] else []
    return ", ".join(names)


def _plain_text(text: str) -> str:
    return text.replace("|", "/").strip()
