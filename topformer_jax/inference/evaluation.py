"""Scores a data set's split: every example once, on any number of devices and processes.

A segmenter's result is a confusion matrix of pixels; a classifier's is the rank of every image's class.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32, UInt8
from ml_collections import ConfigDict

from topformer_jax import models
from topformer_jax.data import loader, sources
from topformer_jax.data.augment import normalize
from topformer_jax.data.batch import Image, Labels, SegmentationSource
from topformer_jax.data.classification import images as class_images
from topformer_jax.data.transforms import Size
from topformer_jax.inference import metrics
from topformer_jax.inference.compiled import compile_inference, make_global_batch
from topformer_jax.inference.plan import (
    EvalBatch,
    InferenceInput,
    padding_input,
    plan_evaluation,
    prepare_input,
)
from topformer_jax.runtime import processes, sharding
from topformer_jax.runtime.errors import UserError

BATCHES_IN_FLIGHT = 2  # dispatched to the devices and not yet fetched
NO_IMAGE = -1  # the label of a classifier's row that has no image
Rows = Sequence[int | None]  # the example in each row of a batch
Progress = Callable[[int, str], None]  # gets the number of examples started, and the canvases being compiled


@dataclasses.dataclass(frozen=True)
class LoadedExample:
    """An example on the host; `inputs` stack into a batch."""

    index: int
    name: str
    image: Image
    label: Labels
    inputs: InferenceInput | None = None


# Gets an example of this process, and a function that copies its predicted labels to the host.
OnExample = Callable[[LoadedExample, Callable[[], Labels]], None]


class EvaluationResult(NamedTuple):
    """The counts of a segmenter; the same on every process."""

    confusion: Int[np.ndarray, "classes classes"]  # pixels, int64: a row per label, a column per prediction
    example_accuracy: Float[np.ndarray, " examples"]  # of its labelled pixels; nan if it has none
    example_miou: Float[np.ndarray, " examples"]
    boundary: Int[np.ndarray, "classes classes"] | None  # of `evaluation.boundary_pixels`; None if it is 0


class ClassifierResult(NamedTuple):
    """The ranks of a classifier; the same on every process.

    `ranks[i]` is the number of classes that come before the class of image i, `labels[i]`: 0 if it is right.
    """

    ranks: Int[np.ndarray, " images"]
    labels: Int[np.ndarray, " images"]

    def top(self, count: int) -> float:
        """The share of images whose class is among the first `count`.

        >>> ClassifierResult(np.array([0, 3, 0, 9]), np.array([1, 1, 2, 2])).top(5)
        0.75
        """
        return int((self.ranks < count).sum()) / len(self.ranks)

    def of_class(self, label: int) -> "ClassifierResult":
        """The images of one class."""
        return ClassifierResult(self.ranks[self.labels == label], self.labels[self.labels == label])


def score_split(
    result: EvaluationResult, config: ConfigDict, split: str
) -> tuple[metrics.Scores, metrics.Scores | None]:
    """The scores of all pixels, and of those near boundaries if they were counted.

    Raises:
        UserError: no label of the split has a pixel of a class.
    """
    if not result.confusion.any():
        raise UserError(
            f"no label of the {split} split in {config.data.root or config.data.source} has a pixel of a class, so "
            "there is nothing to score: python -m topformer_jax.check says what the labels hold"
        )
    boundary = None if result.boundary is None else metrics.compute_scores(result.boundary)
    return metrics.compute_scores(result.confusion), boundary


def evaluate_split(
    model: models.Segmenter,
    source: sources.Source,
    mesh: Mesh,
    *,
    tensors: Mapping[str, Any] | None = None,
    on_example: OnExample = lambda *_: None,
    on_progress: Progress = lambda *_: None,
) -> EvaluationResult:
    """Counts the pixels of every example of a source exactly once, on all devices of all processes.

    The integers do not depend on the number of devices, as long as `evaluation.per_device_batch_size` stays the same.

    Args:
        model: its `config` says how to evaluate; it is switched to inference mode.
        source: the examples.
        mesh: all devices of all processes.
        tensors: by official name, to use instead of the model's own.
        on_example: see `OnExample`.
        on_progress: called before each batch and at the end.

    Raises:
        UserError: an example cannot be read.
    """
    config = model.config
    programs = compile_inference(model, mesh)
    device_tensors = _put_tensors(model, tensors, mesh)
    per_device = _rows_per_device(config, mesh)
    own_rows = local_rows(programs.batch_sharding, per_device * mesh.size)
    sizes = _read_sizes(source)
    batches = plan_evaluation(sizes, config.evaluation, devices=mesh.size, rows_per_device=per_device)
    dtype = programs.dtype.name
    counter = _PixelCounter(config, len(source), on_example)

    def load(number: int, index: int) -> LoadedExample:
        example, batch = _load_example(source, config, index), batches[number]
        shapes, size = batch.shapes, batch.label_size
        inputs = prepare_input(example.image, example.label, config.evaluation, shapes, size, dtype)
        return dataclasses.replace(example, inputs=inputs)

    def dispatch(number: int, loaded: Mapping[int, LoadedExample]) -> tuple[Array, Array]:
        batch = batches[number]
        padding: Any = None
        if len(loaded) < len(own_rows):
            size = next(sizes[index] for index in batch.rows if index is not None)
            padding = padding_input(size, config.evaluation, batch.shapes, batch.label_size, dtype)
        inputs: list[Any] = [loaded[row].inputs if row in loaded else padding for row in own_rows]
        placed = make_global_batch(inputs, programs.batch_sharding)
        views = programs.compute_views(device_tensors, batch.shapes, placed)
        return cast(tuple[Array, Array], programs.predict_and_count(views, placed.tiles, placed.labels))

    def collect(loaded: Mapping[int, LoadedExample], predictions: Array, counts: Array) -> None:
        counts_of_row = _fetch_local_rows(counts)
        for row, example in loaded.items():
            fetch = functools.partial(_fetch_labels, predictions, row, example)
            counter.add(example, counts_of_row[row], fetch)

    rows = list(zip([batch.rows for batch in batches], _name_new_canvases(batches), strict=True))
    _run_batches(rows, own_rows, load, dispatch, collect, on_progress)
    return counter.sum_over_processes()


def evaluate_images(
    predict: Callable[[Image], Labels],
    source: sources.Source,
    config: ConfigDict,
    *,
    on_example: OnExample = lambda *_: None,
    on_progress: Progress = lambda *_: None,
) -> EvaluationResult:
    """Counts as `evaluate_split` does, with labels from a function and in one process.

    Raises:
        UserError: an example cannot be read.
    """
    counter = _PixelCounter(config, len(source), on_example)
    load = functools.partial(_load_example, source, config)
    for example in loader.map_in_threads(load, range(len(source))):
        on_progress(example.index, "")
        prediction = predict(example.image)
        counts = metrics.count_on_host(example.label, prediction, config.model.num_classes)
        counter.add(example, counts, functools.partial(np.copy, prediction))
    on_progress(len(source), "")
    return counter.sum_over_processes()


def evaluate_classifier(
    model: models.Classifier,
    source: sources.Source,
    mesh: Mesh,
    *,
    tensors: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda *_: None,
) -> ClassifierResult:
    """Finds the rank of every image's class, on all devices of all processes; arguments as for `evaluate_split`.

    A device computes as many images at once, by the same program, however many devices there are.
    """
    config = model.config
    model.eval()
    device_tensors = _put_tensors(model, tensors, mesh)
    count = _rows_per_device(config, mesh) * mesh.size
    layout = sharding.batch_sharding(mesh)
    own_rows = local_rows(layout, count)
    program = _rank_program(models.network_graphdef(model), np.dtype(model.policy.accum_dtype), mesh)
    found = np.zeros((2, len(source)), np.int64)  # ranks and labels; zero for other processes' images

    def load(_: int, index: int) -> tuple[int, np.ndarray, int]:
        example = source[index]
        label = int(class_images.read_label(example, config))
        return index, class_images.make_evaluation_image(example, config), label

    def dispatch(_: int, loaded: Mapping[int, tuple[int, np.ndarray, int]]) -> tuple[Array]:
        images = np.zeros((len(own_rows), *config.data.crop_size, 3), np.uint8)
        labels = np.full(len(own_rows), NO_IMAGE, np.int32)
        for place, row in enumerate(own_rows):
            if row in loaded:
                _, images[place], labels[place] = loaded[row]
        batch = (jax.make_array_from_process_local_data(layout, values) for values in (images, labels))
        return (program(device_tensors, *batch),)

    def collect(loaded: Mapping[int, tuple[int, np.ndarray, int]], ranks: Array) -> None:
        rank_of_row = _fetch_local_rows(ranks)
        for row, (index, _, label) in loaded.items():
            found[:, index] = rank_of_row[row], label

    starts = range(0, len(source), count)
    rows = [[index if index < len(source) else None for index in range(n, n + count)] for n in starts]
    _run_batches([(each, "") for each in rows], own_rows, load, dispatch, collect, on_progress)
    ranks, labels = processes.sum_over_processes(found)
    return ClassifierResult(ranks, labels)


def _run_batches(
    batches: Sequence[tuple[Rows, str]],
    own_rows: Sequence[int],
    load: Callable[[int, int], Any],
    dispatch: Callable[[int, dict[int, Any]], tuple[Array, ...]],
    collect: Callable[..., None],
    on_progress: Progress,
) -> None:
    """Reads examples, computes batches and collects their results, all at the same time.

    Args:
        batches: the example in each row of each batch, and a note for `on_progress`.
        own_rows: the rows that this process reads and computes.
        load: reads an example, from the number of its batch and its index; called by threads.
        dispatch: starts the computation of a batch, from its number and its examples by row.
        collect: gets a batch's examples by row, and what `dispatch` returned.
        on_progress: called before each batch, and at the end.
    """
    jobs = [
        (number, index)
        for number, (rows, _) in enumerate(batches)
        for row in own_rows
        if (index := rows[row]) is not None
    ]
    examples = loader.map_in_threads(lambda job: load(*job), jobs, ahead=len(own_rows))
    in_flight: collections.deque[tuple[Any, ...]] = collections.deque()
    started = 0
    for number, (rows, note) in enumerate(batches):
        on_progress(started, note)
        loaded = {row: next(examples) for row in own_rows if rows[row] is not None}
        in_flight.append((loaded, *dispatch(number, loaded)))
        started += sum(index is not None for index in rows)
        # The devices compute while the host reads the next batch.
        while len(in_flight) > BATCHES_IN_FLIGHT:
            collect(*in_flight.popleft())
    for batch in in_flight:
        collect(*batch)
    on_progress(started, "")


def _load_example(source: sources.Source, config: ConfigDict, index: int) -> LoadedExample:
    example = source[index]
    return LoadedExample(index, example.name, *loader.decode_example(example, config))


class _PixelCounter:
    """Adds up the confusion matrices of this process's examples."""

    def __init__(self, config: ConfigDict, examples: int, on_example: OnExample):
        classes, self._boundary_pixels = config.model.num_classes, config.evaluation.boundary_pixels
        # The confusion matrices of all pixels, and of those near boundaries.
        self._confusions = np.zeros((2 if self._boundary_pixels else 1, classes, classes), np.int64)
        self._scores = np.zeros((examples, 2), np.float32)  # accuracy and mIoU; zero for others' examples
        self._on_example = on_example

    def add(self, example: LoadedExample, counts: np.ndarray, predict: Callable[[], Labels]) -> None:
        """Adds an example's counts `[classes**2]`, and hands the example on."""
        matrix = counts.reshape(self._confusions.shape[1:])
        self._confusions[0] += matrix
        if self._boundary_pixels:
            near = metrics.keep_boundary(example.label, self._boundary_pixels)
            self._confusions[1] += metrics.count_on_host(near, predict(), len(matrix))
        scores = metrics.compute_scores(matrix)
        self._scores[example.index] = scores.aacc, scores.miou
        self._on_example(example, predict)

    def sum_over_processes(self) -> EvaluationResult:
        """The counts of all processes."""
        scores = processes.sum_over_processes(self._scores)
        confusion, *boundary = processes.sum_over_processes(self._confusions)
        return EvaluationResult(confusion, scores[:, 0], scores[:, 1], boundary[0] if boundary else None)


def compute_ranks(logits: Float[Array, "n classes"], labels: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """How many classes come before an image's own: those of larger logits, and of equal ones with smaller numbers.

    A logit that is not a number comes before all.

    >>> compute_ranks(jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]), jnp.array([2, 0])).tolist()
    [1, 0]
    """
    classes = jnp.arange(logits.shape[1], dtype=labels.dtype)
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], 1)
    is_behind = (logits < own) | ((logits == own) & (classes >= labels[:, None]))
    return jnp.sum(~is_behind, 1, dtype=jnp.int32)


@functools.lru_cache(maxsize=8)
def _rank_program(graphdef: nnx.GraphDef, dtype: np.dtype, mesh: Mesh) -> Callable[..., Array]:
    """`compute_ranks` of images; for an equal network and mesh always the same program."""

    def rank(tensors: Any, images: UInt8[Array, "n h w 3"], labels: Int32[Array, " n"]) -> Int32[Array, " n"]:
        network = models.merge_state_dict(graphdef, tensors)
        return compute_ranks(network(normalize(images, dtype)), labels)

    rows = P(mesh.axis_names)
    per_device = jax.shard_map(rank, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, check_vma=False)
    return jax.jit(per_device)


def _put_tensors(model: Any, tensors: Mapping[str, Any] | None, mesh: Mesh) -> Any:
    """Tensors by name, the model's own if None, on every device."""
    return jax.device_put(models.state_dict(model) if tensors is None else dict(tensors), sharding.replicated(mesh))


def _rows_per_device(config: ConfigDict, mesh: Mesh) -> int:
    """Images that a device computes at once."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    defaults = {"segmentation": (1, 8), "classification": (16, 128)}[config.task]  # on a CPU, on others
    return int(config.evaluation.per_device_batch_size or defaults[0 if on_cpu else 1])


def local_rows(batch_sharding: NamedSharding, rows: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, in order."""
    indices: Any = batch_sharding.addressable_devices_indices_map((rows,)).values()
    return sorted(row for index in indices for row in range(*index[0].indices(rows)))


def _read_sizes(source: sources.Source) -> list[Size]:
    """The size of every example; each process reads its share of the label files' headers."""
    own = range(jax.process_index(), len(source), jax.process_count())
    sizes = np.zeros((len(source), 2), np.int64)
    label_size = cast(SegmentationSource, source).label_size
    for index, size in zip(own, loader.map_in_threads(label_size, own), strict=True):
        sizes[index] = size
    return [(int(height), int(width)) for height, width in processes.sum_over_processes(sizes)]


def _name_new_canvases(batches: Sequence[EvalBatch]) -> list[str]:
    """The canvases that each batch is the first to use, as a text."""
    known: set[Size] = set()
    names = []
    for batch in batches:
        new = [size for canvas in batch.shapes.canvases for size in canvas if size not in known]
        names.append(", ".join(f"{height}x{width}" for height, width in dict.fromkeys(new)))
        known |= set(new)
    return names


def _fetch_labels(predictions: Array, row: int, example: LoadedExample) -> Labels:
    height, width = example.label.shape
    return _fetch_local_rows(predictions)[row][:height, :width]


def _fetch_local_rows(array: Array) -> dict[int, np.ndarray]:
    """The rows of a global array that this process holds, copied to the host."""
    return {
        (shard.index[0].start or 0) + number: np.asarray(row)
        for shard in array.addressable_shards
        for number, row in enumerate(np.asarray(shard.data))
    }
