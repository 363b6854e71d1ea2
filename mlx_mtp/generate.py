"""Text in, text out: prompt, chat template, detokenizer, stop strings, stats.

``stream_generate`` turns a prompt into ids, passes them to the loop (``decode``), and turns the ids
that come back into text as soon as they are decided.  What it promises:

- the pieces of text joined are what ``tokenizer.decode(prompt + answer)`` adds to
  ``tokenizer.decode(prompt)``, special tokens included, and stop ids left out; a character of
  several bytes is never broken, and one that the end of the answer cuts off is U+FFFD;
- text never has a stop string in it, nor what follows it; ids after a stop string are not counted;
- however it ends, the next prompt can continue from a cache that was passed in: it has the prompt
  and the ids that were yielded (of ours the last one is added on use).

mlx-lm takes seconds to import, so whatever needs it is imported when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.decoding.limits import ContextOverflow
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.thinking_budget import budget_processors
from mlx_mtp.stats import RULE, GenerationStats, StatsMeter
from mlx_mtp.terminal import show
from mlx_mtp.text.chat_template import chat_text
from mlx_mtp.text.detokenizer import detokenizer_for
from mlx_mtp.text.reasoning import Reasoning, open_suffix

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.decoding.outcome import StepResult
    from mlx_mtp.model.caches.mtp_cache import MTPCache
    from mlx_mtp.model.mtp_model import MTPModel

__all__ = ["ContextOverflow", "GenerationResponse", "chat_text", "generate", "stream_generate"]
Config = TypeVar("Config", GenerationConfig, CacheConfig)
DECODE_OPTIONS = {
    "sampling", "sampler", "logits_processors", "prompt_progress_callback", "explain", "cached_ids",
    "lookup_ids",
}  # fmt: skip
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
        detokenizer: one of ``detokenizer_for``, or of mlx-lm.
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
        meter.add_step(step.parts)
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
        """Return the pending text; a character that was never completed is U+FFFD."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        self._pending += self._detokenizer.last_segment
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
            open_sizes = (open_suffix(self._pending, stop) for stop in self._stop)
            cut = len(self._pending) - max(open_sizes, default=0)
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text


def stream_generate(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int | GenerationConfig | None = None,
    draft_model: Any = None,
    stream: Any = None,
    *,
    config: GenerationConfig | None = None,
    cache_config: CacheConfig | None = None,
    prompt_cache: MTPCache | list[Any] | None = None,
    input_embeddings: None = None,
    reasoning: Reasoning | None = None,
    lookup_texts: Sequence[str] = (),
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answer a prompt, one response per emitted id, as soon as a step has decided it.

    Args:
        model: from ``load``.
        tokenizer: from ``load``; its ``eos_token_ids`` end an answer.
        prompt: text (no chat template is applied) or ids ``[n]``.  With ``prompt_cache`` it is
            what follows the cached ids.
        max_tokens: a field of ``config``, which may also stand here.
        draft_model: a smaller model with the same tokenizer, from ``load`` or mlx-lm, which
            proposes drafts in this answer; by default that of ``load(draft_model=...)``.
        stream: MLX stream for the forwards; the default one if omitted.
        config: lengths, stop strings, layout, seed; its fields may also be given as keywords
            (``seed=``).
        cache_config: size and quantisation of the cache; likewise (``max_kv_size=``).
        prompt_cache: caches to continue from, updated in place: of ``model.make_cache``, or a list
            of mlx-lm's (``make_prompt_cache``, ``load_prompt_cache``).  A list then has the prompt
            and all ids that were yielded.  Ours takes the last one when it is next used, unless
            ``prompt`` is ids that begin with it.  ``kv_bits`` applies to both, ``max_kv_size``
            does not.  After the caches of the model a list may have those of ``draft_model``.
        input_embeddings: not supported; prompts are text or ids.
        reasoning: the marks that ``thinking_budget`` applies to; needed where the end of ``prompt``
            does not show where the answer begins.
        lookup_texts: texts apart from the prompt that drafts are looked up in, such as files that
            the answer may quote; ``lookup_ids`` takes them as lists of ids.
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
    from mlx_mtp.drafting.draft_model import DraftText
    from mlx_mtp.model.caches.mtp_cache import MTPCache
    from mlx_mtp.planning.plan import DRAFT_MODEL

    if input_embeddings is not None:
        raise ValueError("input_embeddings is not supported: pass the prompt as text or ids")
    if isinstance(max_tokens, GenerationConfig):
        config = max_tokens
    elif max_tokens is not None:
        options["max_tokens"] = max_tokens
    model, tokenizer = usable(model), wrapped(tokenizer)
    draft_model = None if draft_model is None else usable(draft_model, "draft_model")
    settings, cache_settings = answer_settings(tokenizer, config, cache_config, options)
    ids = encode_prompt(tokenizer, prompt)
    own_cache, draft_cache, num_layers = prompt_cache, [], None
    if draft_model is not None and isinstance(prompt_cache, list):
        num_layers = len(model.make_cache())
        own_cache, draft_cache = prompt_cache[:num_layers], prompt_cache[num_layers:]
    cache = cache_for(model, own_cache, cache_settings)
    if draft_model is not None and draft_cache:
        cache.drafter_memory[DRAFT_MODEL] = DraftText.of_caches(draft_model, draft_cache)
    follow(cache, prompt, ids)
    limit_reasoning(options, tokenizer, ids, settings.thinking_budget, reasoning)
    if lookup_texts:
        given = options.get("lookup_ids") or ()
        options["lookup_ids"] = [*given, *encode_lookup(tokenizer, lookup_texts)]
    steps = decode(
        model,
        ids,
        settings,
        stop_ids=tokenizer.eos_token_ids,
        cache=cache,
        draft_model=draft_model,
        speculation=speculation_for(model),
        **options,
    )
    detokenizer = detokenizer_for(tokenizer, ids, continued=cache.offset > 0)
    text = TextStream(detokenizer, stop=settings.stop, stop_ids=tokenizer.eos_token_ids)
    num_cached = cache.offset
    meter = StatsMeter(
        prompt_tokens=len(ids),
        cached_tokens=num_cached,
        mtp=drafts_tokens(model, settings, draft_model),
    )

    def at_end(last_id: int | None) -> None:
        if isinstance(prompt_cache, list):
            with on_stream(stream):
                finish_list(model, cache, prompt_cache, last_id)
                if draft_cache:
                    draft_text = cache.drafter_memory[DRAFT_MODEL]
                    draft_text.end_at(draft_text.num_prompt - len(ids) + cache.offset - num_cached)
                    prompt_cache[num_layers:] = draft_text.to_mlx_lm(draft_cache)
        elif isinstance(cache, MTPCache):
            cache.end_answer(last_id, model)
        store_learned(model)

    steps = steps if stream is None else _steps_on(stream, steps)
    return _respond(steps, text, meter, cache, at_end=at_end)


def answer_settings(
    tokenizer: TokenizerWrapper,
    config: GenerationConfig | None,
    cache_config: CacheConfig | None,
    options: dict[str, Any],
) -> tuple[GenerationConfig, CacheConfig]:
    """Take the fields of both configurations out of ``options``; complete its ``sampling``.

    Raises:
        ValueError: an option has a wrong type, does not exist, or is a field of ``Sampling``.
    """
    for value, kind in ((config, GenerationConfig), (cache_config, CacheConfig)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{value!r} is not a {kind.__name__}")
    for name in options.keys() & {field.name for field in fields(Sampling)}:
        raise ValueError(f"{name} is a field of Sampling: pass sampling=Sampling({name}=...)")
    settings = _configured(config or GenerationConfig(), options)
    cache_settings = _configured(cache_config or CacheConfig(), options)
    _check_options(options)
    if options.get("sampling") is not None:
        options["sampling"] = with_special_tokens(options["sampling"], tokenizer)
    return settings, cache_settings


def _check_options(options: dict[str, Any]) -> None:
    """Check the arguments of ``decode``; None is the default of all.

    Raises:
        ValueError: one does not exist or has a wrong type.
    """
    for name in options.keys() - DECODE_OPTIONS:
        raise ValueError(f"{name} is not an argument of stream_generate")
    sampling, processors = options.get("sampling"), options.get("logits_processors")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ValueError("sampling must be a Sampling; functions are passed as sampler=")
    if processors is None:
        options.pop("logits_processors", None)
    elif not isinstance(processors, list | tuple) or not all(map(callable, processors)):
        raise ValueError("logits_processors must be a list of functions")
    for name in ("sampler", "prompt_progress_callback", "explain"):
        if options.get(name) is not None and not callable(options[name]):
            raise ValueError(f"{name} must be a function, got {options[name]!r}")


def limit_reasoning(
    options: dict[str, Any],
    tokenizer: TokenizerWrapper,
    ids: Sequence[int],
    budget: int | None,
    reasoning: Reasoning | None = None,
) -> None:
    """Add the processor of a budget of reasoning to ``options``, if there is a budget."""
    if budget is not None:
        num_prompt = len(options.get("cached_ids") or ()) + len(ids)
        marks = reasoning or Reasoning.of(tokenizer, ids)
        more = budget_processors(tokenizer, marks, budget, num_prompt=num_prompt)
        options["logits_processors"] = [*(options.get("logits_processors") or ()), *more]


def with_special_tokens(sampling: Sampling, tokenizer: TokenizerWrapper) -> Sampling:
    """Add the ids that XTC never drops: line breaks and end tokens, as in mlx-lm's commands."""
    if not sampling.xtc_probability or sampling.xtc_special_tokens is not None:
        return sampling
    special = (*tokenizer.encode("\n"), *tokenizer.eos_token_ids)
    return replace(sampling, xtc_special_tokens=special)


def cache_for(
    model: MTPModel, prompt_cache: MTPCache | list[Any] | None, settings: CacheConfig
) -> MTPCache:
    """Return the cache of an answer: a new one, or ``prompt_cache``.

    Raises:
        ValueError: ``prompt_cache`` does not fit the model or the settings.
    """
    if prompt_cache is None:
        return model.make_cache(**vars(settings))
    is_list = isinstance(prompt_cache, list)
    layers = prompt_cache if is_list else [prompt_cache]
    if not layers or not all(hasattr(it, "state" if is_list else "rewind") for it in layers):
        raise ValueError(
            "prompt_cache must come from model.make_cache() or from mlx-lm's make_prompt_cache"
        )
    cache = model.wrap_prompt_cache(layers) if is_list else prompt_cache
    if settings.kv_bits is not None:
        like = model.make_cache(**vars(settings) | {"max_kv_size": None})  # that of the cache stays
        cache.quantise_from(
            like.quantized_kv_start, bits=like.kv_bits, group_size=like.kv_group_size
        )
    return cache


def follow(cache: MTPCache, prompt: Any, ids: Sequence[int]) -> None:
    """Add the last id of the answer before to a cache, unless the ids of a prompt begin with it."""
    pending = getattr(cache, "next_id", None)
    if pending is not None and (isinstance(prompt, str) or ids[0] != pending):
        cache.add_next()


def finish_list(model: MTPModel, cache: MTPCache, caches: list[Any], last_id: int | None) -> None:
    """Leave a list of mlx-lm's caches as mlx-lm does, with the last id.

    Args:
        model: the model.
        cache: wraps the list.
        caches: the list, updated in place.
        last_id: the last id that was emitted; None changes nothing else.
    """
    if last_id is not None:
        cache.begin_step()
        model(mx.array([[last_id]]), cache=cache)
    cache.begin_step()
    for index, layer in enumerate(cache.layers):
        caches[index] = layer.to_mlx_lm(caches[index])
    mx.eval(cache.state)


def on_stream(stream: Any) -> Any:
    """Make a context in which MLX uses a stream; None changes nothing."""
    return contextlib.nullcontext() if stream is None else mx.stream(stream)


def _steps_on(
    stream: Any, steps: Generator[StepResult, None, None]
) -> Generator[StepResult, None, None]:
    """Run each step on a stream of MLX, which stays the caller's own in between."""
    with contextlib.closing(steps):
        while True:
            with mx.stream(stream):
                step = next(steps, None)
            if step is None:
                return
            yield step


def drafts_tokens(
    model: MTPModel, config: GenerationConfig, draft_model: MTPModel | None = None
) -> bool:
    """Whether an answer is generated with drafts at all; see ``drafter_sources``."""
    from mlx_mtp.decoding.setup import drafter_sources

    return bool(drafter_sources(model, config, draft_model))


def generate(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
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


def encode_lookup(tokenizer: TokenizerWrapper, texts: Sequence[str]) -> list[list[int]]:
    """Turn texts to look up drafts in into ids; an empty text is left out.

    Raises:
        ValueError: ``texts`` is not a list of texts, or one is not Unicode.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"lookup_texts must be a list of texts, got {texts!r:.60}")
    return [encode_prompt(tokenizer, text, add_special_tokens=False) for text in texts if text]


def usable(model: Any, name: str = "the model") -> Any:
    """Return a model that can decode; one of mlx-lm does so plainly.

    Args:
        model: from ``load`` or mlx-lm.
        name: what it is called in messages.

    Raises:
        ValueError: it is no model, or one that is not supported.
    """
    import mlx.nn as nn

    from mlx_mtp.model.mtp_model import MTPModel

    is_ours = isinstance(model, MTPModel)
    if isinstance(model, nn.Module) and hasattr(model, "layers") and not is_ours:
        return MTPModel(model)
    if not hasattr(model, "make_cache"):
        raise ValueError(f"{name} must come from load, got {type(model).__name__}")
    return model


def wrapped(tokenizer: Any) -> TokenizerWrapper:
    """Give a bare tokenizer what mlx-lm's wrapper adds: a streaming detokenizer, end tokens."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    if not hasattr(tokenizer, "decode"):
        raise ValueError(f"the tokenizer must come from load, got {type(tokenizer).__name__}")
    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def _configured(config: Config, options: dict[str, Any]) -> Config:
    """Take the fields of a configuration out of ``options``."""
    names = {field.name for field in fields(config)} & options.keys()
    return replace(config, **{name: options.pop(name) for name in names})


def _checked_ids(prompt: Sequence[int] | mx.array) -> list[int]:
    if not hasattr(prompt, "__iter__"):
        raise ValueError(f"a prompt must be text or ids, got {prompt!r}")
    values: Any = getattr(prompt, "tolist", lambda: list(prompt))()
    if not isinstance(values, list):
        raise ValueError("a prompt of ids must have one dimension, got a single number")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"a prompt of ids must consist of whole numbers, got {value!r}")
    return values


def _respond(
    steps: Generator[StepResult, None, None],
    text: TextStream,
    meter: StatsMeter,
    cache: MTPCache,
    *,
    at_end: Callable[[int | None], object],
) -> Generator[GenerationResponse, None, None]:
    """Yield one response per id, then leave the cache at the last id that was yielded.

    ``at_end`` is called with that id, or with None if there is none or a step failed.
    """
    num_unused = 0
    last_id = None
    try:
        with contextlib.closing(steps), wired_memory():
            for step in steps:
                num_unused = len(step.tokens)
                for index, piece in enumerate(text.pieces(step, meter)):
                    num_unused -= 1
                    last_id = piece.token
                    yield GenerationResponse(
                        **vars(piece), logprobs=step.logprobs[index], **meter.counts()
                    )
                    if piece.finish_reason:
                        return
    except (Exception, KeyboardInterrupt):
        last_id = None
        raise
    finally:
        cache.rewind(num_unused)
        at_end(last_id)


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
