"""Topics of the built-in self-distillation: beginnings of users' messages.

Small models ignore a topic in a system prompt, but they continue first words.  Each entry ends in
"...", which makes it the beginning of the user's message; "..." alone leaves the message to the
model.  None of the entries begins a prompt of the benchmarks.
"""

from __future__ import annotations

from pathlib import Path

FREE = ("...",) * 6
CODE = (
    "I need a Python function which...",
    "Could you implement this in Python: a class that...",
    "Complete the following Python function.\n\n```python\ndef...",
    "Finish this code and keep its docstring:\n\n```python\nclass...",
    "def...",
    "Here is my code, please find the bug.\n\n```python\n...",
    "Given a list of integers, I want Python code that...",
    "Given two strings, show me an efficient algorithm that...",
    "Please add type hints and comments to this code:\n\n...",
    "In JavaScript, what is the best way to...",
    "My TypeScript interface should describe...",
    "In Rust, how would I...",
    "Show me C++ code for...",
    "How do I use pandas to...",
    "I have an SQL table with the columns...",
    "Design a regular expression that matches...",
    "Which shell command can...",
    "Please write unit tests for...",
    "What does this error mean, and how do I fix it?\n\n...",
    "Build a small web page with HTML and CSS that...",
)
MATHS = (
    "Let me describe a maths problem. A farmer...",
    "Calculate step by step:...",
    "If a car drives...",
    "My teacher asked us to prove that...",
    "What is the area of...",
    "A box contains...",
    "Simplify the expression...",
    "In physics, how do you compute...",
)
LISTS = (
    "Make a list of...",
    "Give me five examples of...",
    "Draw up a table with the columns...",
    "Which steps are needed to...",
    "Compare the following options in a table:...",
    "Produce a JSON object that...",
    "Put together a weekly schedule for...",
    "What are the advantages of...",
)
EDITS = (
    "Please proofread this paragraph:\n\n...",
    "Translate into Spanish:...",
    "Make the following sentence shorter:...",
    "Sum up this article in three bullet points:\n\n...",
    "Classify the mood of this comment:...",
    "Pick out the names and dates from:\n\n...",
    "Rephrase this for a formal letter:...",
)
CHAT = (
    "Hi! I have been wondering...",
    "Tell me about the history of...",
    "How does it come that...",
    "My friend thinks that...",
    "I would like to cook...",
    "Invent a story in which...",
    "Compose a poem about...",
    "Draft an e-mail to...",
    "Can you recommend...",
    "Who was...",
    "What happens in the body when...",
    "Imagine that you are...",
)
LANGUAGES = (
    "¿Qué opinas de...",
    "Necesito ayuda para...",
    "Écris un texte sur...",
    "Pourquoi est-ce que...",
    "Erkläre mir bitte...",
    "Wie funktioniert...",
    "Che cosa significa...",
    "Como posso...",
    "Hoe kan ik...",
    "Jak mogę...",
    "Bana şunu anlat:...",
    "Apa yang dimaksud dengan...",
    "Расскажи мне о...",
    "Как правильно...",
    "请介绍一下...",
    "如何...",
    "日本の文化について...",
    "한국에서...",
    "اشرح لي...",
)


def default_topics() -> tuple[str, ...]:
    """All topics, mixed so that any dozen in a row has some of each kind."""
    kinds = (FREE, CODE, MATHS, LISTS, EDITS, CHAT, LANGUAGES)
    keyed = [
        ((number + 0.5) / len(kind), topic) for kind in kinds for number, topic in enumerate(kind)
    ]
    return tuple(topic for _, topic in sorted(keyed, key=lambda pair: pair[0]))


def read_topics(path: Path) -> tuple[str, ...]:
    r"""Read a file of one topic per line; ``\n`` is a line break, blank lines are skipped.

    Raises:
        ValueError: it is not UTF-8 or empty.
        OSError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    topics = tuple(line.strip().replace("\\n", "\n") for line in lines if line.strip())
    if not topics:
        raise ValueError(f"{path} contains no topics")
    return topics
