"""Loading: folders that mlx-lm reads too, and one clear line about everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_mtp.converters.base.model import convert_base
from mlx_mtp.decoding.loop import decode
from mlx_mtp.lab.tiny_models import tiny_config
from mlx_mtp.loading import load, load_with_status, read_adapter, read_tensors, resolve
from mlx_mtp.model.config import CONFIG_FILE, WEIGHTS_FILE, MTPConfig
from mlx_mtp.model.mtp_model import MASK_EMBEDDINGS, fingerprint
from tests.helpers.fixtures_generate import EOS
from tests.helpers.tiny import (
    BYTE_VOCAB,
    KINDS,
    random_adapter,
    save_adapter,
    save_tiny_model,
    save_tiny_pair,
    tiny_base,
)

BYTES: dict[str, Any] = {"vocab_size": BYTE_VOCAB, "eos_token_id": EOS}
Q_PROJ = "model.layers.0.self_attn.q_proj"
Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny llama and its adapter."""
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


def refused(*args: Any, **options: Any) -> str:
    """The one line that loading refuses with."""
    with pytest.raises(ValueError) as error:
        load(*args, **options)
    message = str(error.value)
    assert message.strip() and "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_is_one_of_mlx_lms(kind: str, tmp_path: Path) -> None:
    model_path, adapter_path = save_tiny_pair(tmp_path, kind)
    model, tokenizer = load(str(model_path), adapter_path=str(adapter_path))
    stock, stock_tokenizer = mlx_lm.load(str(model_path))[:2]
    ids = tokenizer.encode("Hello, wörld!")
    assert ids == stock_tokenizer.encode("Hello, wörld!") == list("Hello, wörld!".encode())
    assert tokenizer.eos_token_ids == {EOS}
    expected = [int(token) for token, _ in generate_step(mx.array(ids), stock, max_tokens=12)]
    steps = decode(model, ids, max_tokens=12, layout="quadratic")
    assert [token for step in steps for token in step.tokens] == expected
    assert model.config is not None and model.config.base_model_type == kind
    assert model.name == str(model_path)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe"])
def test_quantised_folders_load(kind: str, tmp_path: Path) -> None:
    model_path, adapter_path = save_tiny_pair(tmp_path, kind, quantised=True)
    model, _ = load(str(model_path), adapter_path=str(adapter_path))
    stock = mlx_lm.load(str(model_path))[0]
    ids = mx.array([[5, 6, 7]])
    logits = model.logits(model(ids, cache=model.make_cache()))
    assert mx.allclose(logits, stock(ids), rtol=1e-3, atol=1e-3)
    if mx.default_device().type == mx.cpu:
        parameters = dict(tree_flatten(model.base.parameters()))
        types = {value.dtype for value in parameters.values()}
        assert types == {mx.float32} or kind == "qwen3_moe"
    plain = [step.tokens for step in decode(model, [5, 6], layout="plain", max_tokens=10)]
    steps = decode(model, [5, 6], layout="quadratic", max_tokens=10)
    assert [t for step in steps for t in step.tokens] == [t for tokens in plain for t in tokens]


def test_without_an_adapter_the_model_decodes_plainly(pair: tuple[Path, Path]) -> None:
    model_path, adapter_path = (str(path) for path in pair)
    for options in ({}, {"adapter_path": adapter_path, "mtp": False}):
        model, _ = load(model_path, **options)
        assert model.config is None and model.num_draft_tokens == 0


def test_options_reach_the_tokenizer(pair: tuple[Path, Path]) -> None:
    _, tokenizer = load(str(pair[0]), tokenizer_config={"chat_template": "hi"})
    assert tokenizer.chat_template == "hi"


def test_adapters_survive_being_written(tmp_path: Path) -> None:
    config, weights = random_adapter(tiny_base())
    found_config, found = read_adapter(save_adapter(tmp_path, config, weights))
    assert found_config == config and found.keys() == weights.keys()
    assert all(mx.array_equal(found[name], weights[name]) for name in weights)


# Folders that are not what they should be


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize(
    "name", ["./nowhere", "nowhere", "/no/where/at/all", "a/b/c/d", "~/no-where"]
)
def test_a_missing_folder(pair: tuple[Path, Path], kind: str, name: str) -> None:
    options = {"adapter_path": name} if kind == "adapter" else {}
    found = refused(str(pair[0]) if kind == "adapter" else name, **options)
    assert found == f"{kind} {name} does not exist"


def test_a_file_is_no_folder(pair: tuple[Path, Path]) -> None:
    path = str(pair[0] / "config.json")
    assert refused(path) == f"model {path} is a file, not a folder"
    assert refused(str(pair[0]), adapter_path=path) == f"adapter {path} is a file, not a folder"


def test_folders_in_the_wrong_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model_path, adapter_path = pair
    assert "is an MTP adapter, not a model: use --model" in refused(str(adapter_path))
    assert "has no config.json" in refused(str(tmp_path))
    found = refused(str(model_path), adapter_path=str(model_path))
    assert found == f"{model_path} is a model, not an adapter: use --model {model_path}"


def test_a_hub_id_is_downloaded(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(pair[0])

    monkeypatch.setattr("mlx_mtp.loading.snapshot_download", download)
    assert resolve("some-one/some-model", kind="model") == pair[0] and len(asked) == 1

    def fail(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand more lines")

    monkeypatch.setattr("mlx_mtp.loading.snapshot_download", fail)
    found = refused("some-one/some-model")
    assert (
        found.startswith("cannot find model some-one/some-model locally or on") and "net" in found
    )


BROKEN_MODELS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "not json": ("config.json", lambda path: path.write_text("{"), "is not JSON"),
    "no keys": ("config.json", lambda path: path.write_text("{}"), "cannot load the model"),
    "no object": ("config.json", lambda path: path.write_text("[]"), "cannot load the model"),
    "unknown type": (
        "config.json",
        lambda path: path.write_text('{"model_type": "no-such-model"}'),
        "no-such-model not supported",
    ),
    "no weights": ("model.safetensors", lambda path: path.unlink(), "cannot load the model"),
    "empty weights": (
        "model.safetensors",
        lambda path: path.write_bytes(b""),
        "cannot load the model",
    ),
    "garbage": (
        "model.safetensors",
        lambda path: path.write_bytes(b"garbage" * 100),
        "cannot load the model",
    ),
    "truncated": (
        "model.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        "cannot load the model",
    ),
    "no tokenizer": ("tokenizer.json", lambda path: path.unlink(), "cannot load the tokenizer"),
    "broken tokenizer": (
        "tokenizer.json",
        lambda path: path.write_text("{"),
        "cannot load the tokenizer",
    ),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_broken_model_folder(name: str, tmp_path: Path) -> None:
    file, damage, message = BROKEN_MODELS[name]
    folder = save_tiny_model(tmp_path)
    damage(folder / file)
    found = refused(str(folder))
    assert message in found and str(folder) in found


def test_a_model_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config("plamo3", vocab_size=BYTE_VOCAB)
    folder = save_tiny_model(tmp_path)
    model_class, args_class = mlx_lm.utils._get_classes(config)
    tensors = dict(tree_flatten(model_class(args_class.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(config))
    found = refused(str(folder))
    assert "(plamo3) cannot be used" in found and "window" in found and str(folder) in found


# Adapters that are not what they should be


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_adapter(pair: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    content = (pair[1] / WEIGHTS_FILE).read_bytes()
    (tmp_path / CONFIG_FILE).write_bytes((pair[1] / CONFIG_FILE).read_bytes())
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(content[: int(share * len(content))])
    found = refused(str(pair[0]), adapter_path=str(tmp_path))
    assert f"{path} is not a sound safetensors file" in found


@pytest.mark.parametrize(
    "content", [b"garbage" * 50, b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{not json at all}"]
)
def test_a_corrupt_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        read_tensors(path)
    with pytest.raises(ValueError, match="is missing"):
        read_tensors(tmp_path / "other.safetensors")


def damaged(changes: Callable[[Weights], Any]) -> Callable[[MTPConfig, Weights], MTPConfig]:
    """Change tensors only."""

    def change(config: MTPConfig, weights: Weights) -> MTPConfig:
        changes(weights)
        return config

    return change


def poison(name: str, value: float) -> Callable[[MTPConfig, Weights], MTPConfig]:
    """Put one value into a tensor."""

    def change(weights: Weights) -> None:
        weights[name][1, 1] = value

    return damaged(change)


Change = Callable[[MTPConfig, Weights], MTPConfig]
BROKEN_ADAPTERS: dict[str, tuple[Change, str]] = {
    "nan": (poison(f"{Q_PROJ}.lora_a", float("nan")), f"{Q_PROJ}.lora_a has NaN"),
    "infinite": (poison(MASK_EMBEDDINGS, float("inf")), "mask_embeddings has NaN or infinite"),
    "unknown tensor": (
        damaged(lambda w: w.update(extra=mx.zeros((2, 2)))),
        "the adapter's tensors for '' do not fit",
    ),
    "unknown layer": (
        damaged(lambda w: w.update({"model.layers.9.self_attn.q_proj.lora_a": mx.zeros((32, 4))})),
        "tensors for 'model.layers.9.self_attn.q_proj' do not fit",
    ),
    "unknown part": (
        damaged(lambda w: w.update({f"{Q_PROJ}.lora_c": mx.zeros((4, 4))})),
        f"unknown tensor '{Q_PROJ}.lora_c'",
    ),
    "half a pair": (damaged(lambda w: w.pop(f"{Q_PROJ}.lora_b")), f"{Q_PROJ}' do not fit"),
    "no masks": (damaged(lambda w: w.pop(MASK_EMBEDDINGS)), "mask_embeddings must be (4, 32)"),
    "too few masks": (
        damaged(lambda w: w.update({MASK_EMBEDDINGS: mx.zeros((3, 32))})),
        "mask_embeddings must be (4, 32), got (3, 32)",
    ),
    "transposed": (
        damaged(lambda w: w.update({f"{Q_PROJ}.lora_a": mx.zeros((4, 32))})),
        f"{Q_PROJ}: lora_a (4, 32)",
    ),
    "vector": (
        damaged(lambda w: w.update({f"{Q_PROJ}.lora_a": mx.zeros((32,))})),
        f"{Q_PROJ}: lora_a (32,)",
    ),
    "a norm adapted": (
        damaged(
            lambda w: w.update(
                {
                    "model.norm.lora_a": mx.zeros((32, 4)),
                    "model.norm.lora_b": mx.zeros((4, 32)),
                }
            )
        ),
        "model.norm: RMSNorm cannot carry",
    ),
    "part of a sampler": (
        damaged(lambda w: w.pop("sampler_head.norm_1.weight")),
        "norm_1.weight",
    ),
    "another sampler": (
        damaged(lambda w: w.update({"sampler_head.linear_2.weight": mx.zeros((16, 32))})),
        "linear_2.weight",
    ),
    "a sampler too many": (
        lambda config, _: dataclasses.replace(config, sampler=None),
        "the adapter has a tensor sampler_head.",
    ),
    "other masks": (
        lambda config, _: dataclasses.replace(config, num_draft_tokens=6),
        "mask_embeddings must be (6, 32), got (4, 32)",
    ),
    "other rank": (lambda config, _: dataclasses.replace(config, rank=8), "has rank 4, not 8"),
    "other modules": (
        lambda config, _: dataclasses.replace(config, target_modules=("q_proj",)),
        "while its target_modules are q_proj",
    ),
    "other width": (
        lambda config, _: dataclasses.replace(config, base_hidden_size=48),
        "2 layers of 48",
    ),
    "other vocabulary": (
        lambda config, _: dataclasses.replace(config, base_vocab_size=300),
        "2 layers of 32, 300 tokens), not for",
    ),
    "no tensors": (damaged(lambda w: w.clear()), "mask_embeddings must be"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    change, message = BROKEN_ADAPTERS[name]
    config, weights = random_adapter(tiny_base(**BYTES))
    config = change(config, weights)
    save_adapter(tmp_path, config, weights)
    found = refused(str(pair[0]), adapter_path=str(tmp_path))
    assert message in found and str(tmp_path) in found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"seed": 1}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"hidden_size": 64}),
        ("qwen3", {}),
    ],
)
def test_an_adapter_of_another_base_names_both(
    pair: tuple[Path, Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    other = tiny_base(kind, **BYTES, **options)
    config, weights = random_adapter(other)
    save_adapter(tmp_path, dataclasses.replace(config, base_model="other-model"), weights)
    found = refused(str(pair[0]), adapter_path=str(tmp_path))
    for part in (tmp_path, "other-model", pair[0], fingerprint(other)[:12]):
        assert str(part) in found
    assert fingerprint(tiny_base(**BYTES))[:12] in found


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("place", ["sidecar", "jinja", "config", "named", "folder"])
def test_chat_templates_are_found_wherever_libraries_put_them(tmp_path, place):
    folder = save_tiny_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if place == "sidecar":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    elif place == "config":
        config["chat_template"] = TEMPLATE
    elif place == "named":
        other = {"name": "tool_use", "template": "tools"}
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}, other]
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    if place == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    path.write_text(json.dumps(config))
    output = tmp_path / "converted"
    output.mkdir()
    convert_base(str(folder), output)
    for read in (folder, output):
        tokenizer = load(str(read), mtp=False, kernels=False)[1]
        assert tokenizer.has_chat_template
        messages = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: hi\n"
        if place in ("named", "folder"):
            text = tokenizer.apply_chat_template(messages, tokenize=False, tools=[])
            assert text == "tools"


def test_a_template_of_the_tokenizer_comes_before_a_processors(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.json").write_text('{"chat_template": "other"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load(str(folder), mtp=False)[1].chat_template == TEMPLATE
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match=r"chat_template\.json"):
        load(str(folder), mtp=False)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3_moe", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 64}),
    ],
)
def test_settings_that_mlx_lm_ignores_hold_for_every_way_to_decode(tmp_path, kind, changes):
    model_folder, adapter = save_tiny_pair(tmp_path, kind)
    path = model_folder / "config.json"
    former = json.loads(path.read_text())
    ids = [i % 250 for i in range(30)]
    before = load(str(model_folder), mtp=False, kernels=False)[0].base(mx.array([ids]))
    path.write_text(json.dumps(former | changes))
    old = json.loads((adapter / CONFIG_FILE).read_text())
    base = load(str(model_folder), mtp=False, kernels=False)[0].base
    if kind not in ("llama", "phi3"):  # theirs differ beyond the limits only, which are not reached
        assert not mx.allclose(base(mx.array([ids])), before).item()
    new = old | {"base_fingerprint": fingerprint(base)}
    (adapter / CONFIG_FILE).write_text(json.dumps(new))
    model = load(str(model_folder), adapter_path=str(adapter))[0]
    full: list[Any] = list(ids)
    for _ in range(12):
        full.append(mx.argmax(model.base(mx.array([full]))[0, -1]).item())
    for layout in ("plain", "linear", "quadratic"):
        steps = decode(model, ids, max_tokens=12, layout=layout)
        assert [token for step in steps for token in step.tokens] == full[30:]
    assert model.max_context == (64 if kind == "phi3" else 4096)


def test_a_head_next_to_a_tied_embedding_is_not_used(tmp_path, caplog):
    for kind in ("llama", "gemma3_text", "olmo2"):
        folder = save_tiny_model(tmp_path / kind, kind, tie_word_embeddings=True)
        ids = mx.array([[1, 2, 3]])
        before = load(str(folder), mtp=False, kernels=False)[0].base(ids)
        path = folder / "model.safetensors"
        tensors = read_tensors(path)
        tensors["lm_head.weight"] = mx.ones_like(tensors["model.embed_tokens.weight"])
        mx.save_safetensors(str(path), tensors, {"format": "mlx"})
        after = load(str(folder), mtp=False, kernels=False)[0].base(ids)
        assert mx.array_equal(before, after).item()
        assert "lm_head" in caplog.text
        config = json.loads((folder / "config.json").read_text())
        del tensors["lm_head.weight"]
        mx.save_safetensors(str(path), tensors, {"format": "mlx"})
        untied = config | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(untied))
        with pytest.raises(ValueError, match="tie_word_embeddings") as caught:
            load(str(folder), mtp=False)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("draft") / "model"
    return save_tiny_model(folder, "qwen3", num_hidden_layers=1)


def test_a_draft_model_is_loaded_with_the_model(pair: tuple[Path, Path], draft: Path) -> None:
    model, _ = load(str(pair[0]), adapter_path=str(pair[1]), draft_model=str(draft))
    assert model.config is not None and model.draft_model is not None
    assert model.draft_model.name == str(draft) and model.draft_model.config is None
    assert load(str(pair[0]))[0].draft_model is None


def test_a_draft_model_with_another_tokenizer_is_refused(
    pair: tuple[Path, Path], draft: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(draft, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("<user>", "<human>"), encoding="utf-8")
    assert refused(str(pair[0]), draft_model=str(other)) == (
        f"draft model {other} needs the same tokenizer as the model, but it has no token '<user>'"
    )


def test_a_draft_model_that_cannot_be_used_is_named(
    pair: tuple[Path, Path], draft: Path, tmp_path: Path
) -> None:
    message = refused(str(pair[0]), draft_model=str(tmp_path / "nowhere"))
    assert message == f"draft model: model {tmp_path / 'nowhere'} does not exist"
    message = refused(str(pair[0]), draft_model=str(pair[1]))
    assert message.startswith("draft model: ") and str(pair[1]) in message


@pytest.mark.parametrize(
    ("kind", "layers", "hint"),
    [
        ("qwen3", 1, ""),
        ("qwen3", 9, "is not smaller than the model"),
        ("llama", 2, "is the model itself: take a smaller one for speed"),
    ],
)
def test_a_draft_model_that_saves_nothing_is_a_hint(
    pair: tuple[Path, Path], tmp_path: Path, kind: str, layers: int, hint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = save_tiny_model(tmp_path / "draft", kind, num_hidden_layers=layers)
    load_with_status(str(pair[0]), draft_model=str(folder))
    lines = [line for line in capsys.readouterr().err.splitlines() if "hint" in line]
    assert len(lines) == bool(hint) and hint in "".join(lines)
