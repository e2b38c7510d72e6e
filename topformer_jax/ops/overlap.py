"""Losses of the overlap of predicted and labelled pixels of each class, computed image by image.

Those of a batch as a whole would depend on how it is divided into micro-batches, and its pixels would have to travel
between devices. `tile_sums` resizes the logits to the labels' size for sums over pixels; the Lovász-softmax sorts
pixels, and resizes one class at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.resample import bilinear_matrix
from topformer_jax.ops.tile_sums import Labels, Logits, SumTiles, Tile, sum_tiles

JACCARD_SMOOTH = 1e-3


def upsampled_dice(
    logits: Logits, labels: Labels, *, precision: str | None = "highest", devices: int = 1
) -> Float[Array, " n"]:
    """Resizes the logits bilinearly to the labels' size and computes the Dice loss of each image.

    The mean over all classes of `1 - (2 sum(p t) + 1) / (sum(p**2) + sum(t) + 1)`: sums over the labelled pixels of
    the image, with the softmax p, and t 1 where the class is the label and else 0. It is mmsegmentation's `DiceLoss`
    with exponent 2 and smooth 1, except that unlabelled pixels do not count in `sum(p**2)`. The arguments are those
    of `loss.upsampled_cross_entropy`. The backward pass goes over the tiles a second time.

    >>> logits = jnp.zeros((1, 2, 2, 4)).at[..., 3].set(100.0)
    >>> upsampled_dice(logits, jnp.full((1, 16, 16), 3)).tolist()
    [0.0]
    """

    def measure(p: Array, t: Array) -> tuple[Array, ...]:
        return p * t, p**2, t

    with jax.named_scope("dice"):
        shared, squares, pixels = _sum_overlap(measure, logits, labels, None, precision, devices)
        return jnp.mean(1 - (2 * shared + 1) / (squares + pixels + 1), -1)


def upsampled_jaccard(
    logits: Logits,
    labels: Labels,
    teacher: Logits | None = None,
    *,
    precision: str | None = "highest",
    devices: int = 1,
) -> Float[Array, " n"]:
    """Resizes the logits bilinearly to the labels' size and computes the Jaccard metric loss of each image.

    The mean over classes of `1 - (shared + 0.001) / (sum(p) + sum(t) - shared + 0.001)`, with
    `shared = (sum(p) + sum(t) - sum(|p - t|)) / 2` (Wang et al. 2023, JML1): sums over the labelled pixels of the
    image, with the softmax p. Without a teacher, t is 1 where the class is the label and else 0, and only the classes
    in the image's labels count; an image without labels has loss 0. With a teacher, t is its softmax, and all classes
    count. It is the authors' `JDTLoss` with mIoUI=1 and mIoUD=0. The arguments are those of
    `loss.upsampled_cross_entropy`. The backward pass goes over the tiles a second time.

    >>> logits = jnp.zeros((1, 2, 2, 4)).at[..., 3].set(100.0)
    >>> upsampled_jaccard(logits, jnp.full((1, 16, 16), 3)).tolist()
    [0.0]
    """

    def measure(p: Array, t: Array) -> tuple[Array, ...]:
        return p, t, jnp.abs(p - t)

    with jax.named_scope("jaccard"):
        ours, theirs, distance = _sum_overlap(measure, logits, labels, teacher, precision, devices)
        shared = (ours + theirs - distance) / 2
        loss = 1 - (shared + JACCARD_SMOOTH) / (ours + theirs - shared + JACCARD_SMOOTH)
        counts = (theirs > 0) | (teacher is not None)
        return jnp.sum(jnp.where(counts, loss, 0), -1) / jnp.maximum(jnp.sum(counts, -1), 1).astype(loss.dtype)


def upsampled_lovasz(logits: Logits, labels: Labels, *, precision: str | None = "highest") -> Float[Array, " n"]:
    """Resizes the logits bilinearly to the labels' size and computes the Lovász-softmax loss of each image.

    The mean over the classes in the image's labels of the Lovász extension of the Jaccard loss at the errors
    `|t - p|` of the labelled pixels (Berman et al. 2018), with the softmax p, and t 1 where the class is the label
    and else 0. An image without labels has loss 0. It is mmsegmentation's `LovaszLoss(per_image=True)`, whose default
    is a loss of all pixels of a batch.

    The arguments are those of `loss.upsampled_cross_entropy`. The forward pass computes the gradient too. It holds
    some arrays of the labels' size, and as many resized logits as one class has.

    >>> logits = jnp.zeros((1, 2, 2, 4)).at[..., 3].set(100.0)
    >>> upsampled_lovasz(logits, jnp.full((1, 16, 16), 3)).tolist()
    [0.0]
    """
    with jax.named_scope("lovasz"):
        return _lovasz(precision, logits, labels)


# From the softmax p and the target t, both 0 at unlabelled pixels, `[n, rows, classes, columns]`, to what is summed
# over pixels.
Measure = Callable[[Array, Array], tuple[Array, ...]]


def _sum_overlap(
    measure: Measure,
    logits: Array,
    labels: Array,
    teacher: Array | None,
    precision: str | None,
    devices: int,
) -> tuple[Array, ...]:
    """The sums of a measure over the labelled pixels of each image, `[n, classes]` each."""
    tile_sums = functools.partial(_sum_tile, measure=measure)
    run = functools.partial(sum_tiles, tile_sums, precision=precision, devices=devices)
    return _overlap_sums(run, logits, labels, teacher)


def _sum_tile(
    tile: Tile, gradients: tuple[Array, ...] | None, *, measure: Measure
) -> tuple[tuple[Array, ...], Array | None]:
    """The sums of each image in a tile; or, from the loss's gradients in the sums, that in the scores."""
    valid = tile.valid[:, :, None]
    p, *goal = (jnp.where(valid, tile.compute_softmax(i).probabilities, 0) for i in range(len(tile.patches)))
    t = goal[0] if goal else (tile.is_label & valid).astype(p.dtype)

    def add_up(p: Array) -> tuple[Array, ...]:
        return tuple(jnp.sum(terms, (1, 3)) for terms in measure(p, t))

    if gradients is None:
        return add_up(p), None
    (by_p,) = jax.vjp(add_up, p)[1](gradients)
    return (), p * (by_p - jnp.sum(by_p * p, 2, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _overlap_sums(run: SumTiles, logits: Array, labels: Array, teacher: Array | None) -> tuple[Array, ...]:
    """The sums of each image."""
    return _overlap_forward(run, logits, labels, teacher)[0]


def _overlap_forward(
    run: SumTiles, logits: Array, labels: Array, teacher: Array | None
) -> tuple[tuple[Array, ...], tuple[tuple[Array, ...], Array]]:
    maps = (logits,) if teacher is None else (logits, teacher)
    return run(maps, labels)[0], (maps, labels)


def _overlap_backward(
    run: SumTiles, residuals: tuple[tuple[Array, ...], Array], gradients: tuple[Array, ...]
) -> tuple[Array, None, None]:
    return run(*residuals, gradients)[1], None, None


_overlap_sums.defvjp(_overlap_forward, _overlap_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lovasz(precision: str | None, logits: Array, labels: Array) -> Array:
    """The loss of each image."""
    return _lovasz_forward(precision, logits, labels)[0]


def _lovasz_forward(precision: str | None, logits: Array, labels: Array) -> tuple[Array, Array]:
    """The loss of each image and its gradient, `[n, h, w, classes]`.

    With the loss's gradient g in p, that in the scores is `p g - p sum(p g)`. Few classes of an image have a g; one
    loop goes over these, another one over all classes for the second term.
    """
    classes = jnp.arange(logits.shape[3], dtype=labels.dtype)[:, None]
    cells = jnp.moveaxis(logits, 3, 0)  # [classes, n, h, w]
    resize, pull_back = _make_resize(logits, labels, precision)

    def add_class(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[Any, Array]:
        shift, total = carry
        scores = resize(inputs[1])
        largest = jnp.maximum(shift, scores)
        total = total * jnp.exp(shift - largest) + jnp.exp(scores - largest)
        return (largest, total), jnp.any(labels == inputs[0], (1, 2))

    zeros = jnp.zeros(labels.shape, logits.dtype)
    (shift, total), is_in = lax.scan(add_class, (zeros - jnp.inf, zeros), (classes, cells))

    def compute_softmax(scores: Array) -> Array:
        return jnp.exp(resize(scores) - shift) / total

    # [classes, n]: those in the image's labels come first
    order = jnp.argsort(~is_in, axis=0, stable=True).astype(labels.dtype)
    count = jnp.sum(is_in, 0, dtype=jnp.int32)

    def add_place(place: Array, carry: Any) -> Any:
        losses, weighted, gradient = carry
        chosen = (classes == order[place])[:, :, None, None]
        p = compute_softmax(jnp.sum(jnp.where(chosen, cells, 0), 0))
        loss, by_p = _extend_jaccard(p, labels == order[place][:, None, None], labels != IGNORE_LABEL)
        share = jnp.where(place < count, 1 / jnp.maximum(count, 1).astype(p.dtype), 0)
        term = share[:, None, None] * by_p * p
        gradient += jnp.where(chosen, pull_back(term), 0)
        return losses + share * loss, weighted + term, gradient

    start = jnp.zeros(len(logits), logits.dtype), zeros, jnp.zeros_like(cells)
    loss, weighted, gradient = lax.fori_loop(0, jnp.max(count), add_place, start)
    rest = lax.map(lambda scores: pull_back(compute_softmax(scores) * weighted), cells)
    return loss, jnp.moveaxis(gradient - rest, 0, 3)


def _make_resize(
    logits: Array, labels: Array, precision: str | None
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The resize of a class, `[n, h, w]` to `[n, height, width]`, and its transpose."""
    sides = zip(logits.shape[1:3], labels.shape[1:], strict=True)
    down, across = (jnp.asarray(bilinear_matrix(*side, logits.dtype.name)) for side in sides)

    def resize(cells: Array) -> Array:
        return jnp.einsum("ij,njk,lk->nil", down, cells, across, precision=precision)

    def pull_back(pixels: Array) -> Array:
        return jnp.einsum("ij,nil,lk->njk", down, pixels, across, precision=precision)

    return resize, pull_back


def _extend_jaccard(
    p: Float[Array, "n height width"], t: Bool[Array, "n height width"], valid: Bool[Array, "n height width"]
) -> tuple[Float[Array, " n"], Float[Array, "n height width"]]:
    """The Lovász extension of the Jaccard loss of a class, and its gradient in p.

    With the errors in falling order, it is `sum(error * slope)`, where the slope is what a pixel adds to the Jaccard
    loss when it is wrong after those before it. As a difference of two Jaccard losses, in the publication's Algorithm
    1, it would lose digits: it is written out.
    """
    flat_p, flat_t, flat_valid = (each.reshape(len(p), -1) for each in (p, t, valid))
    error = jnp.where(flat_valid, jnp.where(flat_t, 1 - flat_p, flat_p), -1)
    order = jnp.argsort(-error, 1, stable=False)
    error, hit = (jnp.take_along_axis(each, order, 1) for each in (error, flat_t))
    hits = jnp.cumsum(hit, 1, dtype=jnp.int32)
    pixels = hits[:, -1:]
    misses = lax.broadcasted_iota(jnp.int32, hits.shape, 1) + 1 - hits
    union = (pixels + misses).astype(p.dtype)  # of the label and the wrong pixels so far
    missed = (pixels - hits).astype(p.dtype) / (union * jnp.maximum(union - 1, 1))
    slope = jnp.where(hit, 1 / union, missed)  # 0 at unlabelled pixels, which come after all hits

    def put_back(places: Array, values: Array) -> Array:
        return jnp.zeros_like(values).at[places].set(values, unique_indices=True)

    by_error = jax.vmap(put_back)(order, slope)  # `put_along_axis` would send all of it between devices
    return jnp.sum(error * slope, 1), jnp.where(t, -1, 1) * by_error.reshape(p.shape)


def _lovasz_backward(_: str | None, gradient: Array, by_loss: Array) -> tuple[Array, None]:
    return gradient * by_loss[:, None, None, None], None


_lovasz.defvjp(_lovasz_forward, _lovasz_backward)
