"""Sums over the pixels of resized logits and their gradient, one tile of pixels at a time.

What is summed is a function of a `Tile`; `ops/loss.py` has the functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.resample import bilinear_matrix
from topformer_jax.ops.tiled import split_into_bands


class Tiling(NamedTuple):
    """How a batch of labels is cut into tiles.

    Attributes:
        height, width: of a tile at most, pixels.
        images: that a device computes together at most.
        lookups: whether the label's score is looked up, and the softmax's shift bounded, or else both are reductions
            over the classes.
    """

    height: int
    width: int
    images: int
    lookups: bool


# Small tiles: one array of the scores of all their classes fits the cores' caches. XLA writes and reads such an array
# for each reduction, so the fewer of them the better: 4 x 64 x 64 x 150 logits take 130 ms, and 240 ms with
# reductions for the label's score and the maximum and with matrix products for the rows (2 cores).
CPU = Tiling(8, 128, 2**31, lookups=True)
# Tiles of whole rows. XLA fuses all reductions over the classes with the scores' computation, so the scores are never
# written to memory. By the estimates of XLA's compiler for TPUs the loss takes a sixth of the time that it takes with
# smaller tiles, and the arrays of 8 images fit a fast memory of 128 MB.
ACCELERATOR = Tiling(8, 2**31, 8, lookups=False)
# With all logits this close to each other, `exp` of the distance to a bound of the maximum is above 0.
SAFE_RANGE = 80


class Softmax(NamedTuple):
    """The softmax of the scores in a tile, `exponentials / total`, and what it is made from.

    Attributes:
        scores: `[n, rows, classes, columns]`.
        exponentials: of the scores less `shift`.
        total: their sum over the classes, `[n, rows, columns]`.
        shift: at least the largest score, `[n, rows, columns]`; the largest one where `Tiling.lookups` is off.
    """

    scores: Array
    exponentials: Array
    total: Array
    shift: Array

    @property
    def log_total(self) -> Array:
        """The logarithm of the sum of the scores' exponentials, `[n, rows, columns]`."""
        return jnp.log(self.total) + self.shift


class Tile(NamedTuple):
    """The pixels of a tile: the scores of each of the resized maps, and their labels.

    Attributes:
        label: int32 `[n, rows, columns]`.
        valid: where the label is not `IGNORE_LABEL`.
        is_label: `[n, rows, classes, columns]`, whether a class is the label.
        lookups: see `Tiling`.
        compute_softmax: of a map by its number and of its scores divided by a temperature.
    """

    label: Array
    valid: Array
    is_label: Array
    lookups: bool
    compute_softmax: Callable[..., Softmax]

    def look_up(self, values: Array) -> Array:
        """Each pixel's value of its label's class, of values `[n, rows, classes, columns]`."""
        if not self.lookups:
            return jnp.sum(jnp.where(self.is_label, values, 0), 2)
        index = jnp.where(self.valid, self.label, 0)[:, :, None]
        return jnp.take_along_axis(values, index, 2)[:, :, 0]

    def weigh_label(self, weights: Array) -> Array:
        """Each pixel's weight, of weights by class."""
        if not self.lookups:
            return self.look_up(weights[:, None])
        return weights[jnp.where(self.valid, self.label, 0)]


# From a tile and the slice of each per-image array to what is summed, arrays `[n, ...]`, and the gradient of the
# first map's scores, of which a caller takes all rows (`slice(None)`) or one after the other (an int).
Visit = Callable[[Tile, Any], tuple[Any, Callable[[Any], Array]]]


def sum_tiles(
    visit: Visit,
    zeros: Any,
    arrays: tuple[tuple[Array, ...], Array, Any],
    *,
    precision: str | None,
    devices: int,
    with_gradient: bool,
) -> tuple[Any, Array | None]:
    """Sums what a function says of each tile.

    Args:
        visit: the function.
        zeros: what the sums of one image start from: arrays without the axis of images.
        arrays: maps of logits, all `[n, h, w, classes]`; labels `[n, height, width]`; and what `visit` gets
            besides, arrays `[n, ...]`.
        precision: of matrix products.
        devices: that the batch is sharded over. The sums do not depend on it; with the right number no images move
            between devices.
        with_gradient: whether the gradient of the first map is computed too.

    Returns:
        The sums of each image, `[n, ...]`, and the gradient, `[n, h, w, classes]` or None.
    """
    run = functools.partial(
        _sum_groups, visit, zeros, precision=precision, devices=devices, with_gradient=with_gradient
    )
    return lax.platform_dependent(
        arrays,
        cpu=functools.partial(run, tiling=CPU),
        default=functools.partial(run, tiling=ACCELERATOR),
    )


def _sum_groups(
    visit: Visit, zeros: Any, arrays: Any, *, devices: int, tiling: Tiling, **options: Any
) -> Any:
    """Runs `_sum_group` on groups of at most `tiling.images` images a device, one group after the other."""

    def run(group: Any) -> Any:
        return _sum_group(visit, zeros, *group, tiling=tiling, **options)

    # A group has equally many images from each device. Where devices hold unequal numbers, all images are one group.
    n = len(arrays[1])
    per_device = n // devices if n % devices == 0 else 1
    divisors = (count for count in range(1, per_device + 1) if per_device % count == 0)
    groups = next(count for count in divisors if per_device // count <= tiling.images)
    if groups == 1:
        return run(arrays)
    # Groups interleave, so that no image moves to another device.
    split = jax.tree.map(lambda x: x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1), arrays)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), lax.map(run, split))


def _sum_group(
    visit: Visit,
    zeros: Any,
    maps: tuple[Array, ...],
    labels: Array,
    extra: Any,
    *,
    precision: str | None,
    with_gradient: bool,
    tiling: Tiling,
) -> tuple[Any, Array | None]:
    """`sum_tiles` of one group. The loop keeps separate sums for each image: summing over a sharded batch would need
    communication at every tile.
    """
    n, height, width = labels.shape
    _, h, w, classes = maps[0].shape
    (down, pad_rows), (across, pad_columns) = (
        _cut_axis(cells, pixels, side, between, maps[0].dtype.name)
        for cells, pixels, side, between in (
            (h, height, tiling.height, True),
            (w, width, tiling.width, False),
        )
    )
    rows, columns = down.weights.shape[1], across.weights.shape[1]
    patch_rows, patch_columns = down.weights.shape[2], across.weights.shape[2]
    tiles_down, tiles_across = len(down.starts), len(across.starts)
    labels = jnp.pad(labels.astype(jnp.int32), ((0, 0), pad_rows, pad_columns), constant_values=IGNORE_LABEL)
    down, across = jax.tree.map(jnp.asarray, (down, across))
    maps = tuple(
        each.swapaxes(2, 3) for each in maps
    )  # columns last: they fill vector lanes, classes may not
    is_safe = [jnp.max(each) - jnp.min(each) < SAFE_RANGE for each in maps]
    class_index = lax.broadcasted_iota(jnp.int32, (1, 1, classes, 1), 2)
    zero = jnp.int32(0)

    def add_tile(number: Array, carry: Any) -> Any:
        sums, gradient = carry
        number = number.astype(jnp.int32)  # with x64 enabled the loop counts in int64
        row, column = number // tiles_across, number % tiles_across
        vertical, horizontal = down.weights[row], across.weights[column]
        corner = (zero, down.starts[row], zero, across.starts[column])
        patch_shape = n, patch_rows, classes, patch_columns
        label = lax.dynamic_slice(labels, (zero, row * rows, column * columns), (n, rows, columns))

        def compute_softmax(index: int, temperature: float = 1.0) -> Softmax:
            patch = lax.dynamic_slice(maps[index], corner, patch_shape)
            stretched = jnp.matmul(patch.reshape(-1, patch_columns), horizontal.T, precision=precision)
            stretched = stretched.reshape(n, patch_rows, classes, columns)
            if temperature != 1:
                stretched = stretched / temperature
            scores = _weigh_rows(vertical, stretched)
            is_near = is_safe[index] if temperature >= 1 else jnp.bool_(False)
            shift = _bound_scores(vertical, stretched, is_near) if tiling.lookups else jnp.max(scores, 2)
            exponentials = jnp.exp(scores - shift[:, :, None])
            return Softmax(scores, exponentials, jnp.sum(exponentials, 2), shift)

        is_label = class_index == label[:, :, None]
        tile = Tile(label, label != IGNORE_LABEL, is_label, tiling.lookups, compute_softmax)
        terms, score_grad = visit(tile, extra)
        sums = jax.tree.map(jnp.add, sums, terms)
        if with_gradient:  # the transpose of the resize
            weights = vertical[:, :, None, None]
            if tiling.lookups:
                # Row by row: XLA's CPU backend would write an array that a reduction reads to memory.
                each_row = (score_grad(i)[:, None] for i in range(rows))
                x = functools.reduce(
                    jnp.add, (weight * grad for weight, grad in zip(weights, each_row, strict=True))
                )
            else:
                whole = score_grad(slice(None))
                x = jnp.stack([jnp.sum(weights[:, i] * whole, 1) for i in range(patch_rows)], 1)
            patch_grad = jnp.matmul(x.reshape(-1, columns), horizontal, precision=precision)
            old = lax.dynamic_slice(gradient, corner, patch_shape)
            gradient = lax.dynamic_update_slice(gradient, old + patch_grad.reshape(patch_shape), corner)
        return sums, gradient

    start = (
        jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), zeros),
        jnp.zeros_like(maps[0]) if with_gradient else None,
    )
    sums, gradient = lax.fori_loop(0, tiles_down * tiles_across, add_tile, start)
    return sums, gradient.swapaxes(2, 3) if with_gradient else None


def _weigh_rows(vertical: Array, patch: Array) -> Array:
    """Resizes the second axis of a patch to the rows of a tile: multiply-adds, which XLA fuses with what follows.

    Args:
        vertical: the weights of the rows, `[rows, patch_rows]`.
        patch: `[n, patch_rows, ...]`.

    Returns:
        `[n, rows, ...]`.
    """
    weights = vertical.reshape(*vertical.shape, *(1,) * (patch.ndim - 2))
    terms = (weights[:, row] * patch[:, row, None] for row in range(patch.shape[1]))
    return functools.reduce(jnp.add, terms)


def _bound_scores(vertical: Array, stretched: Array, is_safe: Array) -> Array:
    """What to subtract from the scores of a tile's pixels before `exp`, `[n, rows, columns]`.

    The resized maximum is at least the maximum of the resized scores, which takes a pass over a tile several times as
    large. Where it is not safe, because the exponentials of all classes might vanish, it is the maximum itself.
    """
    return lax.cond(
        is_safe,
        lambda: _weigh_rows(vertical, jnp.max(stretched, 2)),
        lambda: jnp.max(_weigh_rows(vertical, stretched), 2),
    )


def _cut_axis(cells: int, pixels: int, tile: int, between: bool, dtype: str) -> tuple[Any, tuple[int, int]]:
    """Cuts one axis of the labels into tiles.

    Args:
        cells: logits along the axis.
        pixels: labels along the axis.
        tile: pixels of a tile at most.
        between: whether the first of several tiles begins half a tile before the axis. At stride 8 each tile of 8
            pixels then lies between the centres of two neighbouring logits, and is interpolated from these two only.
        dtype: of the weights.

    Returns:
        The resize of each tile (see `ops.tiled`), and the padding (before, after) of the labels, pixels.
    """
    tile = min(tile, pixels)
    before = tile // 2 if between and tile < pixels else 0
    matrix = np.pad(bilinear_matrix(cells, pixels, dtype), ((before, 0), (0, 0)))
    return split_into_bands(matrix, tile), (before, -len(matrix) % tile)
