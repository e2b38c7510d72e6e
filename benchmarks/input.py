"""How many training examples a second come from files, on one core and over worker processes?

  python -m benchmarks.input --config configs/topformer_t_ade.py

On generated JPEG and PNG files, on one core beside mmsegmentation's pipeline. Flip, colours and normalisation are the
device's work in ours, and the host's in the other.
"""

import contextlib
import itertools

import cv2
import numpy as np
from ml_collections import ConfigDict

from benchmarks import samples, timing
from benchmarks.official_input import make_example
from benchmarks.timing import OURS, Program, Row
from topformer_jax import cli
from topformer_jax import config as config_lib
from topformer_jax.data import loader, sources

LEAST_BATCHES = 8  # of a run


def on_one_core(source: sources.Source, config: ConfigDict, repeats: int) -> list[Row]:
    """Each example of the source once."""
    rng = np.random.default_rng(config.seed)

    def ours() -> None:
        for index in range(len(source)):
            loader.crop_example(source[index], config, index, epoch=0)

    def official() -> None:
        for index in range(len(source)):
            make_example(source[index], config, rng)

    cv2.setNumThreads(1)
    programs = {OURS: timing.start(OURS, ours), "official": timing.start("official", official)}
    return timing.compare("one core", programs, repeats, images=len(source))


def over_workers(source: sources.Source, config: ConfigDict, repeats: int) -> list[Row]:
    """Batches of the training loader."""
    count = max(LEAST_BATCHES, -(-len(source) // config.batch_size))
    case = f"{config.data.num_workers} workers, batch {config.batch_size}"
    with contextlib.closing(loader.training_batches(source, config)) as batches:

        def call() -> None:
            for _ in itertools.islice(batches, count):
                pass

        programs: dict[str, Program] = {OURS: timing.start(f"{OURS}, {case}", call)}
        return timing.compare(case, programs, repeats, images=count * config.batch_size)


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, images=(32, "generated files"))
    default = [count for count in (1, 2, 4, 8, 16) if count <= timing.cores()]
    parser.add_argument("--workers", type=timing.positive, nargs="+", default=default, help="processes")
    args, config = timing.parse(parser)
    with samples.written_files(args.images, config) as source:
        rows = on_one_core(source, config, args.repeats)
        for workers in args.workers:
            settings = config_lib.load(config, {"data.num_workers": workers})
            rows += over_workers(source, settings, args.repeats)
    size = " x ".join(map(str, samples.SIZE))
    timing.report(
        f"input: {size} JPEG and PNG to crops of {config.data.crop_size}, {config.name}", rows, args
    )


if __name__ == "__main__":
    cli.run(main)
