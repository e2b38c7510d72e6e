"""Scores a segmenter on a data set's split: every example once, the same integers on any number of devices."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from topformer_jax import models
from topformer_jax.data import loader, sources
from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.example import SegmentationSource
from topformer_jax.data.transforms import Size
from topformer_jax.inference import (
    InferenceInput,
    compile_inference,
    make_global_batch,
    metrics,
    plan_evaluation,
)
from topformer_jax.inference.inputs import padding_input, prepare_input
from topformer_jax.inference.plan import EvalBatch
from topformer_jax.runtime import processes, sharding
from topformer_jax.runtime.errors import UserError

BATCHES_IN_FLIGHT = 2  # dispatched to the devices and not yet fetched


@dataclasses.dataclass(frozen=True)
class ExampleResult:
    """One example of this process after its batch was computed; `prediction()` copies its labels to the host."""

    index: int
    name: str
    image: Image
    label: Labels
    prediction: Callable[[], Labels]


class EvaluationResult(NamedTuple):
    """What was counted; the same on every process."""

    confusion: Int[np.ndarray, "classes classes"]  # pixels, int64: a row per label, a column per prediction
    accuracy: Float[np.ndarray, " examples"]  # share of each example's labelled pixels; nan if it has none
    miou: Float[np.ndarray, " examples"]  # of each example alone


def score_split(result: EvaluationResult, config: ConfigDict, split: str) -> metrics.Scores:
    """The scores of what was counted.

    Raises:
        UserError: no label of the split has a pixel of a class.
    """
    if not result.confusion.any():
        raise UserError(
            f"no label of the {split} split in {config.data.root or config.data.source} has a pixel of a class, so "
            "there is nothing to score: python -m topformer_jax.check says what the labels hold"
        )
    return metrics.compute_scores(result.confusion)


def evaluate_split(
    model: models.Segmenter,
    source: sources.Source,
    mesh: Mesh,
    *,
    tensors: Mapping[str, Any] | None = None,
    on_example: Callable[[ExampleResult], None] = lambda _: None,
    on_progress: Callable[[int, str], None] = lambda *_: None,
) -> EvaluationResult:
    """Counts every example of a source exactly once, on all devices of all processes.

    Each process reads and computes its rows of every batch and adds up their confusion matrices; they are summed over
    processes at the end. The integers do not depend on the number of devices, as long as
    `evaluation.per_device_batch_size` stays the same.

    Args:
        model: whose `config` says how to evaluate; it is switched to inference mode.
        source: the examples.
        mesh: all devices of all processes.
        tensors: by official name, to use instead of the model's own.
        on_example: called with each example of this process.
        on_progress: called with the number of examples started, and the canvases being compiled ("" if none).

    Raises:
        UserError: an example cannot be read.
    """
    config = model.config
    programs = compile_inference(model, mesh)
    host_tensors = models.state_dict(model) if tensors is None else dict(tensors)
    device_tensors = jax.device_put(host_tensors, sharding.replicated(mesh))
    rows_per_device = _rows_per_device(config.evaluation.per_device_batch_size)
    rows = rows_per_device * mesh.size
    own_rows = local_rows(programs.batch_sharding, rows)
    sizes = _read_sizes(source)
    _, batches = plan_evaluation(sizes, config.evaluation, devices=mesh.size, rows_per_device=rows_per_device)
    dtype = programs.dtype.name

    def load(job: tuple[EvalBatch, int]) -> _LoadedExample:
        batch, index = job
        example = source[index]
        image, label = loader.decode_example(example, config)
        inputs = prepare_input(image, label, config.evaluation, batch.shapes, batch.label_size, dtype)
        return _LoadedExample(index, example.name, image, label, inputs)

    jobs = [(batch, index) for batch in batches for row in own_rows if (index := batch.rows[row]) is not None]
    # Hosts read the next batch while the devices compute this one.
    examples = loader.map_in_threads(load, jobs, ahead=len(own_rows))
    classes = config.model.num_classes
    confusion = np.zeros((classes, classes), np.int64)  # of this process's rows
    scores = np.zeros((len(source), 2), np.float32)  # accuracy and mIoU; zero for other processes' examples
    in_flight: collections.deque[tuple[dict[int, _LoadedExample], Array, Array]] = collections.deque()
    started = 0
    compiled: set[Size] = set()
    for batch in batches:
        shapes = batch.shapes
        new_sizes = dict.fromkeys(
            size for canvas in shapes.canvases for size in canvas if size not in compiled
        )
        compiled |= set(new_sizes)
        on_progress(started, ", ".join(f"{height}x{width}" for height, width in new_sizes))
        loaded = {row: next(examples) for row in own_rows if batch.rows[row] is not None}
        inputs = {row: example.inputs for row, example in loaded.items()}
        if len(inputs) < len(own_rows):
            example = next(index for index in batch.rows if index is not None)
            padding = padding_input(sizes[example], config.evaluation, shapes, batch.label_size, dtype)
            inputs = {row: inputs.get(row, padding) for row in own_rows}
        global_batch = make_global_batch(inputs, rows, programs.batch_sharding)
        views = programs.compute_views(device_tensors, shapes, global_batch)
        in_flight.append((loaded, *programs.predict_and_count(views, global_batch.label)))
        started += sum(index is not None for index in batch.rows)
        while len(in_flight) > BATCHES_IN_FLIGHT or (in_flight and batch is batches[-1]):
            _collect_batch(*in_flight.popleft(), confusion, scores, on_example)
    on_progress(started, "")
    scores = processes.sum_over_processes(scores)
    confusion = processes.sum_over_processes(confusion)
    return EvaluationResult(confusion, scores[:, 0], scores[:, 1])


def evaluate_images(
    predict: Callable[[Image], Labels],
    source: sources.Source,
    config: ConfigDict,
    *,
    on_example: Callable[[ExampleResult], None] = lambda _: None,
    on_progress: Callable[[int, str], None] = lambda *_: None,
) -> EvaluationResult:
    """Counts as `evaluate_split` does what a function makes of each image, in this process alone.

    Args:
        predict: an image, uint8 `[h, w, 3]`, to labels of its size.
        source: the examples.
        config: of the data set.
        on_example, on_progress: see `evaluate_split`.

    Raises:
        UserError: an example cannot be read.
    """
    classes = config.model.num_classes
    confusion = np.zeros((classes, classes), np.int64)
    scores = np.zeros((len(source), 2), np.float32)

    def load(index: int) -> tuple[str, Image, Labels]:
        example = source[index]
        return (example.name, *loader.decode_example(example, config))

    for index, (name, image, label) in enumerate(loader.map_in_threads(load, range(len(source)))):
        on_progress(index, "")
        prediction = predict(image)
        counted = label < classes
        pairs = label[counted].astype(np.int64) * classes + prediction[counted]
        counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        confusion += counts
        scores[index] = metrics.compute_image_scores(np.diagonal(counts), counts.sum(1), counts.sum(0))
        on_example(ExampleResult(index, name, image, label, functools.partial(np.copy, prediction)))
    on_progress(len(source), "")
    return EvaluationResult(confusion, scores[:, 0], scores[:, 1])


@dataclasses.dataclass(frozen=True)
class _LoadedExample:
    """An example on the host, ready to be stacked into a batch."""

    index: int
    name: str
    image: Image
    label: Labels
    inputs: InferenceInput


def _rows_per_device(setting: int) -> int:
    """Images that a device computes at once; 0 means the default of the backend."""
    return setting or (1 if jax.default_backend() == "cpu" else 8)


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


def _collect_batch(
    loaded: Mapping[int, _LoadedExample],
    predictions: Array,
    counts: Array,
    confusion: np.ndarray,
    scores: np.ndarray,
    on_example: Callable[[ExampleResult], None],
) -> None:
    """Waits for a batch, adds its examples to `confusion`, and writes their accuracy and mIoU into `scores`."""
    counts_of_row = _fetch_local_rows(counts)
    for row, example in loaded.items():
        matrix = counts_of_row[row].reshape(confusion.shape)
        confusion += matrix
        scores[example.index] = metrics.compute_image_scores(
            np.diagonal(matrix), matrix.sum(1), matrix.sum(0)
        )

        def prediction(row: int = row, label: Labels = example.label) -> Labels:
            return _fetch_local_rows(predictions)[row][: label.shape[0], : label.shape[1]]

        on_example(ExampleResult(example.index, example.name, example.image, example.label, prediction))


def _fetch_local_rows(array: Array) -> dict[int, np.ndarray]:
    """The rows of a global array that this process holds, copied to the host."""
    return {
        (shard.index[0].start or 0) + number: row
        for shard in array.addressable_shards
        for number, row in enumerate(np.asarray(shard.data))
    }
