"""What every measurement shares: programs timed in turn, what they cost, and the machine they run on."""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from topformer_jax.errors import UserError
from topformer_jax.models.summary import summary

OURS = "ours"
LOAD = os.getloadavg()[0]  # when the command started: what else runs slows PyTorch on a CPU down most
PAUSE = 0.3  # seconds before each run: as long as OpenMP's threads go on spinning after the one before
# Products in bfloat16 (operations a second) and memory (bytes a second), as the makers publish them.
PEAKS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "TPU v4": (275e12, 1228e9),
    "TPU v5": (459e12, 2765e9),  # v5p
    "TPU v5p": (459e12, 2765e9),
    "TPU v5e": (197e12, 819e9),
    "TPU v5 lite": (197e12, 819e9),
    "TPU v6e": (918e12, 1640e9),
    "TPU v6 lite": (918e12, 1640e9),
}


class Options(NamedTuple):
    """What the command line says about every measurement."""

    repeats: int = 7
    peer: bool = False  # beside PyTorch
    variants: tuple[str, ...] = ()  # of PyTorch; none: what suits the device


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to time, which has run once.

    `call` does it and may return before the device is done; `wait` takes what it returned, and waits. `first` is
    how long the first call took (seconds, compilation included). `memory` is what it needs on the device with
    its arguments, `temporary` without (bytes), `accessed` what it reads and writes there (bytes, by the
    compiler's count, which takes each loop once); None where nobody knows.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], object] = jax.block_until_ready
    first: float = 0.0
    memory: int | None = None
    temporary: int | None = None
    accessed: float | None = None


def ready(
    name: str, call: Callable[[], Any], wait: Callable[[Any], object] = jax.block_until_ready
) -> Program:
    """Calls a program for the first time."""
    start = time.perf_counter()
    wait(call())
    first = time.perf_counter() - start
    print(f"{name}: the first call took {first:.2f} s", file=sys.stderr, flush=True)
    return Program(call, wait, first)


def with_costs(program: Program, jitted: Any, *arguments: Any) -> Program:
    """The program with what its compiled form, which is in the cache by now, says that it costs."""
    compiled = jitted.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        return program
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return dataclasses.replace(program, memory=whole + temporary, temporary=temporary, accessed=accessed)


def in_turn(
    programs: Mapping[str, Program], repeats: int, *, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of one call of each program: all of them in turn, `repeats` times.

    In turn, because machines' speed drifts: what is compared is measured side by side. Each run is as many calls, one
    after the other without waiting, as take `at_least` seconds: with 0 each call is waited for.
    """
    calls = {}
    for name, program in programs.items():
        second = _run(program, 1)
        calls[name] = max(1, round(at_least / second))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            seconds[name].append(_run(program, calls[name]))
    return seconds


def _run(program: Program, calls: int) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    for _ in range(calls):
        result = program.call()
    program.wait(result)
    return (time.perf_counter() - start) / calls


def rows(
    case: str,
    programs: Mapping[str, Program],
    seconds: Mapping[str, list[float]],
    *,
    images: int | None = None,
    operations: float | None = None,
    machine: "Machine | None" = None,
) -> list[dict[str, Any]]:
    """The rows of a report that one comparison gives; the first program is ours.

    Args:
        case: what was compared.
        programs: by name.
        seconds: of their runs, from `in_turn`.
        images: that a call takes.
        operations: floating point operations that the network needs for a call.
        machine: whose peaks to compare with.
    """
    first = next(iter(seconds.values()))
    found = []
    for name, times in seconds.items():
        program = programs[name]
        middle = statistics.median(times)
        # Of neighbours in time, so that a drift of the machine cancels.
        ratios = [other / ours for other, ours in zip(times, first, strict=True)]
        row: dict[str, Any] = {
            "case": case,
            "program": name,
            "seconds": {"median": middle, "low": min(times), "high": max(times)},
            "images_per_second": images / middle if images else None,
            "ours_faster": statistics.median(ratios) if times is not first else None,
            "first_seconds": program.first,
            "memory_bytes": program.memory,
            "temporary_bytes": program.temporary,
            "share_of_peak": None,
            "share_of_bandwidth": None,
        }
        if machine and machine.operations and operations:
            row["share_of_peak"] = operations / middle / machine.operations
        if machine and machine.bandwidth and program.accessed:
            row["share_of_bandwidth"] = program.accessed / middle / machine.bandwidth
        found.append(row)
    return found


class Machine(NamedTuple):
    """The device that is measured, with its peaks in operations and bytes a second (None: unknown)."""

    kind: str
    platform: str
    operations: float | None
    bandwidth: float | None
    source: str  # of the peaks

    def facts(self) -> dict[str, Any]:
        """For a report's head."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return {
            "device": f"{self.kind} ({self.platform})",
            "cores": cores(),
            "load_before": LOAD,
            "jax": jax.__version__,
            "peak_operations_per_second": self.operations,
            "peak_bytes_per_second": self.bandwidth,
            "peaks_from": self.source,
            "jax_peak_memory_bytes": stats.get("peak_bytes_in_use"),  # of the whole process, so far
        }


def machine() -> Machine:
    """This process's first device."""
    device = jax.local_devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        return Machine(kind, "cpu", _matmul_rate(2048), None, "a float32 product of 2048 x 2048 matrices")
    known = peaks(kind)
    if known is None:
        return Machine(kind, device.platform, None, None, "unknown")
    return Machine(kind, device.platform, *known, "the maker, bfloat16")


def peaks(kind: str) -> tuple[float, float] | None:
    """The row of `PEAKS` for a device of this kind."""
    known = [name for name in PEAKS if name.lower() in kind.lower()]
    return PEAKS[max(known, key=len)] if known else None


def _matmul_rate(size: int) -> float:
    """Operations a second in a product of two square float32 matrices."""
    matrix = jnp.ones((size, size), jnp.float32)
    program = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    jax.block_until_ready(program(matrix))
    seconds = in_turn({"": Program(lambda: program(matrix))}, 3)[""]
    return 2 * size**3 / min(seconds)


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def described(config: ConfigDict) -> str:
    """The config in a report's title."""
    return f"{config.name}, {config.model.dtype}, precision {config.model.precision}"


def multiply_adds(config: ConfigDict, size: tuple[int, int]) -> float:
    """Of the network for one image, without the resizing: as papers count them."""
    return 1e6 * float(summary(config, size)[-1][2].replace(",", ""))


def require_torch() -> None:
    """Raises a UserError where PyTorch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            "--peer torch needs PyTorch, which is not installed: pip install -e '.[convert]'"
        ) from None
