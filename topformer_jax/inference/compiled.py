"""The compiled programs of an evaluation: images to logits, logits to labels, counts and probabilities.

The sizes of images are data in all of them: each is compiled once for the static shapes of a plan (`ProgramShapes`),
with a branch for each of its few canvases, of which every device takes the one that its images lie on.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32, UInt8
from ml_collections import FrozenConfigDict

from topformer_jax import models, sharding
from topformer_jax.data.augment import normalize
from topformer_jax.data.transforms import Size
from topformer_jax.inference.geometry import ProgramShapes, ViewSizes, logits_size, view_flips
from topformer_jax.inference.inputs import InferenceInput, LabelTiles, NetworkInput
from topformer_jax.metrics import count_confusions
from topformer_jax.models.layers import DTypePolicy
from topformer_jax.ops.tiled import ViewLogits, argmax_classes, fold_tiles, mean_probabilities, num_cells

# A data set has more pixels than an int32 can count, and JAX has no wider integers by default. So a count is kept
# in two int32 parts: count = lower + upper * 2**LOWER_BITS. It overflows at 2**51 pixels.
LOWER_BITS = 20
Supports = tuple[ViewSizes, ...]  # those of `ProgramShapes`


class CompiledInference:
    """The jitted programs of one network on one mesh; each device computes its own images independently.

    The number of images a device computes at once is fixed, so that an image is computed by the same operations on
    the same shapes however many devices there are.

    Attributes:
        num_classes, evaluation, mesh: what the programs were made for.
        logits: `(canvases, size)` to the program `(tensors, input, flip) -> [n, h, classes, w]`, the logits of all
            windows of one ratio side by side; `size` is (h, w).
        predict_and_count: `(supports)` to the program `(views, tiles, totals) -> (predictions, pixels, totals)`.
        probabilities: `(supports)` to the program `(views, tiles) -> [n, tiles, rows, columns, classes]`.
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

        def make_program(function: Callable[..., Any], *in_specs: P, **options: Any) -> Callable[..., Any]:
            """A function from static arguments to the program that they make of `function`, always the same one."""

            @functools.cache
            def program(*static: Any) -> Callable[..., Any]:
                per_device = jax.shard_map(
                    functools.partial(function, *static),
                    mesh=mesh,
                    in_specs=in_specs,
                    out_specs=batch,
                    check_vma=False,
                )
                return jax.jit(per_device, **options)

            return program

        # XLA's CPU backend prefers vectors of 256 bits. With 512 Tiny takes 100 ms instead of 111 ms on a CPU that
        # has them (8 x 512 x 512, 2 cores of AMD's Zen 4).
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        wide = {"xla_cpu_prefer_vector_width": 512} if on_cpu else None
        self.logits = make_program(self._logits, replicated, batch, replicated, compiler_options=wide)
        self.predict_and_count = make_program(self._predict_and_count, batch, batch, batch, donate_argnums=2)
        self.probabilities = make_program(self._probabilities, batch, batch)

    def compute_views(
        self, tensors: Mapping[str, Array], shapes: ProgramShapes, batch: InferenceInput
    ) -> list[ViewLogits]:
        """The logits of every view of a batch that lies on the mesh (see `make_global_batch`)."""
        views = [
            (ratio, flip) for ratio in range(len(shapes.canvases[0])) for flip in view_flips(self.evaluation)
        ]
        return [
            ViewLogits(
                self.network(shapes, ratio)(tensors, batch.networks[ratio], np.bool_(flip)), rows, columns
            )
            for (ratio, flip), rows, columns in zip(
                views, batch.row_resizes, batch.column_resizes, strict=True
            )
        ]

    def network(self, shapes: ProgramShapes, ratio: int) -> Callable[..., Any]:
        """The program of `logits` for images of these shapes at a ratio; of equal canvases it is the same one."""
        return self.logits(tuple(canvas[ratio] for canvas in shapes.canvases), logits_size(shapes, ratio))

    def zero_totals(self) -> Int32[Array, "devices 2 pairs"]:
        """What `predict_and_count` starts from: the two parts of each device's confusion matrix."""
        zeros = np.zeros((self.mesh.size, 2, self.num_classes**2), np.int32)
        return jax.make_array_from_callback(zeros.shape, self.batch_sharding, lambda index: zeros[index])

    def read_totals(self, totals: Int32[Array, "devices 2 pairs"]) -> Int[np.ndarray, "classes classes"]:
        """The confusion matrix, int64, summed over this process's devices; waits for them."""
        parts = np.concatenate([np.asarray(shard.data) for shard in totals.addressable_shards])
        lower, upper = parts.astype(np.int64).sum(0)
        return (lower + (upper << LOWER_BITS)).reshape(self.num_classes, self.num_classes)

    def _logits(
        self, canvases: tuple[Size, ...], size: Size, tensors: Any, inputs: NetworkInput, flip: Array
    ) -> Float[Array, "n h classes w"]:
        """The logits of all windows side by side, padded to one of few sizes."""
        if self.evaluation.flip:
            mirrored = jax.vmap(_mirror)(jnp.asarray(inputs.image), jnp.asarray(inputs.size)[:, 1])
            inputs = inputs._replace(image=jnp.where(flip, mirrored, inputs.image))
        branches = [functools.partial(self._compute_windows, canvas=canvas, size=size) for canvas in canvases]

        def no_images(_: Any, inputs: NetworkInput) -> Array:
            return jnp.zeros((len(inputs.image), size[0], self.num_classes, size[1]), self.dtype)

        # All images of a device lie on the same canvas.
        return lax.switch(inputs.canvas[0], [*branches, no_images], tensors, inputs)

    def _compute_windows(
        self, tensors: Any, inputs: NetworkInput, *, canvas: Size, size: Size
    ) -> Float[Array, "n h classes w"]:
        """The logits of images on one canvas; `size` is that of the result."""
        n, (height, width) = len(inputs.image), canvas
        model = models.merge_state_dict(self._graphdef, tensors)
        area = inputs.area.on_canvas(canvas)
        if self.evaluation.mode == "whole":
            logits = model(normalize(inputs.image[:, :height, :width], self.dtype), area=area)
            pad = [(0, padded - side) for padded, side in zip(size, logits.shape[1:3], strict=True)]
            return jnp.pad(logits, ((0, 0), *pad, (0, 0))).swapaxes(2, 3)

        images, tops, lefts = map(jnp.asarray, (inputs.image, inputs.tops, inputs.lefts))
        down, across = (jnp.max(inputs.counts[:, axis]) for axis in (0, 1))

        def add_window(number: Array, logits: Array) -> Array:
            row, column = number // across, number % across

            def cut(image: Array, top: Array, left: Array) -> Array:
                return lax.dynamic_slice(image, (top, left, jnp.zeros((), top.dtype)), (height, width, 3))

            windows = jax.vmap(cut)(images, tops[:, row], lefts[:, column])
            computed = model(normalize(windows, self.dtype), area=area)
            zero = jnp.zeros((), row.dtype)
            corner = (zero, row * num_cells(height), column * num_cells(width), zero)
            return lax.dynamic_update_slice(logits, computed, corner)

        zeros = jnp.zeros((n, *size, self.num_classes), self.dtype)
        return lax.fori_loop(0, down * across, add_window, zeros).swapaxes(2, 3)

    def _predict_and_count(
        self, supports: Supports, views: list[ViewLogits], tiles: LabelTiles, totals: Array
    ) -> tuple[Array, Array, Array]:
        """Predicts and counts a batch.

        Returns:
            predictions: uint8 `[n, tiles, rows, columns]`.
            pixels: int32 `[n, 3, classes]`: per class, the correct, labelled and predicted pixels of each image.
            totals: with this batch added to each device's confusion matrix.
        """
        classes = self.num_classes

        def count_image(totals: Array, image: Any) -> tuple[Array, tuple[Array, Array]]:
            views, tiles = image

            def count_tile(carry: Any, scores: Array, tile: Array) -> Any:
                predictions, counts = carry
                predicted = argmax_classes(scores)
                counts = counts + count_confusions(tiles.labels[tile], predicted, classes)
                return predictions.at[tile].set(predicted.astype(jnp.uint8)), counts

            init = (jnp.zeros_like(tiles.labels), jnp.zeros(classes**2, jnp.int32))
            predictions, counts = self._fold_image(supports, views, tiles, init, count_tile)
            matrix = counts.reshape(classes, classes)
            of_class = functools.partial(jnp.sum, matrix, dtype=jnp.int32)  # 64 bits wide in 64-bit mode
            pixels = jnp.stack([jnp.diagonal(matrix), of_class(axis=1), of_class(axis=0)])
            return _add_counts(totals, counts), (predictions, pixels)

        totals, (predictions, pixels) = lax.scan(count_image, totals, (views, tiles))
        return predictions, pixels, totals

    def _probabilities(
        self, supports: Supports, views: list[ViewLogits], tiles: LabelTiles
    ) -> Float[Array, "n tiles rows columns classes"]:
        """The softmax at each pixel of the images, averaged over the views."""

        def image_probabilities(image: Any) -> Array:
            views, tiles = image

            def write_tile(carry: Array, scores: Array, tile: Array) -> Array:
                return carry.at[tile].set(mean_probabilities(scores, len(views)).swapaxes(1, 2))

            init = jnp.zeros((*tiles.labels.shape, self.num_classes), views[0].logits.dtype)
            return self._fold_image(supports, views, tiles, init, write_tile)

        return lax.map(image_probabilities, (views, tiles))

    def _fold_image(
        self,
        supports: Supports,
        views: list[ViewLogits],
        tiles: LabelTiles,
        init: Any,
        body: Callable[..., Any],
    ) -> Any:
        """`fold_tiles` of one image, with a branch for each of the supports."""
        flips = len(view_flips(self.evaluation))

        def fold(views: list[ViewLogits], *, choice: ViewSizes) -> Any:
            narrow = [
                view._replace(
                    row_resize=view.row_resize.narrow(choice[number // flips][0]),
                    column_resize=view.column_resize.narrow(choice[number // flips][1]),
                )
                for number, view in enumerate(views)
            ]
            count, across = tiles.counts
            return fold_tiles(narrow, count, across, init, body, precision=self._precision)

        branches = [functools.partial(fold, choice=choice) for choice in supports]
        return lax.switch(tiles.support, branches, views)


def _mirror(image: UInt8[Array, "h w 3"], width: Int32[Array, ""]) -> UInt8[Array, "h w 3"]:
    """Mirrors an image of this width, which stays at the left of its buffer."""
    return jnp.roll(image[:, ::-1], width - image.shape[1], axis=1)


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
    graphdef = models.network_graphdef(model)
    return _cached_inference(graphdef, model.num_classes, model.policy, model.config.evaluation, mesh)


_cached_inference = functools.lru_cache(maxsize=8)(CompiledInference)


def make_global_batch(
    inputs: Mapping[int, InferenceInput], rows: int, batch_sharding: NamedSharding
) -> InferenceInput:
    """One batch on the mesh from this process's rows of it, all prepared for the same shapes.

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
