"""The routes of the app: answers, the history, and access control."""

from __future__ import annotations

import hashlib
import json
import time

import httpx
import pytest

from mlx_mtp.apps.chat_app.race import hash_of, verdict
from tests.app.host import AppHost, events_of, hosted_app


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with hosted_app(tmp_path_factory.mktemp("app") / "history.sqlite3", unwatched_s=0.5) as host:
        yield host


def test_an_answer_is_streamed_step_by_step_and_saved(app: AppHost):
    number = app.new_conversation()
    text = "Tell me *something* slowly about a tree."
    answer = app.start(number, text)
    events = app.events(answer)
    assert events[0] == {"type": "started", "prompt_tokens": 10, "cached_tokens": 4}
    groups = [each for each in events if each["type"] == "group"]
    assert [len(each["tokens"]) for each in groups] == [1, 2, 3, 4]
    assert "".join(token for each in groups for token in each["tokens"]) == text
    assert events[-1]["type"] == "end" and events[-1]["state"] == "done"
    kept = app.conversation(number)
    assert [each["text"] for each in kept["messages"]] == [text, text]
    names = ("tokens", "accepted", "drafted", "source", "ms")
    assert kept["messages"][1]["groups"] == [
        {name: each[name] for name in names} for each in groups
    ]
    assert kept["messages"][1]["state"] == "done" and kept["messages"][1]["model"] == "fake/model"
    assert kept["title"] == text and kept["leaf"] == answer


def test_an_answer_can_be_watched_again_from_its_beginning(app: AppHost):
    answer = app.start(app.new_conversation(), "watch me twice")
    with httpx.Client(base_url=app.client.base_url, cookies=app.client.cookies) as other:
        first = events_of(other.get(f"/answers/{answer}").text)
    assert first[-1]["type"] == "end"
    again = app.events(answer)
    assert again == [each for each in first if each["type"] in ("group", "end")]


def test_stop_keeps_the_text_so_far(app: AppHost):
    number = app.new_conversation()
    answer = app.start(number, "slow")
    time.sleep(0.3)
    assert app.client.post(f"/answers/{answer}/stop").status_code == 204
    assert app.events(answer)[-1]["state"] == "stopped"
    message = app.conversation(number)["messages"][1]
    assert message["state"] == "stopped" and message["text"].startswith("slow")
    assert message["text"] == "".join(t for group in message["groups"] for t in group["tokens"])


def test_an_unwatched_answer_ends_and_a_watched_one_continues(app: AppHost):
    number = app.new_conversation()
    answer = app.start(number, "slow")
    with app.client.stream("GET", f"/answers/{answer}") as reply:
        lines = reply.iter_lines()
        began = time.monotonic()
        while time.monotonic() - began < 1.2:  # longer than an answer may be unwatched
            next(lines)
    time.sleep(1.2)
    assert app.conversation(number)["messages"][1]["state"] == "interrupted"


def state_of(app: AppHost, number: int) -> str:
    """State of the first answer of a conversation."""
    return app.conversation(number)["messages"][1]["state"]


def test_a_page_that_reads_nothing_is_disconnected(tmp_path):
    with hosted_app(tmp_path / "history.sqlite3", unwatched_s=0.2, send_timeout_s=0.4) as app:
        number = app.new_conversation()
        answer = app.start(number, "flood")
        with app.client.stream("GET", f"/answers/{answer}"):  # nothing is read
            deadline = time.monotonic() + 20
            while app.engine.running or state_of(app, number) == "streaming":
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert state_of(app, number) == "interrupted"


def test_text_is_written_while_it_streams(app: AppHost):
    number = app.new_conversation()
    answer = app.start(number, "slow")
    with app.client.stream("GET", f"/answers/{answer}") as reply:
        lines = reply.iter_lines()
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            next(lines)
        message = app.conversation(number)["messages"][1]
        assert message["state"] == "streaming" and "slow" in message["text"]
    app.client.post(f"/answers/{answer}/stop")


def test_regenerate_and_edit_make_branches(app: AppHost):
    number = app.new_conversation()
    first = app.ask(number, "question")
    question = app.conversation(number)["messages"][0]["id"]
    again = app.ask(number, None, question)
    edited = app.ask(number, "another question", None)
    kept = app.conversation(number)
    parents = {each["id"]: each["parent"] for each in kept["messages"]}
    assert parents[first] == parents[again] == question
    assert parents[parents[edited]] is None and kept["leaf"] == edited
    assert app.client.patch(f"/conversations/{number}", json={"leaf": again}).status_code == 204
    assert app.conversation(number)["leaf"] == again


@pytest.mark.parametrize(
    ("body", "status", "culprit"),
    [
        ({}, 400, "text is missing"),
        ({"parent": 10**6}, 404, "no item with id 1000000"),
        ({"text": 5}, 400, "text"),
        ({"text": "x", "more": 1}, 400, "more"),
        ({"text": "x", "parent": -1}, 400, "parent"),
    ],
)
def test_bad_requests_for_answers_are_named(app: AppHost, body, status, culprit):
    reply = app.client.post(f"/conversations/{app.new_conversation()}/answer", json=body)
    assert reply.status_code == status and culprit in reply.json()["error"]["message"]


def test_a_message_must_follow_one_of_the_other_role(app: AppHost):
    number = app.new_conversation()
    answer = app.ask(number, "one")
    question = app.conversation(number)["messages"][0]["id"]
    for body in ({"parent": answer}, {"parent": question, "text": "two"}):
        reply = app.client.post(f"/conversations/{number}/answer", json=body)
        assert reply.status_code == 400, body
    other = app.new_conversation()
    reply = app.client.post(f"/conversations/{other}/answer", json={"parent": question})
    assert "another conversation" in reply.json()["error"]["message"]


def test_failures_of_the_engine_are_saved_and_reported(app: AppHost):
    number = app.new_conversation()
    failed = app.start(number, "fail")
    assert "out of luck" in app.events(failed)[-1]["stats"]["error"]
    assert app.conversation(number)["messages"][1]["state"] == "failed"
    died = app.start(number, "die")
    end = app.events(died)[-1]
    assert end["state"] == "interrupted" and "died" in end["stats"]["error"]
    assert app.conversation(number)["messages"][3]["text"].startswith("last words")
    app.wait_for("ok")
    assert app.ask(number, "back again")


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"options": {"temp": 3}}, "temp"),
        ({"options": {"nonsense": 3}}, "nonsense"),
        ({"options": {"layout": "round"}}, "layout"),
        ({"title": "x" * 300}, "title"),
        ({"leaf": 10**9}, "leaf"),
    ],
)
def test_bad_changes_are_named(app: AppHost, values, culprit):
    reply = app.client.patch(f"/conversations/{app.new_conversation()}", json=values)
    assert reply.status_code == 400 and culprit in reply.json()["error"]["message"]


def test_options_reach_the_engine(app: AppHost):
    number = app.new_conversation(options={"layout": "plain", "max_tokens": 2})
    events = app.events(app.start(number, "twelve letters"))
    assert [each["tokens"] for each in events if each["type"] == "group"] == [["twel"], ["ve l"]]
    assert events[-1]["state"] == "length"


def test_export_import_search_rename_delete(app: AppHost):
    number = app.new_conversation()
    app.ask(number, "zebras and quaggas")
    exported = app.client.get(f"/conversations/{number}/export")
    assert "attachment" in exported.headers["content-disposition"]
    markdown = app.client.get(f"/conversations/{number}/export?format=markdown").text
    assert markdown.startswith("# zebras and quaggas\n")
    [copy] = app.client.post("/import", content=exported.content).json()["conversations"]
    app.client.patch(f"/conversations/{copy}", json={"title": "Stripes"})
    matches = app.client.get("/conversations", params={"search": "quaggas"}).json()
    assert {each["id"]: each["title"] for each in matches} == {
        number: "zebras and quaggas",
        copy: "Stripes",
    }
    assert len(json.loads(app.client.get("/export").text)["conversations"]) >= 2
    assert app.client.delete(f"/conversations/{copy}").status_code == 204
    assert app.client.get(f"/conversations/{copy}").status_code == 404
    bad = app.client.post("/import", content=b"{}")
    assert bad.status_code == 400 and "not an export" in bad.json()["error"]["message"]


def test_a_race_reports_identical_outputs_and_the_speed_up(app: AppHost):
    reply = app.client.post("/race", json={"text": "run as fast as you can, " * 10})
    events = events_of(reply.text)
    ends = [each for each in events if each["type"] == "lane_end"]
    assert [each["lane"] for each in ends] == ["plain", "mtp"]
    assert ends[0]["sha256"] == ends[1]["sha256"] and len(ends[0]["sha256"]) == 64
    assert ends[0]["steps"] == ends[0]["tokens"] == 60 and ends[1]["steps"] < 30
    result = events[-1]
    assert result["identical"] and result["differs_at"] is None and result["speed_up"] > 1.2
    assert result["others"] == 0


def test_a_race_reports_answers_that_ran_at_the_same_time(app: AppHost):
    bearer = {"Authorization": f"Bearer {app.token}"}
    body = {"messages": [{"role": "user", "content": "slow"}], "stream": True}
    with (
        httpx.Client(base_url=app.url, headers=bearer, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as other,
    ):
        assert other.status_code == 200
        reply = app.client.post("/race", json={"text": "run as fast as you can, " * 2})
    ends = [each["others"] for each in events_of(reply.text) if each["type"] == "lane_end"]
    assert ends == [1, 1] and events_of(reply.text)[-1]["others"] == 2


def test_a_race_reports_an_answer_that_started_during_it(app: AppHost):
    bearer = {"Authorization": f"Bearer {app.token}"}
    body = {"messages": [{"role": "user", "content": "hello"}]}
    asked: list[httpx.Response] = []
    with (
        httpx.Client(base_url=app.url, headers=bearer, timeout=30) as client,
        app.client.stream("POST", "/race", json={"text": "run as fast as you can, " * 60}) as reply,
    ):
        text = ""
        for line in reply.iter_lines():
            text += f"{line}\n"
            if '"group"' in line and not asked:
                asked.append(client.post("/v1/chat/completions", json=body))
    assert asked[0].status_code == 200
    ends = [each["others"] for each in events_of(text) if each["type"] == "lane_end"]
    assert ends == [1, 0] and events_of(text)[-1]["others"] == 1


def test_a_race_over_a_question_of_the_conversation(app: AppHost):
    number = app.new_conversation()
    app.ask(number, "which question")
    question = app.conversation(number)["messages"][0]["id"]
    reply = app.client.post("/race", json={"conversation": number, "message": question})
    assert events_of(reply.text)[-1]["identical"]
    answer = app.conversation(number)["messages"][1]["id"]
    reply = app.client.post("/race", json={"conversation": number, "message": answer})
    assert reply.status_code == 400


@pytest.mark.parametrize("options", [{"layout": "plain"}, {"num_draft_tokens": 0}])
def test_a_race_of_plain_decoding_with_itself_is_rejected(app: AppHost, options):
    reply = app.client.post("/race", json={"text": "run", "options": options})
    assert reply.status_code == 400 and "side" in reply.json()["error"]["message"]


def test_a_race_cannot_start_during_an_answer(app: AppHost):
    answer = app.start(app.new_conversation(), "slow")
    assert app.client.post("/race", json={"text": "run"}).status_code == 409
    app.client.post(f"/answers/{answer}/stop")
    assert app.events(answer)[-1]["state"] == "stopped"


def test_k_is_limited_to_that_of_the_adapter(app: AppHost):
    number = app.new_conversation(options={"num_draft_tokens": 64})
    events = app.events(app.start(number, "four drafts are all that there are " * 3))
    assert max(len(each["tokens"]) for each in events if each["type"] == "group") == 5


def test_a_verdict_reports_the_first_difference():
    def lane(ids: list[int], seconds: float) -> dict:
        counts = {"tokens": len(ids), "timed_tokens": len(ids) - 1, "seconds": seconds, "others": 1}
        return {"ids": ids, "sha256": hash_of(ids)} | counts

    result = verdict(lane([1, 2, 3], 2.0), lane([1, 2, 4], 1.0))
    assert not result["identical"] and result["differs_at"] == 2 and result["speed_up"] == 2.0
    assert result["others"] == 2
    assert verdict(lane([1, 2], 1.0), lane([1, 2, 3], 1.0))["differs_at"] == 2
    assert verdict(lane([1], 0.0), lane([1], 0.0))["speed_up"] is None
    expected = bytes([1, 0, 0, 0, 0, 1, 0, 0])
    assert hash_of([1, 256]) == hashlib.sha256(expected).hexdigest()


def test_another_model_is_loaded_and_a_broken_one_restores_the_previous(app: AppHost, tmp_path):
    for name in ("good", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    missing = app.client.post("/model", json={"model": str(tmp_path / "none")})
    assert missing.status_code == 400 and "neither a folder" in missing.text
    no_adapter = app.client.post("/model", json={"adapter_path": str(tmp_path / "good")})
    assert no_adapter.status_code == 400 and "adapters.safetensors" in no_adapter.text
    assert app.client.post("/model", json={"model": str(tmp_path / "good")}).status_code == 202
    assert app.client.post("/model", json={}).status_code == 409
    app.wait_for("ok")
    state = app.client.get("/state").json()
    assert state["chosen"]["model"] == str(tmp_path / "good") and state["model"]["name"] == "good"
    app.client.post("/model", json={"model": str(tmp_path / "broken")})
    deadline = time.monotonic() + 20
    while "cannot load" not in (state := app.client.get("/state").json())["error"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    app.wait_for("ok")
    state = app.client.get("/state").json()
    assert state["chosen"]["model"] == str(tmp_path / "good") and "cannot load" in state["error"]
    assert app.ask(app.new_conversation(), "still here")


def test_facts_contain_the_cost_of_steps(app: AppHost):
    facts = app.client.get("/facts").json()
    assert facts["costs"]["rows"] == [1, 2, 4, 8] and facts["num_draft_tokens"] == 4


@pytest.mark.parametrize("path", ["/app/api/conversations", "/app/api/state", "/v1/models"])
def test_every_route_needs_the_cookie_or_the_token(app: AppHost, path):
    assert httpx.get(app.url + path).status_code == 401
    name = next(iter(app.client.cookies))
    assert httpx.get(app.url + path, cookies={name: "x" * 43}).status_code == 401
    bad = {"Authorization": "Bearer wrong"}
    assert (
        httpx.get(app.url + path, headers=bad, cookies=dict(app.client.cookies)).status_code == 401
    )
    good = {"Authorization": f"Bearer {app.token}"}
    assert httpx.get(app.url + path, headers=good).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
    ],
)
def test_other_sites_are_refused_even_with_the_cookie(app: AppHost, headers):
    reply = app.client.get("/conversations", headers=headers)
    assert reply.status_code in (401, 403)
    assert app.client.post("/conversations", json={}, headers=headers).status_code in (401, 403)


def test_the_cookie_is_for_this_page_alone(app: AppHost):
    reply = httpx.post(f"{app.url}/app/api/session", json={"token": app.token})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert app.url.rpartition(":")[2] in cookie.partition("=")[0]
    wrong = httpx.post(f"{app.url}/app/api/session", json={"token": "guess"})
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers


@pytest.mark.parametrize("path", ["/", "/app/api/state", "/nowhere"])
def test_every_response_has_the_policy(app: AppHost, path):
    headers = httpx.get(app.url + path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_the_page_is_served(app: AppHost):
    page = httpx.get(app.url + "/")
    assert page.headers["content-type"].startswith("text/html") and '<div id="app">' in page.text
    script = page.text.partition('src="')[2].partition('"')[0]
    served = httpx.get(app.url + script)
    assert served.headers["content-type"].startswith("text/javascript")
    assert "immutable" in served.headers["cache-control"]
    assert httpx.get(app.url + "/assets/../../pyproject.toml").status_code in (401, 404)


def test_answers_are_saved_when_the_app_ends(tmp_path):
    path = tmp_path / "history.sqlite3"
    with hosted_app(path) as host:
        number = host.new_conversation()
        host.start(number, "slow")
        time.sleep(0.2)
    with hosted_app(path) as host:
        message = host.conversation(number)["messages"][1]
        assert message["state"] == "interrupted" and message["text"].startswith("slow")


def test_a_page_that_is_not_built_is_reported(tmp_path):
    with (
        pytest.raises(ValueError, match="npm run build"),
        hosted_app(tmp_path / "h.sqlite3", folder=tmp_path),
    ):
        pass
