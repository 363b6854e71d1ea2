"""The pickle in a PyTorch file, followed instruction by instruction without making any object.

A small machine plays the pickle with stand-ins: dicts whose content is not kept, storages that
know their size, tensors.  It knows the instructions and globals of plain weights and refuses the
rest, so what passes can call nothing but torch's own rebuilding of tensors, keys are names, and
every tensor lies within a storage that is really in the file.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mtp.storage.safetensors import MAX_DIMENSIONS, shown

MAX_INSTRUCTIONS = 400_000  # of some 10,000 tensors

_STORAGES = {
    **{"torch.FloatStorage": 4, "torch.HalfStorage": 2, "torch.BFloat16Storage": 2},
    **{"torch.DoubleStorage": 8, "torch.IntStorage": 4, "torch.LongStorage": 8},
    **{"torch.ShortStorage": 2, "torch.CharStorage": 1, "torch.ByteStorage": 1},
    **{"torch.BoolStorage": 1, "torch.ComplexFloatStorage": 8, "torch.storage.UntypedStorage": 1},
}
_TYPES = {
    **{"torch.bool": 1, "torch.uint8": 1, "torch.int8": 1, "torch.uint16": 2, "torch.int16": 2},
    **{"torch.uint32": 4, "torch.int32": 4, "torch.uint64": 8, "torch.int64": 8},
    **{"torch.float16": 2, "torch.bfloat16": 2, "torch.float32": 4, "torch.float64": 8},
    **{"torch.complex64": 8, "torch.float8_e4m3fn": 1, "torch.float8_e5m2": 1},
}
_DICTS = ("collections.OrderedDict",)
_TENSORS = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_PARAMETER = "torch._utils._rebuild_parameter"
_PLAIN = ("torch.Size", "torch.device", "__builtin__.set")
_GLOBALS = {*_STORAGES, *_TYPES, *_DICTS, *_TENSORS, _PARAMETER, *_PLAIN}

Instruction = tuple[str, Any]


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle refers to: its element's bytes and its length in elements."""

    item_bytes: int
    count: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.item_bytes * self.count


class _Kind:
    """A stand-in for an object whose content does not matter."""

    def __init__(self, name: str) -> None:
        self.name = name


_DICT, _TENSOR, _OTHER = _Kind("dict"), _Kind("tensor"), _Kind("plain object")


@dataclass(frozen=True, kw_only=True)
class PickleFacts:
    """What a pickle would build.

    Attributes:
        result: its object, where a dict is shown by ``is_dict`` alone.
        is_dict: whether that is a dict.
        storages: the storages that it refers to, by key.
        tensor_bytes: what its tensors fill together.
        globals: the globals that it names.
    """

    result: Any
    is_dict: bool
    storages: Mapping[str, Storage]
    tensor_bytes: int
    globals: frozenset[str]


def check_pickle(text: bytes, *, start: int = 0) -> tuple[PickleFacts, int]:
    """Follow one pickle.

    Args:
        text: bytes that hold it.
        start: where it begins.

    Returns:
        What it would build, and where it ends.

    Raises:
        ValueError: it is broken, or more than plain weights.
    """
    machine = _Machine()
    stream = _stream_at(text, start)
    try:
        for name, argument in _disassemble(stream):
            action = _ACTIONS.get(name)
            if action is None:
                raise ValueError(f"its pickle uses {name}, which plain weights never need")
            action(machine, argument)
    except (IndexError, KeyError):
        raise ValueError("its pickle is broken") from None
    if len(machine.stack) != 1 or machine.below:
        raise ValueError("its pickle leaves more or less than one object")
    result = machine.stack[0]
    facts = PickleFacts(
        result=result,
        is_dict=result is _DICT,
        storages=machine.storages,
        tensor_bytes=machine.tensor_bytes,
        globals=frozenset(machine.globals),
    )
    return facts, stream.tell()


def named_globals(text: bytes, *, start: int = 0) -> tuple[list[str], int]:
    """Name the globals of any pickle; where they come from its stack, as well as can be told.

    Returns:
        The names, and where the pickle ends.

    Raises:
        ValueError: it is broken.
    """
    names: list[str] = []
    texts: list[str] = ["?", "?"]  # the last two texts that were pushed
    memo: dict[int, str] = {}
    stream = _stream_at(text, start)
    for name, argument in _disassemble(stream):
        if name in ("GLOBAL", "INST"):
            names.append(argument.replace(" ", ".", 1))
        elif name == "STACK_GLOBAL":
            names.append(".".join(texts))
        elif name in ("EXT1", "EXT2", "EXT4"):
            names.append(f"extension {argument}")
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = texts[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            texts = [texts[-1], memo.get(argument, "?")]
        elif isinstance(argument, str):
            texts = [texts[-1], argument]
    return [shown(name) for name in names], stream.tell()


def _stream_at(text: bytes, start: int) -> io.BytesIO:
    stream = io.BytesIO(text)
    stream.seek(start)
    return stream


def _disassemble(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield the names and arguments of one pickle's instructions; leave the stream at its end."""
    instructions = pickletools.genops(stream)
    for _ in range(MAX_INSTRUCTIONS):
        try:
            found = next(instructions, None)
        except (ValueError, struct.error, OverflowError) as error:
            raise ValueError(f"its pickle is broken: {shown(error)}") from None
        if found is None:
            return
        yield found[0].name, found[1]
    raise ValueError(f"its pickle has over {MAX_INSTRUCTIONS} instructions")


class _Machine:
    """The pickle machine with stand-ins; IndexError and KeyError mean a broken pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.tensor_bytes = 0
        self.globals: set[str] = set()

    def since_mark(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_of(self, count: int) -> None:
        """Make a tuple of the topmost objects."""
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def look_up(self, argument: str) -> None:
        """Push a global of plain weights."""
        name = argument.replace(" ", ".", 1)
        if name not in _GLOBALS:
            raise ValueError(
                f"it refers to {shown(name)}, which is not plain weights; save its state_dict alone"
            )
        self.globals.add(name)
        self.stack.append(_Global(name))

    def append(self, items: list[Any]) -> None:
        """Append to the list on top."""
        if not isinstance(self.stack[-1], list):
            raise ValueError("its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Set items of the dict on top; the keys must be names, so that nothing odd is hashed."""
        if self.stack[-1] is not _DICT or len(items) % 2:
            raise ValueError("its pickle sets items of what is no dict")
        for key in items[::2]:
            if type(key) not in (str, int):
                raise ValueError(f"it has a key that is no name but a {type(key).__name__}")

    def find_storage(self) -> None:
        """Replace a persistent id by its storage."""
        pid = self.stack.pop()
        known = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not known or pid[5:] not in ((), (None,)):
            raise ValueError("its pickle refers to something that is no storage")
        kind, key, location, count = pid[1:5]
        if not isinstance(kind, _Global) or kind.name not in _STORAGES:
            raise ValueError("a storage in it has no known type")
        if not isinstance(key, str) or not isinstance(location, str) or not _is_size(count):
            raise ValueError("a storage in it has an absurd name, place or length")
        storage = Storage(_STORAGES[kind.name], count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"its storage {shown(key)} comes with two types or lengths")
        self.stack.append(storage)

    def call(self) -> None:
        """Stand in for a call of one of the known globals."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls something that is no function")
        if function.name in _TENSORS:
            self.tensor_bytes += _check_tensor(function.name, arguments)
            self.stack.append(_TENSOR)
        elif function.name == _PARAMETER and len(arguments) == 3 and arguments[0] is _TENSOR:
            self.stack.append(_TENSOR)
        elif function.name in _DICTS and not arguments:
            self.stack.append(_DICT)
        elif function.name in _PLAIN and _all_scalars(arguments):
            self.stack.append(_OTHER)
        else:
            raise ValueError(f"its pickle calls {function.name} in a way that torch.save does not")

    def set_state(self) -> None:
        """Set the attributes of an OrderedDict, which is where a module keeps its version."""
        state, target = self.stack.pop(), self.stack[-1]
        if state is not _DICT or target is not _DICT:
            raise ValueError("its pickle sets the state of what is no dict")

    def put(self, index: int) -> None:
        """Remember the object on top."""
        self.memo[index] = self.stack[-1]

    def check_protocol(self, protocol: int) -> None:
        """Take the protocol that torch writes."""
        if protocol != 2:
            raise ValueError(f"its pickle has protocol {protocol}, that of weights is 2")

    def mark(self) -> None:
        """Begin a new group of objects."""
        self.below.append(self.stack)
        self.stack = []


def _check_tensor(function: str, arguments: tuple[Any, ...]) -> int:
    """Require a tensor to lie within its storage; return how many bytes it fills."""
    if not 4 <= len(arguments) <= 8:
        raise ValueError(f"a tensor in it is made from {len(arguments)} things")
    storage, offset, shape, strides, *rest = arguments
    odd = [x for x in rest if not isinstance(x, bool | _Global) and x is not _DICT]
    if not isinstance(storage, Storage) or not _is_size(offset) or odd:
        raise ValueError("a tensor in it has no storage, an absurd offset or odd options")
    if not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise ValueError("a tensor in it has an absurd shape")  # not shown: it may be endless
    item_bytes = storage.item_bytes
    if function.endswith("_v3"):
        kind = rest[2] if len(rest) > 2 else None
        if not isinstance(kind, _Global) or kind.name not in _TYPES:
            raise ValueError("a tensor in it has no known type")
        item_bytes = _TYPES[kind.name]
    count = math.prod(shape)
    last = sum((extent - 1) * step for extent, step in zip(shape, strides, strict=True))
    if count and (offset + max(last + 1, count)) * item_bytes > storage.num_bytes:
        raise ValueError(f"a tensor in it of shape {list(shape)} exceeds its storage")
    return count * item_bytes


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _are_sizes(values: Any) -> bool:
    plain = isinstance(values, tuple) and len(values) <= MAX_DIMENSIONS
    return plain and all(_is_size(value) for value in values)


def _all_scalars(arguments: tuple[Any, ...]) -> bool:
    """Tell whether these are plain values, or one list or tuple of them."""
    inner = arguments[0] if len(arguments) == 1 else None
    values = inner if isinstance(inner, list | tuple) else arguments
    return all(isinstance(value, str | int | float | None) for value in values)


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _push),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append(_DICT),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": lambda machine, index: _push(machine, machine.memo[index]),
    "LONG_BINGET": lambda machine, index: _push(machine, machine.memo[index]),
    "GLOBAL": _Machine.look_up,
    "BINPERSID": lambda machine, _: machine.find_storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.set_state(),
    "PROTO": _Machine.check_protocol,
    "STOP": lambda machine, _: None,
}
