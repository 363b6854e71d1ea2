"""Limits of a model: its vocabulary, its context and its adapter's number of draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_mtp.decoding.sampling import Sampling

if TYPE_CHECKING:
    from mlx_mtp.model.mtp_model import MTPModel


class LimitError(ValueError):
    """An argument exceeds a limit of the model.

    Attributes:
        param: name of the argument: "prompt", "logit_bias", "lookup_ids" or "num_draft_tokens".
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflow(LimitError):
    """The prompt does not fit the model's context."""

    def __init__(self, message: str, *, param: str = "prompt") -> None:
        super().__init__(message, param=param)


def check_ids(
    model: MTPModel,
    prompt: Sequence[int],
    sampling: Sampling,
    lookup_ids: Sequence[Sequence[int]] = (),
) -> None:
    """Check that the prompt is not empty and that all ids are in the vocabulary.

    Raises:
        LimitError: the prompt is empty or an id does not exist.
    """
    if len(prompt) == 0:
        raise LimitError("the prompt is empty", param="prompt")
    texts = [("lookup_ids", text) for text in lookup_ids]
    for param, ids in (("prompt", prompt), ("logit_bias", sampling.logit_bias or ()), *texts):
        if len(ids) and (min(ids) < 0 or max(ids) >= model.vocab_size):
            bad = next(token for token in ids if not 0 <= token < model.vocab_size)
            raise LimitError(
                f"{param} contains the id {bad}, but the vocabulary has {model.vocab_size} ids",
                param=param,
            )


def max_draft_tokens(
    model: MTPModel, num_draft_tokens: int | None, draft_model: MTPModel | None = None
) -> int:
    """Maximum number of mask tokens per group: the adapter's k, or fewer if so configured.

    Raises:
        LimitError: the adapter was trained for fewer, and there is no draft model.
    """
    k = model.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
    if k > model.num_draft_tokens > 0 and (draft_model or model.draft_model) is None:
        raise LimitError(
            f"num_draft_tokens is {k}, but the adapter was trained for {model.num_draft_tokens}",
            param="num_draft_tokens",
        )
    return min(k, model.num_draft_tokens)


def max_new_tokens(model: MTPModel, num_prompt: int, max_tokens: int) -> int:
    """Maximum number of tokens to emit after ``num_prompt`` rows; ``max_tokens`` may be -1.

    Raises:
        ContextOverflow: the prompt leaves no room for a token.
    """
    limit = max_tokens if max_tokens > 0 else 2**62
    if model.max_context is None:
        return limit
    if num_prompt >= model.max_context:
        raise ContextOverflow(
            f"the prompt has {num_prompt} tokens, but {model.name} takes fewer than "
            f"{model.max_context}"
        )
    return min(limit, model.max_context - num_prompt)
