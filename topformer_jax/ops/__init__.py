"""Operations that no library has: resampling exactly as PyTorch's, convolutions fast on CPUs, the tiled loss."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

IGNORE_LABEL = 255  # the label of pixels that count neither in the loss nor in a score


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype itself, or float32 for a narrower one: sums, statistics and logits are computed in it.

    >>> at_least_float32(jnp.bfloat16), at_least_float32(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    return np.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)
