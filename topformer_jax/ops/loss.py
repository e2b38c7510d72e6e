"""The loss of logits resized to the labels' size, without ever storing the resized logits.

For 150 classes and 512 x 512 pixels the resized logits are 157 MB an image, and their gradient as much again: in the
official code, writing and reading them is most of a training step. Here the labels are cut into tiles. For each tile
the logits are resized, and its part of the loss and of the gradient is computed at once; only these are stored.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.loss_tiles import Softmax, Tile, sum_tiles
from topformer_jax.ops.resample import resize

Logits = Float[Array, "n h w classes"]
Labels = Int[Array, "n height width"]


@dataclasses.dataclass(frozen=True)
class PixelLoss:
    """What the loss of a pixel is; by default the cross-entropy.

    With weights, smoothing or both it is `torch.nn.functional.cross_entropy(reduction="none")` of the same arguments.

    Attributes:
        class_weight: factor on the loss of the pixels of each class; all 1 if empty.
        label_smoothing: share of the target that is spread evenly over all classes.
        ohem_threshold: pixels whose class has this probability or more do not count (online hard example mining by
            threshold); 0: all count.
        distillation_weight: factor on `temperature**2 * KL(teacher, student)`, the divergence of the softmaxes of
            logits divided by the temperature, added at each labelled pixel (Hinton et al. 2015).
        temperature: see there.
    """

    class_weight: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    ohem_threshold: float = 0.0
    distillation_weight: float = 0.0
    temperature: float = 1.0


CROSS_ENTROPY = PixelLoss()


class LossSums(NamedTuple):
    """Sums over the pixels of a batch, to be divided by the caller after adding up devices and micro-batches.

    Attributes:
        loss: the sum of the losses of the pixels whose label is not `IGNORE_LABEL`.
        correct: the number of these pixels where no class has a larger logit than the label's.
        valid: the number of these pixels.
    """

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    valid: Int[Array, ""]


def upsampled_cross_entropy(
    logits: Logits,
    labels: Labels,
    teacher: Logits | None = None,
    *,
    pixel_loss: PixelLoss = CROSS_ENTROPY,
    precision: str | None = "highest",
    devices: int = 1,
) -> LossSums:
    """Resizes the logits bilinearly to the labels' size and sums the losses of the pixels.

    Values and gradients are those of `plain_cross_entropy` up to rounding. The forward pass computes the gradient
    together with the loss, and the backward pass only scales it. Only `loss` has a gradient, in `logits` alone.

    Args:
        logits: float32 or float64.
        labels: classes, or `IGNORE_LABEL` for pixels that do not count.
        teacher: logits to distil from; None: without distillation.
        pixel_loss: the loss of a pixel.
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
        loss, correct = _cross_entropy_sums(logits, labels, teacher, pixel_loss, precision, devices)
        return LossSums(jnp.sum(loss), jnp.sum(correct), jnp.sum(labels != IGNORE_LABEL))


def plain_cross_entropy(
    logits: Logits,
    labels: Labels,
    teacher: Logits | None = None,
    *,
    pixel_loss: PixelLoss = CROSS_ENTROPY,
    precision: str | None = "highest",
    devices: int = 1,
) -> LossSums:
    """The textbook formulation of `upsampled_cross_entropy`, for tests and benchmarks. `devices` is not used."""
    size = labels.shape[1], labels.shape[2]
    logits = resize(logits, size, precision=precision)
    valid = labels != IGNORE_LABEL
    one_hot = jax.nn.one_hot(jnp.where(valid, labels, 0), logits.shape[-1], dtype=logits.dtype)
    smoothing = pixel_loss.label_smoothing
    weights = jnp.asarray(pixel_loss.class_weight or (1.0,), logits.dtype)
    target = weights * ((1 - smoothing) * one_hot + smoothing / logits.shape[-1])
    label_logit = jnp.sum(one_hot * logits, -1)
    loss = -jnp.sum(target * jax.nn.log_softmax(logits), -1)
    if pixel_loss.ohem_threshold:
        probability = jnp.sum(one_hot * jax.nn.softmax(logits), -1)
        loss = jnp.where(probability < pixel_loss.ohem_threshold, loss, 0)
    if teacher is not None:
        temperature = pixel_loss.temperature
        goal = jax.nn.log_softmax(resize(teacher, size, precision=precision) / temperature)
        divergence = jnp.sum(jnp.exp(goal) * (goal - jax.nn.log_softmax(logits / temperature)), -1)
        loss = loss + pixel_loss.distillation_weight * temperature**2 * divergence
    correct = (label_logit >= logits.max(-1)) & valid
    return LossSums(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(correct), jnp.sum(valid))


def upsampled_dice(
    logits: Logits, labels: Labels, *, precision: str | None = "highest", devices: int = 1
) -> Float[Array, " n"]:
    """The Dice loss of each image, of logits resized bilinearly to the labels' size.

    The mean over all classes of `1 - (2 sum(p t) + 1) / (sum(p**2) + sum(t) + 1)`: sums over the image's labelled
    pixels, p the softmax, t whether the class is the label. mmsegmentation's DiceLoss of exponent 2 and smooth 1, but
    that counts the squares of unlabelled pixels too. Arguments as for `upsampled_cross_entropy`; the backward pass
    goes over the tiles once more.
    """
    with jax.named_scope("dice"):
        return _dice(logits, labels, precision, devices)


def plain_dice(
    logits: Logits, labels: Labels, *, precision: str | None = "highest", devices: int = 1
) -> Float[Array, " n"]:
    """The textbook formulation of `upsampled_dice`, for tests and benchmarks. `devices` is not used."""
    logits = resize(logits, (labels.shape[1], labels.shape[2]), precision=precision)
    valid = labels != IGNORE_LABEL
    target = jax.nn.one_hot(jnp.where(valid, labels, 0), logits.shape[-1], dtype=logits.dtype)
    target = jnp.where(valid[..., None], target, 0)
    softmax = jnp.where(valid[..., None], jax.nn.softmax(logits), 0)
    shared, squares, pixels = (jnp.sum(x, (1, 2)) for x in (softmax * target, softmax**2, target))
    return jnp.mean(1 - (2 * shared + 1) / (squares + pixels + 1), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy_sums(
    logits: Array,
    labels: Array,
    teacher: Array | None,
    pixel_loss: PixelLoss,
    precision: str | None,
    devices: int,
) -> tuple[Array, Array]:
    """The loss and the number of correct pixels of each image, `[n]` each."""
    return _sum_cross_entropy(logits, labels, teacher, pixel_loss, precision, devices, False)[0]


def _sum_cross_entropy(
    logits: Array,
    labels: Array,
    teacher: Array | None,
    pixel_loss: PixelLoss,
    precision: str | None,
    devices: int,
    with_gradient: bool = True,
) -> tuple[tuple[Array, Array], Any]:
    maps = (logits,) if teacher is None else (logits, teacher)
    visit = functools.partial(_visit_cross_entropy, pixel_loss=pixel_loss, distil=teacher is not None)
    zeros = jnp.zeros((), logits.dtype), jnp.zeros((), jnp.int32)
    return sum_tiles(
        visit,
        zeros,
        (maps, labels, None),
        precision=precision,
        devices=devices,
        with_gradient=with_gradient,
    )


def _scale_gradient(
    pixel_loss: PixelLoss,
    precision: str | None,
    devices: int,
    gradient: Array,
    cotangents: tuple[Array, Array],
) -> tuple[Array, None, None]:
    return gradient * cotangents[0][:, None, None, None], None, None


_cross_entropy_sums.defvjp(_sum_cross_entropy, _scale_gradient)


def _visit_cross_entropy(
    tile: Tile, _: None, *, pixel_loss: PixelLoss, distil: bool
) -> tuple[tuple[Array, Array], Callable[[Any], Array]]:
    """The loss and the number of correct pixels of each image in a tile, and the gradient of the scores.

    With the target's weights a (of the label's class, and of all of them where labels are smoothed), the loss is
    `sum(a) * log_total - sum(a * scores)` and its gradient `sum(a) * softmax - a`.
    """
    scores, exponentials, total, shift = softmax = tile.compute_softmax(0)
    dtype, classes = scores.dtype, scores.shape[2]
    weights = jnp.asarray(pixel_loss.class_weight, dtype)[:, None] if pixel_loss.class_weight else None
    label_score = tile.look_up(scores)
    if tile.lookups:
        label_exponential = tile.look_up(exponentials)
        is_largest = label_exponential >= jnp.max(exponentials, 2)
    else:
        is_largest = label_score >= shift
    counts = tile.valid
    if pixel_loss.ohem_threshold:
        counts &= tile.look_up(exponentials) < pixel_loss.ohem_threshold * total
    label_weight = counts.astype(dtype)
    if weights is not None:
        label_weight *= tile.weigh_label(weights[:, 0])
    each_weight = jnp.zeros((), dtype)  # [classes, 1] or a scalar
    all_weight = label_weight
    pixels = jnp.where(counts, label_weight * (softmax.log_total - label_score), 0)
    if smoothing := pixel_loss.label_smoothing:
        each_weight = smoothing / classes * (jnp.ones((classes, 1), dtype) if weights is None else weights)
        label_weight = (1 - smoothing) * label_weight
        all_weight = label_weight + jnp.sum(each_weight) * counts.astype(dtype)
        others = jnp.sum(each_weight) * softmax.log_total - jnp.sum(each_weight * scores, 2)
        pixels = (1 - smoothing) * pixels + jnp.where(counts, others, 0)
    factor = (all_weight / total)[:, :, None]

    def score_grad(rows: Any) -> Array:
        grad = exponentials[:, rows] * factor[:, rows] - jnp.where(
            tile.is_label[:, rows], label_weight[:, rows, ..., None, :], 0
        )
        if not smoothing:
            return grad
        return grad - jnp.where(counts[:, rows, ..., None, :], each_weight, 0)

    sums = jnp.sum(pixels, (1, 2)), jnp.sum(is_largest & tile.valid, (1, 2), dtype=jnp.int32)
    if not distil:
        return sums, score_grad
    divergence, divergence_grad = _visit_divergence(tile, pixel_loss, softmax)
    return (sums[0] + divergence, sums[1]), lambda rows: score_grad(rows) + divergence_grad(rows)


def _visit_divergence(
    tile: Tile, pixel_loss: PixelLoss, softmax: Softmax
) -> tuple[Array, Callable[[Any], Array]]:
    """The distillation of each image in a tile, and the gradient of the scores.

    `KL = sum(q (log q - log p))` with q, p the softmaxes of teacher and student; its gradient in the student's scores
    divided by the temperature is `p - q`.
    """
    temperature = pixel_loss.temperature
    if temperature != 1:
        softmax = tile.compute_softmax(0, temperature)
    goal = tile.compute_softmax(1, temperature)
    q = goal.exponentials / goal.total[:, :, None]
    divergence = jnp.sum(q * (goal.scores - softmax.scores), 2) - goal.log_total + softmax.log_total
    factor = pixel_loss.distillation_weight * tile.valid.astype(divergence.dtype)
    by_score = factor * temperature

    def score_grad(rows: Any) -> Array:
        p = softmax.exponentials[:, rows] / softmax.total[:, rows, ..., None, :]
        return by_score[:, rows, ..., None, :] * (p - q[:, rows])

    return temperature**2 * jnp.sum(factor * divergence, (1, 2)), score_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dice(logits: Array, labels: Array, precision: str | None, devices: int) -> Array:
    return _forward_dice(logits, labels, precision, devices)[0]


def _forward_dice(logits: Array, labels: Array, precision: str | None, devices: int) -> tuple[Array, Any]:
    zeros = [jnp.zeros(logits.shape[-1], logits.dtype)] * 3
    (shared, squares, pixels), _ = sum_tiles(
        _visit_overlap,
        zeros,
        ((logits,), labels, None),
        precision=precision,
        devices=devices,
        with_gradient=False,
    )
    above, below = 2 * shared + 1, squares + pixels + 1
    return jnp.mean(1 - above / below, -1), (logits, labels, above, below)


def _backward_dice(
    precision: str | None, devices: int, residuals: Any, cotangent: Array
) -> tuple[Array | None, None]:
    logits, labels, above, below = residuals
    scale = cotangent[:, None] / logits.shape[-1]
    by_sums = -2 * scale / below, scale * above / below**2
    _, gradient = sum_tiles(
        _visit_overlap_grad,
        [],
        ((logits,), labels, by_sums),
        precision=precision,
        devices=devices,
        with_gradient=True,
    )
    return gradient, None


_dice.defvjp(_forward_dice, _backward_dice)


def _visit_overlap(tile: Tile, _: None) -> tuple[list[Array], Callable[[Any], Array]]:
    """What the Dice loss is made from, `[n, classes]` each: sums of p t, p**2 and t."""
    softmax, target = _mask_softmax(tile)
    sums = [jnp.sum(x, (1, 3)) for x in (softmax * target, softmax**2, target)]
    return sums, lambda rows: jnp.zeros_like(softmax[:, rows])


def _visit_overlap_grad(
    tile: Tile, by_sums: tuple[Array, Array]
) -> tuple[list[Array], Callable[[Any], Array]]:
    """The gradient of the scores, given the loss's gradient in the sums of p t and of p**2, `[n, classes]` each."""
    softmax, target = _mask_softmax(tile)
    by_shared, by_squares = (x[:, None, :, None] for x in by_sums)
    by_softmax = by_shared * target + 2 * by_squares * softmax
    score_grad = softmax * (by_softmax - jnp.sum(by_softmax * softmax, 2, keepdims=True))
    return [], lambda rows: score_grad[:, rows]


def _mask_softmax(tile: Tile) -> tuple[Array, Array]:
    """The softmax and the one-hot labels `[n, rows, classes, columns]`, 0 where a pixel has no label."""
    _, exponentials, total, _ = tile.compute_softmax(0)
    valid = tile.valid[:, :, None]
    return jnp.where(valid, exponentials / total[:, :, None], 0), (tile.is_label & valid).astype(
        exponentials.dtype
    )
