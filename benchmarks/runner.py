"""What every benchmark shares: flags, programs timed in turn, PyTorch as a peer, a table and its JSON.

The first call compiles and one more turn warms up. Then the programs run in turn, since a machine's speed drifts: a
ratio is the median over neighbouring runs. Each variant of PyTorch runs in a process of its own, which times its own
calls, as its user would run it: its allocator and threads touch nobody else's times.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.data.loader import count_cores
from topformer_jax.runtime import cli, files
from topformer_jax.runtime.errors import UserError

Row = dict[str, Any]
OURS = "ours"
LOAD = os.getloadavg()[0]  # when the script started: other work makes the figures useless
PAUSE = 0.3  # seconds before each run: as long as OpenMP's threads spin after the run before
WORDS = ("eager", "channels_last", "compile", "kept_memory")
VARIANTS = ("eager", "eager+kept_memory", "channels_last+kept_memory", "channels_last+compile")
# kept_memory: glibc keeps freed memory, as in our commands (`cli.keep_freed_memory`); by default it does not.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}
# A table's columns after the first: the row's key, the heading, and the value's factor and decimal places.
COLUMNS = {
    "runs": ("runs", 1, 0),
    "images_per_second": ("images/s", 1, 1),
    "ratio": ("ratio to first", 1, 2),
    "noise": ("noise %", 100, 1),
    "first_seconds": ("first call s", 1, 2),
    "arguments_bytes": ("arguments MB", 1e-6, 1),
    "memory_bytes": ("memory MB", 1e-6, 1),
    "temporary_bytes": ("temporary MB", 1e-6, 1),
    "operations": ("GFLOP", 1e-9, 1),
    "moved_bytes": ("moved GB", 1e-9, 2),
    "moved_of_image": ("of an image", 1e-9, 3),
    "kernels": ("kernels", 1, 0),
    "collectives": ("collectives", 1, 0),
    "collective_bytes": ("sent MB", 1e-6, 1),
    "compile_seconds": ("compile s", 1, 0),
    "sizes": ("sizes", 1, 0),
    "networks": ("networks", 1, 0),
    "batches": ("batches", 1, 0),
    "used_rows": ("used rows %", 100, 1),
    "padding": ("padding %", 100, 1),
}


class Program(NamedTuple):
    """A program to time, which has run once."""

    run: Callable[[int], float]  # makes so many calls, waits for the last one and returns the seconds of all
    first_seconds: float  # of the first call, compilation included
    # XLA's count of arguments, results and temporary arrays; for PyTorch the growth of its process's peak.
    memory_bytes: int | None = None
    temporary_bytes: int | None = None
    result: np.ndarray | None = None  # of the first call, to compare


class Report(NamedTuple):
    """What a benchmark has found."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def run(
    description: str | None,
    measure: Callable[[argparse.Namespace, ConfigDict], "Report | Iterator[Report]"],
    *,
    peers: bool = False,
    flags: Mapping[str, Mapping[str, Any]] = {},
    **sizes: tuple[int, str],
) -> None:
    """Runs a benchmark as a command: parses its flags, measures, prints the report and writes `--json FILE`.

    Args:
        description: the script's docstring.
        measure: from the arguments and the config, TopFormer-T for ADE20K if none is given; an iterator yields what
            is known so far, which is written each time.
        peers: whether PyTorch can run beside ours.
        flags: further flags by name, with `add_argument`'s keywords.
        sizes: flags of whole numbers from 1 on: default and meaning by name.
    """
    parser = cli.Parser(description, config_required=False)
    for name, (default, meaning) in {"repeats": (7, "timed runs of each"), **sizes}.items():
        text = f"{meaning} (default {default})"
        parser.add_argument(f"--{name}", type=positive, default=default, help=text)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything")
    if peers:
        parser.add_argument("--peer", choices=["torch"], help="run PyTorch too (pip install -e '.[convert]')")
        text = f"of PyTorch: {', '.join(WORDS)}, or several joined by + (default: {' '.join(VARIANTS)})"
        parser.add_argument("--variants", nargs="+", metavar="NAME", help=text)
    for name, keywords in (flags or {}).items():
        parser.add_argument(f"--{name}", **keywords)
    # A GPU is shared with PyTorch and with the processes that a script starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args, config = parser.parse()
    found = measure(args, config_lib.ade20k("tiny") if config is None else config)
    device = jax.local_devices()[0]
    kind = f"{device.device_kind} ({device.platform})"
    machine = f"{kind}, {count_cores()} cores, load {LOAD:.2f}, jax {jax.__version__}"
    for title, rows, notes in [found] if isinstance(found, Report) else found:
        if args.json:
            written = {"title": title, "machine": machine, "rows": list(rows), "notes": list(notes)}
            files.write_file(args.json, json.dumps(written, indent=2) + "\n")
    print(title, machine, format_table(rows), *notes, sep="\n")


def positive(text: str) -> int:
    """A flag's value that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def describe(config: ConfigDict) -> str:
    """The config in a report's title."""
    return f"{config.name}, {config.model.dtype}, precision {config.model.precision}"


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


def start(name: str, call: Callable[[], Any], compiled: Callable[[], Any] | None = None) -> Program:
    """Calls a program for the first time; its memory is that of what `compiled` returns after it."""
    run = make_timer(call)
    seconds = run(1)
    print(f"{name}: the first call took {seconds:.2f} s", file=sys.stderr, flush=True)
    memory = compiled and compiled().memory_analysis()
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
    images: int,
    at_least: float = 0.0,
) -> list[Row]:
    """Times the programs in turn, `repeats` times; a row each, with the ratio of its time to the first one's.

    A run is as many calls as take `at_least` seconds. `images` is how many a call takes. `noise` is how much two
    neighbouring runs of the same program differ, in the median: the machine's.
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
        spread = {"median": statistics.median(times), "low": min(times), "high": max(times)}
        row: Row = {"case": case, "program": name, "seconds": spread, "runs": len(times)}
        row["images_per_second"] = images / spread["median"]
        if times is not first:
            row["ratio"] = statistics.median(b / a for a, b in zip(first, times, strict=True))
        if len(times) > 1:
            row["noise"] = statistics.median(max(pair) / min(pair) - 1 for pair in itertools.pairwise(times))
        _, row["first_seconds"], row["memory_bytes"], row["temporary_bytes"], _ = programs[name]
        rows.append(row)
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, with the columns that any of them has a value for."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    timed = any("seconds" in row for row in rows)
    width = max((len(row["case"]) for row in rows), default=0)
    lines = [("", *["ms, median (range)"] * timed, *(COLUMNS[key][0] for key in keys))]
    for row in rows:
        cells = []
        if timed:
            low, median, high = (f"{1000 * row['seconds'][key]:.1f}" for key in ("low", "median", "high"))
            cells.append(f"{median} ({low}-{high})")
        for key in keys:
            _, factor, places = COLUMNS[key]
            cells.append("-" if row.get(key) is None else f"{factor * row[key]:.{places}f}")
        lines.append((f"{row['case']:<{width}}  {row['program']}", *cells))
    return cli.table(lines)


@contextlib.contextmanager
def start_peers(
    args: argparse.Namespace, question: str, config: ConfigDict, *arguments: Any
) -> Iterator[dict[str, Program]]:
    """PyTorch's programs by name, none without `--peer torch`; they end with the `with` block.

    A variant that does not work here is reported on stderr and skipped.

    Args:
        args: of the command; `variants` are those of PyTorch.
        question: a function of `torch_peer`.
        config: of the network.
        arguments: of the function.

    Raises:
        UserError: there is no such variant, or PyTorch does not run the config's dtype or JAX's device here.
    """
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), "none")
    variants = (args.variants or VARIANTS) if args.peer else ()
    if variants and (device == "none" or config.model.dtype == "float64"):
        raise UserError("PyTorch runs here on a CPU or a GPU, in float32 or bfloat16: run without --peer torch")
    programs = {}
    with contextlib.ExitStack() as stack:
        for variant in variants:
            if set(variant.split("+")) - set(WORDS):
                raise UserError(f"PyTorch has no variant {variant}: join words of {', '.join(WORDS)} by +")
            name = f"torch {variant}"
            pipe = stack.enter_context(_start_process(variant, (question, variant, device, config, arguments)))
            try:
                seconds, memory_bytes, result = _receive(name, pipe)
            except UserError as error:
                print(f"skipped: {error.line}", file=sys.stderr, flush=True)
                continue
            print(f"{name}: the first call took {seconds:.2f} s", file=sys.stderr, flush=True)
            programs[name] = Program(functools.partial(_time_peer, name, pipe), seconds, memory_bytes, None, result)
        yield programs


@contextlib.contextmanager
def _start_process(variant: str, question: tuple[Any, ...]) -> Iterator["Connection[Any, Any]"]:
    context = multiprocessing.get_context("spawn")
    pipe, their_pipe = context.Pipe()
    process = context.Process(target=_answer, args=(their_pipe, *question), daemon=True)
    # The accelerator is for PyTorch and for the process that asks.
    environment = {"JAX_PLATFORMS": "cpu"} | (KEEP_MEMORY if "kept_memory" in variant else {})
    with mock.patch.dict(os.environ, environment):
        process.start()
    their_pipe.close()
    try:
        yield pipe
    finally:
        process.kill()
        process.join()


def _answer(pipe: "Connection[Any, Any]", *question: Any) -> None:
    """The process of a variant: answers the question, and then the seconds of as many calls as it is asked for."""
    from benchmarks import torch_peer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the process that asks, which ends this one
    try:
        run, answer = torch_peer.start(*question)
        pipe.send(answer)
        while True:
            pipe.send(run(pipe.recv()))
    except Exception as error:  # a compiler that is not installed, a device without the operation, no memory
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def _time_peer(name: str, pipe: "Connection[Any, Any]", calls: int) -> float:
    pipe.send(calls)
    return float(_receive(name, pipe))


def _receive(name: str, pipe: "Connection[Any, Any]") -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        answer = "its process has ended"
    if isinstance(answer, str):
        raise UserError(f"{name} does not work here: {answer}")
    return answer
