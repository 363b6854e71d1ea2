"""The tokenizer in the metadata of a GGUF file, as Hugging Face tokenizer files.

Covers what the default model needs: byte-level BPE (``gpt2``) with the ``smollm`` pre-tokenizer,
which splits off every digit before the GPT-2 rule applies.  Such a vocabulary may lack some of the
256 byte symbols; missing bytes are dropped from the text, as by the original tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_CONTROL = 3  # GGUF type of tokens that are never parts of text


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the fast tokenizer; its ids are the rows of the GGUF's embedding table.

    Args:
        metadata: the second value of ``mx.load(path, return_metadata=True)``.

    Raises:
        ValueError: the metadata describes another kind of tokenizer.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"cannot build a tokenizer of kind {kind[0]!r} with splitter {kind[1]!r}")
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control_tokens(metadata)]
    )
    return tokenizer


def control_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Return the special tokens in id order."""
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    tokens = metadata["tokenizer.ggml.tokens"]
    return [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]


def build_tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tokenizer_config.json``: named special tokens, context length, chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{long}_token_id"].item()]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    others = [token for token in control_tokens(metadata) if token not in named.values()]
    architecture = metadata["general.architecture"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": others,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{architecture}.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }
