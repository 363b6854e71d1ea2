"""THE loop: prefill, plan, step, accept, rewind, draft.  Ids in, ids out.

Every step is one forward over a ``StepLayout`` and one host sync.  Plain decoding is the layout
without drafts and masks, so the same code serves both and speculation can only change the speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import mlx.core as mx

from mlx_mtp.decoding.sampling import LogitsProcessor, Sampling
from mlx_mtp.decoding.step import Decoder, Step, run_steps
from mlx_mtp.drafting.lookup import LONGEST_LOOKUP, Found, SuffixLookup
from mlx_mtp.drafting.mask_tokens import Drafts
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.layout import plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.planning.plan import LAYOUTS, LOOKUP, Plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StepResult:
    """What one step emitted.

    Attributes:
        tokens: emitted ids, accepted drafts then the bonus token, cut after a stop id or at the
            token limit.
        num_draft_tokens: drafts verified in this step.
        num_accepted: drafts kept and emitted; never a match after a mismatch or past a stop.
        num_rows: rows of the forward, pending prompt rows of the first step included.
        source: where the verified drafts are from: "mask", "lookup", or "" without any.
        finish_reason: ``"stop"``, ``"length"`` or None while it goes on.
        logits: processed logits of the emitted ids, ``[len(tokens), V]``.
    """

    tokens: list[int]
    num_draft_tokens: int
    num_accepted: int
    num_rows: int
    source: str
    finish_reason: str | None
    logits: mx.array

    @cached_property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the emitted rows, ``[len(tokens), V]``, computed when asked for."""
        return self.logits - mx.logsumexp(self.logits, axis=-1, keepdims=True)


class Decoding(Iterator[StepResult]):
    """The steps of one answer, as an iterator.

    Whoever makes several answers may take the ``planned`` step of each and run them together with
    ``step.run_steps``; a step that was not run is run by ``next``.

    Args:
        loop: hands out a step, then, once that has run, its result, and so on.
    """

    def __init__(self, loop: Generator[Step | StepResult, None, None]) -> None:
        self._loop = loop
        self._planned: Step | None = None

    def planned(self) -> Step | None:
        """The step that comes next; None at the end.  What of a prompt is not run yet is run."""
        if self._planned is None:
            self._planned = cast(Step | None, next(self._loop, None))
        return self._planned

    def __next__(self) -> StepResult:
        step = self.planned()
        if step is None:
            raise StopIteration
        self._planned = None
        if step.tokens is None and step.error is None:
            run_steps([step])
        if step.error is not None:
            self.close()
            raise step.error
        return cast(StepResult, next(self._loop))

    def close(self) -> None:
        """End it; a step that has not run leaves the cache as it was."""
        self._loop.close()


def decode(
    model: MTPModel,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    layout: str = "auto",
    num_draft_tokens: int | None = None,
    cache: MTPCache | None = None,
    cached_ids: Sequence[int] = (),
    prefill_step_size: int = 2048,
    seed: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_progress_callback: Progress | None = None,
    speculation: Speculation | None = None,
    lookup: bool = True,
    explain: Callable[[str], None] | None = None,
) -> Decoding:
    """Decode step by step.

    Args:
        model: the model.
        prompt: ids that are not in the cache yet, at least one.
        max_tokens: how many ids to emit; -1 sets no limit but the model's context.
        sampling: how tokens are drawn; greedy by default.
        stop_ids: ids that end the text; the stop id itself is emitted last.
        layout: ``"auto"``, ``"linear"``, ``"quadratic"`` or ``"plain"``.
        num_draft_tokens: drafts per step, at most the adapter's k, which is the default.
        cache: caches to go on with, updated in place.  Whenever a step is handed out they hold
            the prompt and all emitted ids but the last.
        cached_ids: the ids that ``cache`` holds, where lookup and processors should see them too.
        prefill_step_size: prompt rows per forward.
        seed: random seed; None draws one from mlx's global state.
        logits_processors: more processors in mlx-lm's form, applied along the drafted prefix.
        prompt_progress_callback: called with (rows done, rows in all) during prefill.
        speculation: what is known of steps and drafts, for ``"auto"``, updated in place; without
            it the planner guesses and learns anew (``tuning.speculation_for`` has one).  Sampling
            with a seed uses a copy of its beginnings, so that the same ids come again.
        lookup: whether ``"auto"`` may take drafts from the text so far.
        explain: called with a line about every step.

    Raises:
        ValueError: an argument is out of range; raised before any work.
    """
    sampling = sampling or Sampling()
    cache = model.make_cache() if cache is None else cache
    if prefill_step_size < 1:
        raise ValueError(f"prefill_step_size must be at least 1, got {prefill_step_size}")
    _check_ids(model, prompt, sampling)
    k = _num_draft_tokens(model, num_draft_tokens)
    known = speculation or Speculation.guess(k)
    if seed is not None and not sampling.greedy:
        known = known.repeatable()  # drawn ids depend on the steps, so these must come again
    planner = _planner(model, layout, k, known, lookup)
    if explain and isinstance(planner, AutoPlanner) and known.costs.curve.disturbed:
        explain(f"costs: {known.costs.curve.doubt}")
    room = _room(model, cache.offset + len(prompt), max_tokens)
    if seed is None:
        seed = cast(int, mx.random.randint(0, 2**31 - 1).item())
    processors = [*sampling.logits_processors(), *logits_processors]
    loop = _loop(
        Decoder(model, cache, sampling, processors),
        _Pilot(planner, explain),
        [int(token) for token in (*cached_ids, *prompt)],
        num_prefill=len(prompt),
        room=room,
        stop_ids=frozenset(stop_ids),
        prefill_step_size=prefill_step_size,
        key=mx.random.key(seed),
        progress=prompt_progress_callback or (lambda *_: None),
    )
    return Decoding(loop)


class _Pilot:
    """Brings a planner and its drafts into the loop: the ones that wait, or looked-up ones."""

    def __init__(
        self, planner: FixedPlanner | AutoPlanner, explain: Callable[[str], None] | None
    ) -> None:
        self._planner = planner
        self._explain = explain
        self._lookup = SuffixLookup()
        self._found = Found([], 0)
        self._decision = Plan(plain_layout())
        self._held = 0

    def plan(
        self, drafts: Drafts, *, num_pending: int, room: int, held: int
    ) -> tuple[Plan, Drafts]:
        """The next step and the drafts that it verifies; ``held`` ids are in the cache."""
        self._held = held
        self._found = self._lookup.find(LONGEST_LOOKUP)
        self._decision = decision = self._planner.plan(
            num_pending=num_pending,
            num_waiting=len(drafts),
            room=room,
            context=held,
            num_found=len(self._found.tokens),
            match=self._found.match,
        )
        count = decision.layout.num_draft_tokens
        if decision.source != LOOKUP:
            return decision, drafts.first(count)
        tokens = self._found.tokens[:count]
        return decision, replace(Drafts.certain(mx.array(tokens, mx.int32)), host_ids=tokens)

    def learn(self, num_accepted: int, emitted: Sequence[int], ms: float) -> None:
        """Tell the planner how the step went, and how looked-up ids would have."""
        self._planner.observe(
            self._decision,
            num_accepted=num_accepted,
            context=self._held,
            ms=ms,
            match=self._found.match,
            num_judged=min(len(emitted), len(self._found.tokens)),
            num_right=self._found.num_right(emitted),
        )
        if self._explain:
            took = "run with others" if math.isnan(ms) else f"{ms:.1f} ms"
            self._explain(f"{self._decision.line()} -> {num_accepted} held, {took}")

    def read(self, ids: Sequence[int]) -> None:
        """Take note of ids that now stand in the text."""
        if self._planner.uses_lookup:
            self._lookup.extend(ids)


def _loop(
    decoder: Decoder,
    pilot: _Pilot,
    context: list[int],
    *,
    num_prefill: int,
    room: int,
    stop_ids: frozenset[int],
    prefill_step_size: int,
    key: mx.array,
    progress: Progress,
) -> Generator[Step | StepResult, None, None]:
    cache = decoder.cache
    prompt_size = len(context)
    pending = _prefill(decoder, context[-num_prefill:], prefill_step_size, progress)
    drafts, emitted = Drafts.none(), context
    while room > 0:
        pilot.read(emitted)
        cache.begin_step()
        may = min(room, cache.rows_until_change or room)
        decision, drafts = pilot.plan(drafts, num_pending=len(pending), room=may, held=cache.offset)
        layout = decision.layout
        key, step_key = mx.random.split(key)
        step = decoder.step(pending, drafts, layout, context=context, key=step_key)
        yield step  # it is run meanwhile
        assert step.tokens is not None
        pilot.learn(step.num_accepted, step.tokens, step.ms)
        emitted, finish_reason = _cut(step.tokens, room, stop_ids)
        cache.rewind(layout.num_rows - len(pending) - len(emitted) + 1)
        if len(context) == prompt_size:
            progress(num_prefill, num_prefill)
            mx.clear_cache()  # prompt-sized buffers are not needed again
        context = context + emitted
        room -= len(emitted)
        yield StepResult(
            tokens=emitted,
            num_draft_tokens=layout.num_draft_tokens,
            num_accepted=min(step.num_accepted, len(emitted)),
            num_rows=layout.num_rows,
            source=decision.source,
            finish_reason=finish_reason,
            logits=step.logits[: len(emitted)],
        )
        if finish_reason:
            return
        pending, drafts = emitted[-1:], step.following


def _prefill(decoder: Decoder, prompt: list[int], step_size: int, progress: Progress) -> list[int]:
    """Run all chunks of the prompt but the last; return the last, which awaits its masks."""
    done = 0
    progress(done, len(prompt))
    while len(prompt) - done > step_size:
        decoder.cache.begin_step()
        decoder.model(mx.array([prompt[done : done + step_size]]), cache=decoder.cache)
        mx.eval(decoder.cache.state)
        mx.clear_cache()
        done += step_size
        progress(done, len(prompt))
    return prompt[done:]


def _cut(emitted: list[int], room: int, stop_ids: frozenset[int]) -> tuple[list[int], str | None]:
    """Cut emitted ids after the first stop id and at the token limit."""
    for count, token in enumerate(emitted[:room], start=1):
        if token in stop_ids:
            return emitted[:count], "stop"
    return emitted[:room], "length" if len(emitted) >= room else None


def _num_draft_tokens(model: MTPModel, num_draft_tokens: int | None) -> int:
    """k, after a check against the adapter."""
    k = model.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
    if k < 0:
        raise ValueError(f"num_draft_tokens must be at least 0, got {k}")
    if k > model.num_draft_tokens > 0:
        raise ValueError(
            f"num_draft_tokens is {k}, but the adapter was trained for {model.num_draft_tokens}"
        )
    return min(k, model.num_draft_tokens)


def _planner(
    model: MTPModel, layout: str, k: int, known: Speculation, lookup: bool
) -> FixedPlanner | AutoPlanner:
    """Make the planner of a layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout != "auto" or not model.num_draft_tokens:
        return FixedPlanner(layout if layout != "auto" else "plain", num_draft_tokens=k)
    return AutoPlanner(known, num_draft_tokens=k, use_lookup=lookup)


def _room(model: MTPModel, num_prompt: int, max_tokens: int) -> int:
    """Tokens that may be emitted after a prompt of that many rows."""
    if max_tokens < -1 or max_tokens == 0:
        raise ValueError(f"max_tokens must be at least 1, or -1 for no limit, got {max_tokens}")
    room = max_tokens if max_tokens > 0 else 2**62
    if model.max_context is None:
        return room
    if num_prompt >= model.max_context:
        raise ValueError(
            f"the prompt has {num_prompt} tokens, which leaves no room in the model's context "
            f"of {model.max_context}"
        )
    return min(room, model.max_context - num_prompt)


def _check_ids(model: MTPModel, prompt: Sequence[int], sampling: Sampling) -> None:
    """Refuse an empty prompt and ids outside the vocabulary."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty")
    for what, ids in (("prompt", prompt), ("logit_bias", sampling.logit_bias or ())):
        if len(ids) and (min(ids) < 0 or max(ids) >= model.vocab_size):
            bad = next(i for i in ids if not 0 <= i < model.vocab_size)
            raise ValueError(
                f"{what} holds the id {bad}, the vocabulary has {model.vocab_size} ids"
            )
