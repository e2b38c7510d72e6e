"""The compiled programs of an evaluation: images to logits, logits to labels, counts and probabilities.

The sizes of images are data in all of them: each is compiled once for the static shapes of a plan (`ProgramShapes`).
The network has a branch for each of few canvases; every device takes the branch of the canvas that its images lie on.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float
from ml_collections import FrozenConfigDict

from topformer_jax import models
from topformer_jax.data.augment import normalize
from topformer_jax.data.transforms import Size
from topformer_jax.inference.metrics import count_confusions
from topformer_jax.inference.plan import InferenceInput, ProgramShapes, ViewInput, view_flips
from topformer_jax.models.layers import DTypePolicy
from topformer_jax.ops.tiled import TILE, ViewLogits, fold_tiles, mean_probabilities, tile_labels, tile_logits
from topformer_jax.runtime import sharding


class CompiledInference:
    """The jitted programs of one network on one mesh; each device computes its own images independently.

    The number of images a device computes at once is fixed, so that an image is computed by the same operations on
    the same shapes however many devices there are.

    Attributes:
        predict_and_count: the program `(views, tiles, labels) -> (predictions, counts)`, see `_predict_and_count`.
        probabilities: the program `(views, tiles, labels) -> [n, rows, columns, classes]`.
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
        self.num_classes, self.evaluation, self.mesh = num_classes, evaluation, mesh
        self.dtype = np.dtype(policy.accum_dtype)
        self.batch_sharding = sharding.batch_sharding(mesh)
        self._graphdef, self._precision = graphdef, policy.precision
        batch, replicated = P(mesh.axis_names), P()

        def divide(function: Callable[..., Any], *in_specs: P, **options: Any) -> Callable[..., Any]:
            specs: Any = {"in_specs": in_specs, "out_specs": batch}
            return jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs), **options)

        # XLA's CPU backend prefers vectors of 256 bits. With 512 Tiny takes 100 ms instead of 111 ms on a CPU that
        # has them (8 x 512 x 512, 2 cores of AMD's Zen 4).
        platform = mesh.devices.flat[0].platform
        wide = {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else None
        # A GPU takes longer to start the kernels of one tile than to run them.
        self._together = platform == "gpu"

        @functools.cache
        def network_of(canvases: tuple[Size, ...], size: Size) -> Callable[..., Any]:
            function = functools.partial(self._logits, canvases, size)
            return divide(function, replicated, batch, compiler_options=wide)

        self._network_of = network_of
        self.predict_and_count = divide(self._predict_and_count, batch, batch, batch)
        self.probabilities = divide(self._probabilities, batch, batch, batch)

    def compute_views(
        self, tensors: Mapping[str, Array], shapes: ProgramShapes, batch: InferenceInput
    ) -> list[ViewLogits]:
        """The logits of every view of a batch that lies on the mesh (see `make_global_batch`)."""
        flips = len(view_flips(self.evaluation))
        return [
            view.with_logits(self.network(shapes, number // flips)(tensors, view))
            for number, view in enumerate(batch.views)
        ]

    def network(self, shapes: ProgramShapes, ratio: int) -> Callable[..., Any]:
        """The program `(tensors, view) -> logits` for images of these shapes at a ratio; always the same one."""
        return self._network_of(tuple(canvas[ratio] for canvas in shapes.canvases), shapes.logits_size(ratio))

    def _logits(
        self, canvases: tuple[Size, ...], size: Size, tensors: Any, view: ViewInput
    ) -> Float[Array, "n windows h classes w"]:
        """The logits of each window, padded to `size`."""
        branches = [functools.partial(self._compute_windows, canvas, size) for canvas in canvases]

        def no_images(_: Any, view: ViewInput) -> Array:
            n, windows = view.windows.shape[:2]
            return jnp.zeros((n, windows, size[0], self.num_classes, size[1]), self.dtype)

        # All images of a device lie on the same canvas.
        return lax.switch(view.canvas[0], [*branches, no_images], tensors, view)

    def _compute_windows(
        self, canvas: Size, size: Size, tensors: Any, view: ViewInput
    ) -> Float[Array, "n windows h classes w"]:
        """The logits of images on one canvas."""
        model = models.merge_state_dict(self._graphdef, tensors)
        area = view.area.on_canvas(canvas)
        windows: Any = view.windows

        def compute(images: Array) -> Float[Array, "n h classes w"]:
            logits = model(normalize(images[:, : canvas[0], : canvas[1]], self.dtype), area=area)
            pad = [(0, padded - side) for padded, side in zip(size, logits.shape[1:3], strict=True)]
            return jnp.pad(logits, ((0, 0), *pad, (0, 0))).swapaxes(2, 3)

        if windows.shape[1] == 1:
            return compute(windows[:, 0])[:, None]

        def add_window(number: Array, logits: Array) -> Array:
            images = lax.dynamic_index_in_dim(windows, number, 1, keepdims=False)
            return lax.dynamic_update_index_in_dim(logits, compute(images), number, 1)

        zeros = jnp.zeros((*windows.shape[:2], size[0], self.num_classes, size[1]), self.dtype)
        return lax.fori_loop(0, jnp.max(view.counts[:, 0] * view.counts[:, 1]), add_window, zeros)

    def _predict_and_count(self, *batch: Any) -> tuple[Array, Array]:
        """The labels of a batch, uint8 `[n, rows, columns]`, and the confusion matrices, int32 `[n, classes**2]`."""

        def count_image(views: list[ViewLogits], tiles: Array, labels: Array) -> tuple[Array, Array]:

            def count_tile(carry: Any, predicted: Array, corner: Any) -> Any:
                predictions, counts = carry
                of_tile = lax.dynamic_slice(labels, corner, predicted.shape)
                counts = counts + count_confusions(of_tile, predicted, self.num_classes)
                return lax.dynamic_update_slice(predictions, predicted.astype(jnp.uint8), corner), counts

            init = (jnp.zeros_like(labels), jnp.zeros(self.num_classes**2, jnp.int32))
            compute = tile_labels(views, self._precision)
            return fold_tiles(compute, tiles, init, count_tile, in_row=self._tiles_in_row(labels))

        return self._map_images(count_image, *batch)

    def _probabilities(self, *batch: Any) -> Float[Array, "n rows columns classes"]:
        """The softmax at each pixel of the images, averaged over the views."""

        def image_probabilities(views: list[ViewLogits], tiles: Array, labels: Array) -> Array:

            def write_tile(carry: Array, logits: list[Array], corner: Any) -> Array:
                found = mean_probabilities(logits).swapaxes(1, 2)
                return lax.dynamic_update_slice(carry, found, (*corner, jnp.zeros_like(corner[0])))

            init = jnp.zeros((*labels.shape, self.num_classes), self.dtype)
            compute = tile_logits(views, self._precision)
            return fold_tiles(compute, tiles, init, write_tile, in_row=self._tiles_in_row(labels))

        return self._map_images(image_probabilities, *batch)

    def _tiles_in_row(self, labels: Array) -> int:
        """`in_row` of `fold_tiles`."""
        return labels.shape[1] // TILE[1] if self._together else 0

    def _map_images(self, compute: Callable[..., Any], views: list[ViewLogits], tiles: Array, labels: Array) -> Any:
        """Computes each image of a batch; on a GPU all together, as many rows of tiles as the tallest one has."""
        if not self._together:
            return lax.map(lambda image: compute(*image), (views, tiles, labels))
        return jax.vmap(compute, (0, None, 0))(views, jnp.max(tiles, 0), labels)


def compile_inference(model: models.Segmenter, mesh: Mesh) -> CompiledInference:
    """The programs of a model on a mesh; each is compiled at its first call with new shapes.

    The model is switched to inference mode. For an equal network, evaluation and mesh it returns the same object
    again, so that nothing is compiled twice.
    """
    model.eval()
    graphdef = models.network_graphdef(model)
    return _cached_inference(graphdef, model.num_classes, model.policy, model.config.evaluation, mesh)


_cached_inference = functools.lru_cache(maxsize=8)(CompiledInference)


def make_global_batch(inputs: Sequence[InferenceInput], batch_sharding: NamedSharding) -> InferenceInput:
    """One batch on the mesh from this process's rows of it in order, all prepared for the same shapes."""

    def put(*rows: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(batch_sharding, np.stack(rows))

    return jax.tree.map(put, *inputs)
