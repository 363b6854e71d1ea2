"""Prompts with text before them: what a benchmark asks at a given length of context.

The text is real: sections of Python's own reference manual, which every Python carries for
``help()``, in an order drawn anew for each prompt.  No section comes twice in a prompt, so that
lookup finds no more than a document offers.
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
    """A prompt as it is asked.

    Attributes:
        prompt: the user's message.
        context: ids of text before it, as wanted.
        ids: the whole conversation, ready for the model's turn.
    """

    prompt: Prompt
    context: int
    ids: list[int]


def sections() -> list[str]:
    """Texts that fill contexts.

    Raises:
        ValueError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python lacks pydoc_data, whose text fills contexts") from None
    return [text.strip() for _, text in sorted(topics.items())]


def source() -> dict[str, str]:
    """Tells one filling text from another."""
    digest = hashlib.sha256("\n".join(sections()).encode()).hexdigest()
    return {"from": f"reference manual of Python {platform.python_version()}", "sha256": digest}


def questions(
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    contexts: Sequence[int],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[Question]:
    """Put each prompt behind each length of text.

    Args:
        tokenizer: from ``load``.
        prompts: what is asked.
        contexts: ids of text before it; 0 is the prompt alone.
        say: called with a line now and then.

    Returns:
        All prompts at the first length, then at the next.

    Raises:
        ValueError: there is not so much text.
    """
    encoded: dict[str, list[int]] = {}
    found = []
    for context in contexts:
        for number, prompt in enumerate(prompts):
            if context:
                say(f"Preparing prompts with {context} ids of text {number + 1}/{len(prompts)}")
            text = prompt.text
            if context:
                text = _BEFORE + _notes(tokenizer, context, prompt.id, encoded) + _AFTER + text
            found.append(Question(prompt, context, prompt_ids(tokenizer, text)))
    return found


def prompt_ids(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """A user's message in the chat template, or as it is where the model has none."""
    if not tokenizer.has_chat_template:
        return encode_prompt(tokenizer, text)
    rendered = chat_text(tokenizer, [{"role": "user", "content": text}])
    return encode_prompt(tokenizer, rendered, add_special_tokens=False)


def check_room(
    asked: Sequence[Question], *, max_tokens: int, max_context: int | None, model: str
) -> None:
    """Refuse what does not fit the model's context.

    Raises:
        ValueError: it names the longest prompt.
    """
    longest = max(asked, key=lambda each: len(each.ids))
    if max_context is None or len(longest.ids) + max_tokens <= max_context:
        return
    behind = f" behind {longest.context} tokens of text" if longest.context else ""
    raise ValueError(
        f"prompt {longest.prompt.id}{behind} has {len(longest.ids)} tokens and its answer "
        f"{max_tokens}, but {model} has a context of {max_context}"
    )


def _notes(tokenizer: Any, length: int, key: str, encoded: dict[str, list[int]]) -> str:
    """Text of about ``length`` ids."""
    texts = sections()
    random.Random(f"{SEED} {key}").shuffle(texts)
    taken: list[str] = []
    room = length
    for text in texts:
        if text not in encoded:
            encoded[text] = encode_prompt(tokenizer, text, add_special_tokens=False)
        ids = encoded[text]
        if len(ids) >= room:
            return "\n\n".join([*taken, tokenizer.decode(ids[:room]).rstrip("\ufffd")])
        taken.append(text)
        room -= len(ids)
    raise ValueError(f"there are {length - room} tokens of text to fill contexts, not {length}")
