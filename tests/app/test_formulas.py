"""Formulas of answers in a real browser: what Markdown leaves of them, and how they are shown."""

from __future__ import annotations

import json

import pytest

from tests.app.host import AppHost
from tests.app.page import answers, finished, send, until

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect  # noqa: E402

pytestmark = pytest.mark.slow

MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
ALIGN = "\\begin{align*}\na &= b \\\\\n- c &= *d*\n\\end{align*}"
# The text, its formulas in TeX, and the selector of an element that contains the first one.
FORMULAS: list[tuple[str, list[str], str]] = [
    (r"so \(x_1 = \frac{-b + \sqrt{d}}{2a}\).", [r"x_1 = \frac{-b + \sqrt{d}}{2a}"], "p"),
    (r"\[ \|x\|_2 \le 5\% \]", [r" \|x\|_2 \le 5\% "], ".display"),
    (
        r"$a*b*c$ and $\{1, 2\}$ and $\int f\,dx$",
        ["a*b*c", r"\{1, 2\}", r"\int f\,dx"],
        "p",
    ),
    (f"$${MATRIX}$$", [MATRIX], ".display"),
    ("$$\na_1 = b\n- c\n$$", ["\na_1 = b\n- c\n"], ".display"),
    ("$$\n\\# a\n=\n* b\n> c\n1. d\n$$", ["\n\\# a\n=\n* b\n> c\n1. d\n"], ".math"),
    ("text \\[\na\n=\nb\n\\] more", ["\na\n=\nb\n"], "p"),
    ("we have \\(a\n- b\\) here", ["a\n- b"], "p"),
    ("$$\n\na = 1\n\n$$", ["\n\na = 1\n\n"], ".display"),
    ("\\[\n\na = 1\n\n\\]", ["\n\na = 1\n\n"], ".display"),
    (ALIGN, [ALIGN], ".display"),
    ("```math\na_1*b*c\n```", ["a_1*b*c"], ".display"),
    ("- one\n  ~~~math\n  a\n  ~~~\n- two", ["  a"], "li"),
    ("- first $a_1*b*$\n  - \\(c_1\\)", ["a_1*b*", "c_1"], "li"),
    ("1. so\n   $$\n   a\n   - b\n   $$\n2. end", ["\n   a\n   - b\n   "], "ol > li"),
    ("> so\n> $$\n> a\n> - b\n> $$", ["\na\n- b\n"], "blockquote"),
    ("| a | b |\n|---|---|\n| $|x|$ | \\(\\|y\\|\\) |", ["|x|", r"\|y\|"], "td"),
    ("## The $n_1$th *case*", ["n_1"], "h4"),
    ("**bold $a*b$ and \\(c\\)**", ["a*b", "c"], "strong"),
    ("*it $x$*, [link $y$](https://x.example)", ["x", "y"], "em"),
    ("Both $x$, $y$; ($z$) – $w$-axis.", ["x", "y", "z", "w"], "p"),
    (r"$\text{costs \$5}$ and $5 and $10", [r"\text{costs \$5}"], "p"),
    (r"设$x$为 and \\(no\\) but \(yes\)", ["x", "yes"], "p"),
    ("$$x$$ and $$y$$ in one line", ["x", "y"], ".display"),
    ("$a\nb$ over lines", ["a\nb"], "p"),
    ("`$` is a dollar, $x$ is not", ["x"], "p"),
    ("```\n$a$\n```\n$b$", ["b"], "p"),
    ("\ue000 $x$ \ue001", ["x"], "p"),
]
# The text, and what is shown of it: no formula.
TEXTS: list[tuple[str, str]] = [
    ("It costs $5 and $10.", "It costs $5 and $10."),
    ("US$5, CA$6, and US$7.", "US$5, CA$6, and US$7."),
    ("from $5-$10, $1,000/$2,000", "from $5-$10, $1,000/$2,000"),
    ("- **$5** for *x*\n- $6 for y", "$5 for x\n$6 for y"),
    (r"\$a\$ and \\$", r"$a$ and \$"),
    ("$ a $ and $a $", "$ a $ and $a $"),
    ("`$a$` and `\\(b\\)` and ``$`c$``", r"$a$ and \(b\) and $`c$"),
    ("`$a` and `$b`", "$a and $b"),
    ("echo $HOME and *$PATH", "echo $HOME and *$PATH"),
    ("```sh\necho $a $b\n\\[ -f x \\]\n```", "shCopyecho $a $b\n\\[ -f x \\]"),
    ("    $a$ and \\(b\\)", "textCopy$a$ and \\(b\\)"),
    ("```\n$$\na", "textCopy$$\na"),
    ("[a](https://x.example/$b$) https://x.example/$c$", "a https://x.example/$c$"),
    ("![$a$](https://x.example/)", "image: $a$"),
    ("$\n\na$ and $a\n\nb$", "$|a$ and $a|b$"),
    ("*so* \\(a*b*c", "so \\(a*b*c"),
    ("*so*\n\n$$\n- a\n- *b*", "so|$$\n- a\n- *b*"),
    ("$$\n# a\n=\n* b\n| c |\n|---|\n$$", "$$\n# a\n=\n* b\n| c |\n|---|\n$$"),
    (r"bad: \(\frac{a*b*\)", r"bad: \(\frac{a*b*\)"),
    (r"\(\href{https://x.example}{a}\)", r"\(\href{https://x.example}{a}\)"),
    (r"$\includegraphics{https://x.example/a.png}$", r"$\includegraphics{https://x.example/a.png}$"),
    (r"\(\def\a{\a\a}\a\)", r"\(\def\a{\a\a}\a\)"),
    (f"${'{' * 5000}$", f"${'{' * 5000}$"),
    ("\\begin{eqnarray}\n- a *b* \\\\\n\\end{eqnarray}", "\\begin{eqnarray}\n- a *b* \\\\\n\\end{eqnarray}"),
]  # fmt: skip
SHOWN = """() => [...document.querySelectorAll("article.assistant")].map((article) => ({
    sources: [...article.querySelectorAll("annotation")].map((each) => each.textContent),
    text: [...article.querySelectorAll(".text > div")].map((block) => block.textContent.trim()).join("|"),
}))"""


def opened(page: Page, app: AppHost, texts: list[str]) -> None:
    """Show a conversation whose answers are the texts."""
    messages = [
        {"role": ("user", "assistant")[at % 2], "text": text, "parent": at - 1 if at else None}
        | {"groups": [], "model": "some"}
        for at, text in enumerate(each for text in texts for each in ("?", text))
    ]
    talk = {"title": "formulas", "messages": messages, "leaf": len(messages) - 1}
    whole = {"format": "mlx-mtp conversations", "version": 1, "conversations": [talk]}
    reply = app.client.post("/import", content=json.dumps(whole).encode())
    assert reply.status_code == 201, reply.text
    page.evaluate(f"location.hash = 'c={reply.json()['conversations'][0]}'")
    expect(answers(page)).to_have_count(len(texts))
    until(page, lambda: not page.locator(".math:not(.done)").count())


def test_markdown_changes_no_formula(page: Page, app: AppHost):
    opened(page, app, [text for text, _, _ in FORMULAS])
    shown = page.evaluate(SHOWN)
    assert [each["sources"] for each in shown] == [sources for _, sources, _ in FORMULAS]
    for (text, _, selector), answer in zip(FORMULAS, answers(page).all()):
        assert answer.locator(f".text {selector} .katex").count(), text


def test_what_is_no_formula_stays_text(page: Page, app: AppHost):
    opened(page, app, [text for text, _ in TEXTS])
    shown = page.evaluate(SHOWN)
    wrong = [
        (each["text"], right, each["sources"])
        for (_, right), each in zip(TEXTS, shown, strict=True)
        if each["text"] != right or each["sources"]
    ]
    assert wrong == []
