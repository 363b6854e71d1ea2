"""The loop stays small enough to read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

from mlx_mtp.decoding import loop, request, step

MAX_LINES = 150
RECORDS = ("Step", "Outcome", "StepResult", "_Verdict")  # what the loop passes around


def code_lines(path: Path) -> int:
    """Lines of a module's functions and classes without docstrings, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    source, lines, tree = text.splitlines(), set[int](), ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in RECORDS:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines |= set(range(first, (node.end_lineno or 0) + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return sum(bool(source[line - 1].partition("#")[0].strip()) for line in lines)


def test_request_run_commit_and_the_function_that_ties_them_stay_small() -> None:
    modules = (loop, request, step)
    assert sum(code_lines(Path(module.__file__ or "")) for module in modules) <= MAX_LINES
