"""Text in, text out: prompt, chat template, detokenizer, stop strings, stats.

``stream_generate`` turns a prompt into ids, passes them to the loop (``decode``), and turns the ids
that come back into text as soon as they are decided.  What it promises:

- the pieces of text joined are the whole answer; a character of several bytes is never broken, and
  one that the end of the answer cut off is left out;
- text never has a stop string in it, nor what follows it; ids after a stop string are not counted;
- however it ends, a cache that was passed in has the prompt and the ids that were yielded, except
  the last one, so that the next prompt can continue from there.

mlx-lm takes seconds to import, so whatever needs it is imported when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlx_mtp.chat_template import chat_text
from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.decoding.limits import ContextOverflow
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.reasoning import Reasoning, budget_processors
from mlx_mtp.stats import RULE, GenerationStats, StatsMeter
from mlx_mtp.terminal import show

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.decoding.step import StepResult
    from mlx_mtp.model.cache import MTPCache
    from mlx_mtp.model.mtp_model import MTPModel

__all__ = ["ContextOverflow", "GenerationResponse", "chat_text", "generate", "stream_generate"]
Config = TypeVar("Config", GenerationConfig, CacheConfig)
NO_TEXT = "No text generated for this prompt"


@dataclass(frozen=True, kw_only=True)
class GenerationResponse(GenerationStats):
    """One emitted id, the text that it decided, and the counts so far.

    The fields of mlx-lm's class of this name are all here; the counts are in ``GenerationStats``.

    Attributes:
        text: the text that this id decided; may be empty, because text waits while it could still
            become part of a character or of a stop string.
        token: the id.
        logprobs: ``[V]`` log-probabilities that the id was chosen from; computed on use.
        from_draft: whether the id was an accepted draft.
        finish_reason: "stop" (stop id or stop string) or "length" with the last id, else None.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    finish_reason: str | None = None


@dataclass(frozen=True)
class Piece:
    """One emitted id and the text that it decided; see ``GenerationResponse``."""

    text: str
    token: int
    from_draft: bool
    finish_reason: str | None


class TextStream:
    """Turns ids into text: whole characters only, nothing from a stop string on.

    Args:
        detokenizer: a streaming detokenizer of mlx-lm.
        stop: strings that end the text.
        stop_ids: ids that end it and have no text.

    Attributes:
        stopped: whether a stop string has come up.
        stop_string: which one.
    """

    def __init__(
        self, detokenizer: Any, *, stop: Sequence[str] = (), stop_ids: Collection[int] = ()
    ) -> None:
        self.stopped = False
        self.stop_string: str | None = None
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._stop_ids = stop_ids
        self._pending = ""

    def pieces(self, step: StepResult, meter: StatsMeter) -> Iterator[Piece]:
        """Turn a step into pieces of text, one for each id, up to the end of the text.

        Args:
            step: what the loop emitted.
            meter: counts the step, and every id before its piece is yielded.
        """
        meter.add_step(step.num_draft_tokens, source=step.source)
        for index, token in enumerate(step.tokens, start=1):
            is_last = index == len(step.tokens)
            reason = step.finish_reason if is_last else None
            text = "" if token in self._stop_ids else self.push(token)
            text += self.finish() if reason else ""
            from_draft = index <= step.num_accepted
            meter.add_token(from_draft=from_draft)
            yield Piece(text, token, from_draft, "stop" if self.stopped else reason)
            if self.stopped:
                return

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain."""
        self._detokenizer.add_token(token)
        self._pending += self._detokenizer.last_segment
        return self._release()

    def finish(self) -> str:
        """Return the pending text; a character that was never completed is dropped."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        self._pending += self._detokenizer.last_segment.rstrip("\ufffd")
        text = self._release()
        if not self.stopped:
            text, self._pending = text + self._pending, ""
        return text

    def _release(self) -> str:
        """Return the pending text up to a stop string or to what may become one.

        Of several stop strings the one that is complete first counts, so that the result does not
        depend on how the text was cut into pieces.
        """
        starts = ((stop, self._pending.find(stop)) for stop in self._stop)
        matches = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if matches:
            self.stopped = True
            end, cut = min(matches)
            self.stop_string = self._pending[cut:end]
        else:
            cut = len(self._pending) - self._open_suffix()
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _open_suffix(self) -> int:
        """Length of the longest suffix of the pending text with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def stream_generate(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    config: GenerationConfig | None = None,
    *,
    cache_config: CacheConfig | None = None,
    prompt_cache: MTPCache | None = None,
    draft_model: None = None,
    reasoning: Reasoning | None = None,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answer a prompt, one response per emitted id, as soon as a step has decided it.

    Args:
        model: from ``load``.
        tokenizer: from ``load``; its ``eos_token_ids`` end an answer.
        prompt: text (no chat template is applied) or ids ``[n]``.  With ``prompt_cache`` it is
            what follows the cached ids.
        config: lengths, stop strings, layout, seed; its fields may also be given as keywords
            (``max_tokens=``).
        cache_config: size and quantisation of the cache; likewise (``max_kv_size=``).
        prompt_cache: from ``model.make_cache``, in place of a new one; updated in place.
        draft_model: not supported; the adapter proposes the drafts.
        reasoning: the marks that ``thinking_budget`` applies to; needed where the end of ``prompt``
            does not show where the answer begins.
        options: fields of ``config`` and ``cache_config``, and these of ``decode``:
            ``sampling`` (how tokens are drawn; greedy by default) or mlx-lm's ``sampler``,
            ``logits_processors``, ``prompt_progress_callback`` (called with the ids prefilled and
            all ids of the prompt), ``explain`` (called with a line about every step).

    Raises:
        ContextOverflow: the prompt does not fit the model's context.
        ValueError: an argument is out of range or the prompt is empty; raised at the call.
    """
    from mlx_mtp.calibration.stored_costs import speculation_for, store_learned
    from mlx_mtp.decoding.loop import decode

    if draft_model is not None:
        raise ValueError("draft_model is not supported: load(adapter_path=...) proposes the drafts")
    if isinstance(prompt_cache, list):
        raise ValueError("prompt_cache must come from model.make_cache(), not from mlx-lm")
    for name in options.keys() & {field.name for field in fields(Sampling)}:
        raise ValueError(f"{name} is a field of Sampling: pass sampling=Sampling({name}=...)")
    tokenizer = _wrapped(tokenizer)
    settings = _configured(config or GenerationConfig(), options)
    cache_settings = _configured(cache_config or CacheConfig(), options)
    ids = encode_prompt(tokenizer, prompt)
    cache = model.make_cache(**vars(cache_settings)) if prompt_cache is None else prompt_cache
    if settings.thinking_budget is not None:
        options["logits_processors"] = [
            *(options.get("logits_processors") or ()),
            *budget_processors(
                tokenizer,
                reasoning or Reasoning.of(tokenizer, ids),
                settings.thinking_budget,
                num_prompt=len(options.get("cached_ids") or ()) + len(ids),
            ),
        ]
    steps = decode(
        model,
        ids,
        settings,
        stop_ids=tokenizer.eos_token_ids,
        cache=cache,
        speculation=speculation_for(model),
        **options,
    )
    text = TextStream(tokenizer.detokenizer, stop=settings.stop, stop_ids=tokenizer.eos_token_ids)
    meter = StatsMeter(
        prompt_tokens=len(ids), cached_tokens=cache.offset, mtp=drafts_tokens(model, settings)
    )
    return _respond(steps, text, meter, cache, at_end=lambda: store_learned(model))


def drafts_tokens(model: MTPModel, config: GenerationConfig) -> bool:
    """Whether an answer is generated with drafts at all."""
    return model.config is not None and config.layout != "plain" and config.num_draft_tokens != 0


def generate(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Answer a prompt and return the text.

    Args:
        model: from ``load``.
        tokenizer: from ``load``.
        prompt: text or ids.
        verbose: print the text while it is generated, then the stats.
        options: see ``stream_generate``.
    """
    responses = stream_generate(model, tokenizer, prompt, **options)
    if not verbose:
        return "".join(response.text for response in responses)
    text, last = "", None
    print(RULE)
    for last in responses:
        show(last.text, end="")
        text += last.text
    print(f"\n{RULE}")
    print(stats_text(text, last))
    return text


def stats_text(text: str, last: GenerationStats | None) -> str:
    """Return what is printed below an answer."""
    return "\n".join(last.lines()) if text and last else NO_TEXT


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    add_special_tokens: bool | None = None,
) -> list[int]:
    """Turn a prompt into ids.

    Args:
        tokenizer: from ``load``.
        prompt: text, or ids ``[n]``, which are checked and returned.
        add_special_tokens: for text; None adds them unless the text begins with the BOS token.

    Raises:
        ValueError: the prompt is empty, not Unicode, or not a list of whole numbers.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt is not valid UTF-8") from None
        if add_special_tokens is None:
            bos = tokenizer.bos_token
            add_special_tokens = bos is None or not prompt.startswith(bos)
        encoded = tokenizer.encode(prompt, add_special_tokens=add_special_tokens, verbose=False)
        ids = encoded if prompt else []
    else:
        ids = _checked_ids(prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def _wrapped(tokenizer: Any) -> TokenizerWrapper:
    """Give a bare tokenizer what mlx-lm's wrapper adds: a streaming detokenizer, end tokens."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def _configured(config: Config, options: dict[str, Any]) -> Config:
    """Take the fields of a configuration out of ``options``."""
    names = {field.name for field in fields(config)} & options.keys()
    return replace(config, **{name: options.pop(name) for name in names})


def _checked_ids(prompt: Sequence[int] | mx.array) -> list[int]:
    values: Any = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)
    if not isinstance(values, list):
        raise ValueError("a prompt of ids must have one dimension, got a single number")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"a prompt of ids must hold whole numbers, got {value!r}")
    return values


def _respond(
    steps: Generator[StepResult, None, None],
    text: TextStream,
    meter: StatsMeter,
    cache: MTPCache,
    *,
    at_end: Callable[[], object],
) -> Generator[GenerationResponse, None, None]:
    """Yield one response per id, then leave the cache at the last id that was yielded."""
    num_unused = 0
    try:
        with contextlib.closing(steps), wired_memory():
            for step in steps:
                num_unused = len(step.tokens)
                for index, piece in enumerate(text.pieces(step, meter)):
                    num_unused -= 1
                    yield GenerationResponse(
                        **vars(piece), logprobs=step.logprobs[index], **meter.counts()
                    )
                    if piece.finish_reason:
                        return
    finally:
        cache.rewind(num_unused)
        at_end()


@contextlib.contextmanager
def wired_memory() -> Iterator[None]:
    """Keep the model in the memory that a Mac's GPU may wire during generation."""
    if not mx.metal.is_available():
        yield
        return
    limit = mx.device_info()["max_recommended_working_set_size"]
    assert isinstance(limit, int)
    old_limit = mx.set_wired_limit(limit)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(old_limit)
