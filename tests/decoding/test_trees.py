"""Drafts that branch: greedy ids and caches are those of plain decoding, samples stay exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding.accept import Target, last_accepted
from mlx_mtp.decoding.batching import can_batch
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.sampling import Sampling, process_logits
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.drafting.drafter import Drafts, DraftTree
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.model.caches import layers
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepLayout, tree_ancestry
from mlx_mtp.planning.plan import Plan
from tests.decoding.test_accept import target_table, triple_p_values
from tests.decoding.test_sampling import chain_p_values, table_model
from tests.helpers.exact import holm
from tests.helpers.hybrid import hybrid_mtp
from tests.helpers.requests import step_together
from tests.helpers.tiny import tiny_mtp
from tests.helpers.trees import (
    KINDS,
    Kind,
    finish,
    ids_of,
    longest_right,
    tree_request,
)

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
LENGTH, MORE = 20, 12  # of an answer; of what else the trees know
K = 2
WIDE: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
FAST: dict[str, Any] = {"num_hidden_layers": 1, "low_rank": False, "sampler": False}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "4-bit weights": ("qwen3", {"quantised": True}, {}),
    "window": ("gemma3_text", {}, {}),
    "window, scaled queries": ("ministral3", {}, {}),
    "experts": ("qwen3_moe", {}, {}),
    "latent, experts": ("deepseek_v3", {}, {}),
    "quantised": ("llama", WIDE, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 14}),
    "first and last rows": ("llama", {}, {"max_kv_size": 16}),
}


def plain_text(model: Any, prompt: list[int], count: int, **cache: Any) -> list[int]:
    """Prompt and plain answer."""
    steps = decode(model, prompt, cache=model.make_cache(**cache), layout="plain", max_tokens=count)
    return [*prompt, *(token for step in steps for token in step.tokens)]


def next_logits(model: Any, cache: MTPCache, probe: list[int]) -> mx.array:
    """Logits of more rows after a cache, which stays as it is."""
    return model.logits(model(mx.array([probe]), cache=cache.copied()))


def assert_like_plain(model: Any, cache: MTPCache, ids: list[int], **options: Any) -> None:
    """The cache has these ids and continues as one that decoded them one by one."""
    assert cache.offset == len(ids)
    plain = model.make_cache(**options)
    plain.begin_step()
    model(mx.array([ids[: len(PROMPT)]]), cache=plain)
    for token in ids[len(PROMPT) :]:
        plain.begin_step()
        model(mx.array([[token]]), cache=plain)
    found, expected = (next_logits(model, each, [7, 11, 2]) for each in (cache, plain))
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_caches_are_those_of_plain_decoding(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "WINDOW_SLACK", 3)  # windows drop rows between most steps
    kind, sizes, options = CASES[case]
    model = tiny_mtp(kind, k=K, **sizes)
    text = plain_text(model, PROMPT, LENGTH + MORE, **options)
    moved = Counter[bool]()
    for seed, trees in enumerate(KINDS):
        cache = model.make_cache(**options)
        request, drafter, planner = tree_request(
            model, PROMPT, text, trees, cache=cache, max_tokens=LENGTH, tree_seed=seed
        )
        steps = finish(model, request)
        assert ids_of(steps) == text[len(PROMPT) :][:LENGTH], trees
        assert [step.num_accepted for step in drafter.steps] == drafter.expected
        assert any(layout.is_tree for layout in planner.layouts)
        for step in drafter.steps:
            path = step.layout.path(step.last_node)
            moved[path != tuple(range(1, len(path) + 1))] += 1
        if trees == "wrong":
            assert len(steps) == LENGTH
        else:
            assert len(steps) < LENGTH
        assert_like_plain(model, cache, text[: len(PROMPT) + LENGTH - 1], **options)
    assert moved[True] >= 5 <= moved[False]


def test_a_path_of_first_rows_has_the_bits_of_rows_alone() -> None:
    model = tiny_mtp("llama", k=K, quantised=True)
    ids, path = np.random.default_rng(0).integers(0, 64, (2, 70)).tolist()
    cache = model.make_cache()
    model(mx.array([ids]), cache=cache)
    plain = cache.copied()
    alone = [model(mx.array([[token]]), cache=plain)[0, 0] for token in path[:4]]
    layout = StepLayout(1, 5, (0, 1, 0, 2, 0, 0), (0, 1, 2, 0, 4))
    rows = [*path[:4], *path[1:3], *layout.mask_offsets.tolist()]
    hidden = model(mx.array([rows]), cache=cache, layout=layout)[0]
    for node, row in zip((0, *layout.path(3)), alone, strict=True):
        assert mx.array_equal(hidden[node], row)
    for node, row in zip((4, 5), alone[1:], strict=False):  # keys of another branch lie between
        assert mx.allclose(hidden[node], row, rtol=1e-5, atol=1e-6)


def test_recurrent_layers_keep_no_other_branch() -> None:
    cache = hybrid_mtp("qwen3_5", k=1).make_cache()
    assert not cache.supports_trees and tiny_mtp("llama").make_cache().supports_trees
    with pytest.raises(ValueError, match="recurrent layers"):
        cache.keep_rows([0, 2], of=3)


def test_drafters_see_the_states_and_ids_along_the_path() -> None:
    model = tiny_mtp("llama", k=K, **FAST)
    text = plain_text(model, PROMPT, LENGTH + MORE)
    request, drafter, _ = tree_request(model, PROMPT, text, "late", max_tokens=LENGTH)
    finish(model, request)
    states = model(mx.array([text]), cache=model.make_cache())[0]
    place = 0
    for step in drafter.steps:
        count = len(step.next_ids)
        assert list(step.next_ids) == text[place + 1 :][:count]
        assert mx.allclose(step.hidden[:count], states[place : place + count], atol=1e-4)
        place += count
    assert place == len(PROMPT) + LENGTH - 1
    assert max(step.num_accepted for step in drafter.steps) >= 3


@pytest.mark.parametrize("keeps_to_room", [True, False])
def test_an_answer_ends_inside_a_path(keeps_to_room: bool) -> None:
    model = tiny_mtp("llama", k=K, **FAST)
    text = plain_text(model, PROMPT, LENGTH + MORE)
    answer = text[len(PROMPT) :]
    cut = 0
    for count in range(1, 12):
        for stop in (False, True):
            end = answer.index(answer[count - 1]) + 1 if stop else count
            cache = model.make_cache()
            options: Any = {"stop_ids": {answer[count - 1]}} if stop else {"max_tokens": count}
            request, drafter, _ = tree_request(
                model, PROMPT, text, "late", cache=cache, tree_seed=count,
                keeps_to_room=keeps_to_room, **options,
            )  # fmt: skip
            steps = finish(model, request)
            assert ids_of(steps) == answer[:end]
            assert request.finish_reason == ("stop" if stop else "length")
            assert cache.offset == len(PROMPT) + end - 1
            last = steps[-1]
            assert len(last.logits) == len(last.tokens)
            cut += drafter.steps[-1].num_accepted >= len(last.tokens)
            found = next_logits(model, cache, answer[end - 1 : end])[0, -1]
            assert found.argmax().item() == answer[end]
    assert cut >= 5


def follows_rule(tokens: mx.array, logits: mx.array) -> mx.array:
    """A processor that depends on the ids so far: which third of the ids may follow."""
    allowed = (mx.arange(logits.shape[-1]) + tokens[-2] + tokens[-1]) % 3 != 1
    return mx.where(allowed, logits, -mx.inf)


def second(logprobs: mx.array) -> mx.array:
    """A sampler function: the second most likely token."""
    return mx.argsort(-logprobs.reshape(-1))[1]


@pytest.mark.parametrize(
    "target",
    [
        {"logits_processors": [follows_rule]},
        {"sampling": Sampling(repetition_penalty=1.6, repetition_context_size=6)},
        {"sampler": second},
    ],
    ids=["processor", "penalty", "sampler"],
)
def test_processors_and_samplers_along_paths(target: dict[str, Any]) -> None:
    model = tiny_mtp("llama", k=K, **FAST)
    steps = decode(model, PROMPT, layout="plain", max_tokens=LENGTH + MORE, **target)
    text = [*PROMPT, *(token for step in steps for token in step.tokens)]
    for seed, trees in enumerate(KINDS):
        request, drafter, _ = tree_request(
            model, PROMPT, text, trees, max_tokens=LENGTH, tree_seed=seed, **target
        )
        assert ids_of(finish(model, request)) == text[len(PROMPT) :][:LENGTH]
        assert [step.num_accepted for step in drafter.steps] == drafter.expected


def test_a_row_is_processed_after_the_ids_on_its_own_path() -> None:
    parents, drafts = (0, 0, 2, 1, 3), [5, 6, 7, 8, 9]
    seen: list[list[int]] = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        ids: Any = tokens.tolist()
        seen.append(ids)
        return logits + sum(ids)

    logits = mx.arange(6.0)[:, None]
    found = process_logits(
        logits, context=[1, 2], drafts=drafts, processors=[look], parents=parents
    )
    paths = [[], [5], [6], [6, 7], [5, 8], [6, 7, 9]]
    assert found[:, 0].tolist() == [j + 3 + sum(path) for j, path in enumerate(paths)]
    assert sorted(seen) == sorted([1, 2, *path] for path in paths)
    steps_back = sum(one != other[: len(one)] for one, other in zip(seen, seen[1:], strict=False))
    assert steps_back == 1, "one branch, then the other"


def walked(parents: list[int], drafts: list[int], tokens: list[int]) -> int:
    """Number of drafts on the longest path that follows the tokens."""
    best, depths = 0, {0: 0}
    for node, (parent, draft) in enumerate(zip(parents, drafts, strict=True), 1):
        if parent in depths and tokens[parent] == draft:
            best = max(best, depths.setdefault(node, depths[parent] + 1))
    return best


def test_the_longest_path_that_follows_the_tokens_is_accepted(seed: int) -> None:
    rng, lengths = np.random.default_rng(seed), Counter[int]()
    for _ in range(300):
        count = int(rng.integers(1, 12))
        parents = [int(rng.integers(0, i + 1)) for i in range(count)]
        drafts, tokens = rng.integers(0, 3, count).tolist(), rng.integers(0, 3, count + 1).tolist()
        _, last = last_accepted(mx.array(tokens), mx.array(drafts), parents)
        node: Any = last.item()
        path = StepLayout(1, count, (0,) * (count + 1), tuple(parents)).path(node)
        emitted = [tokens[node] for node in (0, *path)]
        assert [drafts[node - 1] for node in path] == emitted[:-1]
        assert len(path) == walked(parents, drafts, tokens)
        lengths[len(path)] += 1
    assert min(lengths[n] for n in range(4)) > 5
    assert (tree_ancestry(range(4)) == np.tri(5, dtype=bool)).all()


SETTINGS = {
    "plain": Sampling(temp=1.0),
    "filters": Sampling(temp=1.1, top_p=0.9, min_p=0.03, top_k=5),
    "penalty, bias": Sampling(temp=0.8, repetition_penalty=1.4, logit_bias={2: 1.0}),
}
PARENTS = (0, 0, 1, 2, 2)


def draw_triples_in_trees(sampling: Sampling, *, draws: int, bias: float = 0.0) -> np.ndarray:
    """Tokens 1 to 3 of many decodes, ``[draws, 3]``: a tree of five drafts is verified for 2 and 3.

    Its drafts are chosen by the target's own probabilities and by the token before, which must not
    matter.  ``bias`` is how often the second one is emitted without looking.
    """
    first, verify = target_table(sampling)  # [V], [V, V, 3, V]
    everything, target = Target(sampling=Sampling(temp=1.0)), mx.argsort(-verify, axis=-1)

    def draw(probs: mx.array, key: mx.array) -> mx.array:
        return mx.random.categorical(mx.log(probs), key=key).astype(mx.int32)

    def one(key: mx.array) -> mx.array:
        keys = mx.random.split(key, 4)
        a = draw(first, keys[0])
        best, next_best = target[a, 0, 0, 0], target[a, 0, 0, 1]
        after_best, after_next = target[a, best, 1], target[a, next_best, 1]
        drafts = mx.stack([best, next_best, after_best[0], after_next[1], after_next[0]])
        rows = [verify[a, 0, 0], verify[a, best, 1], verify[a, next_best, 1]]
        probs = mx.stack([*rows, *[verify[a, 0, 2]] * 3])
        accepted = everything.accept(
            mx.log(probs), Drafts.certain(drafts.astype(mx.int32)), key=keys[1], parents=PARENTS
        )
        tokens, last = accepted
        late = draw(verify[a, tokens[0], 1], keys[2])
        in_tree = mx.where((last == 1) | (last == 3), tokens[1], tokens[2])
        b, c = tokens[0], mx.where(last > 0, in_tree, late)
        planted = mx.random.uniform(key=keys[3]) < bias
        return mx.stack([a, mx.where(planted, next_best, b).astype(mx.int32), c])

    return np.array(mx.vmap(one)(mx.random.split(mx.random.key(3), draws)))


def test_samples_of_trees_follow_the_exact_distribution() -> None:
    found = {
        (name, what): p
        for name, sampling in SETTINGS.items()
        for what, p in triple_p_values(
            draw_triples_in_trees(sampling, draws=5_000), sampling
        ).items()
    }
    assert holm(found.values())[0] > 0.001, min(found.items(), key=lambda item: item[1])


def test_a_bias_planted_in_trees_is_caught() -> None:
    sampling = SETTINGS["plain"]
    found = triple_p_values(draw_triples_in_trees(sampling, draws=5_000, bias=0.08), sampling)
    assert holm([*found.values()] * len(SETTINGS))[0] < 0.001


@pytest.mark.parametrize("tokens", [200, pytest.param(4_000, marks=pytest.mark.soak)])
def test_the_loop_draws_from_the_exact_distribution(tokens: int) -> None:
    """Trees know another answer to the same prompt, which is right now and then."""
    model = table_model()
    accepted = Counter[int]()

    def sampled(model: Any, prompt: list[int], *, seed: int, **options: Any) -> list[int]:
        del options["layout"]
        rng = np.random.default_rng(seed)
        text = [*prompt, *rng.integers(0, model.vocab_size, tokens + MORE).tolist()]
        request, drafter, _ = tree_request(
            model, prompt, text, "random", seed=seed, tree_seed=seed, **options
        )
        ids = ids_of(finish(model, request))
        accepted.update(step.num_accepted for step in drafter.steps)
        return ids

    found = chain_p_values(
        "auto", Sampling(temp=1.0, top_k=6), model=model, sample=sampled, max_tokens=tokens
    )
    assert min(accepted[n] for n in range(3)) > 0.02 * tokens
    assert holm(found.values())[0] > 0.001, found


def run_alone(model: Any, request: Request) -> list[int]:
    """Run a request up to its first ids."""
    while not (tokens := request.commit(run(model, [request.plan()])[0]).tokens):
        pass
    return tokens


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v3"])
def test_steps_of_several_answers_may_have_trees(kind: str) -> None:
    model = tiny_mtp(kind, k=K)
    assert can_batch(model)
    prompts = [PROMPT, PROMPT[2:6], [5]]
    texts = [plain_text(model, prompt, LENGTH + MORE) for prompt in prompts]
    trees: tuple[Kind, ...] = ("late", "random", "right")
    requests = [
        tree_request(model, prompt, text, each, max_tokens=LENGTH, tree_seed=seed)[0]
        for seed, (prompt, text, each) in enumerate(zip(prompts, texts, trees, strict=True))
    ]
    # The prompts go through the model one by one, and some of them in two chunks.
    found = [[*run_alone(model, request)] for request in requests]
    together = 0
    while going := [i for i, request in enumerate(requests) if not request.finished]:
        together += len(going) > 1
        for i, ids in zip(going, step_together(model, [requests[i] for i in going]), strict=True):
            found[i] += ids
    assert together >= 3
    for ids, prompt, text in zip(found, prompts, texts, strict=True):
        assert ids == text[len(prompt) :][:LENGTH]


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("case", ["llama", "window", "quantised"])
def test_after_random_steps_a_cache_is_that_of_a_fresh_prefill(
    case: str, count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random ids and trees; a step may keep any node's path or a part of it, or be rewound."""
    monkeypatch.setattr(layers, "WINDOW_SLACK", 5)
    kind, sizes, options = CASES[case]
    options = {**options, "quantized_kv_start": 0} if options else {}  # all rows or none
    model = tiny_mtp(kind, k=1, low_rank=False, sampler=False, **sizes)
    rng, kept = np.random.default_rng(seed), Counter[str]()
    cache, ids, hidden = model.make_cache(**options), list[int](), None
    for number in range(count):
        cache.begin_step()
        num_drafts, pending = int(rng.integers(0, 8)), int(rng.choice([1, 1, 1, 4]))
        layout = StepLayout(
            pending,
            num_drafts,
            tuple(rng.integers(0, 2, num_drafts + 1).tolist()),
            tuple(int(rng.integers(0, i + 1)) for i in range(num_drafts)),
        )
        ordinary = rng.integers(0, 64, layout.num_ordinary).tolist()
        rows = mx.array([[*ordinary, *layout.mask_offsets.tolist()]])
        hidden = model(rows, cache=cache, layout=layout)
        stay = layout.rows_to(int(rng.integers(0, num_drafts + 1)))
        stay = stay[: int(rng.integers(1, len(stay) + 1))]
        cache.keep_rows(stay, of=layout.num_rows)
        ids += [ordinary[row] for row in stay]
        kept["prefix" if stay[-1] == len(stay) - 1 else "moved"] += 1
        if number % 7 == 0 and cache.can_rewind(2):
            cache.rewind(2)
            del ids[-2:]
        assert cache.offset == len(ids)
        if number % 40 == 39 or number == count - 1:
            fresh = model.make_cache(**options)
            if options:
                fresh.begin_step()
            model(mx.array([ids]), cache=fresh)
            found, expected = (next_logits(model, each, [7, 11]) for each in (cache, fresh))
            assert mx.allclose(found, expected, rtol=1e-3, atol=1e-3), number
            mx.eval(hidden, cache.state)
        if len(ids) > 150:
            cache, ids = model.make_cache(**options), []
    assert min(kept.values()) > count / 10


class TreesFromMasks(MaskTokenDrafter):
    """Adds a tree to the drafts of mask rows."""

    def draft(self, hidden: mx.array, logits: mx.array, previous: mx.array, **more: Any) -> Drafts:
        """The best two tokens of the first row, and the best of the last one after the second."""
        drafts = super().draft(hidden, logits, previous, **more)
        best = mx.argsort(-logits, axis=-1)[:, :2].astype(mx.int32)
        tokens = mx.concatenate([best[0], best[-1, :1]])
        tree = DraftTree(tokens, mx.array([0, 0, 2]), mx.array([0.5, 0.25, 0.125]))
        return Drafts(drafts.tokens, drafts.candidates, drafts.probs, tree=tree)


def test_a_tree_drafted_in_a_step_comes_with_its_one_sync() -> None:
    model = tiny_mtp("llama", k=K, **FAST)
    request = make_request(model, PROMPT, layout="linear", max_tokens=4)
    request.masks = TreesFromMasks(model, None)
    [outcome] = run(model, [request.plan()])
    tree = outcome.drafts.tree
    assert tree is not None and tree.host_ids is not None and tree.host_parents == [0, 0, 2]
    assert tree.host_ids == tree.tokens.tolist() and tree.host_probs == [0.5, 0.25, 0.125]
    assert outcome.drafts.host_ids == outcome.drafts.tokens.tolist()
    chosen = tree.chosen((2, 3))
    assert chosen.host_ids == chosen.tokens.tolist() == tree.host_ids[1:]
    plan = Plan(StepLayout(1, 2, (0, 0, 0)), source="mask", nodes=(2, 3))
    assert plan.parts == (("mask", 2),)
    assert longest_right((0, 0, 2), [4, 5, 6], [5, 6]) == 2
