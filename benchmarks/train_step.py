"""How long does a training step take?

  python -m benchmarks.train_step --peer torch --config configs/topformer_t_ade.py --config.batch_size=4
  python -m benchmarks.train_step --peer torch --config configs/topformer_t_imagenet.py --config.batch_size=16
  python -m benchmarks.train_step --from-files --config configs/topformer_t_ade.py --config.batch_size=4

The step of one device at the config's batch and crop, on a batch that is on the device already, as in training one
step after the other. Ours augments the images too; PyTorch's come augmented and normalised. Of a
classifier ours averages its weights too, as the recipe says.
--from-files feeds the step from generated files, beside the step by itself: does it wait for data?
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import peers, samples, timing
from benchmarks.timing import OURS, Program, Row
from topformer_jax import cli, models, sharding, step
from topformer_jax.data import loader

RUN = 0.2  # seconds of steps that follow each other without waiting


def compare_steps(config: ConfigDict, args: argparse.Namespace, mesh: Mesh) -> list[Row]:
    """Our step beside PyTorch's."""
    batch = samples.batch(config)
    model = models.build(config)
    weights = samples.torch_weights(models.state_dict(model))  # copies: the step donates the model's arrays
    state, train_step = step.init_training(config, mesh, model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))

    def call() -> object:
        nonlocal state
        state, metrics = train_step(state, placed)
        return metrics

    programs = {OURS: timing.start(OURS, call, train_step, shapes, placed)}
    with peers.start(args, "train_step", config, weights, batch) as torch_programs:
        return timing.compare(
            f"{config.batch_size} x {' x '.join(map(str, config.data.crop_size))}",
            programs | torch_programs,
            args.repeats,
            images=config.batch_size,
            at_least=RUN,
        )


def feed_from_files(config: ConfigDict, args: argparse.Namespace, mesh: Mesh) -> list[Row]:
    """The step on one batch again and again, and on batches from files."""
    state, train_step = step.init_training(config, mesh)
    ahead = 2 + max(config.data.num_workers, config.data.prefetch)  # batches
    waits: list[float] = []

    def make_steps(batches: Iterator[Any], steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = train_step(state, next(batches))
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    def from_files(steps: int) -> float:
        make_steps(files, ahead)  # on batches that were made while something else was timed
        waited = 0.0

        def timed() -> Iterator[Any]:
            nonlocal waited
            while True:
                start = time.perf_counter()
                batch = next(files)
                waited += time.perf_counter() - start
                yield batch

        seconds = make_steps(timed(), steps)
        waits.append(waited / seconds)
        return seconds

    with samples.written_files(args.images, config) as source:
        files = loader.to_device(loader.training_batches(source, config), sharding.batch_sharding(mesh))
        try:
            same = itertools.repeat(next(files))
            first = make_steps(same, 1)
            programs = {
                "step alone": Program(lambda steps: make_steps(same, steps), first),
                "from files": Program(from_files, first),
            }
            case = f"batch {config.batch_size}, {config.data.num_workers} workers"
            rows = timing.compare(
                case, programs, args.repeats, images=config.batch_size, at_least=args.seconds
            )
        finally:
            files.close()
    rows[1]["data_wait"] = statistics.median(waits[1:])  # the first turn warms up
    return rows


def main() -> None:
    """The command."""
    images = (32, "generated files of --from-files")
    parser = timing.make_parser(__doc__, images=images, seconds=(5, "a run of --from-files"))
    peers.add_flags(parser)
    parser.add_argument("--from-files", action="store_true", help="feed the step from generated files")
    args, config = timing.parse(parser)
    if args.from_files and args.peer:
        parser.error("--from-files has no peer in PyTorch")
    if args.from_files and config.task == "classification":
        parser.error("--from-files makes files of segmentation alone")
    measure = feed_from_files if args.from_files else compare_steps
    rows = measure(config, args, sharding.make_train_mesh(config, jax.local_devices()[:1]))
    timing.report(f"train_step: {timing.describe(config)}", rows, args)


if __name__ == "__main__":
    cli.run(main)
