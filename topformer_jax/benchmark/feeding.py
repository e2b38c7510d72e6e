"""train: steps that are fed from files, beside the same steps on a batch that lies on the device already."""

import itertools
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax import sharding, step
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import Options
from topformer_jax.benchmark.report import Report
from topformer_jax.data import loader, sources

RUN, LEAST = 5.0, 4  # seconds of a run, and steps


def train(config: ConfigDict, options: Options, count: int, workers: Sequence[int]) -> Report:
    """Training steps from `count` generated files on one device: how much of the step's own rate the input allows."""
    with tempfile.TemporaryDirectory(prefix="topformer_jax.") as folder:
        source = samples.write(pathlib.Path(folder), count, config)
        rows = [
            row
            for number in workers
            for row in _with_workers(source, config_lib.load(config, {"data.num_workers": number}), options)
        ]
    return Report(f"train: {measure.described(config)}", measure.machine().facts(), rows)


def _with_workers(source: sources.Source, config: ConfigDict, options: Options) -> list[dict[str, Any]]:
    """The step alone and the step from files, in turn.

    Before each timed run, as many steps are made as there are batches made ahead: they were made while something
    else was timed.
    """
    mesh = sharding.make_mesh(config, jax.local_devices()[:1])
    place = sharding.batch_sharding(mesh)
    state, train_step = step.create(config, mesh)

    def seconds(batches: Iterator[Any], steps: int) -> float:
        """Of that many steps, the last one waited for."""
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = train_step(state, next(batches))
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    fed = loader.to_device(loader.training_batches(source, config), place)
    alone, files, waits = [], [], []
    try:
        same = itertools.repeat(next(fed))
        print(f"the first step took {seconds(same, 1):.2f} s", file=sys.stderr, flush=True)
        steps = max(LEAST, math.ceil(RUN / seconds(same, 1)))
        for _ in range(options.repeats):
            alone.append(seconds(same, steps) / steps)
            seconds(fed, 2 + max(config.data.num_workers, config.data.prefetch))
            waited = fed.data_wait_seconds
            files.append(seconds(fed, steps) / steps)
            waits.append((fed.data_wait_seconds - waited) / (steps * files[-1]))
    finally:
        fed.close()
    case = f"batch {config.batch_size}, {config.data.num_workers} workers"
    share = statistics.median(a / b for a, b in zip(alone, files, strict=True))
    return [
        _row(case, "step alone", alone, config),
        _row(case, "from files", files, config)
        | {"share_of_step": share, "data_wait": statistics.median(waits)},
    ]


def _row(case: str, name: str, seconds: list[float], config: ConfigDict) -> dict[str, Any]:
    spread = measure.spread(seconds)
    rate = config.batch_size / spread["median"]
    return {"case": case, "program": name, "seconds": spread, "images_per_second": rate}
