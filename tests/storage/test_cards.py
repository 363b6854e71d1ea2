"""Model cards carry what the hub reads; uploads say what went wrong in one line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from mlx_mtp.converters.base.model import BaseResult, Quantisation
from mlx_mtp.converters.card import adapter_card, base_card
from mlx_mtp.converters.upload import upload
from mlx_mtp.storage.cards import is_hub_id, model_card, read_licence
from tests.helpers.tiny import random_adapter, tiny_base


def front_matter(card: str) -> dict[str, Any]:
    """Parse a card's front matter as the hub does."""
    head, text, body = card.split("---\n", 2)
    assert head == "" and body.startswith("\n# ")
    return yaml.safe_load(text)


def result(**changes: Any) -> BaseResult:
    values: dict[str, Any] = {
        "source": Path("x"),
        "model_type": "llama",
        "licence": None,
        "dtype": "float16",
        "quantisation": None,
        "num_bytes": 282_700_000,
        "num_parameters": 502_300_000,
        "compared_texts": 1,
    }
    return BaseResult(**(values | changes))


def test_a_card_has_front_matter_facts_and_usage():
    card = model_card(
        kind="model",
        base_model="user/Name-7B",
        licence="apache-2.0",
        facts=["One fact.", "Another."],
        usage=["command one", "command two"],
        tags=["llama", "mlx"],
    )
    assert front_matter(card) == {
        "library_name": "mlx",
        "base_model": "user/Name-7B",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "llama"],
    }
    assert "# user/Name-7B in MLX\n\nOne fact.\n\nAnother.\n\n```\ncommand one\ncomm" in card
    assert card.endswith("```\n")


def test_an_adapters_card():
    config, _ = random_adapter(tiny_base())
    card = adapter_card(config, licence="mit", notes=["alpha: 32, given", "mask row: row 7"])
    front = front_matter(card)
    assert front["license"] == "mit" and "base_model" not in front  # tiny-llama is no hub id
    assert {"mlx", "multi-token-prediction", "lora"} <= set(front["tags"])
    assert "4 mask tokens, gated LoRA of rank 4" in card and "a sampler head" in card
    assert "- alpha: 32, given\n- mask row: row 7" in card
    assert "mlx-lm does not load it" in card
    assert "Assumed" not in adapter_card(config, licence=None)


def test_a_models_card_and_a_bundles():
    quantised = result(quantisation=Quantisation(bits=4, group_size=64))
    card = base_card("user/name", quantised, adapter=None, licence=None)
    front = front_matter(card)
    assert front["base_model"] == "user/name" and front["tags"] == ["mlx", "llama"]
    assert "license" not in front
    assert "llama, 502.3M parameters, 282.7 MB, 4-bit in groups of 64" in card
    assert "mlx_lm.generate --model FOLDER" in card
    config, _ = random_adapter(tiny_base())
    bundle = base_card("user/name", result(), adapter=config, licence="mit")
    assert "multi-token-prediction" in front_matter(bundle)["tags"]
    assert "float16" in bundle and "In `adapter/`: An mlx-mtp adapter" in bundle
    assert "mlx-mtp generate --model FOLDER" in bundle


@pytest.mark.parametrize("licence", ["mit", "no", "null", "1.0", "a: b", "[x]", "- y", "ü \"'#"])
def test_any_licence_survives_yaml(tmp_path, licence):
    card = model_card(kind="model", base_model="a/b", licence=licence, facts=[], usage=[])
    assert front_matter(card)["license"] == licence
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# X\n", "apache-2.0"),
        ("\ufeff---\r\ntags: [x]\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\n- list\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system [echo]\n---\n", None),
        ("license: mit\n", None),
        ("# X\n---\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_licences_are_read_from_front_matter(tmp_path, text, licence):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_licence(tmp_path) == licence


def test_no_card_no_licence(tmp_path):
    assert read_licence(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    read_licence(tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("user/name", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("a/b.c_d", True),
        ("name", False),
        ("/home/user", False),
        ("./x", False),
        ("../x", False),
        ("a/b/c", False),
        ("a/b c", False),
        ("a/..b", False),
        ("a/b-", False),
    ],
)
def test_what_can_be_a_hub_id(name, wanted):
    assert is_hub_id(name) is wanted


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub that an upload of small files needs."""

    def do_GET(self) -> None:
        server: Any = self.server
        found = {"id": "user/name", "_id": "1", "siblings": []}
        self._answer(found, status=404 if server.refuse else 200)

    def do_POST(self) -> None:
        body = self._body()
        server: Any = self.server
        server.calls.append((self.path, body))
        if server.refuse and self.path.endswith(server.refuse):
            self._answer({"error": "not\nallowed"}, status=403)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{server.address}/user/name", "id": "user/name"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            oid = "0" * 40
            url = f"{server.address}/user/name/commit/{oid}"
            self._answer({"success": True, "commitOid": oid, "commitUrl": url})
        else:
            self._answer({"errors": [], "warnings": []})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, values: dict[str, Any], *, status: int = 200) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on this machine; ``calls`` are its POST requests, ``refuse`` the address it refuses."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.refuse = [], None
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(
        "mlx_mtp.converters.upload.HfApi",
        lambda: huggingface_hub.HfApi(endpoint=server.address, token="hf_test"),
    )
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def folder_to_upload(root: Path) -> Path:
    folder = root / "model"
    (folder / "adapter").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: mlx\n---\n# X\n")
    (folder / "config.json").write_text("{}")
    (folder / "adapter" / "adapter_config.json").write_text('{"x": 1}')
    return folder


def test_a_folder_is_pushed_in_one_commit(hub, tmp_path):
    folder = folder_to_upload(tmp_path)
    assert upload(folder, "user/name", private=True) == f"{hub.address}/user/name"
    created = json.loads(next(body for path, body in hub.calls if path == "/api/repos/create"))
    assert created["name"] == "name" and created["organization"] == "user"
    assert created.get("private") is True or created.get("visibility") == "private"
    commits = [body for path, body in hub.calls if "/commit/main" in path]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]).decode()
        for line in lines
        if line["key"] == "file"
    }
    assert files == {
        "README.md": "---\nlibrary_name: mlx\n---\n# X\n",
        "config.json": "{}",
        "adapter/adapter_config.json": '{"x": 1}',
    }


@pytest.mark.parametrize("address", ["/api/repos/create", "/api/models/user/name/commit/main"])
def test_a_refusal_of_the_hub_is_one_line(hub, tmp_path, address):
    hub.refuse = address
    with pytest.raises(ValueError, match="the hub refuses user/name: ") as caught:
        upload(folder_to_upload(tmp_path), "user/name")
    assert "\n" not in str(caught.value) and "403" in str(caught.value)


def test_bad_uploads_are_one_line(hub, tmp_path, monkeypatch):
    folder = folder_to_upload(tmp_path)
    with pytest.raises(ValueError, match="user/na me is not a valid repository name"):
        upload(folder, "user/na me")
    with pytest.raises(ValueError, match="is not a folder with files to upload"):
        upload(tmp_path / "none", "user/name")
    assert hub.calls == []

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("out\nof reach")

    monkeypatch.setattr(
        "mlx_mtp.converters.upload.HfApi", lambda: SimpleNamespace(create_repo=fail)
    )
    with pytest.raises(ValueError, match="cannot upload .* to user/name: out of reach"):
        upload(folder, "user/name")
