"""The history: a tree of messages in SQLite, with search, export and recovery after a kill."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from mlx_mtp.apps.chat_app.context import chat_messages
from mlx_mtp.apps.history import schema
from mlx_mtp.apps.history.store import History, split_reasoning
from mlx_mtp.apps.history.transfer import from_json, to_json, to_markdown
from mlx_mtp.storage.paths import data_dir

GROUP = {"tokens": ["a", " b"], "accepted": 1, "drafted": 3, "source": "mask", "ms": 20.5}


@pytest.fixture
def history(tmp_path):
    opened = History(tmp_path / "history.sqlite3")
    yield opened
    opened.close()


def talk(history: History, title: str, *texts: str) -> int:
    """Create a conversation with alternating messages; returns its id."""
    number, parent = history.create(title)["id"], None
    for at, text in enumerate(texts):
        parent = history.add(number, parent, ("user", "assistant")[at % 2], text)["id"]
    return number


def test_messages_form_a_tree_and_the_leaf_selects_the_shown_branch(history):
    number = history.create("Trees")["id"]
    question = history.add(number, None, "user", "What is a tree?")["id"]
    first = history.add(number, question, "assistant", "A plant.")["id"]
    second = history.add(number, question, "assistant", "A graph.")["id"]
    assert [each["text"] for each in history.path(first)] == ["What is a tree?", "A plant."]
    assert history.conversation(number)["leaf"] == second
    history.update(number, {"leaf": first})
    assert history.conversation(number)["leaf"] == first
    assert len(history.conversation(number)["messages"]) == 3


def test_streamed_text_is_appended_and_nothing_is_after_the_end(history):
    number = history.create()["id"]
    answer = history.add(number, None, "assistant", state="streaming")["id"]
    history.append(answer, "a b", [GROUP])
    history.append(answer, "a b", [GROUP])
    history.finish(answer, "done", {"generation_tps": 3.0})
    history.append(answer, "too late")
    message = history.message(answer)
    assert message["text"] == "a ba b" and message["groups"] == [GROUP, GROUP]
    assert message["state"] == "done" and message["stats"] == {"generation_tps": 3.0}


def test_streaming_messages_of_a_dead_process_are_marked_interrupted(tmp_path):
    path = tmp_path / "history.sqlite3"
    writer = History(path)
    answer = writer.add(writer.create()["id"], None, "assistant", state="streaming")["id"]
    reader = History(path)
    assert reader.message(answer)["state"] == "streaming"
    reader.close()
    writer.close()
    reader = History(path)
    assert reader.message(answer)["state"] == "interrupted"
    reader.close()


def test_deleting_a_conversation_deletes_its_messages(history):
    number = talk(history, "Gone", "findable words", "indeed")
    kept = talk(history, "Kept", "other words")
    history.delete(number)
    assert [each["id"] for each in history.conversations()] == [kept]
    assert history.conversations("findable") == []
    with pytest.raises(KeyError):
        history.conversation(number)
    with pytest.raises(KeyError):
        history.delete(number)


@pytest.mark.parametrize("with_index", [True, False])
def test_search_finds_titles_and_text_of_any_script(tmp_path, monkeypatch, with_index):
    if not with_index:
        monkeypatch.setattr(schema, "_INDEX", "CREATE VIRTUAL TABLE message_index USING nothing;")
    history = History(tmp_path / "history.sqlite3")
    assert schema.has_index(history._db) == with_index
    one = talk(history, "Baking bread", 'Mix 100% "rye" flour', "then knead_it \\ well")
    two = talk(history, "Sprachen", "Grüße aus Köln", "東京は日本の首都です")
    cases = {"BREAD": one, "rye": one, '"rye"': one, "100%": one, "knead_it": one, "\\ w": one}
    cases |= {"Köln": two, "日本の": two, "首都": two}
    for search, expected in cases.items():
        assert [each["id"] for each in history.conversations(search)] == [expected], search
    for search in ("bre%d", "kneadXit", "NOT rye", "* OR", "\0\0\0"):
        assert history.conversations(search) == [], search
    assert "Köln" in history.conversations("Köln")[0]["snippet"]
    history.close()


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"title": 5}, "title must be a string"),
        ({"nonsense": 5}, "nonsense"),
        ({"options": []}, "options"),
        ({"options": {"x": float("nan")}}, "options is not valid JSON"),
        ({"options": {"x": "y" * 70_000}}, "options has"),
        ({"system_prompt": "x" * 1_000_001}, "system_prompt has"),
        ({"system_prompt": "\ud800"}, "system_prompt is not valid Unicode"),
        ({"leaf": 99}, "leaf 99"),
        ({"leaf": True}, "leaf"),
    ],
)
def test_bad_values_are_named(history, values, culprit):
    number = talk(history, "x", "y")
    with pytest.raises(ValueError, match=culprit):
        history.update(number, values)


def test_a_parent_must_be_of_the_same_conversation(history):
    talk(history, "one", "a")
    other = history.create("two")["id"]
    with pytest.raises(ValueError, match="parent 1 is not"):
        history.add(other, 1, "user", "b")
    with pytest.raises(KeyError):
        history.add(99, None, "user", "b")


def test_export_and_import_keep_everything(history, tmp_path):
    number = history.create("Round", system_prompt="Be brief.", options={"temp": 0.5})["id"]
    question = history.add(number, None, "user", "One?")["id"]
    answer = history.add(number, question, "assistant", state="streaming", model="tiny")["id"]
    history.append(answer, "a b", [GROUP])
    history.finish(answer, "stopped", {"num_steps": 1})
    history.add(number, question, "assistant", "Other")
    history.update(number, {"leaf": answer})
    exported = to_json(history, [number])

    other = History(tmp_path / "other.sqlite3")
    talk(other, "was here before", "so numbers differ")
    [copied] = from_json(other, exported.encode())
    assert json.loads(to_json(other, [copied])) == json.loads(exported)
    assert to_markdown(other, copied) == to_markdown(history, number)
    assert "## You\n\nOne?\n\n## Assistant\n\na b\n" in to_markdown(history, number)
    other.close()


def _export(**changes) -> dict:
    conversation = {"title": "x", "messages": [{"role": "user", "text": "y", "parent": None}]}
    whole = {"format": "mlx-mtp conversations", "version": 1, "conversations": [conversation]}
    return whole | changes


@pytest.mark.parametrize(
    ("data", "culprit"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[]", "not an export"),
        (_export(version=2), "version 2"),
        (_export(conversations={}), "must be a list"),
        (_export(conversations=[5]), "conversation 1 is not"),
        (_export(conversations=[{"messages": [{"role": "system"}]}]), "role must be .* 'sys"),
        (_export(conversations=[{"messages": [{"role": "user", "text": 5}]}]), "message 1: text"),
        (
            _export(conversations=[{"messages": [{"role": "user", "text": "", "parent": 0}]}]),
            "parent '?0",
        ),
        (_export(conversations=[{"messages": [], "title": None}]), "conversation 1: title"),
        (b'{"format":"mlx-mtp conversations","version":1,"conversations":[{"messages":[],'
         b'"options":{"a":NaN}}]}', "not finite"),
    ],
)  # fmt: skip
def test_a_damaged_import_changes_nothing_and_names_the_place(history, data, culprit):
    if not isinstance(data, bytes):
        data["conversations"] = [*_good(), *data["conversations"]] if _listed(data) else 5
        data = json.dumps(data).encode()
        culprit = culprit.replace("conversation 1", "conversation 2")
    with pytest.raises(ValueError, match=culprit) as caught:
        from_json(history, data)
    assert "\n" not in str(caught.value)
    assert history.conversations() == []


def _listed(data: dict) -> bool:
    return isinstance(data["conversations"], list)


def _good() -> list[dict]:
    return _export()["conversations"]


def test_invalid_steps_are_omitted(history):
    data = _export()
    for wrong in (
        {"ms": "<b>"},
        {"drafted": 10**9},
        {"accepted": -1},
        {"tokens": [1]},
        {"span": [3, 1]},
    ):
        values = {"groups": [GROUP | wrong], "stats": {"error": {"a": 1}, "num_steps": 2}}
        data["conversations"][0]["messages"][0].update(values)
        [number] = from_json(history, json.dumps(data).encode())
        [message] = history.conversation(number)["messages"]
        assert message["groups"] == [] and message["text"] == "y"
        assert message["stats"] == {"num_steps": 2}


@pytest.mark.parametrize(
    ("span", "parts"),
    [
        ([0, 0], ("hm</think>ok", "")),
        ([0, 0, 2, 10], ("hm", "ok")),
        ([1, 2, 3, 4], ("<", "hthink>ok")),
        (None, ("", "hm</think>ok")),
    ],
)
def test_reasoning_is_kept_apart(history, span, parts):
    number = history.create()["id"]
    answer = history.add(number, None, "assistant", state="streaming")["id"]
    history.append(answer, "hm</think>ok", [GROUP, GROUP | ({"span": span} if span else {})])
    [message] = history.path(answer)
    assert split_reasoning(message) == parts
    sent = chat_messages("", [message])[0]
    assert (sent.get("reasoning_content", ""), sent["content"]) == parts
    assert ("<details>" in to_markdown(history, number)) == bool(parts[0])
    [copied] = from_json(history, to_json(history, [number]).encode())
    leaf = history.conversation(copied)["leaf"]
    assert split_reasoning(history.path(leaf)[0]) == parts


def test_settings_are_saved(history):
    history.remember({"theme": "dark"})
    history.remember({"theme": "light", "width": 3})
    assert history.settings() == {"theme": "light", "width": 3}
    with pytest.raises(ValueError, match="theme is not valid JSON"):
        history.remember({"theme": {1, 2}})


def test_a_foreign_or_newer_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "history.sqlite3"
    path.write_bytes(b"this is not a database at all, but it is long enough to look" * 40)
    with pytest.raises(ValueError, match="as a conversation history"):
        History(path)
    path.unlink()
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 999")
    newer.close()
    with pytest.raises(ValueError, match="newer version"):
        History(path)


def test_the_file_is_in_wal_mode_and_only_its_owner_reads_it(history, tmp_path):
    assert history._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert (tmp_path / "history.sqlite3").stat().st_mode & 0o077 == 0


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_MTP_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.delenv("MLX_MTP_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_dir() == tmp_path / "mlx-mtp"


_WRITER = """
import sys, time
from pathlib import Path
from mlx_mtp.apps.history.store import History
history = History(Path(sys.argv[1]))
answer = history.add(history.create("x")["id"], None, "assistant", state="streaming")["id"]
for number in range(10**6):
    history.append(answer, f"{number} ")
    print(number, flush=True)
"""


@pytest.mark.slow
def test_what_was_appended_survives_kill_9(tmp_path):
    path = tmp_path / "history.sqlite3"
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        printed = [int(writer.stdout.readline()) for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        printed += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
        history = History(path)
        latest = history.conversation(history.conversations()[0]["id"])["messages"][0]
        history.close()
        assert latest["state"] == "interrupted"
        kept = [int(each) for each in latest["text"].split()]
        assert kept[: len(printed)] == printed and kept == list(range(len(kept)))


def test_ten_thousand_messages_are_searched_quickly(tmp_path):
    history = History(tmp_path / "history.sqlite3")
    with history.transaction():
        for at in range(100):
            talk(history, f"talk {at}", *(f"message {at} {each} " * 20 for each in range(100)))
    began = time.perf_counter()
    assert len(history.conversations("message 7 42")) >= 1
    assert len(history.conversations()) == 100
    assert time.perf_counter() - began < 2.0
    history.close()
