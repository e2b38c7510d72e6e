"""From a picture to labels: what training, evaluation and prediction share.

As officially, the logits are resized to the network's input (of sliding windows, their mean is) and from there to the
picture; where there are several views, their softmaxes are averaged.

A network is compiled for each size of its input; what follows it (`ops/tiled.py`) is compiled once for all pictures
of about the same extent, since their sizes are data there.
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
from jaxtyping import Array, Float
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax import models
from topformer_jax.config import base_config
from topformer_jax.data.augment import normalise
from topformer_jax.metrics import count_confusions
from topformer_jax.models.layers import DTypePolicy
from topformer_jax.ops import tiled
from topformer_jax.ops.tiled import ViewLogits
from topformer_jax.views import (
    InferenceInput,
    Labels,
    Picture,
    extents,
    flips,
    prepare,
    untile,
    windows,
)

LIMB = 20  # bits of the lower half of a count


class CompiledInference:
    """The compiled programs of a network on a mesh: every device computes its own pictures, alone.

    A device always has the same number of pictures at once, so that what it computes for one does not depend
    on how many devices there are.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        classes: int,
        policy: DTypePolicy,
        evaluation: FrozenConfigDict,
        mesh: Mesh,
    ):
        self.classes = classes
        self.dtype = np.dtype(policy.wide)
        self.evaluation = evaluation
        self.mesh = mesh
        self.over_devices = NamedSharding(mesh, P(mesh.axis_names))
        self._graphdef = graphdef
        self._precision = policy.precision
        batch, every = P(mesh.axis_names), P()
        share = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        self.logits = jax.jit(share(self._logits, in_specs=(every, batch, every), out_specs=batch))
        self.count = jax.jit(
            share(self._count, in_specs=(batch, batch, batch, batch), out_specs=batch), donate_argnums=3
        )
        self.probabilities = jax.jit(
            share(self._probabilities, in_specs=(batch, batch, batch), out_specs=batch)
        )

    def views(self, values: Any, batch: InferenceInput) -> list[ViewLogits]:
        """The logits of all views of a batch of prepared pictures (arrays over the mesh)."""
        seen = [(image, flip) for image in batch.images for flip in flips(self.evaluation)]
        return [
            ViewLogits(self.logits(values, image, np.bool_(flip)), rows, columns)
            for (image, flip), rows, columns in zip(seen, batch.rows, batch.columns, strict=True)
        ]

    def totals(self) -> Array:
        """Zero counts: for each device the lower and the upper halves of the confusion matrix, int32."""
        zeros = np.zeros((self.mesh.size, 2, self.classes**2), np.int32)
        return jax.make_array_from_callback(zeros.shape, self.over_devices, lambda index: zeros[index])

    def _logits(self, values: Any, images: Array, flip: Array) -> Float[Array, "n h classes w"]:
        """The logits of all windows side by side, padded to one of few sizes."""
        n, *network = images.shape[:3]
        images = jnp.where(flip, images[:, :, ::-1], images)
        images = normalise(images, self.dtype)
        model = models.merge_state_dict(self._graphdef, values)
        (tops, height), (lefts, width) = windows((network[0], network[1]), self.evaluation)
        if len(tops) * len(lefts) == 1:
            logits = model(images)
        else:
            corners = jnp.asarray([(top, left) for top in tops for left in lefts], jnp.int32)

            def window(corner: Array) -> Array:
                start = (jnp.int32(0), corner[0], corner[1], jnp.int32(0))
                return model(lax.dynamic_slice(images, start, (n, height, width, 3)))

            logits = lax.map(window, corners)
            _, _, h, w, classes = logits.shape
            logits = logits.reshape(len(tops), len(lefts), n, h, w, classes).transpose(2, 0, 3, 1, 4, 5)
            logits = logits.reshape(n, len(tops) * h, len(lefts) * w, classes)
        sides = zip(extents((network[0], network[1]), self.evaluation), logits.shape[1:3], strict=True)
        pad = [(0, extent - side) for extent, side in sides]
        return jnp.pad(logits, ((0, 0), *pad, (0, 0))).swapaxes(2, 3)

    def _count(
        self, views: list[ViewLogits], grids: Array, labels: Array, totals: Array
    ) -> tuple[Array, Array, Array]:
        """Labels of the pictures, their pixels a class (right, labelled, predicted), and the counts so far."""
        classes = self.classes

        def one(totals: Array, picture: Any) -> tuple[Array, tuple[Array, Array]]:
            views, grid, labels = picture

            def use(carry: Any, scores: Array, tile: Array) -> Any:
                predictions, counts = carry
                best = tiled.largest(scores)
                counts = counts + count_confusions(labels[tile], best, classes)
                return predictions.at[tile].set(best.astype(jnp.uint8)), counts

            start = (jnp.zeros_like(labels), jnp.zeros(classes**2, jnp.int32))
            predictions, counts = tiled.tiled(views, grid[0], grid[1], start, use, precision=self._precision)
            square = counts.reshape(classes, classes)
            low = totals[0, 0] + counts % 2**LIMB
            high = totals[0, 1] + counts // 2**LIMB + low // 2**LIMB
            pixels = jnp.stack([jnp.diagonal(square), square.sum(1), square.sum(0)])
            return jnp.stack([low % 2**LIMB, high])[None], (predictions, pixels)

        totals, (predictions, pixels) = lax.scan(one, totals, (views, grids, labels))
        return predictions, pixels, totals

    def _probabilities(
        self, views: list[ViewLogits], grids: Array, labels: Array
    ) -> Float[Array, "n tiles rows columns classes"]:
        """The softmax of each pixel of the pictures, the mean of all views'."""

        def one(picture: Any) -> Array:
            views, grid, labels = picture

            def use(carry: Array, scores: Array, tile: Array) -> Array:
                scores = jax.nn.softmax(scores, axis=1) if len(views) == 1 else scores / len(views)
                return carry.at[tile].set(scores.swapaxes(1, 2))

            start = jnp.zeros((*labels.shape, self.classes), views[0].logits.dtype)
            return tiled.tiled(views, grid[0], grid[1], start, use, precision=self._precision)

        return lax.map(one, (views, grids, labels))


def programs(model: models.Segmenter, evaluation: ConfigDict, mesh: Mesh) -> CompiledInference:
    """The programs of a model on a mesh; asked again for the same network and settings, they are compiled already."""
    model.eval()
    graphdef, _ = nnx.split(model)
    return _programs(graphdef, model.num_classes, model.policy, FrozenConfigDict(evaluation), mesh)


_programs = functools.lru_cache(maxsize=8)(CompiledInference)


class Predictor:
    """Labels pictures of any size, one at a time, on this process's first device.

    Args:
        model: it is switched to inference mode.
        evaluation: a config's settings of that name.
        tensors: by official name, where the model's own are not the ones to use.
    """

    def __init__(
        self,
        model: models.Segmenter,
        evaluation: ConfigDict,
        tensors: Mapping[str, np.ndarray | Array] | None = None,
    ):
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        self._programs = programs(model, evaluation, mesh)
        named = models.state_dict(model) if tensors is None else dict(tensors)
        self._values = jax.device_put(named, NamedSharding(mesh, P()))

    def __call__(self, image: Picture) -> Labels:
        """The label of each pixel of an RGB picture."""
        return self._labels(image, *self._look(image))

    def with_probabilities(self, image: Picture) -> tuple[Labels, Float[np.ndarray, "h w classes"]]:
        """The label of each pixel of an RGB picture, and its softmax: 4 bytes a class and pixel."""
        batch, views = self._look(image)
        tiles = self._programs.probabilities(views, batch.grid, batch.labels)
        values = untile(np.asarray(tiles)[0], (image.shape[0], image.shape[1]))
        return self._labels(image, batch, views), values

    def _labels(self, image: Picture, batch: InferenceInput, views: list[ViewLogits]) -> Labels:
        predictions, _, _ = self._programs.count(views, batch.grid, batch.labels, self._programs.totals())
        return untile(np.asarray(predictions)[0], (image.shape[0], image.shape[1]))

    def _look(self, image: Picture) -> tuple[InferenceInput, list[ViewLogits]]:
        prepared = prepare(image, None, self._programs.evaluation, dtype=self._programs.dtype.name)
        batch = stack({0: prepared}, self._programs, 1)
        return batch, self._programs.views(self._values, batch)


def segment(model: models.Segmenter, image: Picture, evaluation: ConfigDict | None = None) -> Labels:
    """The label of each pixel of one RGB picture of any size.

        model = topformer_jax.load("configs/topformer_b_ade.py", "TopFormer-B.pth")
        labels = segment(model, image)

    Args:
        model: as `topformer_jax.load` returns it; it is switched to inference mode.
        image: uint8 `[h, w, 3]`.
        evaluation: a config's settings of that name; those of the base config where None, aligned to 32 pixels.
    """
    if evaluation is None:
        evaluation = base_config().evaluation
        evaluation.size_divisor = 32
    return Predictor(model, evaluation)(image)


def stack(pictures: Mapping[int, InferenceInput], programs: CompiledInference, rows: int) -> InferenceInput:
    """One batch over the mesh from this process's rows of it, prepared for one room and the same network inputs."""

    def put(*leaves: np.ndarray) -> Array:
        local = dict(zip(pictures, leaves, strict=True))

        def part(index: Any) -> np.ndarray:
            return np.stack([local[row] for row in range(*index[0].indices(rows))])

        return jax.make_array_from_callback((rows, *leaves[0].shape), programs.over_devices, part)

    return jax.tree.map(put, *pictures.values())
