"""From a source to batches on the devices: shuffled, shared out over processes and workers, resumable at any step.

    source -> _ExampleMaker: shuffle, decode, resize, crop -> TrainingBatches -> DeviceBatches
              in worker processes, or in threads               host arrays       global arrays, prefetched

An example's place in the order depends only on the seed, and its random draws only on (seed, epoch, example).
Examples that are drawn for a class or to be pasted depend only on the seed and the place. So the batches are the same
on 1 or N processes, with 0 or N workers, and from any start step.
"""

import collections
import concurrent.futures
import dataclasses
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import cv2
import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int64
from ml_collections import ConfigDict

from topformer_jax.data import class_balance, codecs, transforms
from topformer_jax.data.batch import Batch, Example, Image, Labels, Source
from topformer_jax.data.classification import images as class_images
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

MAX_SKIPPED_IN_A_ROW = 100  # more unreadable examples in a row mean that something else is wrong
SHARED_MEMORY = "/dev/shm"
FIRST_DRAW = 2**31 - 1  # in place of an epoch: examples that are drawn for a class count down from here
COUNTED_AT_ONCE = 1 << 20  # pixels of a label; np.bincount takes eight bytes for each
_ENDLESS = 2**62  # examples; grain counts batches in floating point, which overflows for sys.maxsize


def training_batches(
    source: Source,
    config: ConfigDict,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    processes_on_host: int = 1,
    class_draws: class_balance.ClassDraws | None = None,
) -> "TrainingBatches":
    """Makes an endless iterator over one process's rows of each global batch, from `start_step` on.

    Process p of P gets the rows [p * B / P, (p + 1) * B / P) of a batch of B. Each epoch holds every example once, in
    an order of its own; batches run across the epochs' borders, so that no example is dropped. At a
    share `data.balance` of the places, an example is drawn for a class instead; `needs_class_draws` says when
    `class_draws` must be given. `processes_on_host` share one /dev/shm.

    >>> from topformer_jax import config
    >>> from topformer_jax.data import sources
    >>> settings = config.shapes()
    >>> batches = training_batches(sources.open_source(settings, "train"), settings)
    >>> batch = next(batches)
    >>> batch["image"].shape, batch["label"].shape
    ((16, 128, 128, 3), (16, 128, 128))
    >>> batches.close()

    Raises UserError if the batch cannot be shared out evenly; later, from `next`, if an example cannot be read.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared out over {process_count} processes: give a "
            f"--config.batch_size that is a multiple of {process_count}"
        )
    rows = config.batch_size // process_count
    if class_draws is None and needs_class_draws(config):
        raise ValueError("data.balance and data.mix=paste need class_draws: see class_balance.group_by_class")
    make_example = _ExampleMaker(source, config, process_index, process_count, class_draws)
    batches = grain.MapDataset.range(_ENDLESS).map(make_example).batch(rows)[start_step:]

    if not flags.FLAGS.is_parsed():  # grain reads its own absl flags, which nobody has parsed outside absl
        flags.FLAGS.mark_as_parsed()
    workers, ahead = config.data.num_workers, max(1, config.data.prefetch)
    if not workers:
        threads = min(count_cores(), ahead)
        return TrainingBatches(batches.to_iter_dataset(grain.ReadOptions(threads, ahead)), len(source))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=math.ceil(ahead / workers))
    # A worker process has one thread: one process a core, and OpenCV's own threads are off.
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if line := _explain_full_shared_memory(config, rows, options, processes_on_host):
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, pipes)
        if process_index == 0:
            print(line, flush=True)
    return TrainingBatches(dataset.mp_prefetch(options, _start_worker), len(source))


def is_drawn(epoch: int) -> bool:
    """Whether the `epoch` of an example in a batch is the number of a draw for a class."""
    return epoch > FIRST_DRAW // 2


def needs_class_draws(config: ConfigDict) -> bool:
    """Whether examples are drawn for a class, to be trained on or to be pasted."""
    return bool(config.data.balance) or config.data.mix == "paste"


def _explain_full_shared_memory(
    config: ConfigDict, rows: int, options: grain.MultiprocessingOptions, processes: int
) -> str:
    """One line if the workers' batches do not fit into the free shared memory; "" if they do.

    A worker that writes more than fits dies without a message. Each worker has a full buffer of batches in grain's
    queue, another one in the queue of the thread that empties it, and one batch in the hands of either. One more is
    being copied by `TrainingBatches`.
    """
    channels = 3 + (config.task == "segmentation")  # bytes a pixel: the image's, and the label's
    batches = processes * (options.num_workers * (2 * options.per_worker_buffer_size + 2) + 1)
    needed = rows * math.prod(config.data.crop_size) * channels * batches
    free = count_free_shared_memory()
    if free is None or needed <= free:
        return ""
    return (
        f"note: /dev/shm has {free >> 20:,} MB free, and {batches} batches in it would need {needed >> 20:,} MB: "
        "the data workers send them through pipes, which is slower; with Docker, "
        f"docker run --shm-size={math.ceil(needed / 2**30)}g"
    )


def count_free_shared_memory() -> int | None:
    """The bytes that are free for shared memory, 64 MB in a Docker container; None if the system does not say."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # of other systems than Linux
        return None
    return status.f_bavail * status.f_frsize


def name_shared_memory() -> str:
    """A string that identifies this host's or container's shared memory."""
    try:
        return f"{files.read_boot_id()} {os.stat(SHARED_MEMORY).st_dev}"
    except OSError:
        return ""


class TrainingBatches(Iterator[Batch]):
    """Iterates over a process's batches as NumPy arrays; the first error ends it.

    `skipped` counts the unreadable examples that were replaced by their successors so far; `unreadable` holds their
    indices.
    """

    def __init__(self, dataset: grain.IterDataset, num_examples: int):
        self._iterator: Any = iter(dataset)
        self._num_examples = num_examples
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
            # The traceback's frames are grain's and hold the previous batch, which could not be freed.
            error.__traceback__ = None
            self.close()  # grain would continue with the batch after this one
            if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
                raise UserError(
                    f"a data worker died ({str(error).split('. ')[0]}): if memory or /dev/shm is full, lower "
                    "--config.data.num_workers or --config.data.prefetch"
                ) from None
            raise
        # Workers return arrays in shared memory, which is freed with grain's object: copy them.
        batch = {name: np.array(values) for name, values in batch.items()}
        for index, skipped in zip(batch["index"], batch.pop("skipped"), strict=True):
            self.skipped += int(skipped > 0)
            self.unreadable |= {int(index - back) % self._num_examples for back in range(1, skipped + 1)}
        return cast(Batch, batch)

    def close(self) -> None:
        """Ends the workers; there are no batches after it."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            # A thread of grain frees the shared memory of batches that were not taken; at exit, Python reports the
            # rest as leaked. A task that is queued behind that work returns when it is done.
            gc.collect()
            freeing = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
            if freeing is not None:
                freeing.apply(int)


@dataclasses.dataclass
class _ExampleMaker:
    """Maps a position in one process's share of the order to its training example."""

    source: Source
    config: ConfigDict
    process_index: int
    process_count: int
    class_draws: class_balance.ClassDraws | None

    def __post_init__(self) -> None:
        # grain shuffles epoch e with seed + e: hashed, so that neighbouring seeds share no epochs.
        seed = int(np.random.SeedSequence(self.config.seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(self.source)).shuffle(seed=seed).repeat()

    def __call__(self, local_position: int) -> dict[str, Any]:
        rows = self.config.batch_size // self.process_count
        step, row = divmod(local_position, rows)
        position = step * self.config.batch_size + self.process_index * rows + row
        first, epoch, wanted = int(self._order[position]), position // len(self.source), None
        # Four numbers: no stream of `crop_example`, which takes three.
        rng = np.random.default_rng([self.config.seed, position, 0, 1])
        if self.class_draws and rng.random() < self.config.data.balance:
            wanted, first = self.class_draws.draw(rng)
            epoch = FIRST_DRAW - position % FIRST_DRAW  # others at the same index have another one
        limit = min(MAX_SKIPPED_IN_A_ROW, len(self.source))
        for skipped in range(limit):
            index = (first + skipped) % len(self.source)
            try:
                example = crop_example(self.source[index], self.config, index, epoch, wanted)
            except UserError as error:
                if not self.config.data.skip_unreadable:
                    raise
                last_error = error
            else:
                if self.config.data.mix != "none" and rng.random() < self.config.data.mix_prob:
                    self._mix(example, position, rng)
                numbers = {"index": index, "epoch": epoch, "skipped": skipped}
                return {**example, **{name: np.int32(value) for name, value in numbers.items()}}
        raise UserError(f"{limit} examples in a row are unreadable; the last: {last_error.line}")

    def _mix(self, example: Any, position: int, rng: np.random.Generator) -> None:
        """Pastes part of another example, if it is readable, onto the example of a position."""
        pasted, index = None, int(rng.integers(len(self.source)))
        if self.config.data.mix == "paste":
            assert self.class_draws
            pasted, index = self.class_draws.draw(rng, by_rarity=True)
        try:
            other = crop_example(self.source[index], self.config, index, FIRST_DRAW + 1 + position, pasted)
        except UserError:
            if not self.config.data.skip_unreadable:  # it is counted at its own place in the order
                raise
        else:
            class_balance.mix(example, cast(Any, other), self.config.data.mix, pasted, rng)


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker process: no accelerator, no signals, and it ends with its parent."""
    jax.config.update("jax_platforms", "cpu")
    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach all processes; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def count_cores() -> int:
    """The cores that this process may use: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any], *, ahead: int = 0) -> Iterator[Any]:
    """Yields function(item) for each item in order, computed by threads, at least `ahead` items in advance.

    >>> list(map_in_threads(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    if not items:
        return
    threads = min(count_cores(), 16)
    dataset = grain.MapDataset.source(items).map(function)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(threads, max(2 * threads, ahead))))
    try:
        yield from iterator
    finally:
        iterator.close()


def decode_example(example: Example, config: ConfigDict) -> tuple[Image, Labels]:
    """Decodes an example's image and label; a UserError if their sizes differ."""
    image = codecs.decode_image(example.image, example.where[0])
    label = decode_label(example, config)
    (rows, columns), (height, width) = image.shape[:2], label.shape
    if (rows, columns) != (height, width):
        rotated = " (images are rotated by their EXIF orientation)" if (columns, rows) == (height, width) else ""
        raise UserError(
            f"{example.where[0]}: the image has {columns} x {rows} pixels and its label {width} x {height}: "
            f"they must have the same size{rotated}"
        )
    return image, label


def decode_label(example: Example, config: ConfigDict) -> Labels:
    """Decodes an example's label, and applies `data.reduce_zero_label`."""
    classes, reduce = config.model.num_classes, config.data.reduce_zero_label
    return codecs.decode_label(example.label, example.where[1], classes=classes, reduce_zero_label=reduce)


def count_pixels(
    source: Source, config: ConfigDict, indices: Sequence[int]
) -> Iterator[Int64[np.ndarray, " classes"]]:
    """Counts the pixels of each class in the labels of some examples, in order, by threads.

    Raises UserError if a label cannot be read; with `data.skip_unreadable` its counts are 0.
    """
    classes = config.model.num_classes

    def count(index: int) -> np.ndarray:
        try:
            label = decode_label(source[index], config)
        except UserError:
            if not config.data.skip_unreadable:
                raise
            return np.zeros(classes, np.int64)
        parts = np.array_split(label.reshape(-1), 1 + label.size // COUNTED_AT_ONCE)
        return np.sum([np.bincount(part, minlength=256)[:classes] for part in parts], 0)

    return map_in_threads(count, indices)


def crop_example(
    example: Example, config: ConfigDict, index: int, epoch: int, wanted: int | None = None
) -> transforms.CroppedExample | class_images.ClassExample:
    """Decodes an example, takes the random crop that the seed, its index and the epoch decide, and degrades it.

    A segmenter's crop holds the class `wanted`, if one of the tries finds it. Raises UserError if a file is damaged
    or does not fit, or the image is too large for `data.rotation`.
    """
    data = config.data
    rng = np.random.default_rng([config.seed, epoch, index])
    crop: transforms.CroppedExample | class_images.ClassExample
    if config.task == "classification":
        crop = class_images.make_training_example(example, config, rng)
    else:
        image, label = decode_example(example, config)
        if data.rotation and max(label.shape) > transforms.LONGEST_TURNED:
            raise UserError(
                f"{example.where[0]} has a side of {max(label.shape):,} pixels: data.rotation takes at most "
                f"{transforms.LONGEST_TURNED:,}; cut the picture, or set data.rotation=0"
            )
        crop = transforms.random_resize_crop(image, label, data, rng, wanted)
    if data.blur_prob or data.jpeg_prob:
        height, width = crop["size"]
        seen = crop["image"][:height, :width]
        seen[:] = transforms.degrade(seen, blur_prob=data.blur_prob, jpeg_prob=data.jpeg_prob, rng=rng)
    return crop


def explain_unreadable(source: Source, index: int, config: ConfigDict) -> str:
    """Reads a skipped example again, and returns the line of its error."""
    try:
        crop_example(source[index], config, index, epoch=0)
    except UserError as error:
        return error.line
    return f"example {index} could not be read, and can be now"


class DeviceBatches(Iterator[Batch]):
    """Iterates over global batches on the devices; a thread puts each process's rows there, `depth` batches ahead.

    `sharding` lays out the first axis. The global batch is the processes' rows in order. An error in making a batch
    is raised by the `next` that would have returned it. (grain's prefetch threads read only from grain datasets, and
    its `device_put` takes the global batch on every process.)
    """

    def __init__(self, batches: Iterator[Batch], sharding: jax.sharding.Sharding, depth: int = 3):
        self._batches: Any = batches
        self._sharding = sharding
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "to-device")
        self._waiting = collections.deque(self._thread.submit(self._load) for _ in range(depth))

    def _load(self) -> Batch | None:
        """The next batch on the devices; None if there is none."""
        batch: Any = next(self._batches, None)
        if batch is not None:
            for name, values in batch.items():
                batch[name] = jax.make_array_from_process_local_data(self._sharding, values)
        return batch

    def wait(self, seconds: float) -> bool:
        """Whether `next` returns or raises at once, after a wait of at most so many seconds for it."""
        return not self._waiting or bool(concurrent.futures.wait([self._waiting[0]], seconds).done)

    def __next__(self) -> Batch:
        batch = None
        if self._waiting:
            try:
                batch = self._waiting.popleft().result()
            except Exception:
                self.close()
                raise
        if batch is None:
            self.close()
            raise StopIteration
        self._waiting.append(self._thread.submit(self._load))
        return batch

    @property
    def skipped(self) -> int:
        """How many unreadable examples were replaced so far, those in prefetched batches included."""
        return self._batches.skipped

    @property
    def unreadable(self) -> set[int]:
        """The indices of those examples."""
        return set(self._batches.unreadable)

    def close(self) -> None:
        """Stops the thread, and the workers behind it."""
        self._waiting.clear()
        self._thread.shutdown(cancel_futures=True)
        self._batches.close()
