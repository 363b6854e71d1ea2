"""Constrains an answer to a grammar with a logits processor that masks all other ids.

Grammars and masks are llguidance's.  The processor is called for every verified row along the
drafted prefix and follows it forwards and backwards.  A draft that violates the grammar has a logit
of minus infinity and is rejected, so greedy output and distributions are those of plain decoding
under the same grammar.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.decoding.sampling import LogitsProcessor
from mlx_mtp.text.reasoning import ReasoningTracker, mark_ids

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_BYTES = 2**18  # of a grammar; enough for 5000 properties
TRIAL_S = 20.0  # for a process limited to 3 s of CPU time, on a busy machine
# One space, or one line break with its indent: models tend to repeat white space if allowed.
_WHITESPACE = r" ?|\n {0,20}"
_MAX_TRIED = 256


class GrammarError(ValueError):
    """An answer has no token that can continue its grammar."""


def json_grammar(schema: dict[str, Any]) -> str:
    """Return llguidance's grammar of the JSON texts that match a schema.

    Args:
        schema: JSON schema (2020-12); its order of properties is required.

    Raises:
        ValueError: the schema has llguidance's own settings, or llguidance is not installed.
    """
    if "x-guidance" in schema:
        raise ValueError("x-guidance cannot be set")
    matcher = _llguidance().LLMatcher
    return matcher.grammar_from_json_schema(
        json.dumps(schema, ensure_ascii=False), overrides={"whitespace_pattern": _WHITESPACE}
    )


def calls_grammar(
    functions: dict[str, dict[str, Any]],
    *,
    tags: tuple[str, str],
    parallel: bool,
    answer: dict[str, Any] | None = None,
) -> str:
    """Return a grammar of calls: JSON objects with ``name`` and ``arguments`` between two tags.

    Args:
        functions: JSON schema of the arguments by name of the function.
        tags: texts before and after a call.
        parallel: whether to allow more than one call.
        answer: JSON schema of a text that may be the answer instead of calls.

    Raises:
        ValueError: a schema has llguidance's own settings, or llguidance is not installed.
    """
    rules = []
    for index, (name, schema) in enumerate(functions.items()):
        arguments = _with_whitespace({"type": "object", **schema})
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        rules.append(f'f{index}: {_quoted(head)} %json {json.dumps(arguments)} "}}"')
    names = " | ".join(f"f{index}" for index in range(len(functions)))
    start = r"start: call (/\n?/ call)*" if parallel else "start: call"
    if answer is not None:
        start += f" | %json {json.dumps(_with_whitespace(answer))}"
    call = rf"call: {_quoted(tags[0])} /\n?/ ({names}) /\n?/ {_quoted(tags[1])}"
    lark = "\n".join([start, call, *rules])
    return _llguidance().LLMatcher.grammar_from_lark(lark)


def _with_whitespace(schema: dict[str, Any]) -> dict[str, Any]:
    if "x-guidance" in schema:
        raise ValueError("x-guidance cannot be set")
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}


def _quoted(text: str) -> str:
    """A string literal in Lark, which is the same as in JSON."""
    return json.dumps(text, ensure_ascii=False)


class Grammars:
    """Creates processors for the vocabulary of one tokenizer, built with the first processor.

    Args:
        tokenizer: wraps a fast tokenizer of Hugging Face.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None
        self._tried: dict[str, None] = {}
        self._lock = threading.Lock()

    def processor(self, grammar: str, *, num_prompt: int) -> LogitsProcessor:
        """Return a processor for one answer.

        Once the grammar is complete, only stop ids may follow.

        Args:
            grammar: a grammar of llguidance, such as from ``json_grammar``.
            num_prompt: number of ids of the prompt, which every context starts with.

        Raises:
            ValueError: the grammar is invalid, too large or takes too long to compile.
        """
        guidance = _llguidance()
        with self._lock:
            self._check(grammar)
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
        limits = guidance.LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
        matcher = guidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(_line(matcher.get_error()))
        stop_ids = sorted(self._tokenizer.eos_token_ids)
        return _GrammarProcessor(
            matcher,
            num_ids=self._vocabulary.vocab_size,
            stop_ids=stop_ids,
            num_prompt=num_prompt,
        )

    def processor_after_reasoning(self, grammar: str, tracker: ReasoningTracker) -> LogitsProcessor:
        """Return a processor for an answer that may begin with reasoning, which is free text.

        Args:
            grammar: what follows the closing mark, or what the answer is without reasoning.
            tracker: follows the reasoning.

        Raises:
            ValueError: see ``processor``.
        """
        inner, tokenizer = self.processor(grammar, num_prompt=0), self._tokenizer
        marks = tracker.reasoning
        opening = mark_ids(tokenizer, marks.start)
        stop_ids, vocabulary = sorted(tokenizer.eos_token_ids), tokenizer.get_vocab()

        @cache
        def forbidden(rest: str, num_ids: int) -> mx.array:
            """Ids that end the answer, or go beyond the closing mark that they complete."""
            longer = [
                token
                for text, token in vocabulary.items()
                if text[:-1].startswith(rest) or marks.end in text[:-1]
            ]
            return mx.array([[token for token in (*stop_ids, *longer) if token < num_ids]])

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            phase, since = tracker.at(tokens)
            answer = tokens[tracker.num_prompt :]
            if phase == "inside":  # without a closing mark there would be no valid answer
                ids = forbidden(tracker.unclosed(), logits.shape[-1])
                return mx.put_along_axis(logits, ids, mx.array(-mx.inf, logits.dtype), axis=-1)
            allowed = inner(answer[since:] if phase == "after" else answer, logits)
            if phase == "before" and not answer.size and len(opening) == 1:
                allowed[..., opening[0]] = logits[..., opening[0]]
            return allowed

        return process

    def _check(self, grammar: str) -> None:
        """Check a grammar that has not been checked before."""
        if grammar in self._tried:
            return
        check_in_subprocess(grammar)
        self._tried[grammar] = None
        if len(self._tried) > _MAX_TRIED:
            del self._tried[next(iter(self._tried))]


def check_in_subprocess(grammar: str) -> None:
    """Compile a grammar in another process, which may take seconds.

    Raises:
        ValueError: the grammar cannot be compiled.
    """
    data = grammar.encode()
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than {MAX_BYTES}")
    script = Path(__file__).with_name("grammar_trial.py")
    command = [sys.executable, "-P", str(script)]
    try:
        run = subprocess.run(command, input=data, capture_output=True, timeout=TRIAL_S)
    except subprocess.TimeoutExpired:
        raise ValueError("it takes too long to compile") from None
    if run.returncode:
        raise ValueError("it is too complex: it takes too long, too much memory or nests too deep")
    if run.stdout.strip():
        raise ValueError(_line(run.stdout.decode(errors="replace")))


class _GrammarProcessor:
    """Follows the text and masks the ids that cannot come next."""

    def __init__(
        self, matcher: LLMatcher, *, num_ids: int, stop_ids: list[int], num_prompt: int
    ) -> None:
        self._matcher = matcher
        self._num_ids = num_ids  # of the tokenizer; the model may have more
        self._stop_ids = stop_ids
        self._num_prompt = num_prompt
        self._read: list[int] = []  # ids that the matcher has consumed

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask one row ``[1, V]`` that follows ``tokens`` ``[n]``."""
        answer: Any = tokens[self._num_prompt :].tolist()
        stop = next((i for i, token in enumerate(answer) if token in self._stop_ids), None)
        if not self._follow(answer[:stop]):
            return logits  # after a rejected draft, so the row is not used
        allowed = np.zeros(logits.shape[-1], dtype=bool)
        if stop is None:
            self._allow(allowed)
        if stop is not None or self._matcher.is_accepting():
            allowed[self._stop_ids] = True
        if not allowed.any():
            raise GrammarError(
                "no token of the model can continue the answer according to the schema"
            )
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))

    def _allow(self, allowed: np.ndarray) -> None:
        """Set the ids that may come next in ``[V]``; ids that the tokenizer lacks may not."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(_line(self._matcher.get_error()))
        unpacked = np.unpackbits(bits, count=min(len(allowed), 8 * len(bits)), bitorder="little")
        allowed[: len(unpacked)] = unpacked

    def _follow(self, answer: list[int]) -> bool:
        """Move the matcher to the end of these ids; return False if they violate the grammar."""
        same = min(len(answer), len(self._read))
        while answer[:same] != self._read[:same]:
            same -= 1
        self._matcher.rollback(len(self._read) - same)
        rest = answer[same:]
        known = list(itertools.takewhile(lambda token: token < self._num_ids, rest))
        count = self._matcher.try_consume_tokens(known)
        self._read = answer[: same + count]
        if self._matcher.is_error():
            raise GrammarError(_line(self._matcher.get_error()))
        return count == len(rest)


_EXACT = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def _vocabulary(tokenizer: TokenizerWrapper) -> LLTokenizer:
    """The tokenizer in llguidance's form."""
    try:
        backend: Any = tokenizer.backend_tokenizer
        text = backend.to_str()
    except AttributeError:
        raise ValueError("the model's tokenizer is not a fast tokenizer") from None
    values = json.loads(text) | {"padding": None, "truncation": None}
    ids = set(backend.get_vocab().values())
    for index in set(range(max(ids, default=0))) - ids:  # llguidance fails at ids without a token
        name = f"<|no token {index}|>"
        values["model"]["vocab"][name] = index
        values["added_tokens"].append({"id": index, "content": name, "special": True} | _EXACT)
    return _llguidance().LLTokenizer(json.dumps(values), eos_token=tokenizer.eos_token_id)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "the package llguidance is missing: pip install 'mlx-mtp[server]'"
        ) from None
    return llguidance


def _line(error: str) -> str:
    """An error of llguidance as one line of limited length."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    more = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return " ".join([*lines[:1], *more])[:300] or "it cannot be compiled"
