"""Files that misuse the pickle format, torch's part of it, or the zip format around it.

They would crash a careless reader, hang it, fill its memory, or make it take bytes that are not
there.  A few are only broken.  All must be refused.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable

from tests.converters.hostile import Raw, call, finish, legacy, named, push, zipped

_DEEP = 100_000


def storage(key: object = "0", count: object = 2, *, kind: str = "FloatStorage") -> Raw:
    """A storage by its persistent id."""
    return Raw(push(("storage", named("torch", kind), key, "cpu", count)) + b"Q")


def tensor(source: Raw, offset: int, shape: tuple[object, ...], strides: tuple[int, ...]) -> Raw:
    """A tensor over a storage."""
    hooks = call(named("collections", "OrderedDict"))
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, source, offset, shape, strides, False, hooks)


def whole(body: bytes) -> bytes:
    """A pickle around instructions that leave one object."""
    return b"\x80\x02" + body + b"."


def _doubled(times: int) -> Raw:
    """A tuple that holds the tuple before it twice, and so on."""
    return Raw(push("x") + b"q\x00h\x00\x86" * times)


def old(pickle: bytes) -> bytes:
    """The old form around a pickle, with its storage if it has one."""
    if b"storage" in pickle:
        with_view = pickle.replace(b"tQ", b"NtQ")  # the id has one part more in this form
        return legacy(with_view, tail=struct.pack("<Q", 2) + bytes(8))
    return legacy(pickle, keys=b"\x80\x02].")


def pickles() -> dict[str, bytes]:
    """Pickles by name."""
    laughs = push([{}])
    for _ in range(12):
        laughs = Raw(b"(" + laughs + b"q\x00" + b"h\x00" * 9 + b"t")
    good = tensor(storage(), 0, (2,), (1,))
    return _broken() | {
        "billion laughs": finish(laughs),
        "hash of a doubled tuple": whole(b"}" + _doubled(60) + b"K\x01s"),
        "a doubled tuple is called": finish(_doubled(60) + b")R"),
        "a dict holds itself": whole(b"}q\x00" + push("a") + b"h\x00s"),
        "tuples, nested deeply": finish(b")" + b"\x85" * _DEEP),
        "lists, nested deeply": finish(b"]" * _DEEP + b"a" * (_DEEP - 1)),
        "marks": finish(b"(" * _DEEP),
        "a list alone": whole(push([1, 2])),
        "a tensor alone": whole(good),
        "a text alone": whole(push("weights")),
        "a key that is a tuple": whole(push({(1, 2): good})),
        "a key that is None": whole(push({None: good})),
        "a key that is a number": whole(push({0.5: good})),
        "a key with a line break": whole(push({"a\nb": good})),
        "a key that is very long": whole(push({"a" * 5000: good})),
        "a key that safetensors keeps": whole(push({"__metadata__": good})),
        "two tensors of one dotted name": whole(push({"a.b": good, "a": push({"b": good})})),
        "a tensor spread out of nothing": finish(tensor(storage(), 0, (1 << 40,), (0,))),
        "a small tensor spread out": finish(tensor(storage(), 0, (64,), (0,))),
        "a tensor longer than its storage": finish(tensor(storage(), 0, (1000,), (1,))),
        "a tensor behind its storage": finish(tensor(storage(), 1 << 40, (1,), (1,))),
        "a tensor with huge strides": finish(tensor(storage(), 0, (2, 2), (1 << 62, 1 << 62))),
        "a negative offset": finish(tensor(storage(), -1, (1,), (1,))),
        "a negative size": finish(tensor(storage(), 0, (-5,), (1,))),
        "a negative stride": finish(tensor(storage(), 1, (2,), (-1,))),
        "sizes whose product overflows": finish(tensor(storage(), 0, (1 << 33,) * 3, (0, 0, 0))),
        "too many dimensions": finish(tensor(storage(), 0, (1,) * 40, (1,) * 40)),
        "a size that is a text": finish(tensor(storage(), 0, ("x",), (1,))),
        "a storage that is not there": finish(tensor(storage("7"), 0, (2,), (1,))),
        "a storage by a path": finish(tensor(storage("../data.pkl"), 0, (2,), (1,))),
        "a storage by an absolute path": finish(tensor(storage("/etc/passwd"), 0, (2,), (1,))),
        "a storage of absurd length": finish(tensor(storage("0", 1 << 50), 0, (2,), (1,))),
        "a storage of negative length": finish(tensor(storage("0", -8), 0, (2,), (1,))),
        "a storage of a long number": finish(tensor(storage("0", 1 << 2000), 0, (2,), (1,))),
        "a storage of the wrong kind": finish(
            tensor(storage("0", 2, kind="LongStorage"), 0, (2,), (1,))
        ),
        "a storage that is a tensor class": finish(tensor(storage(kind="Tensor"), 0, (2,), (1,))),
        "not a storage but a dict": finish(tensor(push({}), 0, (2,), (1,))),
        "a persistent id that is a number": finish(push(5) + b"Q"),
        "a persistent id that is a text": finish(push("0") + b"Q"),
        "a persistent id of another kind": finish(push(("module", "os", "x", "y", 1)) + b"Q"),
        "a persistent id that is empty": finish(push(()) + b"Q"),
        "a tensor with another state": finish(good + push((good, 0, (1 << 40,), (1,))) + b"b"),
        "a sparse tensor": finish(
            call(named("torch._utils", "_rebuild_sparse_tensor"), named("torch", "sparse_coo"),
                 (good, good, (1 << 40,)))
        ),
        "a tensor without data": finish(
            call(named("torch._utils", "_rebuild_meta_tensor_no_storage"),
                 named("torch", "float32"), (1 << 40,), (1,), False)
        ),
        "a quantised tensor": finish(
            call(named("torch._utils", "_rebuild_qtensor"), storage(), 0, (2,), (1,),
                 (named("torch", "per_tensor_affine"), 1.0, 0), False, push({}))
        ),
        "a tensor of a subclass": finish(
            call(named("torch._tensor", "_rebuild_from_type_v2"),
                 named("torch._utils", "_rebuild_tensor_v2"), named("torch", "Tensor"),
                 (storage(), 0, (2,), (1,), False, push({})), {"__class__": 1})
        ),
        "a tensor from numpy": finish(
            call(named("torch._utils", "_rebuild_device_tensor_from_numpy"),
                 call(named("numpy", "zeros"), 3), named("torch", "float32"), "cpu", False)
        ),
        "a tensor by its class": finish(named("torch", "Tensor") + push((1 << 40,)) + b"\x81"),
        "a bytearray": finish(call(named("builtins", "bytearray"), 1 << 40)),
        "a set of a doubled tuple": finish(
            call(named("__builtin__", "set"), Raw(b"](" + _doubled(60) + b"e"))
        ),
        "a doubled tuple as a shape": finish(
            call(named("torch._utils", "_rebuild_tensor_v2"), storage(), 0, _doubled(60), (1,),
                 False, push({}))
        ),
        "a doubled tuple as a storage": finish(
            push(("storage", named("torch", "FloatStorage"), _doubled(60), "cpu", 2)) + b"Q"
        ),
        "a doubled tuple as a persistent id": finish(_doubled(60) + b"Q"),
        "a doubled tuple as a state": finish(
            call(named("collections", "OrderedDict")) + _doubled(60) + b"b"
        ),
    }  # fmt: skip


def _broken() -> dict[str, bytes]:
    """Pickles that break the format, or use parts of it that weights do not need."""
    return {
        "nothing": b"",
        "a stop alone": b"\x80\x02.",
        "no stop": b"\x80\x02}",
        "an unknown instruction": finish(b"\xff"),
        "protocol 255": b"\x80\xff}.",
        "protocol 5": finish(push({}), protocol=5),
        "two pickles in a row": finish(push(1)) + finish(push(2)),
        "bytes behind the pickle": finish(push(1)) + b"\0" * 100,
        "a global that is cut off": b"\x80\x02ctorch",
        "a global without a name": finish(b"ctorch\n\n"),
        "a global with a space": finish(b"ctorch FloatStorage\nx\n"),
        "a text longer than the file": finish(b"X\xff\xff\xff\xff"),
        "a text of 2^62 bytes": finish(b"\x8d" + struct.pack("<Q", 1 << 62)),
        "bytes of 2^63": finish(b"\x8e" + struct.pack("<Q", 1 << 63)),
        "a bytearray of 2^62": finish(b"\x96" + struct.pack("<Q", 1 << 62)),
        "a long of 2 GiB": finish(b"\x8b" + struct.pack("<i", 2**31 - 1)),
        "a long of negative length": finish(b"\x8b" + struct.pack("<i", -5)),
        "a frame of 2^62": finish(b"\x95" + struct.pack("<Q", 1 << 62)),
        "a number of a million digits": finish(b"I" + b"9" * 1_000_000 + b"\n"),
        "a text without an end": finish(b"S'abc\n"),
        "a text that is no UTF-8": finish(b"X\x02\0\0\0\xff\xfe"),
        "too many pops": b"\x80\x02" + b"0" * 100 + b"}.",
        "a pop of a mark that is not there": b"\x80\x021}.",
        "a memo that is empty": finish(b"h\x07"),
        "a buffer from outside": finish(b"\x97"),
        "a buffer made read-only": finish(push(1) + b"\x98"),
        "extension 1": finish(b"\x82\x01"),
        "extension 2": finish(b"\x83\x01\x02"),
        "extension 4": finish(b"\x84\x01\x02\x03\x04"),
        "a persistent id in text": finish(b"P0\n"),
        "an item for a text": b"\x80\x02" + push("a") + push("b") + push("c") + b"s.",
        "an item for a list": b"\x80\x02" + push([]) + push("b") + push("c") + b"s.",
        "an element for a dict": b"\x80\x02}" + push(1) + b"a.",
        "a call of a text": finish(push("a") + b")R"),
        "a call without arguments": finish(named("collections", "OrderedDict") + push(1) + b"R"),
        "a state for a number": finish(push(1) + b"}b"),
        "a state that is a number": finish(call(named("collections", "OrderedDict")) + b"K\x01b"),
        "keys without values": b"\x80\x02}(" + push("a") + b"u.",
        "a million instructions": finish(push(1) + b"q\x00" * 1_000_000),
    }


def archives() -> dict[str, bytes]:
    """Whole files, broken or hostile in the form around the pickle."""
    good = finish(tensor(storage(), 0, (2,), (1,)))
    plain = zipped(good)
    end = len(plain) - 22
    entry = plain.index(b"PK\x01\x02")
    return {
        "one storage under many names": zipped(
            whole(
                push(
                    {str(i): tensor(storage("1", 1 << 18), 0, (1 << 18,), (1,)) for i in range(20)}
                )
            ),
            {"data/1": bytes(1 << 20)},
        ),
        "a compressed pickle": _zip({"a/data.pkl": good}, packed=True),
        "a bomb of zeros": _zip({"a/data.pkl": good, "a/data/0": bytes(64 << 20)}, packed=True),
        "a bomb in the pickle": _zip({"a/data.pkl": good + bytes(64 << 20)}, packed=True),
        "no pickle": _zip({"a/data/0": bytes(8)}),
        "no folder": _zip({"data.pkl": good, "data/0": bytes(8)}),
        "two folders": _zip({"a/data.pkl": good, "b/data/0": bytes(8)}),
        "a name upwards": zipped(good, {"../../evil": b"x"}),
        "an absolute name": _zip({"/a/data.pkl": good, "/a/data/0": bytes(8)}),
        "a name with a backslash": zipped(good, {"data\\..\\evil": b"x"}),
        "a folder's entry": zipped(good, {"data/": b""}),
        "a name in another case": zipped(good, {"DATA.PKL": finish(push(1))}),
        "a TorchScript program": zipped(good, {"constants.pkl": good, "code/a.py": b"evil()"}),
        "a pickle in another folder": _zip({"a/b/data.pkl": good}),
        "bytes before": b"#!/bin/sh\n" + plain,
        "bytes behind": plain + b"x",
        "a comment": plain[:-2] + b"\x04\0evil",
        "one entry twice": _twice(good),
        "entries that overlap": _overlap(plain),
        "an entry behind the end": _patch(plain, entry + 42, struct.pack("<I", 1 << 30)),
        "an entry longer than the file": _patch(
            plain, entry + 20, struct.pack("<II", 1 << 30, 1 << 30)
        ),
        "an entry of 4 GiB without the field": _patch(plain, entry + 20, b"\xff" * 8),
        "an encrypted entry": _patch(plain, entry + 8, b"\x01"),
        "a local name that differs": _patch(plain, 30, b"b"),
        "a method that differs": _patch(plain, 8, b"\x08"),
        "more entries than there are": _patch(plain, end + 8, b"\x09\0\x09\0"),
        "fewer entries than there are": _patch(plain, end + 8, b"\x01\0\x01\0"),
        "no entries": _patch(plain, end + 8, bytes(4)),
        "a directory elsewhere": _patch(plain, end + 16, bytes(4)),
        "two discs": _patch(plain, end + 4, b"\x01\0"),
        "a zip64 directory elsewhere": plain[:end] + _locator(1 << 40) + plain[end:],
        "a zip cut off": plain[:-30],
        "a zip's start": plain[:100],
        "a tar archive": _tar({"storages": good, "tensors": good, "pickle": good}),
        "a gzip": gzip.compress(good),
        "a bare pickle": good,
        "a program": b"\x7fELF" + bytes(100),
        "a text": b"weights\n",
        "zeros": bytes(1000),
        "an old file's magic alone": legacy(b"")[:20],
        "an old file without keys": legacy(good, keys=b""),
        "an old file without storages": legacy(good),
        "an old file's absurd storage": legacy(good, tail=struct.pack("<Q", 1 << 60) + bytes(8)),
        "an old file's negative storage": legacy(good, tail=struct.pack("<q", -4) + bytes(8)),
        "an old file cut off": legacy(good, tail=struct.pack("<Q", 2) + bytes(3)),
    }


def _zip(members: dict[str, bytes], *, packed: bool = False) -> bytes:
    stream = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _twice(pickle: bytes) -> bytes:
    """An archive with two entries of one name; two readers may take different ones."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/data.pkL", finish(push(1)))
    return stream.getvalue().replace(b"a/data.pkL", b"a/data.pkl")


def _overlap(plain: bytes) -> bytes:
    """Let the second entry of the directory begin where the first one does."""
    first = plain.index(b"PK\x01\x02")
    second = plain.index(b"PK\x01\x02", first + 4)
    return _patch(plain, second + 42, plain[first + 42 : first + 46])


def _patch(text: bytes, at: int, new: bytes) -> bytes:
    return text[:at] + new + text[at + len(new) :]


def _locator(offset: int) -> bytes:
    return struct.pack("<4sIQI", b"PK\x06\x07", 0, offset, 1)


def _tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FORMS: dict[str, Callable[[bytes], bytes]] = {"zip": zipped, "old": old}
