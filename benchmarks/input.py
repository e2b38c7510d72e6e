"""How many training examples a second come from files, on one core and over worker processes?

  python -m benchmarks.input --config configs/topformer_t_ade.py
  python -m benchmarks.input --peer timm --config configs/topformer_t_imagenet.py --config.data.root=DIR

On generated JPEG and PNG files, on one core beside mmsegmentation's pipeline; for ImageNet on the files of data.root,
beside timm's. Flip, colours, normalisation and erasing are the device's work in ours, and the host's in the others.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from ml_collections import ConfigDict

from benchmarks import samples, timing, timm_input
from benchmarks.official_input import make_example
from benchmarks.timing import OURS, Program, Row
from topformer_jax import config as config_lib
from topformer_jax.data import loader, sources
from topformer_jax.data.classification import folders as class_folders
from topformer_jax.data.sources import Example
from topformer_jax.data.workers import count_cores
from topformer_jax.runtime import cli

LEAST_BATCHES = 8  # of a run


def on_one_core(
    source: sources.Source, config: ConfigDict, repeats: int, peers: Mapping[str, Callable[[Example], Any]]
) -> list[Row]:
    """Each example of the source once, by ours and by others."""

    def ours() -> None:
        for index in range(len(source)):
            loader.crop_example(source[index], config, index, epoch=0)

    def theirs(make: Callable[[Example], Any]) -> None:
        for index in range(len(source)):
            make(source[index])

    cv2.setNumThreads(1)
    programs = {OURS: timing.start(OURS, ours)}
    for name, make in peers.items():
        programs[name] = timing.start(name, functools.partial(theirs, make))
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


def open_files(config: ConfigDict, count: int) -> contextlib.AbstractContextManager[sources.Source]:
    """Generated files of a segmentation; a classifier's training split."""
    if config.task == "segmentation":
        return samples.written_files(count, config)
    classes = len(class_folders.read_class_folders(config.data.root))
    given = config_lib.load(config, {"model.num_classes": classes})
    return contextlib.nullcontext(sources.open_source(given, "train"))


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, images=(32, "generated files"))
    default = [count for count in (1, 2, 4, 8, 16) if count <= count_cores()]
    parser.add_argument("--workers", type=timing.positive, nargs="+", default=default, help="processes")
    parser.add_argument("--peer", choices=["timm"], help="of a classifier: run timm too (pip install timm)")
    args, config = timing.parse(parser)
    rng = np.random.default_rng(config.seed)
    peers: dict[str, Callable[[Example], Any]] = {}
    if config.task == "segmentation":
        peers["official"] = functools.partial(make_example, config=config, rng=rng)
    elif args.peer:
        peers["timm"] = timm_input.make_transform(config)
    if args.peer and config.task == "segmentation":
        parser.error("--peer timm is for a classifier's config")
    with open_files(config, args.images) as source:
        rows = on_one_core(source, config, args.repeats, peers)
        for workers in args.workers:
            settings = config_lib.load(config, {"data.num_workers": workers})
            rows += over_workers(source, settings, args.repeats)
    size = " x ".join(map(str, samples.SIZE))
    files = f"{size} JPEG and PNG" if config.task == "segmentation" else f"{len(source)} JPEG"
    timing.report(f"input: {files} to crops of {config.data.crop_size}, {config.name}", rows, args)


if __name__ == "__main__":
    cli.run(main)
