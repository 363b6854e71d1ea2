"""Writes an answer to standard output."""

from __future__ import annotations

import sys

from mlx_mtp.terminal import AnswerWriter
from mlx_mtp.text.reasoning import Parts, Reasoning, ReasoningParser


class AnswerPrinter:
    """Writes an answer; at a terminal its reasoning is faint and without marks.

    Args:
        output: where to write.
        reasoning: the marks, if the model has any.
    """

    def __init__(self, output: AnswerWriter, reasoning: Reasoning | None) -> None:
        self._output = output
        is_split = reasoning is not None and sys.stdout.isatty()
        self._parser = ReasoningParser(reasoning) if reasoning and is_split else None
        self._is_reasoning = False

    def write(self, text: str) -> None:
        """Write a piece of text."""
        self._write(self._parser.push(text) if self._parser else Parts("", text))

    def finish(self) -> None:
        """Write the pending text."""
        if self._parser:
            self._write(self._parser.finish())

    def _write(self, parts: Parts) -> None:
        if parts.reasoning:
            self._output.write(parts.reasoning, faint=True)
            self._is_reasoning = True
        if parts.content and self._is_reasoning:
            self._output.write("\n\n")
            self._is_reasoning = False
        self._output.write(parts.content)
