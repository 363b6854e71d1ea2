"""Formulas of answers in a real browser: what Markdown leaves of them, and how they are shown."""

from __future__ import annotations

import json
from itertools import pairwise

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
    ("**Note:**$x$ and **a**\\(y\\)**(b)**", ["x", "y"], "strong + .math"),
    ("设**$x$**为**值$y$**。", ["x", "y"], "strong"),
    ("costs $x and \\(a*b*\\)", ["a*b*"], "p"),
    ("$$\r\na\r\n- b\r\n$$", ["\na\n- b\n"], ".display"),
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
    ("$5, `$a$` and $6, `b`$", "$5, $a$ and $6, b$"),
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
    ("\\begin{eqnarray}\n- *b*\n\\end{eqnarray}", "\\begin{eqnarray}\n- *b*\n\\end{eqnarray}"),
]  # fmt: skip
SHOWN = """() => [...document.querySelectorAll("article.assistant")].map((article) => ({
    sources: [...article.querySelectorAll("annotation")].map((each) => each.textContent),
    text: [...article.querySelectorAll(".text > div")]
        .map((block) => block.textContent.trim()).join("|"),
}))"""

STREAMED = r"""Let \(x_1 = *a*\), $y*b*$:

$$
a_1 = b
- c
=
d
$$

1. slowly \[
   - e \] and **$5 or $6**."""
# Every state of the answer: its formulas, its elements that Markdown must not make, and its text.
RECORD = """() => {
    window.states = [];
    new MutationObserver(() => {
        const text = document.querySelector("article.assistant .text");
        if (text) states.push([text.querySelectorAll(".katex").length,
            text.querySelectorAll("em, h3, h4, ul, li li").length]);
    }).observe(document.querySelector("main"), {childList: true, subtree: true});
}"""
MARKS = "() => [...CSS.highlights.values()].reduce((sum, marks) => sum + marks.size, 0)"


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
    for (text, _, selector), answer in zip(FORMULAS, answers(page).all(), strict=True):
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


def test_formulas_stream_without_flicker_and_load_katex_once(page: Page):
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    fonts: list[str] = []
    page.on(
        "response",
        lambda reply: (
            fonts.append(reply.headers["content-type"]) if reply.url.endswith(".woff2") else None
        ),
    )
    page.evaluate(RECORD)
    send(page, "no formula: $5 and $6")
    finished(page)
    assert not any("/assets/" in url for url in loaded)
    page.get_by_role("button", name="New conversation").click()
    send(page, STREAMED)
    finished(page)
    expect(answers(page).locator(".katex")).to_have_count(4)
    expect(answers(page).locator("strong")).to_have_text("$5 or $6")
    states = page.evaluate("states")
    assert len(states) > 6 and not any(made for _, made in states)
    counts = [count for count, _ in states]
    assert all(old <= new or new == 0 for old, new in pairwise(counts)), counts
    assert fonts and set(fonts) == {"font/woff2"}
    kinds = [url.rpartition(".")[2] for url in loaded if "/assets/" in url]
    assert (kinds.count("js"), kinds.count("css"), set(kinds)) == (1, 1, {"js", "css", "woff2"})


def test_folded_reasoning_shows_formulas_and_no_markdown(page: Page):
    send(page, "think so *a* is \\(x*y*\\)\n\n$$\na\n- b\n$$\n\nfor $5 and `$z$`|It is $x$.")
    finished(page)
    expect(answers(page).locator(".katex")).to_have_count(3)
    text = page.evaluate("""() => {
        const copy = document.querySelector(".reasoning-text").cloneNode(true);
        copy.querySelectorAll(".math").forEach((each) => each.replaceWith(
            `[${each.querySelector("annotation").textContent}]`));
        return [...copy.children].map((each) => each.textContent);
    }""")
    assert text == ["so *a* is [x*y*]", "[\na\n- b\n]", "for $5 and `$z$`"]
    answers(page).locator("summary").click()
    expect(answers(page).locator(".reasoning-text .katex-html").first).to_be_visible()


def test_copies_contain_the_sources(page: Page):
    text = r"the *root* \(\sqrt{x_1}\) of $$y*z*$$"
    send(page, text)
    finished(page)
    expect(answers(page).locator(".katex")).to_have_count(2)
    answers(page).get_by_role("button", name="Copy").click()
    expect(page.get_by_role("status").first).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.assistant .text'))")
    page.keyboard.press("Control+c")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert r"the root $\sqrt{x_1}$ of" in copied and "$$y*z*$$" in copied
    expect(answers(page).locator("math")).to_have_count(2)
    answers(page).get_by_text("root").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("Step")


def test_underlines_can_be_switched_off_and_stay_off(page: Page, app: AppHost):
    send(page, "An answer with several steps, as usual.")
    finished(page)
    until(page, lambda: page.evaluate(MARKS) > 0)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Underline steps").uncheck()
    until(page, lambda: page.evaluate(MARKS) == 0)
    until(page, lambda: app.client.get("/settings").json()["marks"] is False)
    page.reload()
    expect(page.get_by_label("Underline steps")).not_to_be_checked()
    answers(page).get_by_role("button", name="Regenerate").click()
    finished(page)
    assert page.evaluate(MARKS) == 0
    page.get_by_label("Underline steps").check()
    until(page, lambda: page.evaluate(MARKS) > 0)
