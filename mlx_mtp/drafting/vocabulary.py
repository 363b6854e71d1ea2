"""The draft vocabulary: the few thousand tokens that drafts come from (FR-Spec, arXiv 2502.14856).

The base model's head ranks tokens for every mask row, and most of the unembedding belongs to tokens
that hardly ever occur.  So drafts come from the tokens that were the most frequent in the adapter's
training text, and from those of the conversation so far.  Verification keeps the whole vocabulary:
a token that is missing here costs speed where it would have been drafted, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_mtp.drafting.shortlist import shortlisted
from mlx_mtp.model.head import PartialHead
from mlx_mtp.model.mtp_model import MTPModel

MIN_SIZE = 4096  # frequent tokens; docs/results/draft-vocabulary.md has the measurements
COUNTED_SHARE = 16  # one in so many tokens of a large vocabulary, if they were counted
UNCOUNTED_SHARE = 3  # and otherwise
MAX_OWN = 1024  # tokens of one conversation, the latest ones
_MIN_SHARE = 2  # of a vocabulary that is not this many times larger, all tokens are used
_BLOCK = 64  # own tokens come in blocks, so that shapes change rarely
_MAX_ERROR = 0.05  # of the largest value; see ``MTPModel._probe``


class RowLogits(NamedTuple):
    """Logits ``[m, N]`` of some tokens, and their ids ``[N]``; None for all tokens in order."""

    logits: mx.array
    ids: mx.array | None = None

    def shortlist(self, size: int) -> tuple[mx.array, mx.array]:
        """The likeliest tokens of each row and their logits, ``[m, min(size, N)]`` each."""
        places = shortlisted(self.logits, size)
        scores = mx.take_along_axis(self.logits, places, axis=-1)
        return places if self.ids is None else self.ids[places], scores


def frequent_head(model: MTPModel, *, size: int | None = None) -> PartialHead | None:
    """Make the head for the tokens that are frequent in an adapter's training text.

    Where nothing was counted, these are the first ids, and more of them (see ``by_frequency``).

    Args:
        model: the model, with its statistics and the modules that it will decode with.
        size: number of tokens.

    Returns:
        None without mask tokens, if the vocabulary is not much larger, or if the model's own code
        does not give these tokens the logits that it gives them among all.
    """
    counted = model.statistics.vocabulary if model.statistics else None
    if size is None:
        share = model.vocab_size // (COUNTED_SHARE if counted else UNCOUNTED_SHARE)
        size = max(share - share % _BLOCK, MIN_SIZE)
    if not model.num_draft_tokens or model.vocab_size < _MIN_SHARE * size:
        return None
    order = by_frequency(counted.ids if counted else (), model.vocab_size)
    ids = mx.array(order[:size], mx.int32)
    try:
        head = PartialHead(model.base, model.parts, ids)
        hidden = mx.random.normal((1, 2, model.hidden_size), key=mx.random.key(0))
        hidden = hidden.astype(model.dtype)
        found, expected = head.logits(hidden), model.logits(hidden)[..., ids]
        error = mx.abs(found - expected).max() / (mx.abs(expected).max() + 1e-6)
        return head if bool((error < _MAX_ERROR).item()) else None
    except (TypeError, ValueError, AttributeError, IndexError):
        return None


def by_frequency(counted: Sequence[int], vocab_size: int) -> np.ndarray:
    """All ids, those that were counted first, then the others; ``[V]``.

    Merges of a tokenizer are numbered in the order of their frequency when it was made, so of the
    others small ids are the likelier ones.
    """
    first = np.array(counted, np.int64)
    others = np.ones(vocab_size, bool)
    others[first] = False
    return np.concatenate([first, np.flatnonzero(others)])


class ConversationVocabulary:
    """The tokens that the drafts of one answer come from.

    Args:
        model: the model.
        frequent: its head for frequent tokens.
        ids: the conversation so far.
    """

    def __init__(self, model: MTPModel, frequent: PartialHead, ids: Sequence[int]) -> None:
        self._model = model
        self._frequent = frequent
        self._is_frequent = np.zeros(model.vocab_size, bool)
        self._is_frequent[np.array(frequent.ids)] = True
        self._own: dict[int, None] = {}  # in the order of their last occurrence
        self._own_head: PartialHead | None = None
        self._ids = frequent.ids
        self.add(ids)

    @property
    def ids(self) -> mx.array:
        """The tokens, all different, int32 ``[N]``."""
        return self._ids

    def add(self, ids: Sequence[int]) -> None:
        """Take up tokens of the conversation."""
        array = np.array(ids, np.int64)
        rare = array[~self._is_frequent[array]].tolist() if len(ids) else []
        before = self._own.keys() | set()
        for token in rare:
            self._own.pop(token, None)
            self._own[token] = None
        for token in list(itertools.islice(self._own, max(len(self._own) - MAX_OWN, 0))):
            del self._own[token]
        if self._own.keys() != before:
            self._make_own_head()

    def rate(self, hidden: mx.array, logits: mx.array) -> RowLogits:
        """Logits of the draft vocabulary.

        Args:
            hidden: final hidden states of mask rows, ``[m, D]``.
            logits: of all tokens, ``[m, V]``, or of the frequent ones, ``[m, F]``.
        """
        if logits.shape[-1] == self._model.vocab_size:
            return RowLogits(logits[:, self._ids], self._ids)
        if self._own_head is not None:
            own = self._own_head.logits(hidden[None])[0]
            logits = mx.concatenate([logits, own], axis=-1)
        return RowLogits(logits, self._ids)

    def _make_own_head(self) -> None:
        """Gather the rows of the conversation's tokens, and of others up to a whole block."""
        own = list(self._own)
        if missing := -len(own) % _BLOCK:
            is_free = ~self._is_frequent
            is_free[own] = False
            own += np.flatnonzero(is_free)[:missing].tolist()
        self._own_head = PartialHead(self._model.base, self._model.parts, mx.array(own, mx.int32))
        self._ids = mx.concatenate([self._frequent.ids, self._own_head.ids])
