"""From a job, as the server sends it, to the ids of its prompt and the arguments of the loop.

Everything that can be wrong with a job is found here, before any work is done for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_mtp.apps.engine.grammar import Grammars, calls_grammar, json_grammar
from mlx_mtp.apps.engine.penalties import answer_penalty
from mlx_mtp.decoding.config import GenerationConfig
from mlx_mtp.decoding.sampling import LogitsProcessor, Sampling
from mlx_mtp.generate import chat_text, encode_prompt
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.terminal import one_line

SAMPLING = ("temp", "top_p", "min_p", "top_k", "repetition_penalty")


class Refusal(ValueError):
    """A job that cannot be done, and why.

    Attributes:
        param: the field of the request that is to blame, if one is.
        code: a word for programs, if there is one.
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
        logits_processors: of penalties and grammars.
        top_logprobs: number of likeliest ids to report per id; None for no log-probabilities.
        tools: tools whose calls are looked for.
        pieces: whether the ids of each step and the text of each id are reported.
        fresh: whether caches of earlier prompts are neither used nor added to.
    """

    ids: list[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    sampling: Sampling = field(default_factory=Sampling)
    logits_processors: list[LogitsProcessor] = field(default_factory=list)
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    pieces: bool = False
    fresh: bool = False


def prepare(
    job: dict[str, Any],
    model: MTPModel,
    tokenizer: TokenizerWrapper,
    grammars: Grammars | None = None,
) -> Prepared:
    """Check a job and encode its prompt.

    Args:
        job: as the server sends it.
        model: the model.
        tokenizer: its tokenizer.
        grammars: what makes grammars for it; without it each job that needs one makes its own.

    Raises:
        Refusal: it cannot be done.
    """
    ids = _encoded(job, tokenizer)
    _check_ids(ids, model, "messages" if "messages" in job else "prompt")
    sampling = _sampling(job, model)
    k = job.get("num_draft_tokens")
    if k is not None and k > model.num_draft_tokens > 0:
        raise Refusal(
            f"num_draft_tokens is {k}, but the adapter was trained for {model.num_draft_tokens}",
            param="num_draft_tokens",
        )
    config = GenerationConfig(
        max_tokens=job["max_tokens"],
        stop=tuple(job.get("stop") or ()),
        seed=job.get("seed"),
        layout=job.get("layout", "auto"),
        num_draft_tokens=k,
    )
    processors = _processors(job, len(ids), tokenizer, grammars or Grammars(tokenizer))
    return Prepared(
        ids=ids,
        config=config,
        sampling=sampling,
        logits_processors=processors,
        top_logprobs=job.get("top_logprobs"),
        tools=job.get("tools") or [],
        pieces=bool(job.get("pieces")),
        fresh=bool(job.get("fresh")),
    )


def _processors(
    job: dict[str, Any], num_prompt: int, tokenizer: TokenizerWrapper, grammars: Grammars
) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    frequency, presence = job.get("frequency_penalty") or 0.0, job.get("presence_penalty") or 0.0
    if frequency or presence:
        penalty = answer_penalty(num_prompt=num_prompt, frequency=frequency, presence=presence)
        found.append(penalty)
    if "schema" in job or "must_call" in job:
        param = job.get("schema_param", "tools")
        try:
            grammar = _grammar(job, tokenizer)
            found.append(grammars.processor(grammar, num_prompt=num_prompt))
        except ValueError as error:
            raise Refusal(f"{param}: {one_line(error)}", param=param) from None
    return found


def _grammar(job: dict[str, Any], tokenizer: TokenizerWrapper) -> str:
    """What the answer is held to."""
    if "schema" in job:
        return json_grammar(job["schema"])
    functions = [tool["function"] for tool in job["tools"]]
    return calls_grammar(
        {
            each["name"]: each.get("parameters") or {}
            for each in functions
            if each["name"] in job["must_call"]
        },
        marks=(tokenizer.tool_call_start or "", tokenizer.tool_call_end or ""),
        many=job["many_calls"],
    )


def _sampling(job: dict[str, Any], model: MTPModel) -> Sampling:
    given = {name: job[name] for name in SAMPLING if job.get(name) is not None}
    bias = {int(token): float(value) for token, value in (job.get("logit_bias") or {}).items()}
    for token in bias:
        if not 0 <= token < model.vocab_size:
            raise Refusal(
                f"logit_bias holds the id {token}, the vocabulary has {model.vocab_size} ids",
                param="logit_bias",
            )
    try:
        return Sampling(logit_bias=bias or None, **given)
    except ValueError as error:
        raise Refusal(str(error)) from None


def _encoded(job: dict[str, Any], tokenizer: TokenizerWrapper) -> list[int]:
    if "messages" in job:
        return _encoded_chat(job, tokenizer)
    prompt = job["prompt"]
    try:
        return encode_prompt(tokenizer, prompt)
    except ValueError as error:
        raise Refusal(str(error), param="prompt") from None


def _encoded_chat(job: dict[str, Any], tokenizer: TokenizerWrapper) -> list[int]:
    """Put a conversation through the chat template."""
    if not tokenizer.has_chat_template:
        raise Refusal("the model has no chat template; use /v1/completions", param="messages")
    messages, tools = job["messages"], job.get("tools")
    config = dict(job.get("template_config") or {})
    if tools:
        config["tools"] = tools
    try:
        text = chat_text(tokenizer, messages, template_config=config)
        return encode_prompt(tokenizer, text, add_special_tokens=False)
    except Exception as error:  # a template is a program, and may fail in any way
        raise Refusal(one_line(error), param="messages") from None


def _check_ids(ids: list[int], model: MTPModel, param: str) -> None:
    bad = next((each for each in ids if not 0 <= each < model.vocab_size), None)
    if bad is not None:
        raise Refusal(
            f"the prompt holds the id {bad}, the vocabulary has {model.vocab_size} ids",
            param=param,
        )
    if model.max_context is not None and len(ids) >= model.max_context:
        raise Refusal(
            f"the prompt has {len(ids)} tokens, but {model.name} takes fewer than "
            f"{model.max_context}",
            param=param,
            code="context_length_exceeded",
        )
