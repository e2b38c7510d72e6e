"""Times programs in turn and prints a table: shared by every script here.

The first call compiles and one more turn warms up. Then the programs run in turn, since a machine's speed drifts: a
ratio is the median over neighbouring runs.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.data.workers import count_cores
from topformer_jax.runtime import cli, files

Row = dict[str, Any]
OURS = "ours"
LOAD = os.getloadavg()[0]  # when the script started: other work makes the figures useless
PAUSE = 0.3  # seconds before each run: as long as OpenMP's threads spin after the run before


class Program(NamedTuple):
    """Something to time, which has run once.

    `run` makes so many calls without waiting in between, waits for the last one and returns the seconds of all.
    `memory_bytes` of ours is XLA's count of arguments, results and temporary arrays; of PyTorch the peak of its
    process (resident on a CPU, allocated on CUDA) less what it had before. `result` is the first call's, to compare.
    """

    run: Callable[[int], float]
    first_seconds: float  # of the first call, compilation included
    memory_bytes: int | None = None
    temporary_bytes: int | None = None
    result: np.ndarray | None = None


def make_timer(
    call: Callable[[], Any], wait: Callable[[Any], object] = jax.block_until_ready
) -> Callable[[int], float]:
    """`Program.run` of a call; `wait` takes its result and waits until the device is done."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return time.perf_counter() - start

    return run


def start(name: str, call: Callable[[], Any], jitted: Any = None, *arguments: Any) -> Program:
    """Calls a program for the first time; its memory is that of `jitted` for these arguments."""
    run = make_timer(call)
    seconds = run(1)
    print(f"{name}: the first call took {seconds:.2f} s", file=sys.stderr, flush=True)
    memory = jitted and jitted.lower(*arguments).compile().memory_analysis()
    if not memory:
        return Program(run, seconds)
    temporary = memory.temp_size_in_bytes
    lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(run, seconds, lasting + temporary, temporary)


def compare(
    case: str,
    programs: Mapping[str, Program],
    repeats: int,
    *,
    images: int | None = None,
    at_least: float = 0.0,
) -> list[Row]:
    """Times the programs in turn, `repeats` times; a row each, with the ratio of its time to the first one's.

    A run is as many calls as take `at_least` seconds. `images` is how many a call takes.
    """
    calls = dict.fromkeys(programs, 1)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(1 + repeats):
        for name, program in programs.items():
            time.sleep(PAUSE)
            second = program.run(calls[name]) / calls[name]
            if turn == 0:  # warms up
                calls[name] = max(1, round(at_least / second))
            else:
                seconds[name].append(second)
    first, *_ = seconds.values()
    rows = []
    for name, times in seconds.items():
        row = make_row(case, name, times)
        if images:
            row["images_per_second"] = images / row["seconds"]["median"]
        if times is not first:
            row["ratio"] = statistics.median(b / a for a, b in zip(first, times, strict=True))
        _, row["first_seconds"], row["memory_bytes"], row["temporary_bytes"], _ = programs[name]
        rows.append(row)
    return rows


def make_row(case: str, name: str, seconds: Sequence[float]) -> Row:
    """A row with the median and the range of these seconds."""
    spread = {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
    return {"case": case, "program": name, "seconds": spread}


def _milliseconds(seconds: Mapping[str, float]) -> str:
    places = 1 if seconds["median"] >= 0.001 else 3
    low, median, high = (f"{1000 * seconds[name]:.{places}f}" for name in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


# A table's columns after the first: the row's key, the heading, and the value's factor and decimal places.
COLUMNS = {
    "images_per_second": ("images/s", 1, 1),
    "ratio": ("ratio to first", 1, 2),
    "miou": ("mIoU %", 100, 4),
    "first_seconds": ("first call s", 1, 2),
    "arguments_bytes": ("arguments MB", 1e-6, 1),
    "memory_bytes": ("memory MB", 1e-6, 1),
    "temporary_bytes": ("temporary MB", 1e-6, 1),
    "operations": ("GFLOP", 1e-9, 1),
    "accessed_bytes": ("accessed GB", 1e-9, 2),
    "bound_seconds": ("bound ms", 1000, 1),
    "moved_bytes": ("moved GB", 1e-9, 2),
    "collective_bytes": ("collectives MB", 1e-6, 1),
    "other_bytes": ("of them no sums B", 1, 0),
    "compile_seconds": ("compile s", 1, 0),
    "sizes": ("sizes", 1, 0),
    "networks": ("networks", 1, 0),
    "counting": ("counting", 1, 0),
    "batches": ("batches", 1, 0),
    "used_rows": ("used rows %", 100, 1),
    "padding": ("padding %", 100, 1),
}


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, with the columns that any of them has a value for."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    timed = any("seconds" in row for row in rows)
    width = max(len(row["case"]) for row in rows)
    lines = [("", *["ms, median (range)"] * timed, *(COLUMNS[key][0] for key in keys))]
    for row in rows:
        cells = [_milliseconds(row["seconds"])] if timed else []
        for key in keys:
            _, factor, places = COLUMNS[key]
            cells.append("-" if row.get(key) is None else f"{factor * row[key]:.{places}f}")
        lines.append((f"{row['case']:<{width}}  {row['program']}", *cells))
    return cli.table(lines)


def report(title: str, rows: Sequence[Row], args: argparse.Namespace, notes: Sequence[str] = ()) -> None:
    """Prints title, machine, table and notes; writes them to `--json FILE` at full precision."""
    device = jax.local_devices()[0]
    kind = f"{device.device_kind} ({device.platform})"
    machine = f"{kind}, {count_cores()} cores, load {LOAD:.2f}, jax {jax.__version__}"
    print(title, machine, *([table(rows)] if rows else []), *notes, sep="\n")
    if args.json:
        found = {"title": title, "machine": machine, "rows": list(rows), "notes": list(notes)}
        files.write_file(args.json, json.dumps(found, indent=2) + "\n")


def describe(config: ConfigDict) -> str:
    """The config in a report's title."""
    return f"{config.name}, {config.model.dtype}, precision {config.model.precision}"


def positive(text: str) -> int:
    """A flag's value that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def make_parser(description: str | None, **sizes: tuple[int, str]) -> cli.Parser:
    """A parser with the flags that every script has, and flags for sizes: default and meaning by name."""
    parser = cli.Parser(description, config_required=False)
    for name, (default, meaning) in {"repeats": (7, "timed runs of each"), **sizes}.items():
        text = f"{meaning} (default {default})"
        parser.add_argument(f"--{name}", type=positive, default=default, help=text)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything")
    return parser


def parse(parser: cli.Parser) -> tuple[argparse.Namespace, ConfigDict]:
    """The arguments, and the config: TopFormer-T for ADE20K where none is given."""
    # A GPU is shared with PyTorch and with the processes that a script starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args, config = parser.parse()
    return args, config_lib.ade20k("tiny") if config is None else config
