"""The losses of single pixels of a segmenter, of a classifier, and of the classes of a teacher.

`tile_sums` resizes the logits to the labels' size.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.tile_sums import Labels, Logits, Softmax, SumTiles, Tile, sum_tiles


@dataclasses.dataclass(frozen=True)
class PixelLoss:
    """The loss of a pixel: by default the cross-entropy.

    With weights and smoothing it equals `torch.nn.functional.cross_entropy(reduction="none")`.

    Attributes:
        class_weight: factor on the loss of the pixels of each class; all 1 if empty.
        label_smoothing: share of the target that is spread evenly over all classes.
        ohem_threshold: pixels whose class has this probability or more do not count; 0: all count.
        distillation_weight: factor on `temperature**2 * KL(teacher, student)`, the divergence of the softmaxes of
            logits divided by the temperature, added at each labelled pixel (Hinton et al. 2015).
        temperature: divisor of both logits in the divergence.
    """

    class_weight: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    ohem_threshold: float = 0.0
    distillation_weight: float = 0.0
    temperature: float = 1.0


CROSS_ENTROPY = PixelLoss()


class LossSums(NamedTuple):
    """Sums over the pixels of a batch, which the caller adds up over micro-batches and then divides.

    Attributes:
        loss: the sum of the losses of the pixels whose label is not `IGNORE_LABEL`; the mean after the division.
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

    Values and gradients are those of the textbook formulation up to rounding. The forward pass computes the gradient
    too, and the backward pass only scales it. Only `loss` has a gradient, with respect to `logits` only.

    Args:
        logits: float32 or float64.
        labels: classes, or `IGNORE_LABEL` for pixels that do not count.
        teacher: logits to distil from; None: without distillation.
        pixel_loss: the loss of a pixel.
        precision: of matrix products.
        devices: the batch is sharded over. The sums do not depend on it; with the right number no images move between
            devices.

    >>> logits = jnp.zeros((1, 2, 2, 4)).at[..., 3].set(100.0)
    >>> labels = jnp.full((1, 16, 16), 3).at[0, :2].set(IGNORE_LABEL)
    >>> sums = upsampled_cross_entropy(logits, labels)
    >>> float(sums.loss), int(sums.correct), int(sums.valid)
    (0.0, 224, 224)
    """
    tile_loss = functools.partial(_compute_tile_loss, pixel_loss=pixel_loss)
    run = functools.partial(sum_tiles, tile_loss, precision=precision, devices=devices)
    with jax.named_scope("loss"):
        loss, correct = _cross_entropy_sums(run, logits, labels, teacher)
        return LossSums(jnp.sum(loss), jnp.sum(correct), jnp.sum(labels != IGNORE_LABEL))


def channel_divergence(logits: Logits, teacher: Logits, *, temperature: float = 4.0) -> Float[Array, " n"]:
    """The channel-wise distillation of each image: where a class is, by a teacher (Shu et al. 2021).

    The mean over the classes of `temperature**2 * KL(teacher, student)`, the divergence of the softmaxes over the
    cells of a class's logits divided by the temperature. It is mmrazor's `ChannelWiseDivergence` of `conv_seg`, at
    the size of the logits, labelled or not.

    >>> logits = jnp.arange(12.0).reshape(1, 2, 2, 3)
    >>> channel_divergence(logits, logits).tolist()
    [0.0]
    """
    with jax.named_scope("channel_divergence"):
        cells = (maps.reshape(len(maps), -1, maps.shape[3]) for maps in (logits, teacher))
        student, goal = (jax.nn.log_softmax(each / temperature, 1) for each in cells)
        return temperature**2 * jnp.mean(jnp.sum(jnp.exp(goal) * (goal - student), 1), -1)


def class_cross_entropy(
    logits: Float[Array, "n classes"],
    first: Int[Array, " n"],
    second: Int[Array, " n"],
    share: Float[Array, " n"],
    *,
    smoothing: float = 0.0,
) -> LossSums:
    """Sums the cross-entropy with the target `share * first + (1 - share) * second`.

    Args:
        logits: float32 or float64.
        first, second, share: an image's two classes and the share of the first.
        smoothing: share of the target's probability that is spread over all classes evenly (Szegedy et al. 2016).

    Returns:
        The loss, the number of images whose larger share is the class of the largest logit (the first of equal ones),
        and the number of images.

    >>> logits = jnp.zeros((1, 4)).at[0, 3].set(100.0)
    >>> sums = class_cross_entropy(logits, jnp.array([3]), jnp.array([0]), jnp.array([0.75]))
    >>> float(sums.loss), int(sums.correct), int(sums.valid)
    (25.0, 1, 1)
    """
    with jax.named_scope("loss"):
        log_probabilities = jax.nn.log_softmax(logits)

        def of_class(label: Array) -> Array:
            return jnp.take_along_axis(log_probabilities, label[:, None], 1)[:, 0]

        share = share.astype(logits.dtype)
        target = share * of_class(first) + (1 - share) * of_class(second)
        loss = -((1 - smoothing) * target + smoothing * jnp.mean(log_probabilities, 1))
        largest = jnp.argmax(logits, 1).astype(first.dtype)
        correct = jnp.sum(largest == jnp.where(share >= 0.5, first, second))
        return LossSums(jnp.sum(loss), correct, jnp.full((), len(logits), correct.dtype))


def _compute_tile_loss(tile: Tile, _: None, *, pixel_loss: PixelLoss) -> tuple[tuple[Array, Array], Array]:
    """The loss and the number of correct pixels of each image in a tile, and the gradient of the scores.

    With the target's weights a (of the label's class, and of all of them where labels are smoothed), the loss is
    `sum(a) * log_total - sum(a * scores)` and its gradient `sum(a) * softmax - a`.
    """
    scores, exponentials, total, shift = softmax = tile.compute_softmax(0)
    dtype, classes = scores.dtype, scores.shape[2]
    weights = jnp.asarray(pixel_loss.class_weight, dtype)[:, None] if pixel_loss.class_weight else None
    label_score = tile.look_up(scores)
    is_largest = label_score >= shift
    if tile.tiling.lookups:  # where the shift is a bound
        is_largest = tile.look_up(exponentials) >= jnp.max(exponentials, 2)
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
    loss = jnp.sum(pixels, (1, 2))
    correct = jnp.sum(is_largest & tile.valid, (1, 2), dtype=jnp.int32)
    score_grad = exponentials * (all_weight / total)[:, :, None]
    score_grad -= jnp.where(tile.is_label, label_weight[:, :, None], 0)
    if smoothing:
        score_grad -= jnp.where(counts[:, :, None], each_weight, 0)
    if len(tile.patches) == 1:  # without a teacher
        return (loss, correct), score_grad
    divergence, divergence_grad = _compute_divergence(tile, pixel_loss, softmax)
    return (loss + divergence, correct), score_grad + divergence_grad


def _compute_divergence(tile: Tile, pixel_loss: PixelLoss, softmax: Softmax) -> tuple[Array, Array]:
    """The distillation of each image in a tile, and the gradient of the scores.

    `KL = sum(q (log q - log p))` with q, p the softmaxes of teacher and student; its gradient in the student's scores
    divided by the temperature is `p - q`.
    """
    temperature = pixel_loss.temperature
    if temperature != 1:
        softmax = tile.compute_softmax(0, temperature)
    goal = tile.compute_softmax(1, temperature)
    p, q = (each.probabilities for each in (softmax, goal))
    divergence = jnp.sum(q * (goal.scores - softmax.scores), 2) - goal.log_total + softmax.log_total
    factor = pixel_loss.distillation_weight * tile.valid.astype(divergence.dtype)
    score_grad = (factor * temperature)[:, :, None] * (p - q)
    return temperature**2 * jnp.sum(factor * divergence, (1, 2)), score_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy_sums(
    sum_tiles: SumTiles, logits: Array, labels: Array, teacher: Array | None
) -> tuple[Array, Array]:
    """The loss and the number of correct pixels of each image, `[n]` each."""
    return _sum_forward(sum_tiles, logits, labels, teacher)[0]


def _sum_forward(
    sum_tiles: SumTiles, logits: Array, labels: Array, teacher: Array | None
) -> tuple[tuple[Array, Array], Array]:
    return sum_tiles((logits,) if teacher is None else (logits, teacher), labels)


def _sum_backward(sum_tiles: SumTiles, gradient: Array, cotangents: tuple[Array, Array]) -> tuple[Array, None, None]:
    return gradient * cotangents[0][:, None, None, None], None, None


_cross_entropy_sums.defvjp(_sum_forward, _sum_backward)
