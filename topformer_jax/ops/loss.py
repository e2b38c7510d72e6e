"""Cross-entropy of logits that are resized to the labels' size first, without the resized logits.

150 classes at 512 x 512 pixels are 157 MB an image, and their gradient as much again: in the official code, making
and reading them is most of a training step. Here a tile of pixels is resized, turned into its part of the loss
and of the gradient at once, and forgotten.
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
from topformer_jax.ops.tiled import bands


class Tiling(NamedTuple):
    """How the work is cut: into tiles of at most `height` x `width` pixels, of at most `images` images a device.

    With `products` a tile's rows are resized by a product of matrices, else by multiply-adds.
    """

    height: int
    width: int
    images: int
    products: bool


# A core's cache holds a tile's scores of all classes, of few pixels.
CPU = Tiling(8, 64, 2**31, products=True)
# Elsewhere whole rows. A product over the two rows of cells that a tile lies between would leave a matrix unit all
# but idle; multiply-adds melt into what uses the scores, which are then never written. By the estimates of XLA's
# compiler for TPUs the loss takes a sixth of the time, and a fast memory of 128 MB holds what 8 images need.
ACCELERATOR = Tiling(8, 2**31, 8, products=False)


class LossSums(NamedTuple):
    """Sums over a batch; the caller divides, so that devices and micro-batches add up.

    `loss` is the sum of the cross-entropies of the valid pixels, `correct` how many of them have no larger logit than
    their label's, `valid` how many there are.
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
    """Resizes the logits bilinearly to the labels' size and sums softmax cross-entropy; label 255 is void.

    The same as `plain_cross_entropy` to rounding, in values and gradients. The gradient is computed together with
    the loss, so that the backward pass only scales it. `devices` is how many share the batch; any number gives the
    same sums, the right one keeps every image where it is.
    """
    with jax.named_scope("loss"):
        loss, correct = _sums(logits, labels, precision, devices)
        return LossSums(jnp.sum(loss), jnp.sum(correct), jnp.sum(labels != IGNORE_LABEL))


def plain_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: Int[Array, "n height width"],
    *,
    precision: str | None = "highest",
    devices: int = 1,
) -> LossSums:
    """`upsampled_cross_entropy` as it is written down: what it is tested against and measured beside.

    `devices` changes nothing.
    """
    logits = resize(logits, (labels.shape[1], labels.shape[2]), precision=precision)
    valid = labels != IGNORE_LABEL
    chosen = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], -1)[..., 0]
    loss = jax.nn.logsumexp(logits, -1) - chosen
    correct = (chosen >= logits.max(-1)) & valid
    return LossSums(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(correct), jnp.sum(valid))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sums(logits: Array, labels: Array, precision: str | None, devices: int) -> tuple[Array, Array]:
    """An image's loss and its correct pixels, `[n]` each."""
    return _by_platform(logits, labels, precision, devices, with_gradient=False)[:2]


def _forward(
    logits: Array, labels: Array, precision: str | None, devices: int
) -> tuple[tuple[Array, Array], Array]:
    loss, correct, gradient = _by_platform(logits, labels, precision, devices, with_gradient=True)
    return (loss, correct), gradient


def _backward(
    precision: str | None, devices: int, gradient: Array, cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    return gradient * cotangents[0][:, None, None, None], None


_sums.defvjp(_forward, _backward)


def _by_platform(
    logits: Array, labels: Array, precision: str | None, devices: int, with_gradient: bool
) -> Any:
    run = functools.partial(_grouped, precision=precision, devices=devices, with_gradient=with_gradient)
    return lax.platform_dependent(
        logits,
        labels,
        cpu=functools.partial(run, tiling=CPU),
        default=functools.partial(run, tiling=ACCELERATOR),
    )


def _grouped(
    logits: Array,
    labels: Array,
    *,
    precision: str | None,
    devices: int,
    with_gradient: bool,
    tiling: Tiling,
) -> Any:
    """`_tiled` of one group of images after the other."""

    def run(pair: Any) -> Any:
        return _tiled(*pair, precision=precision, with_gradient=with_gradient, tiling=tiling)

    # All groups have the same number of images of every device; one group is all, where devices' numbers differ.
    share = len(labels) // devices if len(labels) % devices == 0 else 1
    divisors = (count for count in range(1, share + 1) if share % count == 0)
    groups = next(count for count in divisors if share // count <= tiling.images)
    if groups == 1:
        return run((logits, labels))
    # Interleaved, so that the images of a group lie where they did.
    split = [x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1) for x in (logits, labels)]
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), lax.map(run, split))


def _tiled(
    logits: Array, labels: Array, *, precision: str | None, with_gradient: bool, tiling: Tiling
) -> tuple[Array, Array, Array]:
    """Loss and correct pixels of every image, and the gradient of the loss (a zero an image unless asked for).

    Sums stay an image's own in the loop: over a batch that lies on several devices, a sum would make them talk
    at every tile.
    """
    n, height, width = labels.shape
    _, h, w, classes = logits.shape
    (down, above), (across, beside) = (
        _axis(cells, pixels, side, logits.dtype.name)
        for cells, pixels, side in zip((h, w), (height, width), tiling[:2], strict=True)
    )
    rows, columns = down.weights.shape[1], across.weights.shape[1]
    taps, cells = down.weights.shape[2], across.weights.shape[2]
    counts = (len(down.starts), len(across.starts))
    resized, transposed = (
        functools.partial(function, products=tiling.products, precision=precision)
        for function in (_resized, _transposed)
    )
    labels = jnp.pad(labels.astype(jnp.int32), ((0, 0), above, beside), constant_values=IGNORE_LABEL)
    down, across = jax.tree.map(jnp.asarray, (down, across))
    logits = logits.swapaxes(2, 3)  # columns last: they fill a vector's lanes, classes need not
    number = lax.broadcasted_iota(jnp.int32, (1, 1, classes, 1), 2)
    zero = jnp.int32(0)

    def one(index: Array, carry: Any) -> Any:
        loss, correct, gradient = carry
        index = index.astype(jnp.int32)  # a loop counts in 64 bits where it can
        row, column = index // counts[1], index % counts[1]
        vertical, horizontal = down.weights[row], across.weights[column]
        corner = (zero, down.starts[row], zero, across.starts[column])
        patch = lax.dynamic_slice(logits, corner, (n, taps, classes, cells))
        scores = resized(patch, vertical, horizontal)
        label = lax.dynamic_slice(labels, (zero, row * rows, column * columns), (n, rows, columns))
        valid, hot = label != IGNORE_LABEL, number == label[:, :, None]
        largest = jnp.max(scores, 2, keepdims=True)
        powers = jnp.exp(scores - largest)
        total = jnp.sum(powers, 2, keepdims=True)
        chosen = jnp.sum(jnp.where(hot, scores, 0), 2)
        pixels = jnp.log(total[:, :, 0]) + largest[:, :, 0] - chosen
        loss += jnp.sum(jnp.where(valid, pixels, 0), (1, 2))
        correct += jnp.sum((chosen >= largest[:, :, 0]) & valid, (1, 2), dtype=jnp.int32)
        if with_gradient:
            counted = valid[:, :, None].astype(scores.dtype)
            change = powers * (counted / total) - jnp.where(hot, counted, 0)
            change = transposed(change, vertical, horizontal)
            old = lax.dynamic_slice(gradient, corner, patch.shape)
            gradient = lax.dynamic_update_slice(gradient, old + change, corner)
        return loss, correct, gradient

    empty = jnp.zeros_like(logits) if with_gradient else jnp.zeros(n, logits.dtype)
    start = (jnp.zeros(n, logits.dtype), jnp.zeros(n, jnp.int32), empty)
    loss, correct, gradient = lax.fori_loop(0, counts[0] * counts[1], one, start)
    return loss, correct, gradient.swapaxes(2, 3) if with_gradient else gradient


def _resized(
    patch: Array, vertical: Array, horizontal: Array, *, products: bool, precision: str | None
) -> Array:
    """A patch `[n, taps, classes, cells]` at a tile's pixels, `[n, rows, classes, columns]`.

    The weights are `[rows, taps]` and `[columns, cells]`.
    """
    n, taps, classes, cells = patch.shape
    wide = jnp.matmul(patch.reshape(-1, cells), horizontal.T, precision=precision)
    wide = wide.reshape(n, taps, classes, -1)
    if products:
        weights = jnp.broadcast_to(vertical, (n, *vertical.shape))
        scores = jnp.matmul(weights, wide.reshape(n, taps, -1), precision=precision)
        return scores.reshape(n, -1, classes, len(horizontal))
    parts = (vertical[:, tap, None, None] * wide[:, tap, None] for tap in range(taps))
    return functools.reduce(jnp.add, parts)


def _transposed(
    change: Array, vertical: Array, horizontal: Array, *, products: bool, precision: str | None
) -> Array:
    """The transpose of `_resized`: from a tile's pixels to the patch."""
    n, rows, classes, columns = change.shape
    taps, cells = vertical.shape[1], horizontal.shape[1]
    if products:
        # Columns first: joined to the classes, they would keep XLA from vectorising what made the change.
        change = jnp.matmul(change.reshape(-1, columns), horizontal, precision=precision).reshape(n, rows, -1)
        weights = jnp.broadcast_to(vertical.T, (n, taps, rows))
        return jnp.matmul(weights, change, precision=precision).reshape(n, taps, classes, cells)
    parts = [jnp.sum(vertical[:, tap, None, None] * change, 1) for tap in range(taps)]
    narrow = jnp.stack(parts, 1).reshape(-1, columns)
    return jnp.matmul(narrow, horizontal, precision=precision).reshape(n, taps, classes, cells)


def _axis(cells: int, pixels: int, tile: int, dtype: str) -> tuple[Any, tuple[int, int]]:
    """The bands of an axis, and how many pixels they have before its first and after its last one.

    The first of several tiles begins half a tile early: at a stride of 8 a tile of 8 pixels then lies between the
    centres of two cells, and needs no third.
    """
    tile = min(tile, pixels)
    before = tile // 2 if tile < pixels else 0
    matrix = np.pad(bilinear_matrix(cells, pixels, dtype), ((before, 0), (0, 0)))
    return bands(matrix, tile), (before, -len(matrix) % tile)
