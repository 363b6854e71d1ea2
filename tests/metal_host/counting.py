"""Mode count: the kernel's LLVM text, with a counter in every basic block.

clang compiles the kernel to LLVM's intermediate language after optimisation: scalar, typed, and
nearly free of what is peculiar to the CPU.  `instrument` sorts the instructions of each block into
kinds and puts one counter at its head: times the counter, the kinds are what the launch executed.
Before each load and store goes a call to the runtime, which knows whose memory it is.
"""

from __future__ import annotations

import re

FLOAT_KINDS = {
    "fmul": "multiply",
    "fadd": "add",
    "fsub": "add",
    "fdiv": "divide",
    "frem": "divide",
    "fcmp": "compare",
}
CONVERSIONS = {"fpext", "fptrunc", "sitofp", "uitofp", "fptosi", "fptoui"}
INTEGERS = {"add", "sub", "mul", "and", "or", "xor", "shl", "lshr", "ashr", "icmp", "select"}
INTEGERS |= {"sdiv", "udiv", "srem", "urem", "trunc", "zext", "sext", "getelementptr"}
MATH = re.compile(r"@(?:llvm\.)?(sqrt|exp|log|sin|cos|tan|pow|fmod|floor|ceil|trunc|rint|round)")
INTEGER_INTRINSICS = re.compile(r"@llvm\.(ctpop|ctlz|cttz|bswap|bitreverse|fsh|[su](min|max)|abs)")
SIZES = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}

FUNCTION = re.compile(r"^define .*@(?P<name>[\w.$]+|\"[^\"]+\")\(.*\{$")
LABEL = re.compile(r"^[\w.$\"-]+:")
INSTRUCTION = re.compile(r"^\s+(?:%[\w.\"$-]+ = )?(?:(?:tail|musttail|notail) )?(?P<op>[a-z]+)")
VECTOR = re.compile(r"<(\d+) x ")
LOAD = re.compile(r"= load (?:volatile )?(?P<type><[^>]*>|[\w.%]+), ptr (?P<at>[^,]+)")
STORE = re.compile(
    r"^\s+store (?:volatile )?(?P<type><[^>]*>|[\w.%]+) .*, ptr (?P<at>[^,]+?)(?:,|$)"
)
COPY = re.compile(
    r"@llvm\.mem(?:cpy|move|set)[\w.]*\(ptr [^,%@]*(?P<to>[%@][^,]+), "
    r"(?:ptr [^,%@]*(?P<from>[%@][^,]+)|i8 [^,]+), i64 (?P<bytes>[^,]+),"
)

DECLARATIONS = """
@msl_blocks = global [{n} x i64] zeroinitializer
@msl_blocks_sink = global [{n} x i64] zeroinitializer
@msl_blocks_live = global ptr @msl_blocks
declare void @msl_count_load(ptr, i64)
declare void @msl_count_store(ptr, i64)
"""


def size_of(kind: str) -> int:
    """Bytes of an LLVM type as loads and stores have them after optimisation."""
    vector = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    if vector:
        return int(vector.group(1)) * size_of(vector.group(2))
    if kind in SIZES:
        return SIZES[kind]
    bits = re.fullmatch(r"i(\d+)", kind)
    if not bits:
        raise ValueError(f"a load or store of type {kind!r}")
    return (int(bits.group(1)) + 7) // 8


def _call_kind(line: str) -> str | None:
    if re.search(r"@llvm\.fm(a|uladd)\.", line):
        return "fma"
    if "msl_float_to_bfloat" in line or "msl_bfloat_to_float" in line:
        return "convert"
    if re.search(r"@llvm\.(fabs|copysign|minnum|maxnum|minimum|maximum)", line):
        return "compare"
    if MATH.search(line):
        return "math"
    return "integer" if INTEGER_INTRINSICS.search(line) else None


def kind_of(line: str) -> tuple[str, int] | None:
    """(kind, how many) of one instruction; None for what costs nothing or is counted elsewhere."""
    match = INSTRUCTION.match(line)
    if not match:
        return None
    op = match.group("op")
    lanes = VECTOR.search(line)
    width = int(lanes.group(1)) if lanes else 1
    if op == "call":
        kind = _call_kind(line)
        return (kind, width) if kind else None
    if op in FLOAT_KINDS:
        return FLOAT_KINDS[op], width
    if op in CONVERSIONS:
        return "convert", width
    if op in INTEGERS:
        return "integer", width
    if op in ("br", "switch"):
        return ("branch", 1) if "label" in line and ", label" in line else None
    return None


class _Instrumenter:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.blocks: list[dict[str, int]] = []
        self.fresh = 0

    def start_block(self) -> None:
        n, number = self.fresh, len(self.blocks)
        self.fresh += 1
        self.lines += [
            f"  %mslb{n} = load ptr, ptr @msl_blocks_live",
            f"  %mslp{n} = getelementptr i64, ptr %mslb{n}, i64 {number}",
            f"  %mslc{n} = load i64, ptr %mslp{n}",
            f"  %mslq{n} = add i64 %mslc{n}, 1",
            f"  store i64 %mslq{n}, ptr %mslp{n}",
        ]
        self.blocks.append({})

    def instruction(self, line: str) -> None:
        found = kind_of(line)
        if found:
            kind, count = found
            self.blocks[-1][kind] = self.blocks[-1].get(kind, 0) + count
        for name, at, count in _accesses(line):
            self.lines.append(f"  call void @msl_count_{name}(ptr {at}, i64 {count})")
        self.lines.append(line)


def _accesses(line: str) -> list[tuple[str, str, str]]:
    """(load or store, pointer, bytes) of one instruction."""
    load, store = LOAD.search(line), STORE.match(line)
    if load:
        return [("load", load.group("at"), str(size_of(load.group("type"))))]
    if store:
        return [("store", store.group("at"), str(size_of(store.group("type"))))]
    copy = COPY.search(line)
    if not copy:
        return []
    stores = [("store", copy.group("to"), copy.group("bytes"))]
    if copy.group("from"):
        return [("load", copy.group("from"), copy.group("bytes")), *stores]
    return stores


def _is_ours(name: str) -> bool:
    """Namespace msl stands for hardware; bfloat conversions count where they are called."""
    return (
        name.startswith(("_ZN3msl", "_ZNK3msl"))
        or "bfloat_to_float" in name
        or ("float_to_bfloat" in name)
    )


def instrument(text: str) -> tuple[str, list[dict[str, int]]]:
    """LLVM text → the text with counters, and the kinds of instructions in each counted block."""
    out = _Instrumenter()
    inside, pending = False, False
    for line in text.split("\n"):
        function = FUNCTION.match(line)
        if function:
            inside = pending = not _is_ours(function.group("name"))
        elif line == "}":
            inside = False
        elif inside and LABEL.match(line):
            pending = True
        elif inside and line.strip() and not line.lstrip().startswith(";"):
            starts = INSTRUCTION.match(line)
            if pending and starts and starts.group("op") not in ("phi", "landingpad"):
                out.start_block()
                pending = False
            if starts and not pending:
                out.instruction(line)
                continue
        out.lines.append(line)
    declarations = DECLARATIONS.format(n=max(len(out.blocks), 1))
    return "\n".join(out.lines) + declarations, out.blocks
