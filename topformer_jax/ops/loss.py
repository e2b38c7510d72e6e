"""Cross-entropy of logits that are resized to the labels' size first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from topformer_jax.ops.resample import resize

VOID = 255


class LossSums(NamedTuple):
    """Sums over a batch; the caller divides, so that devices and micro-batches add up.

    `loss` is the sum of the cross-entropies of the valid pixels, `correct` how many of them have their label's
    logit as the largest, `valid` how many there are.
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
    """Resizes the logits bilinearly to the labels' size and sums softmax cross-entropy; label 255 is void."""
    with jax.named_scope("loss"):
        logits = resize(logits, (labels.shape[1], labels.shape[2]), precision=precision)
        valid = labels != VOID
        target = jnp.where(valid, labels, 0)
        chosen = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
        loss = jax.nn.logsumexp(logits, -1) - chosen
        correct = (logits.argmax(-1).astype(labels.dtype) == labels) & valid
        return LossSums(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(correct), jnp.sum(valid))
