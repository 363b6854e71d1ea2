"""NVIDIA's driver through ctypes: memory, modules, launches, times.

Not run on a GPU yet.  Every call is declared with its types and its result is looked at.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass

import numpy as np

LIBRARY = "libcuda.so.1"
ATTRIBUTES = {"multiprocessors": 16, "l2_bytes": 38, "major": 75, "minor": 76}
CAPTURE_THREAD_LOCAL = 1
NON_BLOCKING = 1  # a stream that does not wait for the default one
_HANDLE = POINTER(c_void_p)
FUNCTIONS = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [_HANDLE, c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxSynchronize": [],
    "cuModuleLoadData": [_HANDLE, c_char_p],
    "cuModuleGetFunction": [_HANDLE, c_void_p, c_char_p],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemcpyHtoD_v2": [c_uint64, c_void_p, c_size_t],
    "cuMemcpyDtoH_v2": [c_void_p, c_uint64, c_size_t],
    "cuMemsetD8_v2": [c_uint64, c_ubyte, c_size_t],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)],
    "cuStreamCreate": [_HANDLE, c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, _HANDLE],
    "cuGraphInstantiateWithFlags": [_HANDLE, c_void_p, c_uint64],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphExecDestroy": [c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuEventCreate": [_HANDLE, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cuEventDestroy_v2": [c_void_p],
}


class DriverError(RuntimeError):
    """A call of the driver failed."""


class NoDriver(DriverError):
    """There is no driver, or it sees no GPU."""


@dataclass(frozen=True)
class Packed:
    """Arguments of a launch: the pointers' values, and where each of them lies.

    The driver reads `values` through `places`, so both must live until the launch was made.
    """

    values: ctypes.Array[c_uint64]
    places: ctypes.Array[c_void_p]


def pack(pointers: Sequence[int]) -> Packed:
    """Device pointers as `cuLaunchKernel` takes a kernel's parameters."""
    values = (c_uint64 * len(pointers))(*pointers)
    first, size = ctypes.addressof(values), ctypes.sizeof(c_uint64)
    places = (c_void_p * len(pointers))(*(first + i * size for i in range(len(pointers))))
    return Packed(values, places)


class Driver:
    """The first GPU.

    Raises:
        NoDriver: there is none.
        DriverError: a call failed; with the driver's words.
    """

    def __init__(self, *, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError:
            raise NoDriver(f"no NVIDIA driver: {library} cannot be loaded") from None
        for name, types in FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise NoDriver(f"the NVIDIA driver is too old: it has no {name}")
            function.argtypes, function.restype = types, c_int
        self._device = self._first_device()
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxSetCurrent", context)

    def _first_device(self) -> int:
        count, device = c_int(), c_int()
        result = self._library.cuInit(0)
        if result:
            raise NoDriver(f"no NVIDIA GPU: cuInit: {self._words(result)}")
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise NoDriver("no NVIDIA GPU: the driver sees none")
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        return device.value

    def _words(self, result: int) -> str:
        """What the driver says of a result; it may not know it."""
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            if self._library[name](result, ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode(errors="replace"))
        return ": ".join(texts) or f"error {result}"

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of FUNCTIONS; DriverError unless it succeeds."""
        result = getattr(self._library, name)(*arguments)
        if result:
            raise DriverError(f"{name}: {self._words(result)}")

    def handle(self, name: str, *arguments: object) -> c_void_p:
        """Call a function that makes something, and return what it made."""
        made = c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made

    def attribute(self, name: str) -> int:
        """One of ATTRIBUTES."""
        value = c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ATTRIBUTES[name], self._device)
        return value.value

    def name(self) -> str:
        """Of the GPU."""
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode(errors="replace")

    def arch(self) -> str:
        """As NVRTC takes it, such as sm_90."""
        return f"sm_{self.attribute('major')}{self.attribute('minor')}"

    def version(self) -> str:
        """The CUDA version that the driver knows, such as 13.0."""
        value = c_int()
        self.call("cuDriverGetVersion", ctypes.byref(value))
        return f"{value.value // 1000}.{value.value % 1000 // 10}"

    def function(self, cubin: bytes, entry: str) -> c_void_p:
        """Load a cubin and find its entry; it stays until the context ends."""
        module = self.handle("cuModuleLoadData", cubin)
        return self.handle("cuModuleGetFunction", module, entry.encode())

    def allocate(self, size: int) -> int:
        """Memory of the GPU, by its address."""
        pointer = c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", pointer)

    def upload(self, array: np.ndarray) -> int:
        """A copy of an array's elements, in memory of its own."""
        data = np.ascontiguousarray(array)
        pointer = self.allocate(max(data.nbytes, 1))
        try:
            self.call("cuMemcpyHtoD_v2", pointer, data.ctypes.data, data.nbytes)
        except DriverError:
            self.free(pointer)
            raise
        return pointer

    def download(self, pointer: int, array: np.ndarray) -> None:
        """Fill a contiguous array; waits for what was launched before."""
        assert array.flags.c_contiguous and array.flags.writeable
        self.call("cuCtxSynchronize")
        self.call("cuMemcpyDtoH_v2", array.ctypes.data, pointer, array.nbytes)

    def fill(self, pointer: int, byte: int, size: int) -> None:
        """Set memory to one byte."""
        self.call("cuMemsetD8_v2", pointer, byte, size)
        self.call("cuCtxSynchronize")

    def launch(
        self,
        function: c_void_p,
        grid: Sequence[int],
        block: Sequence[int],
        packed: Packed,
        stream: c_void_p | None = None,
    ) -> None:
        """Start a kernel without shared memory of its own size; blocks, threads."""
        self.call("cuLaunchKernel", function, *grid, *block, 0, stream, packed.places, None)
