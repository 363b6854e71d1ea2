"""Statistics of an adapter: what the counts say, and the file next to the adapter."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_mtp.evaluation.sequences import TokenSequence
from mlx_mtp.evaluation.statistics import (
    NO_KIND,
    OTHERS,
    by_frequency,
    count_vocabulary,
    rank_counts,
)
from mlx_mtp.loading import load
from mlx_mtp.model.config import WEIGHTS_FILE, read_any_config
from mlx_mtp.model.statistics import (
    COVERAGE_SIZES,
    MAX_RANK,
    STATISTICS_FILE,
    AdapterStatistics,
    DraftVocabulary,
    RankCounts,
    read_statistics,
    summary_lines,
    update_adapter,
    write_statistics,
)
from mlx_mtp.train.average import save_mean
from mlx_mtp.train.run.checkpoint import save_adapter
from tests.helpers.tiny import random_adapter, save_tiny_pair, tiny_base


def random_ranks(seed: int, size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks as ``draft_ranks`` gives them, and rooms."""
    rng = np.random.default_rng(seed)
    ranks = rng.choice(MAX_RANK + 1, (size, k), p=[0.5, *[0.5 / MAX_RANK] * MAX_RANK]) + 1
    rooms = rng.integers(0, k + 3, size)
    for row in ranks:
        beyond = np.flatnonzero(row > MAX_RANK)
        if len(beyond):
            row[beyond[0] + 1 :] = 0
    return ranks, rooms


def statistics(seed: int = 0, k: int = 4, *, with_vocabulary: bool = True) -> AdapterStatistics:
    kinds = {kind: rank_counts(*random_ranks(seed + at, 60, k)) for at, kind in enumerate("ab")}
    ids = np.random.default_rng(seed).zipf(1.3, 4000) % 40
    texts = [TokenSequence(ids.tolist(), [True] * len(ids))]
    vocabulary = count_vocabulary(texts, texts) if with_vocabulary else None
    return AdapterStatistics(source="a test", kinds=kinds, vocabulary=vocabulary)


def test_ranks_are_counted_as_one_by_one() -> None:
    k = 5
    ranks, rooms = random_ranks(3, 400, k)
    anchors, on, side = Counter(), Counter(), Counter()
    for row, room in zip(ranks, rooms, strict=True):
        is_on = True
        for j in range(min(k, room)):
            anchors[j] += 1
            if row[j]:
                (on if is_on else side)[j, row[j]] += 1
            is_on &= row[j] == 1
    found = rank_counts(ranks, rooms)
    assert found.num_anchors == tuple(anchors[j] for j in range(k))
    for table, counts in ((found.ranks, on), (found.side_ranks, side)):
        assert table == tuple(tuple(counts[j, r] for r in range(1, MAX_RANK + 2)) for j in range(k))
    assert sum(side.values()) > 50
    assert found.acceptance == tuple(on[j, 1] / anchors[j] for j in range(k))


def test_counts_of_parts_add_up() -> None:
    ranks, rooms = random_ranks(1, 100, 3)
    whole = rank_counts(ranks, rooms)
    assert rank_counts(ranks[:30], rooms[:30]) + rank_counts(ranks[30:], rooms[30:]) == whole
    assert statistics().total == statistics().kinds["a"] + statistics().kinds["b"]


def test_tokens_are_counted_as_by_counter() -> None:
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(20):
        ids = (rng.zipf(1.2, 300) % 5000).tolist()
        texts.append(TokenSequence(ids, (rng.random(300) < 0.7).tolist()))
    held_out = texts.pop()
    counter = Counter(
        token for text in texts for token, is_answer in zip(text.ids, text.answer, strict=True)
        if is_answer
    )  # fmt: skip
    found = count_vocabulary(texts, [held_out])
    assert found is not None
    assert dict(zip(found.ids, found.counts, strict=True)) == counter
    assert list(found.ids) == sorted(counter, key=lambda token: (-counter[token], token))
    curve = [found.coverage(size) for size in range(len(found.ids) + 1)]
    assert curve == sorted(curve) and curve[0] == 0 and curve[-1] == 1
    assert found.coverage(10**6) == 1
    first = set(found.ids[: COVERAGE_SIZES[0]])
    answer = [t for t, is_answer in zip(held_out.ids, held_out.answer, strict=True) if is_answer]
    share = sum(token in first for token in answer) / len(answer)
    assert found.held_out[0] == round(share, 4) and list(found.held_out) == sorted(found.held_out)


def test_without_answers_there_is_no_vocabulary() -> None:
    assert count_vocabulary([]) is None
    assert count_vocabulary([TokenSequence([1, 2], [False, False])]) is None


def test_rare_kinds_are_counted_together() -> None:
    names = by_frequency([""] * 3 + ["code"])
    assert names == {"": NO_KIND, "code": "code"}
    many = by_frequency([f"{at}" for at in range(100) for _ in range(at + 1)])
    assert many["99"] == "99" and many["0"] == OTHERS and len(set(many.values())) == 24


def test_they_survive_saving_and_loading(tmp_path: Path) -> None:
    config, _ = random_adapter(tiny_base())
    for saved in (statistics(), statistics(with_vocabulary=False)):
        write_statistics(tmp_path, saved)
        assert read_statistics(tmp_path, config) == saved


def test_every_id_of_the_default_model_fits_300_kb() -> None:
    ids = list(range(49152))
    vocabulary = DraftVocabulary(ids=tuple(ids), counts=(1,) * len(ids))
    whole = dataclasses.replace(statistics(k=8), vocabulary=vocabulary).to_dict()
    assert len(json.dumps(whole, separators=(",", ":"))) < 300_000


def test_an_adapter_is_loaded_with_its_statistics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, adapter = save_tiny_pair(tmp_path)

    def loaded() -> AdapterStatistics | None:
        return load(str(model), adapter_path=str(adapter))[0].statistics

    assert loaded() is None and not caplog.records  # as adapters of earlier versions
    write_statistics(adapter, statistics())
    assert loaded() == statistics() and not caplog.records
    with caplog.at_level(logging.WARNING):
        (adapter / STATISTICS_FILE).write_text("{")
        assert loaded() is None  # and decodes
    (record,) = caplog.records
    told = record.getMessage()
    assert str(adapter / STATISTICS_FILE) in told and "\n" not in told


def damaged(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Contents of a file with another value at a path."""
    values = json.loads(json.dumps(statistics().to_dict()))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("format_version",), 2, "format_version 2 is not supported"),
        (("kinds",), None, "not statistics of an adapter"),
        (("kinds",), {}, "same number of drafts"),
        (("kinds", "a"), [1], "not statistics of an adapter"),
        (("kinds", "a", "num_anchors"), 5, "not statistics of an adapter"),
        (("kinds", "a", "num_anchors"), [], "ranks must be 0 x 9"),
        (("kinds", "a", "num_anchors"), [9.5, 1, 1, 1], "num_anchors must be 4 whole numbers"),
        (("kinds", "a", "num_anchors"), [10**30, 1, 1, 1], "num_anchors must be 4 whole numbers"),
        (("kinds", "a", "num_anchors"), [1, 1, 1, 1], "more anchors than there are"),
        (("kinds", "a", "ranks", 0, 0), -1, "ranks must be 4 x 9 whole numbers"),
        (("kinds", "a", "ranks", 0, 0), "many", "ranks must be 4 x 9 whole numbers"),
        (("kinds", "a", "ranks", 0), [1], "ranks must be 4 x 9 whole numbers"),
        (("kinds", "a", "side_ranks", 0, 0), 1, "more anchors than there are"),
        (("vocabulary", "ids", 1), 10**6, "id 1000000 is not in the model's vocabulary"),
        (("vocabulary", "ids", 1), 0.5, "ids must be"),
        (("vocabulary", "ids"), [1], "there are 1 ids, but counts of"),
        (("vocabulary", "counts", 0), [1, 0], "counts of|not increase"),
        (("vocabulary", "held_out"), [0.5], "held_out must be 6 shares"),
        (("vocabulary", "held_out"), ["x"] * 6, "held_out must be 6 shares"),
    ],
)
def test_damaged_files(tmp_path: Path, path: tuple[Any, ...], value: Any, told: str) -> None:
    config, _ = random_adapter(tiny_base())
    (tmp_path / STATISTICS_FILE).write_text(json.dumps(damaged(path, value)))
    with pytest.raises(ValueError, match=told) as caught:
        read_statistics(tmp_path, config)
    assert str(caught.value).startswith(str(tmp_path / STATISTICS_FILE))
    assert "\n" not in str(caught.value)


def test_an_id_that_occurs_twice() -> None:
    with pytest.raises(ValueError, match="an id occurs twice"):
        DraftVocabulary(ids=(3, 3), counts=(2, 1))


def test_files_that_are_not_statistics(tmp_path: Path) -> None:
    config, _ = random_adapter(tiny_base())
    for content in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"format_version": 1}'):
        (tmp_path / STATISTICS_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=STATISTICS_FILE):
            read_statistics(tmp_path, config)
    write_statistics(tmp_path, statistics(k=3))
    with pytest.raises(ValueError, match="is of 3 drafts, and the adapter has 4"):
        read_statistics(tmp_path, config)


def test_new_weights_do_not_keep_the_statistics_of_others(tmp_path: Path) -> None:
    config, weights = random_adapter(tiny_base())
    save_adapter(tmp_path / "one", config, weights, statistics=statistics())
    assert read_statistics(tmp_path / "one", config) == statistics()
    save_adapter(tmp_path / "two", config, weights, statistics=statistics())
    save_mean([tmp_path / "one", tmp_path / "two"], tmp_path / "mean")
    assert read_statistics(tmp_path / "mean", read_any_config(tmp_path / "mean")) is None
    save_adapter(tmp_path / "one", config, {name: 2 * value for name, value in weights.items()})
    assert not (tmp_path / "one" / STATISTICS_FILE).exists()


def test_an_adapter_is_updated_without_its_weights(tmp_path: Path) -> None:
    config, weights = random_adapter(tiny_base())
    save_adapter(tmp_path, config, weights)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    update_adapter(tmp_path, config, statistics())
    total = statistics().total.acceptance
    found = read_any_config(tmp_path)
    assert found.acceptance == tuple(np.minimum.accumulate(np.round(total, 4)).tolist())
    assert dataclasses.replace(found, acceptance=()) == config
    assert read_statistics(tmp_path, found) == statistics()
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


def test_lines_are_readable() -> None:
    one = RankCounts(
        num_anchors=(4, 2),
        ranks=((2, 1, 0, 0, 0, 0, 0, 0, 1), (1, 0, 0, 0, 0, 0, 0, 0, 0)),
        side_ranks=((0,) * 9, (0,) * 8 + (1,)),
    )
    vocabulary = DraftVocabulary(ids=(7, 2), counts=(3, 1), held_out=(0.5,) * 6)
    found = AdapterStatistics(source="two texts", kinds={"text": one}, vocabulary=vocabulary)
    assert summary_lines(json.loads(json.dumps(found.summary()))) == [
        "statistics of two texts, 4 anchors, in %",
        "accepted with all earlier drafts, by position",
        "                     1     2",
        "all               50.0  50.0",
        "rank of the right token, all earlier drafts right",
        "                     1     2     3     4     5     6     7     8    >8",
        "draft 1           50.0  25.0   0.0   0.0   0.0   0.0   0.0   0.0  25.0",
        "draft 2          100.0   0.0   0.0   0.0   0.0   0.0   0.0   0.0   0.0",
        "the same after a runner-up, rank 2 to 8",
        "                     1     2     3     4     5     6     7     8    >8",
        "draft 2            0.0   0.0   0.0   0.0   0.0   0.0   0.0   0.0 100.0",
        "draft vocabulary: 2 ids in 4 tokens of training answers",
        "first N ids        1024   2048   4096   8192  16384  32768",
        "cover             100.0  100.0  100.0  100.0  100.0  100.0",
        "evaluated text     50.0   50.0   50.0   50.0   50.0   50.0",
    ]
