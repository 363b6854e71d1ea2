"""Native MTP modules survive a conversion, are found when a folder is loaded, and are described."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import torch
from click.testing import CliRunner
from gguf.constants import GGMLQuantizationType as Type
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file

from mlx_mtp.cli.main import cli
from mlx_mtp.converters.base.native import read_modules
from mlx_mtp.decoding.loop import decode
from mlx_mtp.loading import load
from mlx_mtp.model.base import open_base
from mlx_mtp.model.native.names import native_tensors
from mlx_mtp.model.native.stored import find_native, read_native
from mlx_mtp.storage.safetensors import check_safetensors, read_metadata
from tests.converters.base_models import edit, split, tensors
from tests.helpers.fixtures_generate import EOS, byte_tokenizer
from tests.helpers.gguf_models import write_gguf
from tests.helpers.native_models import publish
from tests.helpers.tiny import BYTE_VOCAB, random_adapter, save_adapter, save_tiny_model

KINDS = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_moe", "mimo", "ernie4_5_moe")
SIDECAR = "mtp.safetensors"
NOT_ANNOUNCED = "config.json announces no such native module"
Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models as published, with their modules among their tensors."""
    made: dict[str, Path] = {}

    def source(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp("source") / kind
            model = publish(kind, folder, vocab_size=BYTE_VOCAB, eos_token_id=EOS)
            for donor in folder.glob("donor*"):
                shutil.rmtree(donor)
            write(folder / "model.safetensors", tensors(folder) | model.tensors)
            byte_tokenizer().save_pretrained(folder)
        return made[kind]

    return source


@pytest.fixture
def copied(sources: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies of these folders, to be changed."""
    return lambda kind: Path(shutil.copytree(sources(kind), tmp_path / f"copy-of-{kind}"))


def write(path: Path, values: Weights) -> None:
    mx.save_safetensors(str(path), values, {"format": "pt"})


def read(path: Path) -> Weights:
    loaded: Any = mx.load(str(path))
    mx.eval(loaded)
    return loaded


def parameters(module: Any) -> Weights:
    assert module is not None
    found: Any = dict(tree_flatten(module.parameters()))
    return found


def assert_same(first: Weights, second: Weights) -> None:
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        assert value.dtype == second[name].dtype and value.shape == second[name].shape, name
        assert mx.array_equal(value, second[name]).item(), name


def run(*args: object) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result.stdout


def convert(source: Path, output: Path, *options: object) -> str:
    return run("convert", "--hf-path", source, "--mlx-path", output, *options)


def refusal(folder: Path) -> str:
    """The line with which ``generate`` refuses a model that it takes with ``--no-mtp``."""
    args = ["generate", "--model", str(folder), "--prompt", "hi", "--max-tokens", "2"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ") and line.endswith(", or use --no-mtp")
    run(*args, "--no-mtp")
    (problem,) = json.loads(run("inspect", "--json", folder))["problems"]
    assert line == f"Error: {problem}, or use --no-mtp"
    return problem


def drafter(folder: Path, source: str = "native") -> dict[str, Any]:
    """What ``inspect`` says of a drafter."""
    (facts,) = (each for each in described(folder) if each["source"] == source)
    return facts


def described(folder: Path) -> list[dict[str, Any]]:
    """What ``inspect`` says of all drafters."""
    return json.loads(run("inspect", "--json", folder))["drafters"]


def modules_of(folder: Path) -> Weights:
    return parameters(load(str(folder))[0].native)


def split_off(folder: Path, chosen: Callable[[str], bool], name: str) -> dict[str, str]:
    """Move tensors of a folder into another shard, and index both; return the weight map."""
    found = tensors(folder)
    mx.eval(found)  # before their file is written anew
    own = {key: value for key, value in found.items() if not chosen(key)}
    write(folder / "model.safetensors", own)
    write(folder / name, {key: value for key, value in found.items() if chosen(key)})
    weight_map = {key: "model.safetensors" if key in own else name for key in found}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


# Round trips


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_has_the_modules_of_the_original(kind, sources, tmp_path):
    source, output = sources(kind), tmp_path / "out"
    said = convert(source, output)
    original = load(str(source))[0]
    native: Any = original.native
    assert f"native MTP modules: {native.num_modules} in {SIDECAR}, float32" in said
    assert f"Native MTP modules: {native.num_modules} in" in (output / "README.md").read_text()
    converted = load(str(output))[0]
    assert_same(parameters(native), parameters(converted.native))
    ids = list(b"Native modules")
    # Stock mlx-lm takes the folder too, and computes the same.
    stock: Any = mlx_lm.load(str(output))[0]
    logits = converted.logits(converted(mx.array([ids]), cache=converted.make_cache()))
    assert mx.allclose(logits, stock(mx.array([ids])), rtol=1e-4, atol=1e-4)
    again = tmp_path / "again"
    convert(output, again)
    assert_same(read(output / SIDECAR), read(again / SIDECAR))


@pytest.mark.parametrize("kind", ["glm4_moe", "qwen3_next"])
def test_drafts_of_modules_leave_the_answer_as_it_is(kind, sources, tmp_path):
    convert(sources(kind), tmp_path / "out")
    model = load(str(tmp_path / "out"))[0]
    ids = list(b"The same")
    plain = [t for step in decode(model, ids, layout="plain", max_tokens=12) for t in step.tokens]
    steps = list(decode(model, ids, drafter="native", max_tokens=12))
    assert [token for step in steps for token in step.tokens] == plain


def test_modules_stay_without_the_adapter(sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("mimo"), folder)
    save_adapter(folder / "adapter", *random_adapter(open_base(folder)[0]))
    both, _ = load(str(folder))
    assert both.config is not None and both.native is not None
    without, _ = load(str(folder), adapter=False)
    assert without.config is None
    assert_same(parameters(without.native), parameters(both.native))
    plain, _ = load(str(folder), mtp=False)
    assert plain.config is None and plain.native is None
    available = {each["source"] for each in described(folder) if each["is_available"]}
    assert available == {"mask", "native", "lookup"}


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "qwen3_next", "mimo"])
@pytest.mark.parametrize("bits", [None, 4])
def test_quantised_models_have_quantised_modules(kind, bits, sources, tmp_path):
    source, output = sources(kind), tmp_path / "out"
    options = () if bits is None else ("--q-native-bits", bits)
    said = convert(source, output, "-q", "--q-group-size", 32, *options)
    assert f"in {SIDECAR}, {bits or 8}-bit" in said
    assert drafter(output)["facts"]["precision"] == f"{bits or 8}-bit"
    stored, bound = read(output / SIDECAR), {None: 0.01, 4: 0.2}[bits]
    for name, value in parameters(load(str(source))[0].native).items():
        name = name.removeprefix("predictors.")
        kept, scales = stored[name], stored.get(name.removesuffix("weight") + "scales")
        if "projection" in name:
            assert scales is not None
        if scales is not None:
            biases, width = stored[name.removesuffix("weight") + "biases"], value.shape[-1]
            sizes: dict[str, Any] = {
                "bits": 32 * kept.shape[-1] // width,
                "group_size": width // scales.shape[-1],
            }
            kept = mx.dequantize(kept, scales, biases, **sizes)
        limit = 0 if scales is None else bound * mx.abs(value).max()
        assert (mx.abs(kept - value).max() <= limit).item(), name
    module = load(str(output))[0]
    ids = list(b"quantised")
    steps = decode(module, ids, drafter="native", max_tokens=8)
    plain = decode(module, ids, layout="plain", max_tokens=8)
    assert [t for s in steps for t in s.tokens] == [t for s in plain for t in s.tokens]


def test_types_follow_the_model(sources, tmp_path):
    said = convert(sources("mimo"), tmp_path / "out", "--dtype", "bfloat16")
    assert f"2 in {SIDECAR}, bfloat16" in said
    kinds = {info.dtype for info in check_safetensors(tmp_path / "out" / SIDECAR).values()}
    assert kinds == {"BF16"}


# Nothing is dropped in silence


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_kept_or_named_as_dropped(kind, sources):
    folder = sources(kind)
    base, config = open_base(folder)
    whole = tensors(folder)
    before = read_native(folder, base, config)
    names = native_tensors(whole, config)
    assert set(before.dropped) < set(names)
    for name in names:
        changed = whole | {name: whole[name] * 2 + 1}
        after = _read(changed, folder, base, config)
        if name not in before.dropped:
            assert not _equal(parameters(before.native), parameters(after.native)), name
        else:  # a copy: it is kept as soon as it is none
            assert "it equals" in before.dropped[name] and name not in after.dropped


def _read(values: Weights, folder: Path, base: Any, config: dict[str, Any]) -> Any:
    other = folder.parent / "changed"
    other.mkdir(exist_ok=True)
    write(other / "model.safetensors", values)
    found = read_native(other, base, config)
    mx.eval(found.native.parameters() if found.native else [])
    return found


def _equal(first: Weights, second: Weights) -> bool:
    same = first.keys() == second.keys()
    return same and all(mx.array_equal(first[name], second[name]).item() for name in first)


def test_tensors_of_no_module_are_named(copied):
    """mlx-lm drops them too, though they are not part of a module."""
    folder = copied("qwen3_next")
    stray = {"model.stray_mtp.weight": mx.ones((4,))}
    write(folder / "model.safetensors", tensors(folder) | stray)
    assert dropped_by_convert(folder) == dict.fromkeys(stray, NOT_ANNOUNCED)
    folder = copied("glm4_moe")
    names = native_tensors(tensors(folder), json.loads((folder / "config.json").read_text()))
    edit(folder / "config.json", num_nextn_predict_layers=0)
    assert dropped_by_convert(folder) == dict.fromkeys(names, NOT_ANNOUNCED)


def test_tensors_that_a_layer_does_not_use_are_named(copied):
    folder = copied("mimo")
    unused = {f"model.mtp_layers.{i}.self_attn.rotary_emb.inv_freq": mx.ones((8,)) for i in (0, 1)}
    write(folder / "model.safetensors", tensors(folder) | unused)
    assert dropped_by_convert(folder) == dict.fromkeys(unused, "mlx-lm's mimo has no use for it")


def test_modules_in_float8(copied, tmp_path):
    """As DeepSeek-V3 is published; the scales of blocks count as kept."""
    folder = copied("deepseek_v3")
    before = modules_of(folder)
    state, packed = load_file(folder / "model.safetensors"), {}
    for name, value in state.items():
        if re.match(r"model\.layers\.[23]\.(mlp|self_attn).*_proj\.weight$", name):
            packed[name] = value.to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = torch.ones(1, 1)
    assert len(packed) > 50
    save_file(state | packed, folder / "model.safetensors", {"format": "pt"})
    said = convert(folder, tmp_path / "out")
    assert "scale_inv" not in said and said.count("dropped") == 1
    after = modules_of(tmp_path / "out")
    assert_same(modules_of(folder), after)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (mx.abs(value - after[name]).max() <= mx.abs(value).max() / 8).item(), name


def dropped_by_convert(folder: Path) -> dict[str, str]:
    base, config = open_base(folder)
    return read_modules(folder, folder, base, config).dropped


def test_modules_of_an_unknown_family_are_named(tmp_path, caplog):
    folder = save_tiny_model(tmp_path / "in")
    names = [f"mtp.layers.0.mlp.experts.{index}.weight" for index in range(3)]
    own = tensors(folder)
    write(folder / "model.safetensors", own | {name: mx.ones((4, 4)) for name in names})
    said = convert(folder, tmp_path / "out")
    why = "native modules of llama models are not supported"
    assert f"dropped mtp.layers.*.mlp.experts.*.weight (3 tensors): {why}" in said
    assert not (tmp_path / "out" / SIDECAR).exists()
    assert drafter(folder) == {
        "source": "native",
        "is_available": False,
        "detail": "3 tensors, 0.0 MB, of a family that is not supported",
        "facts": {},
    }
    with caplog.at_level(logging.WARNING):
        assert load(str(folder))[0].native is None
    assert why in caplog.text and "\n" not in caplog.records[-1].getMessage()


def test_a_wrong_number_of_layers_is_no_module(tmp_path):
    folder = save_tiny_model(tmp_path / "in")
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match="not in model: model.layers.1."):
        load(str(folder))


# Folders that were not converted, or by other tools


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_next", "mimo"])
def test_shards_of_their_own(kind, sources, copied):
    folder = copied(kind)
    config = json.loads((folder / "config.json").read_text())
    names = native_tensors(tensors(folder), config)
    split_off(folder, lambda name: name in names, "model-mtp.safetensors")
    assert_same(modules_of(sources(kind)), modules_of(folder))
    assert drafter(folder)["detail"].endswith("in model-mtp.safetensors")


def test_numbered_shards(sources, copied):
    folder = copied("qwen3_next")
    split(folder)
    assert_same(modules_of(sources("qwen3_next")), modules_of(folder))


@pytest.mark.parametrize("form", ["published", "plain"])
@pytest.mark.parametrize(
    "name", [SIDECAR, "model_mtp.safetensors", "mtp-00001-of-00001.safetensors"]
)
def test_published_tensors_in_a_file_of_their_own(form, name, sources, tmp_path):
    """As mlx-lm's pull request 1543 and MTPLX write them, norms zero-centred or not."""
    source, folder = sources("qwen3_next"), tmp_path / "out"
    convert(source, folder)
    (folder / SIDECAR).unlink()
    own = {key: value for key, value in tensors(source).items() if key.startswith("mtp.")}
    if form == "plain":
        own = {key: value + (value.ndim == 1) for key, value in own.items()}
    write(folder / name, own)
    assert_same(modules_of(source), modules_of(folder))
    assert drafter(folder)["is_available"]
    # Converting that folder keeps them.
    convert(folder, tmp_path / "again")
    assert_same(modules_of(source), modules_of(tmp_path / "again"))


@pytest.mark.parametrize("prefix", ["mtp.", "language_model.mtp."])
def test_quantised_modules_in_the_index(prefix, sources, tmp_path):
    """As converters write them that keep the modules of Qwen3.5."""
    folder = tmp_path / "out"
    convert(sources("qwen3_next"), folder, "-q", "--q-group-size", 32)
    expected = modules_of(folder)
    parts = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden"}
    parts |= {"projection": "fc", "norm": "norm"}
    renamed = {}
    for name, value in read(folder / SIDECAR).items():
        _, part, rest = name.split(".", 2)
        name = f"layers.0.{rest}" if part == "layer" else f"{parts[part]}.{rest}"
        renamed[prefix + name] = value
    (folder / SIDECAR).unlink()
    write(folder / "model.safetensors", tensors(folder) | renamed)
    split(folder)
    assert_same(expected, modules_of(folder))
    assert drafter(folder)["facts"]["precision"] == "8-bit"


def test_modules_that_a_conversion_dropped(sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("glm4_moe"), folder)
    (folder / SIDECAR).unlink()  # what mlx_lm.convert leaves
    model, _ = load(str(folder))
    assert model.native is None
    facts = drafter(folder)
    assert facts["detail"] == (
        "config.json announces 1 module, which this conversion has dropped: "
        "mlx-mtp convert --hf-path ORIGINAL keeps the original's"
    )
    assert not facts["is_available"]
    assert "without native MTP modules" in drafter(save_tiny_model(tmp_path / "llama"))["detail"]


def test_inspect_lists_all_drafters(sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("mimo"), folder)
    found = json.loads(run("inspect", "--json", folder))
    sources_of = [each["source"] for each in found["drafters"]]
    assert sources_of == ["mask", "native", "heads", "draft-model", "lookup"]
    have = {each["source"] for each in found["drafters"] if each["is_available"]}
    assert have == {"native", "lookup"} and found["problems"] == []
    shown = run("inspect", folder)
    assert f"native       yes  2 modules, float32, 0.3 MB, in {SIDECAR}" in shown
    assert "mask         no   needs an adapter" in shown


# GGUF files


@pytest.mark.parametrize("kept", [True, False])
def test_modules_of_a_gguf_file(kept, sources, tmp_path):
    source, gguf = sources("glm4_moe"), tmp_path / "glm.gguf"
    left_out = "" if kept else "blk.2."
    write_gguf(source, gguf, left_out=left_out)
    said = run("convert", "--gguf", gguf, "--mlx-path", tmp_path / "out", "--dtype", "float32")
    if kept:
        assert f"native MTP modules: 1 in {SIDECAR}, float32" in said and "dropped" not in said
        assert_same(modules_of(source), modules_of(tmp_path / "out"))
    else:
        assert "native" not in said and load(str(tmp_path / "out"))[0].native is None


def test_modules_of_a_quantised_gguf_file(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "glm.gguf"
    write_gguf(sources("glm4_moe"), gguf, choose=lambda name, value: quantised(value))
    said = run("convert", "--gguf", gguf, "--mlx-path", tmp_path / "out")
    assert f"native MTP modules: 1 in {SIDECAR}, 8-bit" in said and "dropped" not in said
    # The copy in the cache has them too, among the model's own tensors.
    assert_same(modules_of(gguf), modules_of(tmp_path / "out"))


def quantised(value: Any) -> Type:
    return Type.Q8_0 if value.ndim > 1 and value.shape[0] > 4 else Type.F32


# What is refused, with one line


def test_a_truncated_sidecar(sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("glm4_moe"), folder)
    data = (folder / SIDECAR).read_bytes()
    (folder / SIDECAR).write_bytes(data[:-100])
    assert f"{folder / SIDECAR} is not a sound safetensors file" in refusal(folder)
    (folder / SIDECAR).write_bytes(data[:100])
    assert f"{folder / SIDECAR} is not a sound safetensors file" in refusal(folder)


@pytest.mark.parametrize("other", ["qwen3_next", "mimo"])
def test_a_sidecar_of_another_family(other, sources, tmp_path):
    for kind in ("glm4_moe", other):
        convert(sources(kind), tmp_path / kind)
    folder = tmp_path / "glm4_moe"
    shutil.copy(tmp_path / other / SIDECAR, folder / SIDECAR)
    assert refusal(folder) == (
        f"{folder / SIDECAR} has native modules of a {other} model, this is a glm4_moe model"
    )


def test_a_sidecar_of_another_model_of_the_family(sources, copied, tmp_path):
    folder = tmp_path / "out"
    convert(sources("mimo"), folder)
    other = copied("mimo")
    name = "model.norm.weight"
    write(other / "model.safetensors", tensors(other) | {name: tensors(other)[name] + 0.5})
    convert(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / SIDECAR, folder / SIDECAR)
    written = read_metadata(folder / SIDECAR)["base_fingerprint"][:12]
    assert f"has native modules of another mimo model (fingerprint {written})" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda own: own | {"0.norm.weight": mx.ones((7,))}, "0.norm.weight has the shape (7,)"),
        (lambda own: own | {"0.what.weight": mx.ones((7,))}, "no place for the tensor 0.what"),
        (
            lambda own: {k: v for k, v in own.items() if "0.layer.self_attn.q_" not in k},
            "is missing",
        ),
        (lambda own: {k: v for k, v in own.items() if not k.startswith("0.")}, "from 0"),
    ],
)
def test_a_sidecar_that_does_not_fit(change, why, sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("mimo"), folder)
    metadata, own = read_metadata(folder / SIDECAR), read(folder / SIDECAR)
    mx.save_safetensors(str(folder / SIDECAR), change(own), metadata)
    assert f"{folder / SIDECAR} does not fit the model: native modules: " in refusal(folder)
    assert why in refusal(folder)


def test_a_sidecar_of_a_later_version(sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("mimo"), folder)
    metadata = read_metadata(folder / SIDECAR) | {"mlx_mtp_native": "2"}
    mx.save_safetensors(str(folder / SIDECAR), read(folder / SIDECAR), metadata)
    assert "was written by another version of mlx-mtp: convert the model again" in refusal(folder)


def test_a_published_file_of_another_model(sources, tmp_path):
    folder = tmp_path / "out"
    convert(sources("qwen3_next"), folder)
    (folder / SIDECAR).unlink()
    own = {key: value for key, value in tensors(sources("qwen3_next")).items() if "mtp." in key}
    write(folder / SIDECAR, own | {"mtp.fc.weight": mx.ones((32, 64))})
    assert "does not fit the model: native modules: the tensor 0.projection.weight" in refusal(
        folder
    )


@pytest.mark.parametrize("name", ["mtp.safetensors", "model-00002-of-00002.safetensors"])
def test_a_shard_of_modules_that_is_missing(name, copied):
    folder = copied("qwen3_next")
    weight_map = split_off(folder, lambda key: key.startswith("mtp."), name)
    if name.startswith("model-"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        weight_map = {
            key: file.replace("model.s", "model-00001-of-00002.s")
            for key, file in weight_map.items()
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / name).unlink()
    count = sum(file == name for file in weight_map.values())
    assert refusal(folder) == (
        f"{folder}/model.safetensors.index.json lists {count} tensors of native MTP modules in "
        f"{name}, which is missing: download it again"
    )
    assert drafter(folder)["detail"] == f"{count} of their tensors are missing from {name}"
    args = ["convert", "--hf-path", str(folder), "--mlx-path", str(folder / "out")]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2 and name in result.stderr and "is missing" in result.stderr


def test_listed_tensors_that_their_shard_lacks(copied):
    folder = copied("qwen3_next")
    name = "model-extra.safetensors"
    split_off(folder, lambda key: key.startswith("mtp."), name)
    own = {key: value for key, value in read(folder / name).items() if "fc" not in key}
    write(folder / name, own)
    assert f"lists 3 tensors of native MTP modules in {name}, which does not have" in refusal(
        folder
    )


def test_a_missing_shard_of_the_model_itself_is_refused_as_before(copied):
    folder = copied("qwen3_next")
    split_off(folder, lambda key: key.startswith("mtp.") or "norm" in key, "model-2.safetensors")
    (folder / "model-2.safetensors").unlink()
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    text = json.dumps(index).replace("model.safetensors", "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model-2.safetensors is missing"):
        load(str(folder), mtp=False)


def test_bits_are_checked(sources, tmp_path):
    for options, why in (
        (["-q", "--q-native-bits", "7"], "q_native_bits must be one of 1, 2, 3, 4, 5, 6, 8, got 7"),
        (["--q-native-bits", "4"], "--q-native-bits needs -q"),
    ):
        args = ["convert", "--hf-path", str(sources("mimo")), "--mlx-path", str(tmp_path / "out")]
        result = CliRunner().invoke(cli, [*args, *options])
        assert result.exit_code == 2 and why in result.stderr
        assert not (tmp_path / "out").exists()


def test_headers_alone_say_what_a_folder_has(sources, monkeypatch):
    folder = sources("deepseek_v3")
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(mx, "load", None)
    found = find_native(folder, config)
    assert found is not None and found.indices == [0, 1] and not found.has_own_files
    assert found.num_bytes == sum(info.num_bytes for info in found.infos.values()) > 0
    assert set(found.files) == set(native_tensors(tensor_names(folder), config))


def tensor_names(folder: Path) -> list[str]:
    return list(check_safetensors(folder / "model.safetensors"))
