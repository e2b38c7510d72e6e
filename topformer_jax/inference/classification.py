"""Scores a classifier on a data set's split: top-1 and top-5, every image once, on any number of devices."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32, UInt8

from topformer_jax import models
from topformer_jax.data import loader, sources
from topformer_jax.data.augment import normalize
from topformer_jax.data.classification import images as class_images
from topformer_jax.inference.evaluation import local_rows
from topformer_jax.runtime import processes, sharding

NO_IMAGE = -1  # the label of a row that fills a batch up


class ClassifierResult(NamedTuple):
    """What was found; the same on every process.

    `ranks[i]` is the number of classes that image i is taken for before its own, `labels[i]`: 0 where it is right.
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


def evaluate_classifier(
    model: models.Classifier,
    source: sources.Source,
    mesh: Mesh,
    *,
    tensors: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, str], None] = lambda *_: None,
) -> ClassifierResult:
    """Finds the rank of every image's class. Each process reads and computes its rows of every batch.

    A device computes as many images at once, by the same program, however many devices there are.

    Args:
        model: whose `config` says how to evaluate; it is switched to inference mode.
        source: the examples.
        mesh: all devices of all processes.
        tensors: by official name, to use instead of the model's own.
        on_progress: called with the number of images started, and "".

    Raises:
        UserError: an example cannot be read.
    """
    config = model.config
    model.eval()
    host_tensors = models.state_dict(model) if tensors is None else dict(tensors)
    device_tensors = jax.device_put(host_tensors, sharding.replicated(mesh))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    rows = (config.evaluation.per_device_batch_size or (16 if on_cpu else 128)) * mesh.size
    layout = sharding.batch_sharding(mesh)
    own_rows = local_rows(layout, rows)
    program = _rank_program(models.network_graphdef(model), np.dtype(model.policy.accum_dtype), mesh)

    def load(index: int) -> tuple[np.ndarray, int]:
        example = source[index]
        label = class_images.read_label(example, config)
        return class_images.make_evaluation_image(example, config), int(label)

    starts = range(0, len(source), rows)
    indices = [start + row for start in starts for row in own_rows if start + row < len(source)]
    loaded = loader.map_in_threads(load, indices, ahead=2 * len(own_rows))
    found = np.zeros((2, len(source)), np.int64)  # zero for other processes' images
    pending: list[tuple[list[int], Array]] = []
    for start in starts:
        on_progress(start, "")
        images = np.zeros((len(own_rows), *config.data.crop_size, 3), np.uint8)
        labels = np.full(len(own_rows), NO_IMAGE, np.int32)
        mine = [start + row for row in own_rows if start + row < len(source)]
        for place, index in enumerate(mine):
            images[place], labels[place] = next(loaded)
            found[1, index] = labels[place]
        batch = (jax.make_array_from_process_local_data(layout, values) for values in (images, labels))
        pending.append((mine, program(device_tensors, *batch)))
        while len(pending) > 1:  # the devices compute this batch while the host reads the next one
            _fetch_ranks(*pending.pop(0), found[0])
    for batch_indices, ranks in pending:
        _fetch_ranks(batch_indices, ranks, found[0])
    on_progress(len(source), "")
    ranks, labels = processes.sum_over_processes(found)
    return ClassifierResult(ranks, labels)


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
    """`compute_ranks` of images; of an equal network and mesh always the same program."""

    def rank(tensors: Any, images: UInt8[Array, "n h w 3"], labels: Int32[Array, " n"]) -> Int32[Array, " n"]:
        network = models.merge_state_dict(graphdef, tensors)
        return compute_ranks(network(normalize(images, dtype)), labels)

    rows = P(mesh.axis_names)
    per_device = jax.shard_map(rank, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, check_vma=False)
    return jax.jit(per_device)


def _fetch_ranks(indices: list[int], ranks: Array, found: np.ndarray) -> None:
    """Waits for a batch's ranks, and writes those of this process's images."""
    shards = sorted(ranks.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    own = np.concatenate([np.asarray(shard.data) for shard in shards])
    found[indices] = own[: len(indices)]
