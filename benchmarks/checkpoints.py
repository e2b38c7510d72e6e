"""What does a checkpoint cost: how long does a save hold up the training, how long do restoring and listing take?

  python -m benchmarks.checkpoints --config topformer_b_ade --folder gs://my-bucket/trial

Saves and restores the state of a run, then opens a folder with many old steps (copies of one with a single small
tensor) as a resumed run does. It writes into a new folder below `--folder`, and deletes it at the end.
"""

import concurrent.futures
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from typing import Any

import fsspec
import jax
import numpy as np

from benchmarks import timing
from topformer_jax import cli, files, sharding
from topformer_jax.checkpoints import CheckpointStore
from topformer_jax.step import init_training

THREADS = 16  # that make the old steps


def time_call(function: Callable[..., object], *arguments: Any) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def time_saves(folder: files.Path, trees: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of saving a run's state, and of restoring it."""
    store = CheckpointStore(folder, 3)
    held, written, restored = [], [], []
    for step in range(1, repeats + 1):
        held.append(time_call(store.save, step, trees, {"config": {}}))
        written.append(held[-1] + time_call(store.wait))
        restored.append(time_call(lambda step: jax.block_until_ready(store.restore(step, trees)), step))
    store.close()
    return {"a save holds up the loop": held, "until it is written": written, "restoring": restored}


def time_openings(folder: files.Path, steps: int, repeats: int) -> list[float]:
    """Seconds that opening a folder of so many steps, and finding the newest, takes."""
    store = CheckpointStore(folder, steps)
    store.save(1, {"model": {"x": np.zeros(1, np.float32)}}, {"config": {}})
    store.close()
    system, root = fsspec.core.url_to_fs(os.fspath(folder))

    def copy(step: int) -> None:
        system.copy(f"{root}/1", f"{root}/{step}", recursive=True)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, range(2, steps + 1)))

    def open_folder() -> None:
        store = CheckpointStore(folder, steps)
        assert store.latest == steps
        store.close()

    return [time_call(open_folder) for _ in range(repeats)]


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, steps=(1000, "old steps"))
    parser.add_argument("--folder", type=files.as_path, default=files.as_path(tempfile.gettempdir()))
    args, config = timing.parse(parser)
    state, _ = init_training(config, sharding.make_train_mesh(config, jax.local_devices()[:1]))
    trees = {"model": state.params | state.stats, "optimizer": state.optimizer}
    folder = args.folder / f"checkpoints-{secrets.token_hex(4)}"
    files.make_folder(folder)
    try:
        seconds = time_saves(folder / "run", trees, args.repeats)
        seconds["opening the folder"] = time_openings(folder / "old", args.steps, args.repeats)
    finally:
        system, root = fsspec.core.url_to_fs(os.fspath(folder))
        system.rm(root, recursive=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    rows = [
        timing.make_row(f"{args.steps:,} steps" if "folder" in what else f"{size / 1e6:.0f} MB", what, values)
        for what, values in seconds.items()
    ]
    place = "a bucket" if files.is_in_bucket(args.folder) else "a disk"
    timing.report(f"checkpoints: {config.name}, in {place}", rows, args)


if __name__ == "__main__":
    cli.run(main)
