"""What a compiled program moves, read off its text: to and from a device's memory, and to other devices.

XLA's own count of bytes takes a loop once and counts what stays in the chip's fast memory like the rest.
"""

import functools
import math
import re
from collections.abc import Callable

BYTES = {
    **{"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2},
    **{"s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1},
}
# They name what others have made, or wait for it.
NOTHING_MOVES = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "optimization-barrier", "partition-id", "replica-id"),
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<operation>[a-z\-]+)\((?P<operands>[^)]*)\)"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


def memory_bytes(text: str, rounds: int = 1) -> int:
    """Bytes that are read from and written to the memory of a device, at most.

    Every operand and result of every operation counts whole, unless it lies in fast memory (`S(1)` and the like in
    its layout); what is done in a loop counts as often as the loop runs (`rounds` if its length depends on data), and
    of branches the one that moves most.
    """
    return _sum_operations(text, _moved, rounds)


def kernels(text: str, rounds: int = 1) -> int:
    """The operations that a GPU starts one after the other; loops and branches as in `memory_bytes`."""
    return _sum_operations(text, lambda *_: 1, rounds)


def collectives(text: str) -> int:
    """The number of collectives, each loop taken once."""
    found = map(_INSTRUCTION.match, text.splitlines())
    return sum(1 for each in found if each and each["operation"].removesuffix("-start") in COLLECTIVES)


def sent_bytes(text: str) -> int:
    """Bytes of the results of all collectives, each loop taken once."""
    return sum(sent_by_kind(text).values())


def sent_by_kind(text: str) -> dict[str, int]:
    """Bytes of the results of the collectives of each kind, each loop taken once."""
    totals: dict[str, int] = {}
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found and (kind := found["operation"].removesuffix("-start")) in COLLECTIVES:
            totals[kind] = totals.get(kind, 0) + sum(_size(s) for s in _SHAPE.finditer(found["result"]))
    return totals


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found.setdefault(head[1], [])
        else:
            lines.append(line)
    return found


def _sum_operations(text: str, weigh: Callable[[re.Match[str], dict[str, int]], int], rounds: int) -> int:
    """Adds up a weight of each operation, from its instruction and the sizes of the results before it."""
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("the text of a program has no ENTRY")

    @functools.cache
    def add_up(name: str) -> int:
        sizes: dict[str, int] = {}
        total = 0
        for line in computations[name]:
            found = _INSTRUCTION.match(line)
            if found is None:
                continue
            shapes = _SHAPE.finditer(found["result"])
            sizes[found["name"]] = sum(_size(shape) for shape in shapes if not _is_fast(shape))
            operation = found["operation"]
            if operation == "while":
                total += _rounds(computations, line, rounds) * add_up(_named(line, "body"))
            if operation == "conditional":
                total += max(map(add_up, _branches(line)))
            if operation not in NOTHING_MOVES and not operation.endswith("-done"):
                total += weigh(found, sizes)
        return total

    return add_up(entry[1])


def _moved(found: re.Match[str], sizes: dict[str, int]) -> int:
    """The bytes of an operation's result and operands."""
    result = sizes[found["name"]]
    # What an asynchronous operation starts from is part of its result.
    if found["operation"].endswith("-start"):
        return result
    return result + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", found["operands"]))


def _rounds(computations: dict[str, list[str]], loop: str, unknown: int) -> int:
    """How often a loop runs that counts up from 0, as all of JAX's do; `unknown` if it depends on data."""
    if times := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(times[1])
    limits = {}
    for line in computations[_named(loop, "condition")]:
        if found := re.search(r"%([\w.\-]+) = s(?:32|64)\[\]\S* constant\((\d+)\)", line):
            limits[found[1]] = int(found[2])
        if found := re.search(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", line):
            return limits.get(found[1], unknown)
    return unknown


def _named(line: str, attribute: str) -> str:
    """The computation that an instruction names."""
    found = re.search(attribute + r"=%?([\w.\-]+)", line)
    assert found is not None, line
    return found[1]


def _branches(line: str) -> list[str]:
    """The computations that a conditional chooses from."""
    if several := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"%?([\w.\-]+)", several[1])
    return [_named(line, f"{value}_computation") for value in ("true", "false")]


def _is_fast(shape: re.Match[str]) -> bool:
    return "S(" in (shape[3] or "")


def _size(shape: re.Match[str]) -> int:
    return BYTES.get(shape[1], 0) * math.prod(int(extent) for extent in shape[2].split(",") if extent)
