"""From a source to batches: one global order, shared out over processes and workers, ready on the devices.

An example's place in the order depends on the seed alone, and what is drawn for it on (seed, epoch, example)
alone: the batches are the same on 1 or N processes and with 0 or N workers, and can start at any step.
"""

import dataclasses
import gc
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import UInt8
from ml_collections import ConfigDict

from topformer_jax.data import transforms
from topformer_jax.data.sources import Example, Source
from topformer_jax.errors import UserError

Batch = dict[str, np.ndarray]
_MOST_SKIPPED = 100  # unreadable examples in a row: more is no accident
_ENDLESS = 2**62  # examples; grain counts batches in floating point, which overflows for sys.maxsize


def training_batches(
    source: Source, config: ConfigDict, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> "Batches":
    """An endless iterator over one process's rows of each global batch, from `start_step` on.

    Process p of P has the rows [p * B / P, (p + 1) * B / P). Each epoch has every example once, in an order of
    its own; batches run across the epochs' borders, so that none is dropped.

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared out over {process_count} processes: give a "
            f"--config.batch_size that is a multiple of {process_count}"
        )
    rows = config.batch_size // process_count
    make = _MakeExample(source, config, process_index, process_count)
    batches = grain.MapDataset.range(_ENDLESS).map(make).batch(rows)[start_step:]

    if not flags.FLAGS.is_parsed():  # grain reads its own absl flags, which nobody has parsed outside absl
        flags.FLAGS.mark_as_parsed()
    workers, ahead = config.data.num_workers, max(1, config.data.prefetch)
    if not workers:
        threads = min(os.cpu_count() or 1, ahead)
        return Batches(batches.to_iter_dataset(grain.ReadOptions(threads, ahead)), len(source))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=math.ceil(ahead / workers))
    # Each worker is one thread: a process a core, and cv2's own threads off.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return Batches(dataset.mp_prefetch(options, _start_worker), len(source))


class Batches(Iterator[Batch]):
    """Iterates over batches: image [b,h,w,3] and label [b,h,w] uint8, size [b,2], index [b] and epoch [b] int32.

    Attributes:
        skipped: how many examples of the batches so far stand in for an unreadable one.
        unreadable: the indices of those unreadable ones.
    """

    def __init__(self, dataset: grain.IterDataset, examples: int):
        self._iterator: Any = iter(dataset)
        self._examples = examples
        self.skipped = 0
        self.unreadable: set[int] = set()

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(traceback.format_exc())
            # The callers of its frames are grain's, and hold the batch before this one: it could not be freed.
            error.__traceback__ = None
            self.close()  # grain would go on without the batch
            if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
                raise UserError(
                    f"a data worker died ({str(error).split('. ')[0]}): if memory or /dev/shm is full, lower "
                    "--config.data.num_workers or --config.data.prefetch"
                ) from None
            raise
        # Workers hand over shared memory, which goes away with grain's array: keep what is ours.
        batch = {name: np.array(values) for name, values in batch.items()}
        for index, skipped in zip(batch["index"], batch.pop("skipped"), strict=True):
            self.skipped += int(skipped > 0)
            self.unreadable |= {int(index - back) % self._examples for back in range(1, skipped + 1)}
        return batch

    def close(self) -> None:
        """Ends the workers; there are no batches after it."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            # Batches that nobody took are freed by a thread of grain; what it has not freed when Python exits is
            # reported as lost. What it does after them shows that it is done.
            gc.collect()
            freeing = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
            if freeing is not None:
                freeing.apply(int)


@dataclasses.dataclass
class _MakeExample:
    """Makes the example at a place of one process's share of the order."""

    source: Source
    config: ConfigDict
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        # Neighbouring seeds would share epochs: grain shuffles epoch e with seed + e.
        seed = int(np.random.SeedSequence(self.config.seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(self.source)).shuffle(seed=seed).repeat()

    def __call__(self, place: int) -> dict[str, np.ndarray | np.int32]:
        rows = self.config.batch_size // self.process_count
        step, row = divmod(place, rows)
        position = step * self.config.batch_size + self.process_index * rows + row
        first, epoch = int(self._order[position]), position // len(self.source)
        most = min(_MOST_SKIPPED, len(self.source))
        for skipped in range(most):
            index = (first + skipped) % len(self.source)
            try:
                example = self._example(index, epoch)
            except UserError as error:
                if not self.config.data.skip_unreadable:
                    raise
                last = error
            else:
                numbers = {"index": index, "epoch": epoch, "skipped": skipped}
                return example | {name: np.int32(value) for name, value in numbers.items()}
        raise UserError(f"{most} examples in a row are unreadable; the last: {last.line}")

    def _example(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        data = self.config.data
        image, label = decoded(self.source[index], self.config)
        return transforms.training_example(
            image,
            label,
            crop=data.crop_size,
            scale=data.scale,
            ratio=data.ratio_range,
            cat_max_ratio=data.cat_max_ratio,
            rng=np.random.default_rng([self.config.seed, epoch, index]),
        )


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker process: it keeps off accelerators and signals, and ends with its parent."""
    jax.config.update("jax_platforms", "cpu")
    cv2.setNumThreads(1)
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a Ctrl-C reaches all processes; the parent ends its workers
        signal.signal(name, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Ends this process, whatever it does then, when the one that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_order(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields function(item) of each item in turn, computed ahead by threads."""
    if not items:
        return
    threads = min(os.cpu_count() or 1, 16)
    dataset = grain.MapDataset.source(items).map(function)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(threads, 2 * threads)))
    try:
        yield from iterator
    finally:
        iterator.close()


def decoded(
    example: Example, config: ConfigDict
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Image and label of an example; a UserError names the file that is none, damaged or of another size."""
    image = transforms.decode_image(example.image, example.where[0])
    classes, reduce_zero_label = config.model.num_classes, config.data.reduce_zero_label
    label = transforms.decode_label(
        example.label, example.where[1], classes=classes, reduce_zero_label=reduce_zero_label
    )
    transforms.check_sizes(image, label, example.where[0])
    return image, label


def why_unreadable(source: Source, index: int, config: ConfigDict) -> str:
    """What the error said for which an example was skipped."""
    try:
        decoded(source[index], config)
    except UserError as error:
        return error.line
    return f"example {index} could not be read, and can be now"


class DeviceBatches(Iterator[dict[str, jax.Array]]):
    """Global arrays made from each process's rows by a thread that keeps some batches ahead: `to_device`.

    Attributes:
        waited: seconds that `next` has waited for data so far.
    """

    def __init__(self, batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int):
        self.waited = 0.0
        self._batches = batches
        self._sharding = sharding
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="to-device", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for batch in self._batches:
                arrays = {
                    name: jax.make_array_from_process_local_data(self._sharding, values)
                    for name, values in batch.items()
                }
                if not self._put(arrays):
                    return
            self._put(StopIteration())
        except Exception as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> dict[str, jax.Array]:
        if self._stopped.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, Exception):
            self.close()
            raise item
        return item

    @property
    def skipped(self) -> int:
        """How many examples stand in for an unreadable one so far; those made ahead count too."""
        return getattr(self._batches, "skipped", 0)

    @property
    def unreadable(self) -> set[int]:
        """The indices of the examples that were stood in for."""
        return set(getattr(self._batches, "unreadable", ()))

    def close(self) -> None:
        """Stops the thread, and the workers behind it."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        if hasattr(self._batches, "close"):
            self._batches.close()


def to_device(batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int = 2) -> DeviceBatches:
    """Keeps `depth` batches ahead on the devices, their first axis laid out by `sharding`.

    The global batch is the processes' rows one after the other. An error while a batch is made is raised by the
    `next` that would have returned it.
    """
    return DeviceBatches(batches, sharding, depth)
