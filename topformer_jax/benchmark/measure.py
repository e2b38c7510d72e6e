"""What every measurement shares: programs timed in turn, what they cost, and the machine they run on."""

import dataclasses
import functools
import importlib.util
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

    `run` does it so many times, one call after the other, waits for the last one, and returns the seconds of all of
    them. `first` is how long the first call took (seconds, compilation included). `memory` is what it needs on the
    device with its arguments, `temporary` without (bytes), `accessed` what it reads and writes there (bytes); None
    where nobody knows. Ours are the compiler's counts, which take each loop once. A peer's memory is the most that
    its process had in its third call beyond what it had before the program was made: allocated on CUDA, resident on
    a CPU, where pages of libraries and freed memory that the process keeps count too.
    """

    run: Callable[[int], float]
    first: float = 0.0
    memory: int | None = None
    temporary: int | None = None
    accessed: float | None = None


class Stopped(Exception):
    """A program cannot go on; whoever made it tells why."""


def ready(
    name: str, call: Callable[[], Any], wait: Callable[[Any], object] = jax.block_until_ready
) -> Program:
    """Calls a program for the first time; `call` may return before the device is done, `wait` takes its result."""
    run = functools.partial(_timed, call, wait)
    first = run(1)
    print(f"{name}: the first call took {first:.2f} s", file=sys.stderr, flush=True)
    return Program(run, first)


def _timed(call: Callable[[], Any], wait: Callable[[Any], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return time.perf_counter() - start


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


def sequential(
    programs: Mapping[str, Program], repeats: int, *, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of one call of each program: all of them in turn, `repeats` times.

    In turn, because machines' speed drifts: what is compared is measured side by side. Each run is as many calls, one
    after the other without waiting, as take `at_least` seconds: with 0 each call is waited for. A program that
    raises `Stopped` is left out from then on, and of the result.
    """
    calls = dict.fromkeys(programs, 1)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(1 + repeats):
        for name in list(seconds):
            time.sleep(PAUSE)
            try:
                second = programs[name].run(calls[name]) / calls[name]
            except Stopped:
                del seconds[name]
                continue
            if turn:
                seconds[name].append(second)
            else:  # the first turn warms up
                calls[name] = max(1, round(at_least / second))
    return seconds


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
        seconds: of their runs, from `sequential`.
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
            "seconds": spread(times),
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


def spread(seconds: list[float]) -> dict[str, float]:
    """What a report keeps of a measurement's runs."""
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


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
        # Caches are faster than this bandwidth: a small program may have more than all of it.
        source = "a float32 product of 2048 x 2048 matrices, and 1 added to 256 MB where they lie"
        return Machine(kind, "cpu", _matmul_rate(2048), _copy_rate(2**28), source)
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
    return 2 * size**3 / _best(lambda: program(matrix))


def _copy_rate(size: int) -> float:
    """Bytes a second, read and written, of adding 1 to an array of `size` bytes.

    The result takes the array's place: fresh memory would have to come from the kernel first.
    """
    program = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = program(jnp.zeros(size // 4, jnp.float32))

    def call() -> jax.Array:
        nonlocal array
        array = program(array)
        return array

    return 2 * size / _best(call)


def _best(call: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of three calls."""
    program = Program(functools.partial(_timed, call, jax.block_until_ready))
    return min(sequential({"": program}, 3)[""])


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
    if importlib.util.find_spec("torch") is None:
        raise UserError("--peer torch needs PyTorch, which is not installed: pip install -e '.[convert]'")
