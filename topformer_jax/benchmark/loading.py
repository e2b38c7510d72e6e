"""input: training examples from files, on one core and over workers, beside the official pipeline."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import OURS, Options
from topformer_jax.benchmark.plain_loading import Pipeline
from topformer_jax.benchmark.report import Report
from topformer_jax.data import loader, sources, transforms

AT_LEAST = 8  # batches of a run


def loading(config: ConfigDict, options: Options, count: int, workers: Sequence[int]) -> Report:
    """Decoding, resizing and cropping of `count` generated files, and the batches of 1, 2, ... worker processes."""
    with tempfile.TemporaryDirectory(prefix="topformer_jax.") as folder:
        source = samples.write(Path(folder), count, config)
        rows = _one_core(source, config, options)
        makers: dict[str, Callable[[int], Iterator[Any]]] = {
            OURS: lambda number: _batches(source, config, number)
        }
        if options.peer:
            measure.require_torch()
            from topformer_jax.benchmark import torch_programs

            makers["torch DataLoader"] = lambda number: torch_programs.batches(source, config, number)
        for number in workers:
            rows += _with_workers(makers, config, options, count, number)
    height, width = samples.SIZE
    title = (
        f"input: {width} x {height} JPEG and PNG to crops of {tuple(config.data.crop_size)}, {config.name}"
    )
    notes = [
        "Flip, colours and normalisation are the device's work here, and the host's in the other pipelines."
    ]
    return Report(title, measure.machine().facts(), rows, notes)


def _one_core(source: sources.Source, config: ConfigDict, options: Options) -> list[dict[str, Any]]:
    pipeline = Pipeline(source, config)

    def ours() -> None:
        for index in range(len(source)):
            _example(source, config, index)

    def plain() -> None:
        for index in range(len(source)):
            pipeline(index)

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        programs = {OURS: measure.ready(OURS, ours), "plain": measure.ready("plain", plain)}
        seconds = measure.sequential(programs, options.repeats)
    finally:
        cv2.setNumThreads(threads)
    rows = measure.rows("one core", programs, seconds, images=len(source))
    return [row | {"images_per_second_per_core": row["images_per_second"]} for row in rows]


def _example(source: sources.Source, config: ConfigDict, index: int) -> transforms.CroppedExample:
    """What a worker does for one example."""
    data = config.data
    image, label = loader.decode_example(source[index], config)
    return transforms.random_resize_crop(
        image,
        label,
        crop_size=data.crop_size,
        scale=data.scale,
        ratio_range=data.ratio_range,
        cat_max_ratio=data.cat_max_ratio,
        rng=np.random.default_rng([config.seed, 0, index]),
    )


def _batches(source: sources.Source, config: ConfigDict, workers: int) -> loader.TrainingBatches:
    return loader.training_batches(source, config_lib.load(config, {"data.num_workers": workers}))


def _with_workers(
    makers: dict[str, Callable[[int], Iterator[Any]]],
    config: ConfigDict,
    options: Options,
    count: int,
    workers: int,
) -> list[dict[str, Any]]:
    """One loader after the other, not in turn: its workers would go on while another's are timed."""
    number = max(AT_LEAST, -(-count // config.batch_size))
    programs: dict[str, measure.Program] = {}
    seconds: dict[str, list[float]] = {}
    for name, make in makers.items():
        batches = make(workers)

        def call(batches: Iterator[Any] = batches) -> None:
            for _ in itertools.islice(batches, number):
                pass

        programs[name] = measure.ready(f"{name}, {workers} workers", call)
        seconds |= measure.sequential({name: programs[name]}, options.repeats)
        if isinstance(batches, loader.TrainingBatches):
            batches.close()
        del batches, call
    case = f"{workers} workers, batch {config.batch_size}" if workers else "threads"
    rows = measure.rows(case, programs, seconds, images=number * config.batch_size)
    cores = workers or measure.cores()
    return [row | {"images_per_second_per_core": row["images_per_second"] / cores} for row in rows]
