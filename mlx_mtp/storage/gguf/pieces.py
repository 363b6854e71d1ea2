"""Sentencepiece-style BPE (``tokenizer.ggml.model`` = ``llama``) as a sentencepiece model.

GGUF keeps a sentencepiece model's pieces, scores and types but not the file.  The model is
written down again here, for the builder that converts such files and for sentencepiece's own
library, which tests compare with.
"""

from __future__ import annotations

from typing import Any

from mlx_mtp.storage.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)
from mlx_mtp.storage.sentencepiece import SPACE, AddedPiece

_BPE = 2
_ADDED_SCORE = -1000.0  # of tokens that come from tokenizer files, not from the sentencepiece model
_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's special tokens


def sentencepiece_model(vocabulary: Vocabulary) -> Any:
    """Return the vocabulary as a sentencepiece ``ModelProto``.

    Raises:
        ValueError: the tokens for single bytes are incomplete.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.trainer_spec.model_type = _BPE
    proto.trainer_spec.byte_fallback = _has_bytes(vocabulary)
    for role in ("bos", "eos", "unk", "pad"):
        setattr(proto.trainer_spec, f"{role}_id", vocabulary.ids.get(role, -1))
    rules = proto.normalizer_spec
    rules.name = "identity"
    rules.add_dummy_prefix = vocabulary.adds_space
    rules.remove_extra_whitespaces = False
    rules.escape_whitespaces = True
    entries = zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
    for token, score, kind in entries:
        # GGUF writes spaces into symbols, where sentencepiece has its letter for them.
        name = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        known = kind in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
        proto.pieces.add(piece=name, score=score, type=kind if known else NORMAL)
    return proto


def added_pieces(vocabulary: Vocabulary) -> list[AddedPiece]:
    """Return the tokens that are matched in the text itself, before a space is put before it.

    These are, as for llama.cpp, symbols that a converter took from tokenizer files, where a space
    is added after them; and Phi-3's special tokens, which also take the spaces that follow them.
    """
    pieces = []
    entries = zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
    is_phi3 = "phi-3" in vocabulary.name or "phi3" in vocabulary.name
    for index, (token, score, kind) in enumerate(entries):
        is_symbol = kind == USER_DEFINED and vocabulary.adds_space and score == _ADDED_SCORE
        takes_space = is_phi3 and kind == CONTROL and token not in _KEEP_SPACE
        if is_symbol or takes_space:
            pieces.append(
                AddedPiece(
                    content=token,
                    id=index,
                    special=kind == CONTROL,
                    options={"rstrip": takes_space},
                    source="tokenizer.ggml.tokens",
                )
            )
    return pieces


def _has_bytes(vocabulary: Vocabulary) -> bool:
    """Whether letters without a token become tokens for their bytes."""
    names = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind == BYTE
    }
    if names and names != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise ValueError(
            f"tokenizer.ggml.token_type has {len(names)} tokens for bytes, not <0x00> to <0xFF>"
        )
    return bool(names)
