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

from topformer_jax.ops.resample import bilinear_matrix, resize
from topformer_jax.ops.tiled import bands

VOID = 255
# Pixels of a tile, (height, width): what a core's cache holds of all classes; elsewhere, more work at once.
CPU_TILE, TILE = (8, 64), (8, 512)


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
) -> LossSums:
    """Resizes the logits bilinearly to the labels' size and sums softmax cross-entropy; label 255 is void.

    The same as `plain_cross_entropy` to rounding, in values and gradients. The gradient is computed together with
    the loss, so that the backward pass only scales it.
    """
    with jax.named_scope("loss"):
        loss, correct = _sums(logits, labels, precision)
        return LossSums(jnp.sum(loss), jnp.sum(correct), jnp.sum(labels != VOID))


def plain_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: Int[Array, "n height width"],
    *,
    precision: str | None = "highest",
) -> LossSums:
    """`upsampled_cross_entropy` as it is written down: what it is tested against and measured beside."""
    logits = resize(logits, (labels.shape[1], labels.shape[2]), precision=precision)
    valid = labels != VOID
    chosen = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], -1)[..., 0]
    loss = jax.nn.logsumexp(logits, -1) - chosen
    correct = (chosen >= logits.max(-1)) & valid
    return LossSums(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(correct), jnp.sum(valid))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sums(logits: Array, labels: Array, precision: str | None) -> tuple[Array, Array]:
    """An image's loss and its correct pixels, `[n]` each."""
    return _by_platform(logits, labels, precision, with_gradient=False)[:2]


def _forward(logits: Array, labels: Array, precision: str | None) -> tuple[tuple[Array, Array], Array]:
    loss, correct, gradient = _by_platform(logits, labels, precision, with_gradient=True)
    return (loss, correct), gradient


def _backward(precision: str | None, gradient: Array, cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    return gradient * cotangents[0][:, None, None, None], None


_sums.defvjp(_forward, _backward)


def _by_platform(logits: Array, labels: Array, precision: str | None, with_gradient: bool) -> Any:
    run = functools.partial(_tiled, precision=precision, with_gradient=with_gradient)
    return lax.platform_dependent(
        logits,
        labels,
        cpu=functools.partial(run, tile=CPU_TILE),
        default=functools.partial(run, tile=TILE),
    )


def _tiled(
    logits: Array, labels: Array, *, precision: str | None, with_gradient: bool, tile: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Loss and correct pixels of every image, and the gradient of the loss (zeros unless asked for).

    Sums stay an image's own in the loop: over a batch that lies on several devices, a sum would make them talk
    at every tile.
    """
    n, height, width = labels.shape
    _, h, w, classes = logits.shape
    product = functools.partial(jnp.matmul, precision=precision)
    down, across = (
        _centred(cells, pixels, min(side, pixels), logits.dtype.name)
        for cells, pixels, side in zip((h, w), (height, width), tile, strict=True)
    )
    rows, columns = down.weights.shape[1], across.weights.shape[1]
    taps, cells = down.weights.shape[2], across.weights.shape[2]
    counts = (len(down.starts), len(across.starts))
    pad = [
        (side // 2, count * side - pixels - side // 2)
        for side, count, pixels in zip((rows, columns), counts, (height, width), strict=True)
    ]
    labels = jnp.pad(labels.astype(jnp.int32), ((0, 0), *pad), constant_values=VOID)
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
        wide = product(patch.reshape(-1, cells), horizontal.T).reshape(n, taps, -1)
        scores = product(jnp.broadcast_to(vertical, (n, rows, taps)), wide).reshape(n, rows, classes, columns)
        label = lax.dynamic_slice(labels, (zero, row * rows, column * columns), (n, rows, columns))
        valid, hot = label != VOID, number == label[:, :, None]
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
            # Columns first: joined to the classes, they would keep XLA from vectorising all of the above.
            change = product(change.reshape(-1, columns), horizontal).reshape(n, rows, -1)
            change = product(jnp.broadcast_to(vertical.T, (n, taps, rows)), change).reshape(patch.shape)
            old = lax.dynamic_slice(gradient, corner, patch.shape)
            gradient = lax.dynamic_update_slice(gradient, old + change, corner)
        return loss, correct, gradient

    empty = jnp.zeros_like(logits) if with_gradient else jnp.zeros((), logits.dtype)
    start = (jnp.zeros(n, logits.dtype), jnp.zeros(n, jnp.int32), empty)
    loss, correct, gradient = lax.fori_loop(0, counts[0] * counts[1], one, start)
    return loss, correct, gradient.swapaxes(2, 3) if with_gradient else gradient


def _centred(cells: int, pixels: int, tile: int, dtype: str) -> Any:
    """The bands of an axis whose tiles begin half a tile before the first pixel.

    At a stride of 8 a tile of 8 pixels then lies between the centres of two cells, and needs no third.
    """
    matrix = bilinear_matrix(cells, pixels, dtype)
    return bands(np.pad(matrix, ((tile // 2, 0), (0, 0))), tile)
