"""The loss of a classifier: cross-entropy with mixed classes and label smoothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from topformer_jax.ops.loss import LossSums


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
        smoothing: of the target's probability, this share is spread over all classes evenly (Szegedy et al. 2016).

    Returns:
        The loss, the number of images whose larger share is the class of the largest logit (of equal logits the first
        class), and the number of images.

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
