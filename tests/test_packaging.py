"""What users install: the sdist makes the wheel, and the wheel holds all that the package reads."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_the_wheel_made_from_the_sdist_is_complete(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    for name in [
        "mlx_mtp/cli/main.py",
        "mlx_mtp/evaluation/prompts.jsonl",
        "mlx_mtp/simulate/chips.json",
        "mlx_mtp/simulate/trace.json",
        "mlx_mtp/converters/convert.py",
        "mlx_mtp/metal/README.md",
        "mlx_mtp/apps/README.md",
        "mlx_mtp/apps/server/app.py",
        "mlx_mtp/apps/chat_app/app.py",
        "mlx_mtp/apps/history/store.py",
        "mlx_mtp/apps/chat/dist/index.html",
        "mlx_mtp/adapters/smollm2-135m-mtp/adapters.safetensors",
        "mlx_mtp/adapters/smollm2-135m-mtp/adapter_config.json",
        "mlx_mtp/adapters/smollm2-135m-mtp/statistics.json",
    ]:
        assert names.count(name) == 1, name
    assert not [name for name in names if name.startswith(("converters/", "metal/", "tests/"))]
    assert not [name for name in names if "node_modules" in name or "apps/chat/src" in name]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_wheel_is_small_and_the_sdist_can_be_tested(built):
    assert next(built.glob("*.whl")).stat().st_size < 24e6
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    inside = {name.partition("/")[2] for name in names}
    assert {"tests/conftest.py", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"} <= inside
