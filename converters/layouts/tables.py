"""Mask rows from embedding tables, and comparison of whole tables with the base model's.

Projects that enlarge the vocabulary save the whole embedding table, and sometimes the unembedding.
An adapter cannot replace rows of the base model, so all of these must be equal to its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.converters.layouts.common import FLOATS, HEAD, BaseFacts, NoiseRows
from mlx_mtp.converters.layouts.options import Options

_ROWS_AT_ONCE = 4096
_MOST_LISTED = 16
_NAMED = re.compile(r"[<\[]\|?(?:mtp[_-]?)?mask[_-]?(\d{1,4})\|?[>\]]", re.IGNORECASE)
# Relative root-mean-square error of 2-bit weights is about 0.5, that of a foreign table 1.4.
_QUANTISED_ERROR = 0.6


def token_rows(base: BaseFacts, ids: Sequence[int]) -> mx.array:
    """Return rows ``[n, D]`` of the base model's embedding.

    Raises:
        ValueError: an id is not in its table.
    """
    for token in ids:
        if not 0 <= token < base.vocab_size:
            raise ValueError(
                f"token {token} is not in the embedding of {base.name}, which has "
                f"{base.vocab_size} rows"
            )
    return base.embed(ids)


def random_rows(base: BaseFacts, options: Options, *, why: str) -> tuple[mx.array, str]:
    """Return mask rows ``[k, D]`` that are embeddings of tokens, random ones or chosen by id.

    Args:
        base: the base model.
        options: ``num_draft_tokens``, ``seed`` and ``mask_token_ids``.
        why: why the number must be specified, for the message.

    Returns:
        The rows and a note that names the ids.

    Raises:
        ValueError: k is unknown, or the options contradict each other.
    """
    k, ids = options.num_draft_tokens, options.mask_token_ids
    if ids is None and k is None:
        raise ValueError(f"layout option num_draft_tokens is required: {why}")
    if ids is None:
        assert k is not None
        seed = options.seed or 0
        size = base.vocab_size if base.num_tokens is None else base.num_tokens
        drawn = np.random.default_rng(seed).integers(min(size, base.vocab_size), size=k)
        ids, how = tuple(drawn.tolist()), f"drawn with seed {seed}"
    else:
        if options.seed is not None:
            raise ValueError("layout options seed and mask_token_ids exclude each other")
        if k not in (None, len(ids)):
            raise ValueError(f"mask_token_ids are {len(ids)}, but num_draft_tokens is {k}")
        how = "as specified"
    listed = ", ".join(map(str, ids))
    return token_rows(base, ids), f"mask rows: the base embedding's rows of {listed}, {how}"


def noise_rows(
    base: BaseFacts, options: Options, *, block_size: int | None, why: str
) -> tuple[NoiseRows, list[str]]:
    """Return mask rows of random tokens, and notes about what was assumed.

    Args:
        base: the base model.
        options: ``num_draft_tokens`` and ``noise_ids``.
        block_size: tokens of a block in training, k + 1; None if the checkpoint has no such value.
        why: why the number must be specified otherwise, for the message.

    Raises:
        ValueError: k is unknown, or an id is not in the vocabulary.
    """
    notes, k = [], options.num_draft_tokens
    block_size = block_size or base.block_size
    if k is None and block_size is not None and block_size > 1:
        k = block_size - 1
        notes.append(f"num_draft_tokens: {k}, one less than block_size {block_size}")
    if k is None:
        raise ValueError(f"layout option num_draft_tokens is required: {why}")
    size, ids, how = base.vocab_size, options.noise_ids, "as specified"
    if ids is None:
        end = base.noise_end
        # Some tokenizers have a mask token of another kind among their first tokens.
        is_end = end is not None and end > size // 2
        high = min(end if end is not None and is_end else base.num_tokens or size, size)
        ids, how = (1, high), "below the mask token" if is_end else "all tokens but the first"
    if ids[1] > size:
        raise ValueError(f"noise_ids end at {ids[1]}, but {base.name} has {size} tokens")
    notes.append(f"mask rows: random ids from {ids[0]} to {ids[1] - 1}, {how}")
    return NoiseRows(k, ids), notes


def check_table(
    name: str, table: mx.array, base: BaseFacts, *, mask_ids: Collection[int]
) -> list[str]:
    """Compare a whole embedding or unembedding table ``[rows, D]`` with the base model's.

    Args:
        name: name of the tensor; an unembedding if it contains ``lm_head``.
        table: the table.
        base: the base model.
        mask_ids: rows of mask tokens, which are not compared.

    Returns:
        Notes.

    Raises:
        ValueError: a row of the base model differs.
    """
    if table.ndim != 2 or table.shape[1] != base.hidden_size or table.dtype not in FLOATS:
        raise ValueError(
            f"{name} has shape {tuple(table.shape)} of {table.dtype}, not rows of "
            f"{base.hidden_size} numbers"
        )
    own, shared = base.embed, min(table.shape[0], base.vocab_size)
    if HEAD in name and HEAD in base.linears:  # a separate table
        if base.unembed is None:
            return [f"{name} was assumed to be the base model's own, which was not available"]
        own = base.unembed
    ids = np.setdiff1d(np.arange(shared), list(mask_ids))
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        _check_rows(name, table, own, ids[start : start + _ROWS_AT_ONCE], base)
    notes = []
    if base.quantised:
        notes.append(f"{name} is close to the base model's, which is quantised")
    surplus = set(range(base.vocab_size, table.shape[0])) - set(mask_ids)
    if surplus and HEAD not in name:
        notes.append(
            f"{len(surplus)} rows of {name} from {min(surplus)} on are neither mask tokens nor "
            "tokens of the base model and were left out"
        )
    return notes


def _check_rows(
    name: str,
    table: mx.array,
    own: Callable[[Sequence[int]], mx.array],
    ids: np.ndarray,
    base: BaseFacts,
) -> None:
    actual, expected = table[mx.array(ids)], own(ids.tolist())
    # Compare in the narrower of the two types, to which one of them may have been rounded.
    narrow = next((t for t in (actual.dtype, expected.dtype) if t != mx.float32), mx.float32)
    exact = {actual.dtype, expected.dtype} != {mx.float16, mx.bfloat16}
    if exact:
        actual, expected = actual.astype(narrow), expected.astype(narrow)
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    error = mx.abs(actual - expected)
    if base.quantised:
        rms = mx.sqrt((error**2).mean() / mx.maximum((expected**2).mean(), 1e-30))
        wrong = mx.broadcast_to(~(rms < _QUANTISED_ERROR), (len(ids),))
    elif exact:
        wrong = ~(error == 0).all(axis=-1)
    else:  # either type may have rounded: bfloat16 to 8 bits, float16 small numbers to 0
        wrong = ~(error <= 2**-8 * mx.abs(expected) + 2**-24).all(axis=-1)
    if wrong.any().item():
        first = int(ids[np.array(wrong).argmax()])
        raise ValueError(
            f"{name}: row {first} differs from that of {base.name}; an adapter cannot replace rows "
            "of the base model (is it the right base model?)"
        )


def named_masks(tokens: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids of tokens such as ``<mask_0>``, in the order of their numbers.

    The numbers must be consecutive and begin at 0 or 1; otherwise no token is a mask token.
    """
    ids = {int(m[1]): token for text, token in tokens.items() if (m := _NAMED.fullmatch(text))}
    numbers = sorted(ids)
    is_complete = numbers in (list(range(len(ids))), list(range(1, len(ids) + 1)))
    return tuple(ids[number] for number in numbers) if is_complete else ()


def ask_for_masks(found: str, ids: Sequence[int]) -> str:
    """Return the error for tokens that may be mask tokens, or just tokens of a fine-tune."""
    listed = ",".join(map(str, ids[:_MOST_LISTED])) + (",..." if len(ids) > _MOST_LISTED else "")
    return (
        f"{found} may be mask tokens or tokens that a fine-tune added: name the mask tokens by "
        f"--checkpoint-option mask_token_ids={listed}"
    )


def mask_rows(
    name: str, table: mx.array, base: BaseFacts, options: Options, added: Mapping[str, int]
) -> tuple[tuple[int, ...], str]:
    """Return the mask tokens of an embedding table: the chosen ids, or those with such names.

    Args:
        name: name of the tensor.
        table: the table ``[rows, D]``.
        base: the base model.
        options: ``mask_token_ids``.
        added: ids by text of the tokens that the checkpoint's tokenizer adds.

    Returns:
        The ids in drafting order and a note.

    Raises:
        ValueError: nothing names the mask tokens, or the table has no such rows.
    """
    rows = table.shape[0] if table.ndim else 0
    if options.mask_token_ids is not None:
        ids = options.mask_token_ids
        if max(ids) >= rows:
            raise ValueError(f"mask_token_ids: {name} has {rows} rows, no row {max(ids)}")
        return ids, f"mask rows: rows {', '.join(map(str, ids))} of {name}, as specified"
    ids = named_masks(added) or base.named_masks
    if ids and max(ids) < rows:
        return ids, f"mask rows: rows {', '.join(map(str, ids))} of {name}, named <mask_i>"
    if rows > base.vocab_size:
        found = f"the {rows - base.vocab_size} rows of {name} after those of {base.name}"
        raise ValueError(ask_for_masks(found, range(base.vocab_size, rows)))
    raise ValueError(
        f"{name} has {rows} rows and {base.name} {base.vocab_size}: name the mask tokens by "
        "--checkpoint-option mask_token_ids=ID,..."
    )
