"""The metadata of a GGUF file, each value checked when it is read.

Keys of the model's architecture (``llama.rope.freq_base``) say what it computes.  A key that nobody
asked for may not be left out silently, so ``check_all_read`` refuses those that matter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_mtp.storage.gguf.file import GGUFFile
from mlx_mtp.storage.safetensors import shown

# Kinds of GGUF files that are no language models, by general.type.
_OTHER_KINDS = {
    "adapter": "a LoRA adapter of llama.cpp, not a model",
    "mmproj": "a vision or audio projector (mmproj), not a language model",
    "imatrix": "an importance matrix for quantising, not a model",
    "vocab": "a vocabulary without a model",
}
_OTHER_ARCHITECTURES = {
    "clip": _OTHER_KINDS["mmproj"],
    "controlvector": "a control vector of llama.cpp, not a model",
    "imatrix": _OTHER_KINDS["imatrix"],
}
# Keys of an architecture that change no logits, or that nothing but the named value means.
_HARMLESS = {
    *("rope.scaling.finetuned", "pooling_type"),
    *("size_label", "name", "mm.tokens_per_image"),
}
_NEUTRAL = {
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),  # whose rows are permuted, as in all files
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "expert_weights_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "logit_scale": (1.0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (1.0,),
}


class Source:
    """The metadata of a file of one architecture.

    Attributes:
        file: the file.
        arch: ``general.architecture``.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._read: set[str] = set()
        kind = file.metadata.get("general.type")
        arch = file.metadata.get("general.architecture")
        what = _OTHER_ARCHITECTURES.get(str(arch)) or _OTHER_KINDS.get(str(kind))
        if what is None and any(name.endswith((".lora_a", ".lora_b")) for name in file.tensors):
            what = _OTHER_KINDS["adapter"]
        if what is not None:
            raise ValueError(f"{file.path} is {what}")
        if not isinstance(arch, str):
            raise ValueError(f"{file.path} has no general.architecture: it is not a model")
        if kind not in (None, "model"):
            raise ValueError(f"{file.path}: general.type is {shown(repr(kind))}, not model")
        if not file.tensors:
            raise ValueError(f"{file.path} is {_OTHER_KINDS['vocab']}")
        self.arch = arch

    def refuse(self, key: str, value: Any, why: str) -> ValueError:
        """Return the error that a key of the architecture has a value that cannot be used."""
        return ValueError(f"{self.file.path}: {self.arch}.{key} is {shown(repr(value))}, {why}")

    def list(self, key: str) -> list[Any] | None:
        """Return a value that is one per layer; None if it is no list."""
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return None
        self._read.add(key)
        return value.tolist()

    def get(self, key: str) -> Any:
        """Return a value of the architecture's; None if there is none.

        A list with one value per layer is that value if all are equal.

        Raises:
            ValueError: the layers differ.
        """
        self._read.add(key)
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, np.ndarray):
            values = value.tolist()
            if not values or any(item != values[0] for item in values):
                raise self.refuse(key, values, "and layers that differ are not read")
            return values[0]
        return value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a whole number.

        Raises:
            ValueError: it is missing without a default, or is none of at least ``minimum``.
        """
        value = self.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{self.file.path} has no {self.arch}.{key}")
            return default
        if type(value) is not int or not minimum <= value < 2**31:
            raise self.refuse(key, value, f"not a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number, as short as it was before it was stored as float32.

        Raises:
            ValueError: it is missing without a default, or is not finite or negative.
        """
        value = self.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{self.file.path} has no {self.arch}.{key}")
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise self.refuse(key, value, "not a number of at least 0")
        return float(str(np.float32(value))) if abs(value) < 1e38 else value

    def text(self, key: str, default: str) -> str:
        """Return a text.

        Raises:
            ValueError: it is none.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(key, value, "not text")
        return default if value is None else value

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor."""
        return tensor in self.file.tensors

    def check_all_read(self) -> None:
        """Refuse keys of the architecture that nobody asked for, unless they change nothing.

        A value of 0, an empty one or False switches something off that the family does not have.

        Raises:
            ValueError: the message names the key.
        """
        prefix = f"{self.arch}."
        for name, value in self.file.metadata.items():
            key = name.removeprefix(prefix)
            if not name.startswith(prefix) or key in self._read or key in _HARMLESS:
                continue
            values = value.tolist() if isinstance(value, np.ndarray) else [value]
            neutral = _NEUTRAL.get(key, (0, "", "none"))
            if not all(item in neutral for item in values):
                raise self.refuse(key, value, f"which is not read for {self.arch}")
