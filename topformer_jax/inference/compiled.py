"""The compiled programs of an evaluation: images to logits, logits to labels, counts and probabilities.

The network is compiled once per input size. What follows it (`ops/tiled.py`) takes the sizes of the original images
as data and is compiled once for all images in the same bucket.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32
from ml_collections import FrozenConfigDict

from topformer_jax import models, sharding
from topformer_jax.data.augment import normalize
from topformer_jax.inference.geometry import InferenceInput, padded_logits_size, view_flips, window_grid
from topformer_jax.metrics import count_confusions
from topformer_jax.models.layers import DTypePolicy
from topformer_jax.ops.tiled import ViewLogits, argmax_classes, fold_tiles, mean_probabilities

# A data set has more pixels than an int32 can count, and JAX has no wider integers by default. So a count is kept
# in two int32 parts: count = lower + upper * 2**LOWER_BITS. It overflows at 2**51 pixels.
LOWER_BITS = 20


class CompiledInference:
    """The jitted programs of one network on one mesh; each device computes its own images independently.

    The number of images a device computes at once is fixed, so the result for an image does not depend on how many
    devices there are.

    Attributes:
        num_classes, evaluation, mesh: what the programs were made for.
        logits: `(tensors, images, flip) -> [n, h, classes, w]`, the logits of all windows side by side.
        predict_and_count: `(views, tile_counts, labels, totals) -> (predictions, pixels, totals)`.
        probabilities: `(views, tile_counts, labels) -> [n, tiles, rows, columns, classes]`.
        batch_sharding: how arrays of a batch lie on the mesh.
        dtype: of resize matrices and scores, at least float32.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        num_classes: int,
        policy: DTypePolicy,
        evaluation: FrozenConfigDict,
        mesh: Mesh,
    ):
        self.num_classes = num_classes
        self.dtype = np.dtype(policy.accum_dtype)
        self.evaluation = evaluation
        self.mesh = mesh
        self.batch_sharding = sharding.batch_sharding(mesh)
        self._graphdef = graphdef
        self._precision = policy.precision
        batch, replicated = P(mesh.axis_names), P()
        per_device = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        self.logits = jax.jit(
            per_device(self._logits, in_specs=(replicated, batch, replicated), out_specs=batch)
        )
        self.predict_and_count = jax.jit(
            per_device(self._predict_and_count, in_specs=(batch, batch, batch, batch), out_specs=batch),
            donate_argnums=3,
        )
        self.probabilities = jax.jit(
            per_device(self._probabilities, in_specs=(batch, batch, batch), out_specs=batch)
        )

    def compute_views(self, tensors: Mapping[str, Array], batch: InferenceInput) -> list[ViewLogits]:
        """The logits of every view of a batch that lies on the mesh (see `make_global_batch`)."""
        views = [(image, flip) for image in batch.images for flip in view_flips(self.evaluation)]
        return [
            ViewLogits(self.logits(tensors, image, np.bool_(flip)), rows, columns)
            for (image, flip), rows, columns in zip(
                views, batch.row_resizes, batch.column_resizes, strict=True
            )
        ]

    def zero_totals(self) -> Int32[Array, "devices 2 pairs"]:
        """What `predict_and_count` starts from: the two parts of each device's confusion matrix."""
        zeros = np.zeros((self.mesh.size, 2, self.num_classes**2), np.int32)
        return jax.make_array_from_callback(zeros.shape, self.batch_sharding, lambda index: zeros[index])

    def read_totals(self, totals: Int32[Array, "devices 2 pairs"]) -> Int[np.ndarray, "classes classes"]:
        """The confusion matrix, int64, summed over this process's devices; waits for them."""
        parts = np.concatenate([np.asarray(shard.data) for shard in totals.addressable_shards])
        lower, upper = parts.astype(np.int64).sum(0)
        return (lower + (upper << LOWER_BITS)).reshape(self.num_classes, self.num_classes)

    def _logits(self, tensors: Any, images: Array, flip: Array) -> Float[Array, "n h classes w"]:
        """The logits of all windows side by side, padded to one of few sizes."""
        n, *sides = images.shape[:3]
        input_size = (sides[0], sides[1])
        images = jnp.where(flip, images[:, :, ::-1], images)
        images = normalize(images, self.dtype)
        model = models.merge_state_dict(self._graphdef, tensors)
        (tops, height), (lefts, width) = window_grid(input_size, self.evaluation)
        if len(tops) * len(lefts) == 1:
            logits = model(images)
        else:
            corners = jnp.asarray([(top, left) for top in tops for left in lefts], jnp.int32)

            def window_logits(corner: Array) -> Array:
                start = (jnp.int32(0), corner[0], corner[1], jnp.int32(0))
                return model(lax.dynamic_slice(images, start, (n, height, width, 3)))

            logits = lax.map(window_logits, corners)
            _, _, h, w, classes = logits.shape
            logits = logits.reshape(len(tops), len(lefts), n, h, w, classes).transpose(2, 0, 3, 1, 4, 5)
            logits = logits.reshape(n, len(tops) * h, len(lefts) * w, classes)
        padded_size = padded_logits_size(input_size, self.evaluation)
        pad = [(0, padded - side) for padded, side in zip(padded_size, logits.shape[1:3], strict=True)]
        return jnp.pad(logits, ((0, 0), *pad, (0, 0))).swapaxes(2, 3)

    def _predict_and_count(
        self, views: list[ViewLogits], tile_counts: Array, labels: Array, totals: Array
    ) -> tuple[Array, Array, Array]:
        """Predicts and counts a batch.

        Returns:
            predictions: uint8 `[n, tiles, rows, columns]`.
            pixels: int32 `[n, 3, classes]`: per class, the correct, labelled and predicted pixels of each image.
            totals: with this batch added to each device's confusion matrix.
        """
        classes = self.num_classes

        def count_image(totals: Array, image: Any) -> tuple[Array, tuple[Array, Array]]:
            views, tile_count, labels = image

            def count_tile(carry: Any, scores: Array, tile: Array) -> Any:
                predictions, counts = carry
                predicted = argmax_classes(scores)
                counts = counts + count_confusions(labels[tile], predicted, classes)
                return predictions.at[tile].set(predicted.astype(jnp.uint8)), counts

            init = (jnp.zeros_like(labels), jnp.zeros(classes**2, jnp.int32))
            predictions, counts = fold_tiles(
                views, tile_count[0], tile_count[1], init, count_tile, precision=self._precision
            )
            matrix = counts.reshape(classes, classes)
            pixels = jnp.stack([jnp.diagonal(matrix), matrix.sum(1), matrix.sum(0)])
            return _add_counts(totals, counts), (predictions, pixels)

        totals, (predictions, pixels) = lax.scan(count_image, totals, (views, tile_counts, labels))
        return predictions, pixels, totals

    def _probabilities(
        self, views: list[ViewLogits], tile_counts: Array, labels: Array
    ) -> Float[Array, "n tiles rows columns classes"]:
        """The softmax at each pixel of the images, averaged over the views."""

        def image_probabilities(image: Any) -> Array:
            views, tile_count, labels = image

            def write_tile(carry: Array, scores: Array, tile: Array) -> Array:
                return carry.at[tile].set(mean_probabilities(scores, len(views)).swapaxes(1, 2))

            init = jnp.zeros((*labels.shape, self.num_classes), views[0].logits.dtype)
            return fold_tiles(
                views, tile_count[0], tile_count[1], init, write_tile, precision=self._precision
            )

        return lax.map(image_probabilities, (views, tile_counts, labels))


def _add_counts(totals: Int32[Array, "1 2 pairs"], counts: Int32[Array, " pairs"]) -> Array:
    """Adds counts to totals in two parts, carrying from the lower to the upper one."""
    lower = totals[0, 0] + counts % 2**LOWER_BITS
    upper = totals[0, 1] + counts // 2**LOWER_BITS + lower // 2**LOWER_BITS
    return jnp.stack([lower % 2**LOWER_BITS, upper])[None]


def compile_inference(model: models.Segmenter, mesh: Mesh) -> CompiledInference:
    """The programs of a model on a mesh; each is compiled at its first call with new shapes.

    The model is switched to inference mode. For an equal network, evaluation and mesh it returns the same object
    again, so that nothing is compiled twice.
    """
    model.eval()
    graphdef, _ = nnx.split(model)
    return _cached_inference(graphdef, model.num_classes, model.policy, model.config.evaluation, mesh)


_cached_inference = functools.lru_cache(maxsize=8)(CompiledInference)


def make_global_batch(
    inputs: Mapping[int, InferenceInput], rows: int, batch_sharding: NamedSharding
) -> InferenceInput:
    """One batch on the mesh from this process's rows of it, all prepared for the same bucket.

    Args:
        inputs: by row, every row that lies on this process's devices.
        rows: of the batch, over all processes.
        batch_sharding: of the rows.
    """

    def put(*arrays: np.ndarray) -> Array:
        local = dict(zip(inputs, arrays, strict=True))

        def stack_rows(index: Any) -> np.ndarray:
            return np.stack([local[row] for row in range(*index[0].indices(rows))])

        return jax.make_array_from_callback((rows, *arrays[0].shape), batch_sharding, stack_rows)

    return jax.tree.map(put, *inputs.values())
