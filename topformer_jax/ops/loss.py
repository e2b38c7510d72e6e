"""Cross-entropy of logits resized to the labels' size, without ever storing the resized logits.

For 150 classes and 512 x 512 pixels the resized logits are 157 MB an image, and their gradient as much again: in the
official code, writing and reading them is most of a training step. Here the labels are cut into tiles. For each tile
the logits are resized, and its part of the loss and of the gradient is computed at once; only these are stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.resample import bilinear_matrix, resize
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


class LossSums(NamedTuple):
    """Sums over the pixels of a batch, to be divided by the caller after adding up devices and micro-batches.

    Attributes:
        loss: the sum of the cross-entropies of the pixels whose label is not `IGNORE_LABEL`.
        correct: the number of these pixels where no class has a larger logit than the label's.
        valid: the number of these pixels.
    """

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    valid: Int[Array, ""]


def upsampled_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: Int[Array, "n height width"],
    *,
    precision: str | None = "highest",
    devices: int = 1,
) -> LossSums:
    """Resizes the logits bilinearly to the labels' size and sums the softmax cross-entropy over the pixels.

    Values and gradients are those of `plain_cross_entropy` up to rounding. The forward pass computes the gradient
    together with the loss, and the backward pass only scales it. Only `loss` has a gradient.

    Args:
        logits: float32 or float64.
        labels: classes, or `IGNORE_LABEL` for pixels that do not count.
        precision: of matrix products.
        devices: that the batch is sharded over. The sums do not depend on it; with the right number no images move
            between devices.

    >>> logits = jnp.zeros((1, 2, 2, 4)).at[..., 3].set(100.0)
    >>> labels = jnp.full((1, 16, 16), 3).at[0, :2].set(IGNORE_LABEL)
    >>> sums = upsampled_cross_entropy(logits, labels)
    >>> float(sums.loss), int(sums.correct), int(sums.valid)
    (0.0, 224, 224)
    """
    with jax.named_scope("loss"):
        loss, correct = _image_sums(logits, labels, precision, devices)
        return LossSums(jnp.sum(loss), jnp.sum(correct), jnp.sum(labels != IGNORE_LABEL))


def plain_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: Int[Array, "n height width"],
    *,
    precision: str | None = "highest",
    devices: int = 1,
) -> LossSums:
    """The textbook formulation of `upsampled_cross_entropy`, for tests and benchmarks. `devices` is not used."""
    logits = resize(logits, (labels.shape[1], labels.shape[2]), precision=precision)
    valid = labels != IGNORE_LABEL
    label_logit = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], -1)[..., 0]
    loss = jax.nn.logsumexp(logits, -1) - label_logit
    correct = (label_logit >= logits.max(-1)) & valid
    return LossSums(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(correct), jnp.sum(valid))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _image_sums(logits: Array, labels: Array, precision: str | None, devices: int) -> tuple[Array, Array]:
    """The loss and the number of correct pixels of each image, `[n]` each."""
    return _dispatch(logits, labels, precision, devices, with_gradient=False)[:2]


def _forward(
    logits: Array, labels: Array, precision: str | None, devices: int
) -> tuple[tuple[Array, Array], Array]:
    loss, correct, gradient = _dispatch(logits, labels, precision, devices, with_gradient=True)
    return (loss, correct), gradient


def _backward(
    precision: str | None, devices: int, gradient: Array, cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    return gradient * cotangents[0][:, None, None, None], None


_image_sums.defvjp(_forward, _backward)


def _dispatch(logits: Array, labels: Array, precision: str | None, devices: int, with_gradient: bool) -> Any:
    """Runs `_sum_groups` with the tiling of the platform that the program is compiled for."""
    run = functools.partial(_sum_groups, precision=precision, devices=devices, with_gradient=with_gradient)
    return lax.platform_dependent(
        logits,
        labels,
        cpu=functools.partial(run, tiling=CPU),
        default=functools.partial(run, tiling=ACCELERATOR),
    )


def _sum_groups(
    logits: Array,
    labels: Array,
    *,
    precision: str | None,
    devices: int,
    with_gradient: bool,
    tiling: Tiling,
) -> Any:
    """Runs `_sum_tiles` on groups of at most `tiling.images` images a device, one group after the other."""

    def run(pair: Any) -> Any:
        return _sum_tiles(*pair, precision=precision, with_gradient=with_gradient, tiling=tiling)

    # A group has equally many images from each device. Where devices hold unequal numbers, all images are one group.
    per_device = len(labels) // devices if len(labels) % devices == 0 else 1
    divisors = (count for count in range(1, per_device + 1) if per_device % count == 0)
    groups = next(count for count in divisors if per_device // count <= tiling.images)
    if groups == 1:
        return run((logits, labels))
    # Groups interleave, so that no image moves to another device.
    split = [x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1) for x in (logits, labels)]
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), lax.map(run, split))


def _sum_tiles(
    logits: Array, labels: Array, *, precision: str | None, with_gradient: bool, tiling: Tiling
) -> tuple[Array, Array, Array]:
    """The loss and the number of correct pixels of each image, and the gradient of the loss.

    Without `with_gradient` the gradient is a placeholder, one zero an image. The loop keeps separate sums for each
    image: summing over a sharded batch would need communication at every tile.
    """
    n, height, width = labels.shape
    _, h, w, classes = logits.shape
    (down, pad_rows), (across, pad_columns) = (
        _cut_axis(cells, pixels, side, between, logits.dtype.name)
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
    logits = logits.swapaxes(2, 3)  # columns last: they fill vector lanes, the number of classes may not
    is_safe = jnp.max(logits) - jnp.min(logits) < SAFE_RANGE
    class_index = lax.broadcasted_iota(jnp.int32, (1, 1, classes, 1), 2)
    zero = jnp.int32(0)

    def add_tile(tile: Array, carry: Any) -> Any:
        loss, correct, gradient = carry
        tile = tile.astype(jnp.int32)  # with x64 enabled the loop counts in int64
        row, column = tile // tiles_across, tile % tiles_across
        vertical, horizontal = down.weights[row], across.weights[column]
        weights = vertical[:, :, None, None]
        corner = (zero, down.starts[row], zero, across.starts[column])
        patch = lax.dynamic_slice(logits, corner, (n, patch_rows, classes, patch_columns))
        stretched = jnp.matmul(patch.reshape(-1, patch_columns), horizontal.T, precision=precision)
        stretched = stretched.reshape(n, patch_rows, classes, columns)
        scores = _weigh_rows(vertical, stretched)  # [n, rows, classes, columns]
        label = lax.dynamic_slice(labels, (zero, row * rows, column * columns), (n, rows, columns))
        valid, is_label = label != IGNORE_LABEL, class_index == label[:, :, None]
        shift = _bound_scores(vertical, stretched, is_safe) if tiling.lookups else jnp.max(scores, 2)
        exponentials = jnp.exp(scores - shift[:, :, None])
        total = jnp.sum(exponentials, 2)
        if tiling.lookups:
            index = jnp.where(valid, label, 0)[:, :, None]
            label_score = jnp.take_along_axis(scores, index, 2)[:, :, 0]
            label_exponential = jnp.take_along_axis(exponentials, index, 2)[:, :, 0]
            is_largest = label_exponential >= jnp.max(exponentials, 2)
        else:
            label_score = jnp.sum(jnp.where(is_label, scores, 0), 2)
            is_largest = label_score >= shift
        loss += jnp.sum(jnp.where(valid, jnp.log(total) + shift - label_score, 0), (1, 2))
        correct += jnp.sum(is_largest & valid, (1, 2), dtype=jnp.int32)
        if with_gradient:
            # softmax - onehot, where the pixel is valid; then the transpose of the resize
            mask = valid[:, :, None].astype(scores.dtype)
            factor = mask / total[:, :, None]
            if tiling.lookups:
                # Row by row: XLA's CPU backend would write an array that a reduction reads to memory.
                score_grads = (
                    exponentials[:, i] * factor[:, i] - jnp.where(is_label[:, i], mask[:, i], 0)
                    for i in range(rows)
                )
                terms = (weight * grad[:, None] for weight, grad in zip(weights, score_grads, strict=True))
                x = functools.reduce(jnp.add, terms)
            else:
                score_grad = exponentials * factor - jnp.where(is_label, mask, 0)
                x = jnp.stack([jnp.sum(weights[:, i] * score_grad, 1) for i in range(patch_rows)], 1)
            x = x.reshape(-1, columns)
            patch_grad = jnp.matmul(x, horizontal, precision=precision).reshape(patch.shape)
            old = lax.dynamic_slice(gradient, corner, patch.shape)
            gradient = lax.dynamic_update_slice(gradient, old + patch_grad, corner)
        return loss, correct, gradient

    no_gradient = jnp.zeros_like(logits) if with_gradient else jnp.zeros(n, logits.dtype)
    start = (jnp.zeros(n, logits.dtype), jnp.zeros(n, jnp.int32), no_gradient)
    loss, correct, gradient = lax.fori_loop(0, tiles_down * tiles_across, add_tile, start)
    return loss, correct, gradient.swapaxes(2, 3) if with_gradient else gradient


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
