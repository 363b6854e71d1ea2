"""Holds an answer to a grammar: a logits processor that leaves only ids with which it can go on.

Grammars and masks are llguidance's.  The processor is called for every verify row along the drafted
prefix and follows it, back and forth; a draft that breaks the grammar meets a logit of minus
infinity and does not hold, so greedy output and distributions are those of plain decoding under the
same grammar.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.decoding.sampling import LogitsProcessor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_BYTES = 2**18  # of a grammar; 5000 properties fit
TRIAL_S = 20.0  # for a process that may use 3 s of a CPU, on a busy machine
# A space or a line break with its indent, never two: models that may go on with white space do.
_WHITESPACE = r" ?|\n {0,20}"
_REMEMBERED = 256


class GrammarError(ValueError):
    """An answer came to a point where its grammar cannot be followed any further."""


def json_grammar(schema: dict[str, Any]) -> str:
    """A grammar of the JSON texts that a schema describes, as llguidance reads it.

    Args:
        schema: JSON schema (2020-12).  Properties come in its order.

    Raises:
        ValueError: it asks for llguidance's own settings, or there is no llguidance.
    """
    if "x-guidance" in schema:
        raise ValueError("x-guidance cannot be set")
    matcher = _llguidance().LLMatcher
    return matcher.grammar_from_json_schema(
        json.dumps(schema, ensure_ascii=False), overrides={"whitespace_pattern": _WHITESPACE}
    )


def calls_grammar(
    functions: dict[str, dict[str, Any]], *, marks: tuple[str, str], many: bool
) -> str:
    """A grammar of calls, each a JSON object with ``name`` and ``arguments`` between two marks.

    Args:
        functions: JSON schema of the arguments by name of the function.
        marks: texts before and after a call.
        many: whether more calls than one may be made.

    Raises:
        ValueError: a schema asks for llguidance's own settings, or there is no llguidance.
    """
    rules = []
    for at, (name, schema) in enumerate(functions.items()):
        if "x-guidance" in schema:
            raise ValueError("x-guidance cannot be set")
        held = {"type": "object", **schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        rules.append(f'f{at}: {_quoted(head)} %json {json.dumps(held)} "}}"')
    names = " | ".join(f"f{at}" for at in range(len(functions)))
    start = r"start: call (/\n?/ call)*" if many else "start: call"
    call = rf"call: {_quoted(marks[0])} /\n?/ ({names}) /\n?/ {_quoted(marks[1])}"
    lark = "\n".join([start, call, *rules])
    return _llguidance().LLMatcher.grammar_from_lark(lark)


def _quoted(text: str) -> str:
    """A text as Lark writes it, which is as JSON does."""
    return json.dumps(text, ensure_ascii=False)


class Grammars:
    """Makes processors for the vocabulary of one tokenizer.

    The vocabulary is worked out with the first of them; ``bench.grammar`` times it.

    Args:
        tokenizer: with a Hugging Face fast tokenizer within.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None
        self._tried: dict[str, None] = {}
        self._lock = threading.Lock()

    def processor(self, grammar: str, *, num_prompt: int) -> LogitsProcessor:
        """A processor that holds an answer to a grammar; for one answer only.

        When the grammar is fulfilled only ids that end a text may follow.

        Args:
            grammar: of ``json_grammar``, or another that llguidance reads.
            num_prompt: ids of the prompt, which come first in every context.

        Raises:
            ValueError: the grammar makes no sense, is too large or takes too long to compile.
        """
        guidance = _llguidance()
        with self._lock:
            self._try_out(grammar)
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
        limits = guidance.LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
        matcher = guidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(_line(matcher.get_error()))
        stop_ids = sorted(self._tokenizer.eos_token_ids)
        return _Held(
            matcher,
            num_ids=self._vocabulary.vocab_size,
            stop_ids=stop_ids,
            num_prompt=num_prompt,
        )

    def _try_out(self, grammar: str) -> None:
        """Compile a grammar that is new in another process."""
        if grammar in self._tried:
            return
        try_out(grammar)
        self._tried[grammar] = None
        if len(self._tried) > _REMEMBERED:
            del self._tried[next(iter(self._tried))]


def try_out(grammar: str) -> None:
    """Find out in another process whether a grammar can be compiled, which may take seconds.

    Raises:
        ValueError: it cannot be.
    """
    data = grammar.encode()
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than {MOST_BYTES}")
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


class _Held:
    """Follows the text and masks what cannot come next."""

    def __init__(
        self, matcher: LLMatcher, *, num_ids: int, stop_ids: list[int], num_prompt: int
    ) -> None:
        self._matcher = matcher
        self._num_ids = num_ids  # of the tokenizer; models often have more
        self._stop_ids = stop_ids
        self._num_prompt = num_prompt
        self._read: list[int] = []  # ids that the matcher has consumed

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask one row ``[1, V]`` that follows ``tokens`` ``[n]``."""
        answer: Any = tokens[self._num_prompt :].tolist()
        stop = next((at for at, token in enumerate(answer) if token in self._stop_ids), None)
        if not self._follow(answer[:stop]):
            return logits  # behind a draft that does not hold, so it is never looked at
        allowed = np.zeros(logits.shape[-1], dtype=bool)
        if stop is None:
            self._allow(allowed)
        if stop is not None or self._matcher.is_accepting():
            allowed[self._stop_ids] = True
        if not allowed.any():
            raise GrammarError("no token of the model can go on with what the schema asks for here")
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))

    def _allow(self, allowed: np.ndarray) -> None:
        """Set what may come next in ``[V]``; ids that the tokenizer lacks may not."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(_line(self._matcher.get_error()))
        found = np.unpackbits(bits, count=min(len(allowed), 8 * len(bits)), bitorder="little")
        allowed[: len(found)] = found

    def _follow(self, answer: list[int]) -> bool:
        """Bring the matcher behind these ids; False if they break the grammar."""
        same = min(len(answer), len(self._read))
        while answer[:same] != self._read[:same]:
            same -= 1
        self._matcher.rollback(len(self._read) - same)
        rest = answer[same:]
        foreign = [at for at, token in enumerate(rest) if token >= self._num_ids]
        known = rest[: foreign[0]] if foreign else rest
        count = self._matcher.try_consume_tokens(known)
        self._read = answer[: same + count]
        if self._matcher.is_error():
            raise GrammarError(_line(self._matcher.get_error()))
        return count == len(rest)


def _vocabulary(tokenizer: TokenizerWrapper) -> LLTokenizer:
    """The tokenizer as llguidance needs it."""
    try:
        backend: Any = tokenizer.backend_tokenizer
        text = backend.to_str()
    except AttributeError:
        raise ValueError("the model's tokenizer is not a fast one") from None
    values = json.loads(text) | {"padding": None, "truncation": None}
    return _llguidance().LLTokenizer(json.dumps(values), eos_token=tokenizer.eos_token_id)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "this needs the package llguidance: pip install 'mlx-mtp[server]'"
        ) from None
    return llguidance


def _line(error: str) -> str:
    """What llguidance says of a fault, in a line of moderate length."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    more = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return " ".join([*lines[:1], *more])[:300] or "it cannot be compiled"
