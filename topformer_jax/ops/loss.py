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
        matmul_rows: whether the rows of a tile are resized by a matrix product, or else by multiply-adds.
    """

    height: int
    width: int
    images: int
    matmul_rows: bool


# Small tiles: the scores of all their classes fit a core's cache.
CPU = Tiling(8, 64, 2**31, matmul_rows=True)
# Tiles of whole rows. A tile lies between two rows of logits, and a matrix product over two rows would leave a matrix
# unit almost idle; XLA fuses the multiply-adds into their consumer, so the scores are never written to memory. By the
# estimates of XLA's compiler for TPUs the loss takes a sixth of the time that it takes with `CPU`'s tiles, and the
# arrays of 8 images fit a fast memory of 128 MB.
ACCELERATOR = Tiling(8, 2**31, 8, matmul_rows=False)


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
        _cut_axis(cells, pixels, side, logits.dtype.name)
        for cells, pixels, side in zip((h, w), (height, width), (tiling.height, tiling.width), strict=True)
    )
    rows, columns = down.weights.shape[1], across.weights.shape[1]
    patch_rows, patch_columns = down.weights.shape[2], across.weights.shape[2]
    tiles_down, tiles_across = len(down.starts), len(across.starts)
    resize_patch, resize_patch_transpose = (
        functools.partial(function, matmul_rows=tiling.matmul_rows, precision=precision)
        for function in (_resize_patch, _resize_patch_transpose)
    )
    labels = jnp.pad(labels.astype(jnp.int32), ((0, 0), pad_rows, pad_columns), constant_values=IGNORE_LABEL)
    down, across = jax.tree.map(jnp.asarray, (down, across))
    logits = logits.swapaxes(2, 3)  # columns last: they fill vector lanes, the number of classes may not
    class_index = lax.broadcasted_iota(jnp.int32, (1, 1, classes, 1), 2)
    zero = jnp.int32(0)

    def add_tile(tile: Array, carry: Any) -> Any:
        loss, correct, gradient = carry
        tile = tile.astype(jnp.int32)  # with x64 enabled the loop counts in int64
        row, column = tile // tiles_across, tile % tiles_across
        vertical, horizontal = down.weights[row], across.weights[column]
        corner = (zero, down.starts[row], zero, across.starts[column])
        patch = lax.dynamic_slice(logits, corner, (n, patch_rows, classes, patch_columns))
        scores = resize_patch(patch, vertical, horizontal)  # [n, rows, classes, columns]
        label = lax.dynamic_slice(labels, (zero, row * rows, column * columns), (n, rows, columns))
        valid, is_label = label != IGNORE_LABEL, class_index == label[:, :, None]
        max_score = jnp.max(scores, 2, keepdims=True)
        exponentials = jnp.exp(scores - max_score)
        total = jnp.sum(exponentials, 2, keepdims=True)
        label_score = jnp.sum(jnp.where(is_label, scores, 0), 2)
        pixel_loss = jnp.log(total[:, :, 0]) + max_score[:, :, 0] - label_score
        loss += jnp.sum(jnp.where(valid, pixel_loss, 0), (1, 2))
        correct += jnp.sum((label_score >= max_score[:, :, 0]) & valid, (1, 2), dtype=jnp.int32)
        if with_gradient:
            # softmax - onehot, where the pixel is valid
            mask = valid[:, :, None].astype(scores.dtype)
            score_grad = exponentials * (mask / total) - jnp.where(is_label, mask, 0)
            patch_grad = resize_patch_transpose(score_grad, vertical, horizontal)
            old = lax.dynamic_slice(gradient, corner, patch.shape)
            gradient = lax.dynamic_update_slice(gradient, old + patch_grad, corner)
        return loss, correct, gradient

    no_gradient = jnp.zeros_like(logits) if with_gradient else jnp.zeros(n, logits.dtype)
    start = (jnp.zeros(n, logits.dtype), jnp.zeros(n, jnp.int32), no_gradient)
    loss, correct, gradient = lax.fori_loop(0, tiles_down * tiles_across, add_tile, start)
    return loss, correct, gradient.swapaxes(2, 3) if with_gradient else gradient


def _resize_patch(
    patch: Array, vertical: Array, horizontal: Array, *, matmul_rows: bool, precision: str | None
) -> Array:
    """Resizes a patch of logits to a tile of pixels: the columns first, then the rows.

    Args:
        patch: `[n, patch_rows, classes, patch_columns]`.
        vertical: the weights of the rows, `[rows, patch_rows]`.
        horizontal: the weights of the columns, `[columns, patch_columns]`.
        matmul_rows: see `Tiling`.
        precision: of matrix products.

    Returns:
        The tile's scores, `[n, rows, classes, columns]`.
    """
    n, patch_rows, classes, patch_columns = patch.shape
    resized = jnp.matmul(patch.reshape(-1, patch_columns), horizontal.T, precision=precision)
    resized = resized.reshape(n, patch_rows, classes, -1)
    if matmul_rows:
        weights = jnp.broadcast_to(vertical, (n, *vertical.shape))
        scores = jnp.matmul(weights, resized.reshape(n, patch_rows, -1), precision=precision)
        return scores.reshape(n, -1, classes, len(horizontal))
    terms = (vertical[:, row, None, None] * resized[:, row, None] for row in range(patch_rows))
    return functools.reduce(jnp.add, terms)


def _resize_patch_transpose(
    score_grad: Array, vertical: Array, horizontal: Array, *, matmul_rows: bool, precision: str | None
) -> Array:
    """The transpose of `_resize_patch`: from the gradient of a tile's scores to that of the patch."""
    n, rows, classes, columns = score_grad.shape
    patch_rows, patch_columns = vertical.shape[1], horizontal.shape[1]
    if matmul_rows:
        # Columns first: the rows' product needs classes and columns in one axis, and XLA's CPU backend would not
        # vectorise the computation of `score_grad` in that shape.
        x = jnp.matmul(score_grad.reshape(-1, columns), horizontal, precision=precision).reshape(n, rows, -1)
        weights = jnp.broadcast_to(vertical.T, (n, patch_rows, rows))
        x = jnp.matmul(weights, x, precision=precision)
        return x.reshape(n, patch_rows, classes, patch_columns)
    sums = [jnp.sum(vertical[:, row, None, None] * score_grad, 1) for row in range(patch_rows)]
    x = jnp.stack(sums, 1).reshape(-1, columns)
    return jnp.matmul(x, horizontal, precision=precision).reshape(n, patch_rows, classes, patch_columns)


def _cut_axis(cells: int, pixels: int, tile: int, dtype: str) -> tuple[Any, tuple[int, int]]:
    """Cuts one axis of the labels into tiles.

    The first of several tiles begins half a tile before the axis: at stride 8 each tile of 8 pixels then lies between
    the centres of two neighbouring logits, and is interpolated from these two only.

    Args:
        cells: logits along the axis.
        pixels: labels along the axis.
        tile: pixels of a tile at most.
        dtype: of the weights.

    Returns:
        The resize of each tile (see `ops.tiled`), and the padding (before, after) of the labels, pixels.
    """
    tile = min(tile, pixels)
    before = tile // 2 if tile < pixels else 0
    matrix = np.pad(bilinear_matrix(cells, pixels, dtype), ((before, 0), (0, 0)))
    return split_into_bands(matrix, tile), (before, -len(matrix) % tile)
