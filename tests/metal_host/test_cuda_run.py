"""The launcher for NVIDIA GPUs, as far as it can be tested without one.

The checks run on the CPU executor; the driver's calls on a library that keeps memory on the host.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.metal.matmul import Launch
from tests.helpers.kernel_host import run_launch
from tests.metal_host import toolchain
from tests.metal_host.cuda import cost, run
from tests.metal_host.cuda.build import Built, Resources
from tests.metal_host.cuda.check import check_attention, check_gated, check_rows
from tests.metal_host.cuda.driver import LIBRARY, Driver, DriverError, NoDriver, pack
from tests.metal_host.cuda.gpu import Gpu, Ready
from tests.metal_host.cuda.translate import CudaUnit
from tests.metal_host.quantised import Shape

FAKE = Path(__file__).parent / "fake_cuda.cpp"
UNIT = CudaUnit("", 2, (3, 2, 1), (64, 1, 1))


def executor(launch: Launch) -> mx.array:
    return run_launch(launch)[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("fake") / "libfake.so"
    flags = ["-x", "c++", "-std=c++17", "-fPIC", *toolchain.shared_library_flags()]
    toolchain.run([toolchain.cxx(), *flags, FAKE, "-o", built])
    fake = ctypes.CDLL(str(built))
    fake.fake_calls.restype = ctypes.c_char_p
    return fake


@pytest.fixture
def driver(library: ctypes.CDLL) -> Driver:
    library.fake_set(None, 0, 0)
    return Driver(library=library._name)


class TestDriver:
    def test_packs_pointers_as_the_driver_takes_them(self):
        pointers = [0x7F0000000000, 1, (1 << 64) - 1]
        packed = pack(pointers)
        found = [ctypes.c_uint64.from_address(place or 0).value for place in packed.places]
        assert found == pointers

    def test_copies_there_and_back(self, driver):
        values = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2]
        pointer = driver.upload(values)
        back = np.zeros((2, 2), np.float32)
        driver.download(pointer, back)
        driver.free(pointer)
        assert np.array_equal(back, values)

    def test_says_what_it_runs_on(self, driver):
        assert (driver.name(), driver.arch(), driver.version()) == ("no GPU", "sm_90", "13.5")

    def test_launches_with_blocks_threads_and_parameters(self, driver, library):
        library.fake_set(None, 3, 2)
        function = driver.function(b"\x7fELF cubin", "msl_entry")
        x, y = driver.upload(np.ones(3, np.float32)), driver.upload(np.zeros(3, np.float32))
        driver.launch(function, (3, 2, 1), (64, 1, 1), pack([x, y]))
        result = np.zeros(3, np.float32)
        driver.download(y, result)
        assert result.tolist() == [2, 2, 2]
        assert b"cuLaunchKernel 3,2,1/64,1,1+0 cuCtxSynchronize" in library.fake_calls()

    @pytest.mark.parametrize("name", ["cuMemAlloc_v2", "cuMemcpyHtoD_v2"])
    def test_tells_which_call_failed_and_why(self, driver, library, name):
        library.fake_set(name.encode(), 0, 0)
        with pytest.raises(DriverError, match=f"{name}: CUDA_ERROR_PLANTED: planted"):
            driver.upload(np.zeros(4))

    def test_there_is_none(self, library):
        with pytest.raises(NoDriver, match="no-such-driver.so cannot be loaded"):
            Driver(library="no-such-driver.so")
        library.fake_set(b"cuInit", 0, 0)
        with pytest.raises(NoDriver, match="no NVIDIA GPU: cuInit"):
            Driver(library=library._name)

    def test_an_old_one_is_named(self):
        with pytest.raises(NoDriver, match="too old: it has no cuInit"):
            Driver(library=ctypes.util.find_library("c") or "libc.so.6")


class TestGpu:
    def test_times_passes_over_all_arguments(self, driver, library):
        """A pass takes the fake 3 ms; there are three launches in one."""
        library.fake_set(None, 1, 2)
        function = driver.function(b"\x7fELF", "msl_entry")
        x, y = (driver.upload(np.zeros(1, np.float32)) for _ in range(2))
        ms = Gpu(driver).milliseconds(Ready(function, UNIT), [pack([x, y])] * 3, times=4)
        assert ms == pytest.approx(1.0)
        calls = library.fake_calls().decode().split()
        assert calls.count("cuLaunchKernel") == 1 + 3  # one to load it, three into the graph
        assert calls.index("cuLaunchKernel") < calls.index("cuStreamBeginCapture_v2")
        assert [calls.count(f"cu{name}") for name in ("StreamCreate", "StreamDestroy_v2")] == [1, 1]
        assert calls.count("cuGraphDestroy") == calls.count("cuGraphExecDestroy") == 1

    def test_gives_memory_back_where_a_copy_fails(self, driver, library):
        library.fake_set(b"cuMemcpyHtoD_v2", 0, 0)
        with pytest.raises(DriverError), Gpu(driver).held([np.zeros(4)]):
            pass
        calls = library.fake_calls().decode().split()
        assert calls.count("cuMemAlloc_v2") == calls.count("cuMemFree_v2") == 1

    def test_runs_a_launch_on_its_buffers(self, driver, library, monkeypatch):
        """The launch is real, the kernel the fake's: floats of x, plus 1, become y."""
        resources = Resources(registers=1, stack_bytes=0, spilled_bytes=0, shared_bytes=0)
        built = Built(CudaUnit("text", 2, (1, 1, 1), (32, 1, 1)), b"\x7fELF", resources, ())
        monkeypatch.setattr("tests.metal_host.cuda.gpu.build", lambda text, arch: built)
        library.fake_set(None, 8, 2)
        x = mx.arange(8, dtype=mx.float32)
        launch = Launch(
            name="one_more",
            source="y[thread_position_in_grid.x] = x[thread_position_in_grid.x] + 1;",
            inputs={"x": x},
            template={},
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shape=(8,),
            output_dtype=mx.float32,
        )
        assert Gpu(driver).run(launch).tolist() == (x + 1).tolist()


class TestChecks:
    @pytest.mark.slow
    def test_find_our_kernels_right(self):
        found = check_rows(executor, Shape(5, 24, 192), rows=(1, 5))
        assert found.right and 0 < found.error < 1e-3, found
        assert check_gated(executor, Shape(5, 16, 128, dtype="bfloat16")).right
        found = check_attention(executor, 3, 130, head_dim=64, dtype="float16", heads=3, kv_heads=1)
        assert found.right, found

    def test_find_a_wrong_value(self):
        def off(launch: Launch) -> mx.array:
            y = executor(launch)
            return y + 0.01 if launch.template.get("rows") == 2 else y

        found = check_rows(off, Shape(2, 16, 128, dtype="float32"), rows=(2,))
        assert not found.right and found.wrong == "scalar, 2 rows: far from float64"

    def test_find_a_row_whose_last_bit_depends_on_others(self):
        def off(launch: Launch) -> mx.array:
            y = executor(launch)
            last_bit = mx.array(1 if "row_tiles" in launch.template else 0, dtype=mx.uint32)
            return (y.view(mx.uint32) ^ last_bit).view(mx.float32)

        found = check_rows(off, Shape(1, 16, 128, dtype="float32"), rows=(1,))
        assert not found.right and found.wrong == "matrix, 1 rows: other bits"

    def test_find_what_nobody_wrote(self):
        def off(launch: Launch) -> mx.array:
            return mx.full(launch.output_shape, float("nan"), dtype=launch.output_dtype)

        found = check_rows(off, Shape(1, 16, 128), rows=(1,))
        assert not found.right and found.error == float("inf")


class TestCost:
    def test_takes_more_copies_than_the_cache_holds(self):
        assert cost.copies_of(33_000_000, 50 << 20) == 7
        assert cost.copies_of(1 << 30, 50 << 20) == 2
        assert cost.copies_of(1, 50 << 20) == cost.MOST_COPIES

    def test_ratios_are_to_one_row_of_the_same(self):
        lines = [
            {"kernel": kernel, "dtype": "float16", "m": m, "ms": ms}
            for kernel, m, ms in [
                ("our scalar", 1, 2.0), ("our scalar", 8, 3.0), ("our matrix", 8, 5.0),
                ("stock MLX", 8, 1.0),
            ]
        ]  # fmt: skip
        assert [row["ratio"] for row in cost.with_ratios(lines)] == [1.0, 1.5, 2.5, None]


class TestCommand:
    def test_says_in_one_line_that_there_is_no_driver(self, capsys, monkeypatch, tmp_path):
        def missing(*, library: str = LIBRARY) -> Driver:
            raise NoDriver(f"no NVIDIA driver: {library} cannot be loaded")

        monkeypatch.setattr(run, "Driver", missing)
        monkeypatch.setattr(run.nvrtc, "library_path", lambda: Path("libnvrtc.so"))
        output = tmp_path / "cuda.json"
        assert run.main(["--check", "--output", str(output)]) == 2
        said = capsys.readouterr()
        assert said.err == f"Error: no NVIDIA driver: {LIBRARY} cannot be loaded\n"
        assert said.out == "" and not output.exists()

    def test_writes_what_it_found(self, capsys, driver, monkeypatch, tmp_path):
        found = check_rows(executor, Shape(1, 16, 128), rows=(1,))
        monkeypatch.setattr(run, "Driver", lambda: driver)
        monkeypatch.setattr(run.nvrtc, "library_path", lambda: Path("libnvrtc.so"))
        monkeypatch.setattr(run.nvrtc, "version", lambda: "13.5")
        monkeypatch.setattr(run, "all_checks", lambda _: iter([found]))
        monkeypatch.setattr(
            run, "our_costs", lambda *_: iter([cost._line("our scalar", mx.float16, 1, 0.5, 7)])
        )
        output = tmp_path / "cuda.json"
        arguments = ["--check", "--cost", "--n", "64", "--k", "128", "--dtype", "float16"]
        assert run.main([*arguments, "--output", str(output)]) == 0
        written = json.loads(output.read_text())
        assert written["machine"]["gpu"] == "no GPU" and written["machine"]["arch"] == "sm_90"
        assert written["check"][0]["right"] and written["cost"][0]["ratio"] == 1.0
        assert "right" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [[], ["--check", "--m", "33"]])
    def test_refuses_what_makes_no_sense(self, arguments, capsys):
        with pytest.raises(SystemExit) as ended:
            run.main(arguments)
        assert ended.value.code == 2 and "error: " in capsys.readouterr().err
