"""BatchNorm over the batch's own statistics, with a backward pass that keeps nothing but its input.

Autodiff saves the centred values, in float32 whatever the input is: an array as large as every activation, written
and read once more. The gradient is short enough to be written down (Ioffe and Szegedy 2015, section 3):

    dx = weight / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat))
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32

Statistics = tuple[Float[Array, "*shape c"], Float[Array, " c"], Float[Array, " c"]]


def batch_norm(
    x: Float[Array, "*shape c"], weight: Float[Array, " c"], bias: Float[Array, " c"], *, eps: float = 1e-5
) -> Statistics:
    """Normalises over all axes but the last; returns the result, the mean and the biased variance.

    Statistics are in at least float32, the result is in the input's dtype. No gradient flows through the
    returned statistics.
    """
    return _normalised(x, weight, bias, eps)


def plain_batch_norm(
    x: Float[Array, "*shape c"], weight: Float[Array, " c"], bias: Float[Array, " c"], *, eps: float = 1e-5
) -> Statistics:
    """`batch_norm` as it is written down, its gradient left to autodiff: what it is tested against."""
    wide = at_least_float32(x.dtype)
    values = x.astype(wide)
    # In two axes, as a product leaves them: so XLA's CPU backend centres and squares inside the sum. And the backward
    # pass, which has more axes, does not find centred values here that would have to be kept for it.
    flat = values.reshape(-1, x.shape[-1])
    mean = flat.mean(0)
    variance = jnp.square(flat - mean).mean(0)
    scale = weight.astype(wide) * lax.rsqrt(variance + eps)
    return (values * scale + (bias.astype(wide) - mean * scale)).astype(x.dtype), mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalised(x: Array, weight: Array, bias: Array, eps: float) -> Statistics:
    return plain_batch_norm(x, weight, bias, eps=eps)


def _forward(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Statistics, tuple[Array, Array, Array, Array, Array]]:
    y, mean, variance = plain_batch_norm(x, weight, bias, eps=eps)
    return (y, mean, variance), (x, mean, variance, weight, bias)


def _backward(
    eps: float, saved: tuple[Array, Array, Array, Array, Array], cotangents: Statistics
) -> tuple[Array, Array, Array]:
    x, mean, variance, weight, bias = saved
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    values, grad = (each.astype(mean.dtype) for each in (x, cotangents[0]))
    inverse = lax.rsqrt(variance + eps)
    bias_grad, weight_grad = grad.sum(axes), (grad * (values - mean)).sum(axes) * inverse
    # The formula above, sorted by what a pixel brings: two multiply-adds.
    scale = weight.astype(mean.dtype) * inverse
    slope = -scale * inverse * weight_grad / count
    change = grad * scale + (values * slope - (scale * bias_grad / count + slope * mean))
    return change.astype(x.dtype), weight_grad.astype(weight.dtype), bias_grad.astype(bias.dtype)


_normalised.defvjp(_forward, _backward)
