"""Every figure of one GPU in one command, within a time budget, most important first.

  python -m benchmarks.gpu --peer torch --json gpu.json

The training step in bfloat16 beside compiled PyTorch, with what a profile says of it and with batches from files; the
loss alone; an evaluation of images of many sizes; the forms of depthwise convolutions. On another device the same
questions run, which is of use only at small sizes. What the time did not suffice for, or what does not work, is named
below the table; `--json` writes after each question what is known until then.
"""

import argparse
import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData
from ml_collections import ConfigDict

from benchmarks import evaluate, loss, runner, samples, train_step
from benchmarks.runner import Program, Report, Row
from topformer_jax import config as config_lib
from topformer_jax.data import loader
from topformer_jax.ops import convolution
from topformer_jax.runtime import cli

PEER = "channels_last+compile"  # what is fastest elsewhere
PROFILED = 3  # steps
LARGEST = 8  # kernels that are named
# Of Tiny's depthwise convolutions: side, channels, kernel, stride.
DEPTHWISE = ((256, 16, 3, 1), (256, 64, 3, 2), (64, 96, 5, 1), (32, 192, 3, 2))


def step_rows(args: argparse.Namespace, config: ConfigDict, details: bool) -> list[Row]:
    """The training step beside PyTorch's; with details, a profile of it, and steps on batches from files."""
    step, rows = train_step.compare_steps(args, config)
    name = f"train step {config.model.variant}, "
    for row in rows:
        row["case"] = name + row["case"]
    if not details:
        return rows
    batch = samples.batch(config)
    rows += profile_rows(name + "profile", lambda: step(batch))
    with samples.written_files(args.images, config, samples.ade20k_sizes(args.images)) as source:
        batches = loader.training_batches(source, config)

        def run(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                metrics = step(next(batches))
            jax.block_until_ready(metrics)
            return time.perf_counter() - start

        try:
            program = Program(run, run(1))
            rows += runner.compare(
                f"{name}from files",
                {runner.OURS: program},
                args.repeats,
                images=config.batch_size,
                at_least=1,
            )
        finally:
            batches.close()
    return rows


def profile_rows(case: str, call: Callable[[], Any]) -> list[Row]:
    """The device's time of a call by kernel: the longest ones, and all; on a CPU of XLA's operations."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                jax.block_until_ready(call())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(path)).planes)
        on_device = [plane for plane in planes if plane.name.startswith("/device:GPU")] or planes
        times: dict[str, list[float]] = {}
        for line in (line for plane in on_device for line in plane.lines if "python" not in line.name):
            if on_device is planes or line.name.startswith("Stream"):
                for event in line.events:
                    times.setdefault(event.name.partition(".")[0], []).append(event.duration_ns / 1e9)
    order = sorted(times, key=lambda kernel: -sum(times[kernel]))
    groups = {f"{kernel}, {len(times[kernel]) // PROFILED} calls": times[kernel] for kernel in order[:LARGEST]}
    groups[f"all {sum(map(len, times.values())) // PROFILED} kernels"] = [x for each in times.values() for x in each]
    return [
        {
            "case": case,
            "program": name,
            "seconds": dict.fromkeys(("median", "low", "high"), sum(durations) / PROFILED),
            "runs": PROFILED,
        }
        for name, durations in groups.items()
    ]


def depthwise_rows(args: argparse.Namespace, config: ConfigDict) -> list[Row]:
    """Depthwise convolutions, forward and backward: XLA's, multiply-adds of shifted slices, what training uses."""

    def shifted(images: Any, kernel: Any, grad: Any, stride: int) -> Any:
        result = convolution.multiply_add(images, kernel, stride)
        return result, convolution.multiply_add_gradients(images, kernel, grad, stride)

    def conv(images: Any, kernel: Any, grad: Any, stride: int, method: str) -> Any:
        options: Any = {"stride": stride, "groups": images.shape[3], "method": method}
        result, pull_back = jax.vjp(functools.partial(convolution.conv, **options), images, kernel)
        return result, pull_back(grad)

    forms: dict[str, Callable[..., Any]] = {
        "xla": functools.partial(conv, method="single_op"),
        "shifted": shifted,
        runner.OURS: functools.partial(conv, method="auto"),
    }
    rows: list[Row] = []
    dtype = jnp.dtype(config.model.dtype)
    for side, channels, k, stride in DEPTHWISE:
        side = side * config.data.crop_size[0] // 512
        out = -(-side // stride)
        shapes = [(config.batch_size, side, side, channels), (k, k, 1, channels)]
        shapes.append((config.batch_size, out, out, channels))
        arrays = [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]
        programs = {}
        for name, function in forms.items():
            call = functools.partial(jax.jit(functools.partial(function, stride=stride)), *arrays)
            programs[name] = runner.start(name, call)
        case = f"depthwise {k} x {k}, stride {stride}, {' x '.join(map(str, shapes[0]))}"
        rows += runner.compare(case, programs, args.repeats, images=config.batch_size, at_least=0.05)
    return rows


def measure(args: argparse.Namespace, config: ConfigDict) -> Iterator[Report]:
    """The rows of all questions, in the order of their importance."""
    start = time.monotonic()
    args.variants = args.variants or [PEER]
    base = config_lib.load(config, {"model.dtype": "bfloat16", "data.num_workers": min(loader.count_cores(), 16)})
    alone = argparse.Namespace(**(vars(args) | {"peer": None, "mixed": True}))

    def steps(variant: str, batch: int, details: bool = False) -> list[Row]:
        changes = {"model.variant": variant, "batch_size": batch}
        return step_rows(args, config_lib.load(base, changes), details)

    def of_loss() -> list[Row]:
        sizes = {"batch": min(args.batches), "size": config.data.crop_size[0]}
        return list(loss.measure(argparse.Namespace(**(vars(args) | sizes)), config).rows)

    def of_evaluation() -> list[Row]:
        few = {"evaluation.max_canvases": 2, "evaluation.per_device_batch_size": min(args.batches)}
        return list(evaluate.measure(alone, config_lib.load(base, few)).rows)

    small, *larger = sorted(args.batches)
    # By name: how many seconds it takes about, and what it is.
    questions: dict[str, tuple[int, Callable[[], list[Row]]]] = {
        f"train step tiny, {small}, profile, files": (90, lambda: steps("tiny", small, details=True)),
        "loss": (40, of_loss),
        f"train step base, {small}": (80, lambda: steps("base", small)),
        "evaluation": (60, of_evaluation),
        "depthwise": (40, lambda: depthwise_rows(args, config_lib.load(base, {"batch_size": small}))),
    }
    for batch, variant in itertools.product(larger, ("tiny", "base")):
        questions[f"train step {variant}, {batch}"] = 90, functools.partial(steps, variant, batch)
    rows: list[Row] = []
    notes: list[str] = []
    for name, (seconds, answer) in questions.items():
        spent = time.monotonic() - start
        if spent + seconds > args.budget:
            notes.append(f"left out: {name}, {spent:.0f} of {args.budget} s were spent")
        else:
            try:
                rows += answer()
            except Exception as error:  # the next question may work
                notes.append(f"does not work here: {name}: {' '.join(str(error).split())[:200]}")
        yield Report(f"gpu: {runner.describe(base)}, {config.data.crop_size}", rows, notes)


flags: dict[str, dict[str, Any]] = {
    "batches": {
        "nargs": "+",
        "type": runner.positive,
        "default": [32, 128],
        "help": "images (default 32 128)",
    }
}
sizes = {"budget": (540, "seconds of all"), "images": (128, "generated files")}
main = functools.partial(runner.run, __doc__, measure, peers=True, flags=flags, **sizes)
if __name__ == "__main__":
    cli.run(main)
