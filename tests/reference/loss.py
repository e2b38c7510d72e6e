"""The textbook formulations of the losses in `topformer_jax.ops.loss`, for tests and benchmarks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.loss import CROSS_ENTROPY, Labels, Logits, LossSums, PixelLoss
from topformer_jax.ops.resample import resize


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


def plain_dice(
    logits: Logits, labels: Labels, *, precision: str | None = "highest", devices: int = 1
) -> Float[Array, " n"]:
    """The textbook formulation of `upsampled_dice`; `devices` is not used."""
    logits = resize(logits, (labels.shape[1], labels.shape[2]), precision=precision)
    valid = labels != IGNORE_LABEL
    target = jax.nn.one_hot(jnp.where(valid, labels, 0), logits.shape[-1], dtype=logits.dtype)
    target = jnp.where(valid[..., None], target, 0)
    softmax = jnp.where(valid[..., None], jax.nn.softmax(logits), 0)
    shared, squares, pixels = (jnp.sum(x, (1, 2)) for x in (softmax * target, softmax**2, target))
    return jnp.mean(1 - (2 * shared + 1) / (squares + pixels + 1), -1)
