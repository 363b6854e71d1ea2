"""Setup shared by all tests: a fast BLAS, one thread, Hypothesis profiles, the seed of soak tests.

MLX reads the thread counts and takes the BLAS that is loaded when it is imported, so both come
first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A shell starts background jobs with SIGINT ignored, which the programs under test would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests also start programs of this folder in other processes, which import from it.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

import mlx_mtp.backends.cpu.blas  # noqa: E402, F401, I001  # loads OpenBLAS

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from mlx_mtp.storage import keyed_cache  # noqa: E402

if sys.platform.startswith("linux") and mx.default_device().type != mx.cpu:
    mx.set_default_device(mx.Device(mx.cpu))

# A busy machine makes examples slow, which says nothing about the code.
for profile, max_examples in (("ci", 25), ("soak", 500)):
    settings.register_profile(
        profile,
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("ci")  # `make soak` passes --hypothesis-profile=soak


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark soak tests as slow, so that ``-m "not slow"`` leaves them out too."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="session")
def own_results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither use nor change the costs and kernels that were measured here: plans follow them."""
    folder = tmp_path_factory.mktemp("results")
    usual = keyed_cache.cache_dir

    def cache_dir() -> Path:
        return usual() if "MLX_MTP_CACHE" in os.environ else folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyed_cache, "cache_dir", cache_dir)
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """0, or in a soak test the date, so that every day explores something else.

    ``MLX_MTP_TEST_SEED`` overrides both. Pytest shows the printed line when the test fails.
    """
    today = int(f"{date.today():%Y%m%d}") if request.node.get_closest_marker("soak") else 0
    chosen = int(os.environ.get("MLX_MTP_TEST_SEED", today))
    print(f"Seed {chosen}. To repeat this run, set MLX_MTP_TEST_SEED={chosen}.")
    return chosen
