"""One answer of the server: plans steps, turns their outcomes into messages, keeps its cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.prefix_cache import Beginning, PrefixCache
from mlx_mtp.apps.engine.prefix_tree import shared_prefix
from mlx_mtp.apps.engine.preparing import Prepared
from mlx_mtp.apps.engine.protocol import Finished, Group, JobMessage, Prefill, Started
from mlx_mtp.apps.engine.token_text import AnswerLogprobs, TokenTexts
from mlx_mtp.apps.engine.tool_calls import ToolCallReader
from mlx_mtp.calibration.stored_costs import store_learned
from mlx_mtp.decoding.outcome import Outcome, StepResult
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import Step
from mlx_mtp.drafting.draft_model import DraftText
from mlx_mtp.generate import TextStream, drafts_tokens
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.plan import DRAFT_MODEL
from mlx_mtp.stats import GenerationStats, StatsMeter
from mlx_mtp.text.detokenizer import detokenizer_for
from mlx_mtp.text.reasoning import Parts, ReasoningParser, Span


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What all sessions share.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        speculation: what the model's planner knows.
        prefixes: beginnings of texts that need not be computed again.
        draft_prefixes: the same for the draft model, if there is one.
        texts: text and bytes of ids.
        prefill_step_size: rows of a prompt per forward, between which others have their turn.
        lookup: whether layout "auto" may take drafts from the text so far.
    """

    model: MTPModel
    tokenizer: TokenizerWrapper
    speculation: Speculation
    prefixes: PrefixCache
    texts: TokenTexts
    prefill_step_size: int
    lookup: bool = True
    draft_prefixes: PrefixCache | None = None


class Session:
    """One answer in progress: ``plan`` a step, run it, ``commit`` its outcome, until ``finished``.

    Args:
        job: what to answer.
        engine: what all sessions share.

    Attributes:
        finished: whether the last message has been made.
    """

    def __init__(self, job: Prepared, engine: Engine) -> None:
        self.finished = False
        self._job = replace(job, stored_blocks=())  # they would take memory until the end
        self._engine = engine
        model, tokenizer = engine.model, engine.tokenizer
        ids = job.ids
        self._num_kept = 0  # ids whose rows the prefix cache has seen
        self._places: list[int] = []  # where it keeps the states of recurrent layers
        if job.fresh:
            self._beginning = Beginning(engine.prefixes.make_cache())
        else:
            engine.prefixes.add(ids, job.stored_blocks)
            self._places = engine.prefixes.places(ids)
            self._beginning = engine.prefixes.take(ids)
            self._continue_drafts()
        num_cached = self._beginning.num_ids
        config = replace(
            job.config,
            lookup=engine.lookup,
            prefill_step_size=engine.prefill_step_size,
        )
        self._request = make_request(
            model,
            ids[num_cached:],
            config,
            sampling=job.sampling,
            logits_processors=job.logits_processors,
            stop_ids=tokenizer.eos_token_ids,
            cache=self._beginning.cache,
            cached_ids=ids[:num_cached],
            speculation=engine.speculation,
        )
        stop_ids = tokenizer.eos_token_ids
        detokenizer = detokenizer_for(tokenizer, ids)
        self._text = TextStream(detokenizer, stop=config.stop, stop_ids=stop_ids)
        self._num_characters = 0
        self._logprobs: AnswerLogprobs | None = None
        if job.top_logprobs is not None:
            self._logprobs = engine.texts.of_answer(ids, top=job.top_logprobs, stop_ids=stop_ids)
        self._tools = ToolCallReader(job.call_format, job.tools) if job.tools else None
        self._reasoning = ReasoningParser(job.reasoning) if job.reasoning else None
        self._span: Span | None = None
        self._meter = StatsMeter(
            prompt_tokens=len(ids) - num_cached,
            cached_tokens=num_cached,
            mtp=drafts_tokens(model, config),
        )

    def started(self) -> Started:
        """The first message."""
        return Started(
            prompt_tokens=len(self._job.ids),
            cached_tokens=self._beginning.num_ids,
            read_tokens=self._beginning.num_read,
        )

    def num_expected(self, ids: list[int]) -> int:
        """Number of first ids of another prompt that this answer computes or has computed."""
        if self._job.fresh:
            return 0
        num_shared = shared_prefix(self._job.ids, ids[:-1])
        if not self._engine.prefixes.has_states:
            return num_shared
        return max((place for place in self._places if place <= num_shared), default=0)

    @property
    def num_computed(self) -> int:
        """Number of ids of the prompt whose rows are in the prefix cache by now."""
        return min(self._request.cache.offset, len(self._job.ids))

    def plan(self) -> Step:
        """Plan the next step; a step that is not run leaves the cache as it was."""
        self._request.prefill_step_size = self._engine.prefixes.chunk_size(
            self._request.cache.offset, self._places, self._engine.prefill_step_size
        )
        return self._request.plan()

    def commit(self, outcome: Outcome) -> list[JobMessage]:
        """Take in the outcome of the planned step.

        Returns:
            ``prefill`` for a chunk of the prompt, else a ``group`` and, at the end, ``finished``.

        Raises:
            Exception: what a logits processor raised in the step.
        """
        step = self._request.commit(outcome)
        self._put(at_prompt=not step.tokens)
        if not step.tokens:
            return [Prefill(done=self._request.cache.offset)]
        group, reason = self._group(step)
        self.finished = reason is not None
        return [group, self._finished(reason)] if reason else [group]

    def close(self) -> None:
        """End it between two steps, where the cache is whole, and keep its rows."""
        if not self._job.fresh:
            self._engine.prefixes.keep(
                self._request.ids, self._request.cache, num_prompt=len(self._job.ids)
            )
            self._keep_drafts()
        if self.finished:
            store_learned(self._engine.model)

    def _continue_drafts(self) -> None:
        """Let the draft model continue the beginning of the prompt that it has read before."""
        ids, prefixes = self._job.ids, self._engine.draft_prefixes
        draft = self._engine.model.draft_model
        if prefixes is not None and draft is not None:
            known = prefixes.take(ids)
            text = DraftText(draft, known.cache, ids[: known.num_ids])
            self._beginning.cache.drafter_memory[DRAFT_MODEL] = text

    def _keep_drafts(self) -> None:
        """Keep what the draft model has read."""
        text: DraftText | None = self._beginning.cache.drafter_memory.get(DRAFT_MODEL)
        if text is not None and self._engine.draft_prefixes is not None:
            text.end_at(text.cache.offset)  # without drafts of a step that was not run
            self._engine.draft_prefixes.keep(text.ids, text.cache, num_prompt=len(self._job.ids))

    def _put(self, *, at_prompt: bool) -> None:
        """Let others share the rows: after each chunk of the prompt, at its end, then rarely."""
        cache, prompt_size = self._request.cache, len(self._job.ids)
        is_due = at_prompt or self._num_kept < prompt_size or cache.drops_rows
        if is_due and not self._job.fresh:
            with_states = cache.offset in self._places
            self._engine.prefixes.put(
                self._request.ids, cache, num_prompt=prompt_size, with_states=with_states
            )
            self._num_kept = cache.offset

    def _group(self, step: StepResult) -> tuple[Group, str | None]:
        """The message of a step up to a stop string, and why the answer ends with it."""
        pieces = list(self._text.pieces(step, self._meter))
        count, reason = len(pieces), pieces[-1].finish_reason
        texts = [piece.text for piece in pieces]
        self._num_characters += sum(map(len, texts))
        reasoning, text = self._split(texts, is_last=bool(reason))
        if self._tools:
            text = self._tools.push(text) + (self._tools.finish() if reason else "")
        message = Group(
            text=text,
            reasoning=reasoning,
            tokens=count,
            accepted=min(step.num_accepted, count),
            parts=list(step.parts),
        )
        if self._job.pieces:
            message.pieces = [piece.text for piece in pieces]
            message.ids = step.tokens[:count]
            message.span = self._new_span()
        if self._logprobs:
            self._logprobs.add(step.tokens[:count], step.logprobs[:count])
            is_end = reason is not None
            message.logprobs = self._logprobs.take(self._num_characters, is_end=is_end)
        return message, reason

    def _split(self, pieces: list[str], *, is_last: bool) -> Parts:
        """Split text into reasoning and the answer proper."""
        if self._reasoning is None:
            return Parts("", "".join(pieces))
        parts = [self._reasoning.push(piece) for piece in pieces]
        parts += [self._reasoning.finish()] if is_last else []
        return Parts(*("".join(texts) for texts in zip(*parts, strict=True)))

    def _new_span(self) -> list[int] | None:
        """Where the reasoning is, if that has changed."""
        old, self._span = self._span, self._reasoning.span if self._reasoning else None
        return None if self._span in (old, None) else list(self._span or ())

    def _finished(self, reason: str) -> Finished:
        calls = self._tools.calls if self._tools else []
        calls = calls if self._job.parallel_tool_calls else calls[:1]
        return Finished(
            reason="tool_calls" if calls and reason == "stop" else reason,
            stop_string=self._text.stop_string,
            tool_calls=calls,
            reasoning_tokens=self._reasoning.num_tokens if self._reasoning else 0,
            stats=GenerationStats(**self._meter.counts()).stats_dict(),
        )


def with_stored_blocks(job: Prepared, engine: Engine) -> Prepared:
    """Read the beginning of a prompt from files where memory lacks it; for any thread."""
    return job if job.fresh else replace(job, stored_blocks=engine.prefixes.read(job.ids))


def must_wait(job: Prepared, running: Iterable[Session], engine: Engine) -> bool:
    """Whether a running answer is computing the beginning of a prompt, which can be taken then.

    There is no waiting for less than a step, nor for rows that the prefix cache has no room for.
    """
    if job.fresh:
        return False
    num_known = engine.prefixes.num_known(job.ids)
    num_stored = engine.prefixes.num_stored(job.ids)
    for session in running:
        num_expected = session.num_expected(job.ids)
        num_computed = session.num_computed
        stored = num_stored if num_computed < num_expected else num_known  # without its state yet
        has_room = stored >= min(num_computed, num_expected)
        if has_room and num_expected - num_known >= engine.prefill_step_size:
            return True
    return False
