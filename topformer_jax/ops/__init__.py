"""Numerics that no library has: torch-exact resampling and a depthwise convolution that is fast on CPUs."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

IGNORE_LABEL = 255  # the label of pixels that count neither in the loss nor in a score


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """What sums, statistics and logits of values of this dtype are computed in."""
    return np.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)
