"""What a compiled TPU program moves, read off its text: to and from its memory, and to the other chips.

XLA's own count of bytes takes a loop once and counts what stays in the chip's fast memory like the rest.
"""

import math
import re

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


def memory_bytes(text: str) -> int:
    """Bytes that are read from and written to the memory of a chip, at most.

    Every operand and result of every operation counts whole, unless it lies in fast memory (`S(1)` and the like in
    its layout); what is done in a loop counts as often as the loop runs, and of branches the one that moves most.
    """
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("the text of a program has no ENTRY")
    return _moved(computations, entry[1])


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


def _moved(computations: dict[str, list[str]], name: str) -> int:
    sizes: dict[str, int] = {}
    total = 0
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        result = sum(_size(shape) for shape in _SHAPE.finditer(found["result"]) if not _is_fast(shape))
        sizes[found["name"]] = result
        operation = found["operation"]
        if operation == "while":
            total += _rounds(computations, line) * _moved(computations, _named(line, "body"))
        if operation == "conditional":
            total += max(_moved(computations, branch) for branch in _branches(line))
        if operation in NOTHING_MOVES or operation.endswith("-done"):
            continue
        total += result
        # What an asynchronous operation starts from is part of its result.
        if not operation.endswith("-start"):
            total += sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", found["operands"]))
    return total


def _rounds(computations: dict[str, list[str]], loop: str) -> int:
    """How often a loop runs that counts up from 0, as all of JAX's do; 1 where its condition says something else."""
    if times := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(times[1])
    limits = {}
    for line in computations[_named(loop, "condition")]:
        if found := re.search(r"%([\w.\-]+) = s(?:32|64)\[\]\S* constant\((\d+)\)", line):
            limits[found[1]] = int(found[2])
        if found := re.search(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", line):
            return limits.get(found[1], 1)
    return 1


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
