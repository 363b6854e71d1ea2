"""Jobs that generate nothing: the ids of a prompt, or the text of ids."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.preparing import Refusal, prompt_ids
from mlx_mtp.apps.engine.protocol import Finished, Group, Job, JobMessage, Started


def encode(job: Job, tokenizer: TokenizerWrapper, *, vocab_size: int) -> list[JobMessage]:
    """Return all messages of a job that has ``only``.

    Args:
        job: the job.
        tokenizer: the tokenizer.
        vocab_size: number of ids that there are.

    Raises:
        Refusal: the prompt is invalid.
    """
    ids = [] if job.prompt in ("", []) else prompt_ids(job, tokenizer)
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        message = f"the id {bad} does not exist; the vocabulary has {vocab_size} ids"
        raise Refusal(message, param="tokens")
    text = tokenizer.decode(ids) if job.only == "text" and ids else ""
    group = Group(text=text, ids=ids, tokens=0, accepted=0)
    return [Started(prompt_tokens=len(ids), cached_tokens=0), group, Finished(reason="stop")]
