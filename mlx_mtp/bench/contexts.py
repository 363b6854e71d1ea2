"""Prompts with text before them, for benchmarks with long contexts.

The text is real: sections of Python's reference manual, which every Python includes for ``help()``,
in a random order for each prompt.  No section occurs twice in a prompt, so lookup finds no more
repetition than in a document.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_mtp.evaluation.prompts import Prompt
from mlx_mtp.generate import chat_text, encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SEED = 0
_BEFORE = "Here are notes that I keep at hand.\n\n"
_AFTER = "\n\nThese were the notes. My request is another matter:\n\n"


@dataclass(frozen=True)
class Question:
    """A prompt with its context.

    Attributes:
        prompt: the user's message.
        context: requested number of ids of text before it.
        ids: the whole conversation, up to the model's turn.
    """

    prompt: Prompt
    context: int
    ids: list[int]


def sections() -> list[str]:
    """Return the texts that fill contexts.

    Raises:
        ValueError: this Python does not include them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("contexts need the Python module pydoc_data, which is missing") from None
    return [text.strip() for _, text in sorted(topics.items())]


def filler_facts() -> dict[str, str]:
    """Origin and hash of the texts that fill contexts."""
    digest = hashlib.sha256("\n".join(sections()).encode()).hexdigest()
    return {"from": f"reference manual of Python {platform.python_version()}", "sha256": digest}


def questions(
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    contexts: Sequence[int],
    *,
    on_status: Callable[[str], None] = lambda text: None,
) -> list[Question]:
    """Put text of each length before each prompt.

    Args:
        tokenizer: from ``load``.
        prompts: the prompts.
        contexts: numbers of ids of text; 0 is the prompt alone.
        on_status: called with a line about the work in progress.

    Returns:
        All prompts with the first length, then with the next.

    Raises:
        ValueError: there is not enough text.
    """
    encoded: dict[str, list[int]] = {}
    result = []
    for context in contexts:
        for number, prompt in enumerate(prompts):
            if context:
                on_status(
                    f"Preparing prompts with {context} ids of text {number + 1}/{len(prompts)}"
                )
            text = prompt.text
            if context:
                text = _BEFORE + _notes(tokenizer, context, prompt.id, encoded) + _AFTER + text
            result.append(Question(prompt, context, prompt_ids(tokenizer, text)))
    return result


def prompt_ids(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Encode a user's message with the chat template, or alone if the model has none."""
    if not tokenizer.has_chat_template:
        return encode_prompt(tokenizer, text)
    rendered = chat_text(tokenizer, [{"role": "user", "content": text}])
    return encode_prompt(tokenizer, rendered, add_special_tokens=False)


def check_room(
    questions: Sequence[Question], *, max_tokens: int, max_context: int | None, model: str
) -> None:
    """Check that all prompts and answers fit into the model's context.

    Raises:
        ValueError: the longest prompt does not fit.
    """
    longest = max(questions, key=lambda question: len(question.ids))
    if max_context is None or len(longest.ids) + max_tokens <= max_context:
        return
    after = f" after {longest.context} tokens of text" if longest.context else ""
    raise ValueError(
        f"prompt {longest.prompt.id}{after} has {len(longest.ids)} tokens and its answer "
        f"{max_tokens}, but {model} has a context of {max_context}"
    )


def _notes(tokenizer: Any, length: int, key: str, encoded: dict[str, list[int]]) -> str:
    """Return text of about ``length`` ids."""
    texts = sections()
    random.Random(f"{SEED} {key}").shuffle(texts)
    parts: list[str] = []
    room = length
    for text in texts:
        if text not in encoded:
            encoded[text] = encode_prompt(tokenizer, text, add_special_tokens=False)
        ids = encoded[text]
        if len(ids) >= room:
            return "\n\n".join([*parts, tokenizer.decode(ids[:room]).rstrip("\ufffd")])
        parts.append(text)
        room -= len(ids)
    raise ValueError(
        f"there are only {length - room} tokens of text to fill contexts, not {length}"
    )
