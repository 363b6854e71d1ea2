"""What mlx-mtp does with one family: checks on a tiny random model, each with its outcome.

Plain output is mlx-lm's; drafts, right and wrong, do not change it; mask rows in decoding are
those of training.  ``models`` runs this for every family.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as lm_cache
from mlx_lm.models import switch_layers

from mlx_mtp.decoding.batching import can_batch
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.evaluation.forward import mask_rows, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.lab.row_exact import row_exact
from mlx_mtp.lab.tiny_models import tiny_model, with_adapter
from mlx_mtp.model.attention import attention_blocks
from mlx_mtp.model.layout import StepLayout, linear_layout, plain_layout, quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20, 47, 11]  # longer than the tiny models' windows
MAX_DRAFTS = 3
MAX_ERROR = 1e-3  # of float32 logits, relative to their spread
_SEEDS = range(6)  # of weights, until greedy ids vary
_VARIED = 6  # different ids among the first 24

BITS, REFUSED, FAILED = "bits", "refused", "failed"


@dataclass
class Report:
    """Outcomes of one family's checks.

    Attributes:
        family: name of the file.
        layers: what kinds of layers and caches it has.
        checks: the outcome of each check by name: "bits" or "ids" with the largest difference,
            "refused: why" or "failed: why".
        seconds: processor time.
    """

    family: str
    layers: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """``"exact"``, ``"plain"`` (drafts are refused), ``"refused"`` or ``"failed"``."""
        outcomes = self.checks
        if any(outcome.startswith(FAILED) for outcome in outcomes.values()):
            return FAILED
        if outcomes.get("plain", REFUSED).startswith(REFUSED):
            return REFUSED
        return "plain" if outcomes.get("drafts", REFUSED).startswith(REFUSED) else "exact"

    @property
    def reason(self) -> str:
        """Its failures, or why it is refused."""
        failures = [
            f"{name} {outcome}"
            for name, outcome in self.checks.items()
            if outcome.startswith(FAILED)
        ]
        if failures:
            return "; ".join(failures)
        refusals = [self.checks.get(name, "") for name in ("plain", "drafts")]
        return next((x.partition(": ")[2] for x in refusals if x.startswith(REFUSED)), "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self) | {"status": self.status, "reason": self.reason}


@dataclass(frozen=True)
class Plain:
    """Greedy ids after ``PROMPT``, and the logits ``[n, V]`` that they come from."""

    ids: list[int]
    logits: mx.array


def check_family(
    family: str, *, num_tokens: int = 40, num_long: int = 0, quick: bool = False
) -> Report:
    """Check a family.

    Args:
        family: one of ``tiny_models.families()``.
        num_tokens: tokens of each answer.
        num_long: tokens of the answer in bfloat16, or 0 for ``num_tokens``.
        quick: leave out quantised weights, other caches and fixed layouts.
    """
    began = time.process_time()
    report = Report(family)
    check = _Check(report)
    with check("mlx_lm"):
        seed, stock = _varied(family, num_tokens)
        report.checks["mlx_lm"] = f"{len(set(stock.ids))} different ids"
        report.layers = _layers(tiny_model(family, seed=seed))
    if check.ended:
        report.checks = {"plain": f"{REFUSED}: mlx-lm itself: {check.last}"}
        return report
    with check("plain"):
        model = MTPModel(tiny_model(family, seed=seed))
        report.checks["plain"] = _compare(plain_answer(model, num_tokens), stock)
        greedy = _decoded(model, num_tokens, layout="plain")
        _demand(greedy == stock.ids, "ids of decode differ from mlx-lm's")
    if not check.ended:
        with check("no adapter"), row_exact():
            plain = plain_answer(model, num_tokens)
            report.checks["no adapter"] = drafted(model, plain, masks=False)
        with check("drafts"), row_exact():
            model = with_adapter(model.base)
            plain = plain_answer(model, num_tokens)
            _demand(plain.ids == stock.ids, "an adapter changes plain ids")
            report.checks["drafts"] = drafted(model, plain)
        if not check.ended:
            _check_uses(report.checks, check, model, plain)
            _check_types(report, check, seed, num_long or num_tokens, quick=quick)
            if not quick:
                _check_caches(report.checks, check, model)
    report.seconds = round(time.process_time() - began, 2)
    return report


def _check_uses(checks: dict[str, str], check: _Check, model: MTPModel, plain: Plain) -> None:
    """The loop, training and batches, of a model whose drafts are exact."""
    with check("decode"), row_exact():
        for layout in ("linear", "quadratic", "auto"):
            same = _decoded(model, 12, layout=layout) == plain.ids[:12]
            _demand(same, f"ids with layout {layout} differ")
        checks["decode"] = "ids"
    with check("training"), row_exact():
        checks["training"] = _training(model, plain)
    with check("batches"), row_exact():
        checks["batches"] = _batches(model, 8)


def _check_caches(checks: dict[str, str], check: _Check, model: MTPModel) -> None:
    """Caches that drop rows or quantise them."""
    caches: Any = (
        ("max_kv_size", {"max_kv_size": 16}),
        ("kv_bits", {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}),
    )
    for name, options in caches:
        with check(name), row_exact():
            other = plain_answer(model, 24, **options)
            checks[name] = drafted(model, other, strict=False, **options)


def _check_types(report: Report, check: _Check, seed: int, num_tokens: int, *, quick: bool) -> None:
    """Half precision and quantised weights, of a model whose drafts are exact in float32."""
    # mlx multiplies experts' weights on the CPU in float32 or quantised only
    half = {"dtype": mx.bfloat16, "bits": 8 if "experts" in report.layers["kinds"] else None}
    types: Any = (("bfloat16", half, num_tokens), ("4-bit", {"bits": 4}, 24))
    for name, options, count in types[:1] if quick else types:
        with check(name):
            _stock_answer(tiny_model(report.family, seed=seed, **options), 2)
        if check.ended:
            report.checks[name] = f"{REFUSED}: mlx-lm itself: {check.last}"
            continue
        with check(name), row_exact():
            model = with_adapter(tiny_model(report.family, seed=seed, **options))
            report.checks[name] = drafted(model, plain_answer(model, count), strict=False)


class _Check:
    """Turns what a check raises into its outcome."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.ended = False
        self.last = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.ended = False
        try:
            yield
        except (Exception, SystemExit) as error:
            self.ended = True
            text = str(error).splitlines()[0] if str(error) else ""
            kind = type(error).__name__
            self.last = f"{kind}: {text}"[:200]
            is_reason = isinstance(error, ValueError) and not isinstance(error, _Different)
            is_reason = is_reason and _is_ours(error)
            outcome = f"{REFUSED}: {text}" if is_reason else f"{FAILED}: {self.last}"
            self.report.checks[name] = outcome.replace(f"{FAILED}: _Different: ", f"{FAILED}: ")


class _Different(ValueError):
    """Two things that must agree do not."""


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Different(otherwise)


def _is_ours(error: BaseException) -> bool:
    """Whether mlx-mtp raised an error on purpose: by a ``raise`` in one of its lines."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "mlx_mtp" in frame.filename and (frame.line or "").startswith("raise ")


def _varied(family: str, num_tokens: int) -> tuple[int, Plain]:
    """The first seed of the weights with which mlx-lm's greedy ids vary, and its answer."""
    best: tuple[int, int, Plain] | None = None
    for seed in _SEEDS:
        answer = _stock_answer(tiny_model(family, seed=seed), num_tokens)
        variety = len(set(answer.ids[:24]))
        if best is None or variety > best[0]:
            best = (variety, seed, answer)
        if variety >= _VARIED:
            break
    assert best is not None
    return best[1:]


def _stock_answer(base: Any, num_tokens: int) -> Plain:
    """mlx-lm's greedy answer: the prompt at once, then one row at a time."""
    cache = lm_cache.make_prompt_cache(base)
    return _greedy(lambda ids: base(mx.array([ids]), cache=cache)[0, -1:], num_tokens)


def plain_answer(model: MTPModel, num_tokens: int, **options: Any) -> Plain:
    """Our plain answer, in the same way; ``options`` are those of the cache."""
    cache = model.make_cache(**options)

    def forward(ids: list[int]) -> mx.array:
        cache.begin_step()
        layout = plain_layout(num_pending=len(ids))
        return model.logits(model(mx.array([ids]), cache=cache, layout=layout)[:, -1:])[0]

    return _greedy(forward, num_tokens)


def _greedy(forward: Callable[[list[int]], mx.array], num_tokens: int) -> Plain:
    rows, ids = [forward(PROMPT)], []
    while True:
        token: Any = rows[-1].argmax().item()
        ids.append(token)
        if len(ids) == num_tokens:
            return Plain(ids, mx.concatenate(rows))
        rows.append(forward(ids[-1:]))


def _compare(ours: Plain, theirs: Plain) -> str:
    """Outcome for two answers; ids must be equal."""
    _demand(not mx.isnan(theirs.logits).any().item(), "mlx-lm's logits are not numbers")
    for index, (left, right) in enumerate(zip(ours.ids, theirs.ids, strict=True)):
        error = _difference(ours.logits[: index + 1], theirs.logits[: index + 1])
        _demand(left == right, f"ids differ from token {index}; logits by {error:.1e} until there")
    return _outcome(_difference(ours.logits, theirs.logits))


def _difference(left: mx.array, right: mx.array) -> float:
    """Largest difference of two arrays relative to their spread; 0 if all bits are equal."""
    if mx.array_equal(left, right).item():
        return 0.0
    left, right = (_finite(x) for x in (left, right))
    error: Any = (mx.abs(left - right).max() / mx.maximum(mx.std(right), 1e-9)).item()
    return float(error) or 1e-12


def _finite(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return mx.where(mx.isinf(x), 0.0, x)


def _outcome(error: float) -> str:
    return BITS if error == 0 else f"ids, {error:.0e}"


def drafted(
    model: MTPModel, plain: Plain, *, masks: bool = True, strict: bool = True, **options: Any
) -> str:
    """Decode again with right and wrong drafts in all layouts; every row must be the plain one.

    Args:
        model: the model.
        plain: its plain answer.
        masks: whether steps have mask rows too.
        strict: whether logits that are not within ``MAX_ERROR`` are a failure.
        options: those of the cache.
    """
    rng = np.random.default_rng(5)
    cache = model.make_cache(**options)
    cache.begin_step()
    model(mx.array([PROMPT]), cache=cache, layout=plain_layout(num_pending=len(PROMPT)))
    done, worst = 1, 0.0
    while done < len(plain.ids):
        drafts = _drafts(rng, plain.ids[done : done + MAX_DRAFTS], done)
        count = min(len(drafts), cache.rows_until_change or MAX_DRAFTS, len(plain.ids) - done)
        drafts = drafts[:count]
        layout = _layout(rng, count, model.num_draft_tokens if masks else 0)
        rows = [plain.ids[done - 1], *drafts, *layout.mask_offsets.tolist()]
        cache.begin_step()
        hidden = model(mx.array([rows]), cache=cache, layout=layout)
        logits = model.logits(hidden)[0, : layout.num_ordinary]
        accepted = 0
        while accepted < count and drafts[accepted] == plain.ids[done + accepted]:
            accepted += 1
        emitted = min(accepted + 1, len(plain.ids) - done)
        expected = plain.logits[done : done + emitted]
        error = _difference(logits[:emitted], expected)
        worst = max(worst, error)
        ids = mx.argmax(logits[:emitted], axis=-1).tolist()
        _demand(
            ids == plain.ids[done : done + emitted],
            f"ids with drafts differ after {done} tokens ({layout}); logits by {error:.1e}",
        )
        _demand(not strict or error < MAX_ERROR, f"logits with drafts differ by {error:.1e}")
        cache.rewind(layout.num_rows - emitted)
        done += emitted
    return _outcome(worst)


def _drafts(rng: np.random.Generator, right: list[int], done: int) -> list[int]:
    """All right, all wrong, or right up to some place, in turn."""
    kind = done % 3
    wrong_from = (len(right), 0, int(rng.integers(0, len(right) + 1)))[kind]
    return [token if i < wrong_from else (token + 1) % 64 for i, token in enumerate(right)]


def _layout(rng: np.random.Generator, count: int, num_masks: int) -> StepLayout:
    """Linear, quadratic, groups of random sizes, or no masks."""
    kind = int(rng.integers(0, 4)) if num_masks else 3
    if kind == 0:
        return linear_layout(num_pending=1, num_draft_tokens=count, num_masks=num_masks)
    if kind == 1:
        return quadratic_layout(num_pending=1, num_draft_tokens=count, num_masks=2)
    if kind == 2:
        return StepLayout(1, count, tuple(rng.integers(0, num_masks + 1, count + 1).tolist()))
    return StepLayout(1, count, (0,) * (count + 1))


def _decoded(model: MTPModel, num_tokens: int, **options: Any) -> list[int]:
    steps = decode(model, PROMPT, max_tokens=num_tokens, **options)
    return [token for step in steps for token in step.tokens]


def _training(model: MTPModel, plain: Plain) -> str:
    """Mask rows of training's forward against those of a step; the gradient must be there."""
    drafts = plain.ids[:2]
    layout = quadratic_layout(num_pending=1, num_draft_tokens=2, num_masks=2)
    cache = model.make_cache()
    cache.begin_step()
    model(mx.array([PROMPT[:-1]]), cache=cache)
    rows = [PROMPT[-1], *drafts, *layout.mask_offsets.tolist()]
    stepped = model(mx.array([rows]), cache=cache, layout=layout)[0, layout.num_ordinary :]
    ids = mx.array([*PROMPT, *drafts])
    blocks = MaskRows(tuple(len(PROMPT) - 1 + i for i in range(3)), 2)
    trained = mask_rows(model, ordinary_rows(model, ids), blocks)
    error = _difference(trained, stepped)
    _demand(error < MAX_ERROR, f"mask rows differ from decoding's by {error:.1e}")

    def loss(model: MTPModel) -> mx.array:
        logits = model.logits(mask_rows(model, ordinary_rows(model, ids), blocks)[None])
        return nn.losses.cross_entropy(logits[0], mx.zeros(6, mx.int32), reduction="mean")

    _, gradients = nn.value_and_grad(model, loss)(model)
    parts: Any = tree_flatten(gradients)
    parts = [(name, value) for name, value in parts if not name.startswith("sampler_head")]
    norms = {name: mx.abs(value.astype(mx.float32)).max().item() for name, value in parts}
    bad = [name for name, norm in norms.items() if not np.isfinite(norm)]
    _demand(not bad, f"gradient of {bad[:1]} is not a number")
    zero = [name for name, norm in norms.items() if norm == 0]
    _demand(len(zero) < len(norms), "there is no gradient")
    return f"{_outcome(error).replace('ids, ', '')}; gradient of {len(norms) - len(zero)} tensors"


def _batches(model: MTPModel, num_tokens: int) -> str:
    """Three answers in batched steps against each alone."""
    if not can_batch(model):
        return f"{REFUSED}: steps run one after another"
    prompts = (PROMPT, PROMPT[2:6], PROMPT[::-1])
    layouts = ("quadratic", "linear", "plain")
    alone = [
        [
            t
            for step in decode(model, prompt, max_tokens=num_tokens, layout="plain")
            for t in step.tokens
        ]
        for prompt in prompts
    ]
    requests = [
        make_request(model, prompt, max_tokens=num_tokens, layout=layout)
        for prompt, layout in zip(prompts, layouts, strict=True)
    ]
    for request in requests:  # a prompt runs alone
        while request.num_prompt_left:
            [outcome] = run(model, [request.plan()])
            request.commit(outcome)
    while active := [request for request in requests if not request.finished]:
        outcomes = run(model, [request.plan() for request in active])
        for request, outcome in zip(active, outcomes, strict=True):
            request.commit(outcome)
    for request, prompt, ids in zip(requests, prompts, alone, strict=True):
        _demand(request.ids[len(prompt) :] == ids, "ids of a batch differ")
    return "ids"


def _layers(base: Any) -> dict[str, Any]:
    """The kinds of layers and caches that a model has."""
    caches = [type(x).__name__ for x in _flat(lm_cache.make_prompt_cache(base))]
    modules = [module for _, module in base.named_modules()]
    code = "".join(sorted({inspect.getsource(type(module)) for module in modules if _of(module)}))
    experts = (switch_layers.SwitchLinear, switch_layers.QuantizedSwitchLinear)
    kinds = {
        "attention": any(name.endswith("KVCache") for name in caches),
        "window": any(name in ("RotatingKVCache", "ChunkedKVCache") for name in caches),
        "latent attention": "kv_lora_rank" in code,
        "gated delta": "gated_delta_update" in code,
        "Mamba2": "ssm_update" in code,
        "convolution": any(isinstance(module, nn.Conv1d) for module in modules),
        "recurrent": "ArraysCache" in caches,
        "experts": any(isinstance(module, experts) for module in modules)
        or any(".experts." in path for path, _ in base.named_modules()),
    }
    if kinds["gated delta"] or kinds["Mamba2"] or kinds["convolution"]:
        kinds["recurrent"] = False  # named more closely
    if kinds["gated delta"] or kinds["Mamba2"]:
        kinds["convolution"] = False
    return {
        "kinds": [name for name, there in kinds.items() if there],
        "seam": bool(attention_blocks(getattr(base, "language_model", base))),
        "caches": {name: caches.count(name) for name in sorted(set(caches))},
    }


def _of(module: nn.Module) -> bool:
    return type(module).__module__.startswith("mlx_lm.models")


def _flat(caches: Any) -> Iterator[Any]:
    for cache in caches:
        if isinstance(cache, lm_cache.CacheList):
            yield from _flat(cache.caches)
        else:
            yield cache
