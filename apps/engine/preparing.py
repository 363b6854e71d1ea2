"""Prepare a job: check it, encode its prompt, and make the arguments of the loop.

An invalid job is refused here, before any work is done for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.grammar import Grammars, calls_grammar, json_grammar
from mlx_mtp.apps.engine.penalties import answer_penalty
from mlx_mtp.apps.engine.prefix_files import StoredBlock
from mlx_mtp.apps.engine.protocol import Job
from mlx_mtp.apps.engine.tool_calls import GENERIC, GenericCalls, calls_are_json, reads_tools
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.limits import (
    ContextOverflow,
    LimitError,
    check_ids,
    max_draft_tokens,
    max_new_tokens,
)
from mlx_mtp.decoding.sampling import LogitsProcessor, Sampling
from mlx_mtp.decoding.setup import drafter_sources
from mlx_mtp.decoding.thinking_budget import budget_processors
from mlx_mtp.generate import chat_text, encode_prompt, with_special_tokens
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import AUTO, MASK
from mlx_mtp.terminal import one_line
from mlx_mtp.text.reasoning import Reasoning, ReasoningTracker, template_settings
from mlx_mtp.text.tool_prompt import with_tools


class Refusal(ValueError):
    """A job is invalid.

    Attributes:
        param: the invalid field of the request, if known.
        code: machine-readable error code, if there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job ready to run.

    Attributes:
        ids: of the whole prompt.
        config: lengths, seed and layout of the answer, and its stop strings.
        sampling: how tokens are drawn.
        logits_processors: of penalties, grammars and the budget of reasoning.
        top_logprobs: number of most likely ids to report per id; None for no logprobs.
        tools: tools whose calls are parsed.
        parallel_tool_calls: whether calls after the first are reported.
        reasoning: the marks of the reasoning to split off, if there are any.
        call_format: format of the calls, as an argument of ``ToolCallReader``.
        pieces: whether the ids of each step and the text of each id are reported.
        fresh: whether caches of earlier prompts are neither used nor added to.
        stored_blocks: rows of the beginning of the prompt that were read from files.
    """

    ids: list[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    sampling: Sampling = field(default_factory=Sampling)
    logits_processors: list[LogitsProcessor] = field(default_factory=list)
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    call_format: TokenizerWrapper | GenericCalls = GENERIC
    pieces: bool = False
    fresh: bool = False
    stored_blocks: Sequence[StoredBlock] = ()


def prepare(
    job: Job, model: MTPModel, tokenizer: TokenizerWrapper, grammars: Grammars | None = None
) -> Prepared:
    """Check a job and encode its prompt.

    Args:
        job: the job.
        model: the model.
        tokenizer: its tokenizer.
        grammars: creates grammars for the tokenizer; None creates one for this job.

    Raises:
        Refusal: the job is invalid.
    """
    ids = prompt_ids(job, tokenizer)
    reasoning, (_, budget) = _reasoning(job, ids, tokenizer), _template_settings(job, tokenizer)
    try:
        sampling = Sampling(
            temp=job.temp,
            top_p=job.top_p,
            min_p=job.min_p,
            top_k=job.top_k,
            repetition_penalty=job.repetition_penalty,
            repetition_context_size=job.repetition_context_size,
            logit_bias=job.logit_bias,
            xtc_probability=job.xtc_probability,
            xtc_threshold=job.xtc_threshold,
        )
        sampling = with_special_tokens(sampling, tokenizer)
        config = GenerationConfig(
            max_tokens=job.max_tokens,
            stop=tuple(job.stop or ()),
            seed=job.seed,
            layout=job.layout,
            drafter=job.drafter or AUTO,
            num_draft_tokens=job.num_draft_tokens,
        )
        check_ids(model, ids, sampling)
        check_drafts(model, config)
        max_new_tokens(model, len(ids), config.max_tokens)
    except LimitError as error:
        param = "messages" if error.param == "prompt" and job.messages is not None else error.param
        code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
        raise Refusal(str(error), param=param, code=code) from None
    except ValueError as error:
        raise Refusal(str(error)) from None
    return Prepared(
        ids=ids,
        config=config,
        sampling=sampling,
        logits_processors=[
            *_processors(job, len(ids), tokenizer, grammars or Grammars(tokenizer), reasoning),
            *budget_processors(tokenizer, reasoning, budget, num_prompt=len(ids)),
        ],
        top_logprobs=job.top_logprobs,
        tools=job.tools or [],
        parallel_tool_calls=job.parallel_tool_calls,
        reasoning=reasoning if job.split_reasoning else None,
        call_format=_call_format(job, tokenizer),
        pieces=job.pieces,
        fresh=job.fresh,
    )


def check_drafts(model: MTPModel, config: GenerationConfig) -> tuple[str, ...]:
    """Check what an answer is to be drafted with; return the drafters.

    Raises:
        LimitError: the model lacks what the drafter needs, or the adapter has fewer drafts.
    """
    try:
        sources = drafter_sources(model, config)
    except ValueError as error:
        raise LimitError(str(error), param="drafter") from None
    if MASK in sources:
        max_draft_tokens(model, config.num_draft_tokens)
    return sources


def template_config(
    job: Job, tokenizer: TokenizerWrapper, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of the chat template: the operator's where the request sets none."""
    settings, _ = _template_settings(job, tokenizer)
    return {**defaults, **settings, **(job.template_config or {})}


def _template_settings(job: Job, tokenizer: TokenizerWrapper) -> tuple[dict[str, Any], int | None]:
    """Arguments of the chat template for reasoning, and its budget."""
    enable = (job.template_config or {}).get("enable_thinking", job.enable_thinking)
    return template_settings(
        tokenizer,
        enable=enable if isinstance(enable, bool) else None,
        effort=job.reasoning_effort,
        budget=job.thinking_budget,
    )


def _reasoning(job: Job, ids: list[int], tokenizer: TokenizerWrapper) -> Reasoning | None:
    """The marks of the reasoning; where a grammar follows, nothing else may come before it."""
    if not job.messages:
        return None
    last = job.messages[-1]
    prefill = last.get("content") if last["role"] == "assistant" else ""
    reasoning = Reasoning.of(tokenizer, ids, prefill=str(prefill or ""))
    is_constrained = job.schema is not None or job.required_tools is not None
    return replace(reasoning, anywhere=not is_constrained) if reasoning else None


def _processors(
    job: Job,
    num_prompt: int,
    tokenizer: TokenizerWrapper,
    grammars: Grammars,
    reasoning: Reasoning | None,
) -> list[LogitsProcessor]:
    processors: list[LogitsProcessor] = []
    frequency, presence = job.frequency_penalty or 0.0, job.presence_penalty or 0.0
    if frequency or presence:
        processors.append(
            answer_penalty(num_prompt=num_prompt, frequency=frequency, presence=presence)
        )
    if job.schema is not None or job.required_tools is not None:
        param = job.schema_param or "tools"
        try:
            grammar = _grammar(job, tokenizer)
            if reasoning is None or reasoning.phase == "after":
                processors.append(grammars.processor(grammar, num_prompt=num_prompt))
            else:
                tracker = ReasoningTracker(tokenizer, reasoning, num_prompt=num_prompt)
                processors.append(grammars.processor_after_reasoning(grammar, tracker))
        except ValueError as error:
            raise Refusal(f"{param}: {one_line(error)}", param=param) from None
    return processors


def _grammar(job: Job, tokenizer: TokenizerWrapper) -> str:
    """The grammar that the answer must match."""
    if job.schema is not None and not job.tools:
        return json_grammar(job.schema)
    functions = [tool["function"] for tool in job.tools or ()]
    form = _call_format(job, tokenizer)
    required = job.required_tools
    return calls_grammar(
        {
            function["name"]: _closed(function.get("parameters"))
            for function in functions
            if required is None or function["name"] in required
        },
        tags=(form.tool_call_start or "", form.tool_call_end or ""),
        parallel=job.parallel_tool_calls,
        answer=job.schema if required is None else None,
    )


def _closed(schema: dict[str, Any] | None) -> dict[str, Any]:
    """A schema of arguments without those that it does not list, which small models invent.

    A schema that combines others, or says what else is allowed, is returned unchanged.
    """
    if not schema:
        return {"properties": {}, "additionalProperties": False}
    plain = {"type", "properties", "required", "title", "description", "$schema", "$defs"}
    is_plain = "properties" in schema and schema.keys() <= plain
    return schema | ({"additionalProperties": False} if is_plain else {})


def prompt_ids(job: Job, tokenizer: TokenizerWrapper) -> list[int]:
    """Encode the prompt of a job.

    Raises:
        Refusal: the prompt or the conversation is invalid.
    """
    if job.messages is not None:
        return _encode_chat(job, job.messages, tokenizer)
    try:
        prompt, special = job.prompt or "", job.add_special_tokens
        return encode_prompt(tokenizer, prompt, add_special_tokens=special)
    except ValueError as error:
        raise Refusal(str(error), param="prompt") from None


def _encode_chat(
    job: Job, messages: list[dict[str, Any]], tokenizer: TokenizerWrapper
) -> list[int]:
    """Apply the chat template to a conversation."""
    if not tokenizer.has_chat_template:
        raise Refusal("the model has no chat template; use /v1/completions", param="messages")
    config = template_config(job, tokenizer, {})
    if _is_generic(job, tokenizer):
        messages = with_tools(messages, job.tools or ())
    elif job.tools:
        config["tools"] = job.tools
    try:
        text = chat_text(tokenizer, messages, template_config=config)
        return encode_prompt(tokenizer, text, add_special_tokens=False)
    except ValueError as error:
        raise Refusal(one_line(error), param="messages") from None


def _is_generic(job: Job, tokenizer: TokenizerWrapper) -> bool:
    """Whether tools are listed, and calls written, in plain text instead of the template's form.

    Calls that a grammar enforces are, too, unless the template's form is JSON.
    """
    if not job.tools or not tokenizer.has_chat_template:
        return False
    is_constrained = job.required_tools is not None or job.schema is not None
    if is_constrained and tokenizer.has_tool_calling:
        return not (calls_are_json(tokenizer) and reads_tools(tokenizer))
    return not reads_tools(tokenizer)


def _call_format(job: Job, tokenizer: TokenizerWrapper) -> TokenizerWrapper | GenericCalls:
    """The format of calls in the answer."""
    if not tokenizer.has_tool_calling or _is_generic(job, tokenizer):
        return GENERIC
    return tokenizer
