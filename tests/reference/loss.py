"""The textbook formulations of the losses in `topformer_jax.ops`, for tests and benchmarks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.loss import CROSS_ENTROPY, LossSums, PixelLoss
from topformer_jax.ops.resample import resize
from topformer_jax.ops.tile_sums import Labels, Logits


def plain_cross_entropy(
    logits: Logits,
    labels: Labels,
    teacher: Logits | None = None,
    *,
    pixel_loss: PixelLoss = CROSS_ENTROPY,
    precision: str | None = "highest",
    devices: int = 1,
) -> LossSums:
    """The textbook formulation of `upsampled_cross_entropy`; `devices` is not used."""
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


def plain_dice(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """The textbook formulation of `upsampled_dice`."""
    softmax, target = _masked(logits, labels)
    shared, squares, pixels = (jnp.sum(x, (1, 2)) for x in (softmax * target, softmax**2, target))
    return jnp.mean(1 - (2 * shared + 1) / (squares + pixels + 1), -1)


def plain_jaccard(logits: Logits, labels: Labels, teacher: Logits | None = None) -> Float[Array, " n"]:
    """The fuzzy Jaccard index, which `upsampled_jaccard` writes with distances."""
    softmax, target = _masked(logits, labels)
    active = jnp.sum(target, (1, 2)) > 0
    if teacher is not None:
        target, active = _masked(teacher, labels)[0], jnp.ones_like(active)
    shared, union = (jnp.sum(x, (1, 2)) for x in (jnp.minimum(softmax, target), jnp.maximum(softmax, target)))
    loss = 1 - (shared + 1e-3) / (union + 1e-3)
    return jnp.sum(jnp.where(active, loss, 0), -1) / jnp.maximum(jnp.sum(active, -1), 1).astype(loss.dtype)


def plain_lovasz(logits: Logits, labels: Labels) -> Float[Array, " n"]:
    """Algorithm 1 of Berman et al. for each image and each class in its labels."""
    softmax, target = (x.reshape(len(x), -1, x.shape[-1]) for x in _masked(logits, labels))
    valid = jnp.asarray(labels != IGNORE_LABEL).reshape(len(labels), -1)

    def extend(p: Array, hits: Array, valid: Array) -> Array:
        """The loss of a class, whose unlabelled pixels come last."""
        errors = jnp.where(valid, jnp.abs(hits - p), -1)
        order = jnp.argsort(-errors)
        errors, hits, valid = errors[order], hits[order], valid[order]
        misses = jnp.cumsum(jnp.where(valid, 1 - hits, 0))
        loss = 1 - (jnp.sum(hits) - jnp.cumsum(hits)) / jnp.maximum(jnp.sum(hits) + misses, 1)
        return jnp.sum(jnp.where(valid, errors * jnp.diff(loss, prepend=jnp.zeros(1, loss.dtype)), 0))

    losses = jax.vmap(jax.vmap(extend, (1, 1, None)))(softmax, target, valid)
    present = jnp.sum(target, 1) > 0
    return jnp.sum(jnp.where(present, losses, 0), 1) / jnp.maximum(jnp.sum(present, 1), 1).astype(losses.dtype)


def _masked(logits: Logits, labels: Labels) -> tuple[Array, Array]:
    """The softmax of the resized logits, and 1 where a class is the label, both 0 at unlabelled pixels."""
    logits = resize(logits, (labels.shape[1], labels.shape[2]), precision="highest")
    valid = (labels != IGNORE_LABEL)[..., None]
    target = jax.nn.one_hot(jnp.where(valid[..., 0], labels, 0), logits.shape[-1], dtype=logits.dtype)
    return jnp.where(valid, jax.nn.softmax(logits), 0), jnp.where(valid, target, 0)
