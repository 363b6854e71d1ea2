"""Text in, text out: prompt, chat template, detokeniser, stop strings, stats.

``stream_generate`` turns a prompt into ids, hands them to the loop (``decode``), and turns the ids
that come back into text as soon as they are decided.  What it promises:

- the pieces of text joined are the whole answer; a character of several bytes is never broken, and
  one that the end of the answer cut off is left out;
- text never holds a stop string, nor what follows it; ids after a stop string are not counted;
- however it ends, a cache that was passed in holds the prompt and the ids that were handed out,
  except the last one, so that the next prompt can go on from there.

mlx-lm takes seconds to import, so whatever needs it is imported when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_mtp.stats import RULE, GenerationStats, StatsMeter

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_mtp.decoding.loop import StepResult
    from mlx_mtp.decoding.sampling import LogitsProcessor, Sampling
    from mlx_mtp.model.cache import MTPCache
    from mlx_mtp.model.mtp_model import MTPModel

NO_TEXT = "No text generated for this prompt"


class ContextOverflow(ValueError):
    """The prompt does not fit the model's context."""


@dataclass(frozen=True, kw_only=True)
class GenerationResponse(GenerationStats):
    """One emitted id, the text that it decided, and the counts so far.

    The fields of mlx-lm's class of this name are all here; the counts are in ``GenerationStats``.

    Attributes:
        text: the text that this id decided; may be empty, for text is held back while it could
            still become part of a character or of a stop string.
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


class TextStream:
    """Turns ids into text: whole characters only, nothing from a stop string on.

    Attributes:
        stopped: whether a stop string has come up.
        stop_string: which one.
    """

    def __init__(self, detokenizer: Any, *, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.stop_string: str | None = None
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain."""
        self._detokenizer.add_token(token)
        self._held += self._detokenizer.last_segment
        return self._release()

    def finish(self) -> str:
        """Return what was held back; a character that was never completed is dropped."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        self._held += self._detokenizer.last_segment.rstrip("\ufffd")
        text = self._release()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        """Hand out the held text up to a stop string or to what may become one.

        Of several stop strings the one that is complete first counts, so that the result does not
        depend on how the text was cut into pieces.
        """
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end, cut = min(found)
            self.stop_string = self._held[cut:end]
        else:
            cut = len(self._held) - self._open_suffix()
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _open_suffix(self) -> int:
        """Length of the longest suffix of the held text with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def stream_generate(
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    sampling: Sampling | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    seed: int | None = None,
    layout: str = "auto",
    num_draft_tokens: int | None = None,
    prompt_cache: MTPCache | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    lookup: bool = True,
    explain: Callable[[str], None] | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Answer a prompt, one response per emitted id, as soon as a step has decided it.

    Args:
        model: from ``load``.
        tokenizer: from ``load``; its ``eos_token_ids`` end an answer.
        prompt: text (no chat template is applied) or ids ``[n]``.  With ``prompt_cache`` it is
            what follows the cached ids.
        max_tokens: most ids to emit; -1 means up to the end of the context.
        stop: strings that end the answer; they are not part of it.
        sampling: how tokens are chosen; greedy by default.
        logits_processors: more processors in mlx-lm's form, applied along the drafts.
        seed: makes sampling repeatable.
        layout: "auto", "linear", "quadratic", or "plain" for one token a step.
        num_draft_tokens: drafts per step, at most the adapter's own number, its default.
        prompt_cache: from ``model.make_cache``; updated in place.  Excludes the next four.
        max_kv_size: keep that many rows of the cache at most.
        kv_bits: quantise the cache to that many bits ...
        kv_group_size: ... in groups of that size ...
        quantized_kv_start: ... from that context length on.
        prefill_step_size: rows of the prompt per forward.
        prompt_progress_callback: called with (ids prefilled, all ids of the prompt).
        lookup: whether layout "auto" may take drafts from the text so far.
        explain: called with a line about every step.

    Raises:
        ContextOverflow: the prompt does not fit the model's context.
        ValueError: an argument is out of range or the prompt is empty; raised at the call.
    """
    from mlx_mtp.calibration.stored_costs import doubt_disproved, speculation_for
    from mlx_mtp.decoding.loop import decode

    tokenizer, stop = _wrapped(tokenizer), _stop_strings(stop)
    ids = encode_prompt(tokenizer, prompt)
    cache = prompt_cache
    if cache is None:
        cache = model.make_cache(
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
        )
    _check_room(model, cache.offset + len(ids))
    steps = decode(
        model,
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        logits_processors=logits_processors,
        stop_ids=tokenizer.eos_token_ids,
        layout=layout,
        num_draft_tokens=num_draft_tokens,
        cache=cache,
        prefill_step_size=prefill_step_size,
        seed=seed,
        prompt_progress_callback=prompt_progress_callback,
        speculation=speculation_for(model, measure=False),
        lookup=lookup,
        explain=explain,
    )
    meter = StatsMeter(
        prompt_tokens=len(ids),
        cached_tokens=cache.offset,
        mtp=model.config is not None and layout != "plain" and num_draft_tokens != 0,
    )
    text = TextStream(tokenizer.detokenizer, stop=stop)
    return _respond(
        steps, text, meter, cache=cache, stop_ids=tokenizer.eos_token_ids,
        at_end=lambda: doubt_disproved(model),
    )  # fmt: skip


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
        print(last.text, end="", flush=True)
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


def chat_text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, str]],
    *,
    template_config: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with the model's chat template, ready for the model's turn.

    A last message of the assistant is left open, so that the model goes on with it.  Encode the
    result without special tokens: the template has put them in.

    Raises:
        ValueError: the template refuses the conversation.
    """
    import jinja2

    resume = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            continue_final_message=resume,
            add_generation_prompt=not resume,
            **(template_config or {}),
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    assert isinstance(text, str)
    return text


def _wrapped(tokenizer: Any) -> TokenizerWrapper:
    """Give a bare tokenizer what mlx-lm's wrapper adds: a streaming detokeniser, end tokens."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    return strings


def _checked_ids(prompt: Sequence[int] | mx.array) -> list[int]:
    values: Any = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)
    if not isinstance(values, list):
        raise ValueError("a prompt of ids must have one dimension, got a single number")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"a prompt of ids must hold whole numbers, got {value!r}")
    return values


def _check_room(model: MTPModel, length: int) -> None:
    """Refuse a conversation that leaves no room for a single id; the loop sees to the rest."""
    if model.max_context is not None and length >= model.max_context:
        raise ContextOverflow(
            f"the prompt has {length} tokens, but {model.name} takes fewer than {model.max_context}"
        )


def _respond(
    steps: Iterator[StepResult],
    text: TextStream,
    meter: StatsMeter,
    *,
    cache: MTPCache,
    stop_ids: Collection[int],
    at_end: Callable[[], object],
) -> Generator[GenerationResponse, None, None]:
    """Yield one response per id, then leave the cache at the last id that was handed out."""
    num_unused = 0
    try:
        with contextlib.closing(steps), wired_memory():  # type: ignore[type-var]
            for step in steps:
                meter.add_step(step.num_draft_tokens, source=step.source)
                num_unused = len(step.tokens)
                for index, token in enumerate(step.tokens):
                    from_draft = index < step.num_accepted
                    meter.add_token(from_draft=from_draft)
                    num_unused -= 1
                    ends = step.finish_reason is not None and num_unused == 0
                    piece = text.push(token) if token not in stop_ids else ""
                    piece += text.finish() if ends else ""
                    reason = "stop" if text.stopped else step.finish_reason if ends else None
                    yield GenerationResponse(
                        text=piece,
                        token=token,
                        logprobs=step.logprobs[index],
                        from_draft=from_draft,
                        finish_reason=reason,
                        **meter.counts(),
                    )
                    if reason:
                        return
    finally:
        cache.rewind(num_unused)
        at_end()


@contextlib.contextmanager
def wired_memory() -> Iterator[None]:
    """Keep the model in the memory that a Mac's GPU may wire, as long as it generates."""
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
