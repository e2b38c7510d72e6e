"""The 1x1 convolution as a matrix product, with a weight gradient that needs no copies.

JAX's own gradient computes the transposed weight gradient and transposes it back, for which XLA's CPU backend copies
the gradient of the feature map into another layout. For 4 x 256 x 256 pixels, 16 to 64 channels, on 2 cores, that
takes 54 ms; the gradient below takes 38 ms. Within a training step of Tiny it is 140 ms against 7 ms.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def pointwise_conv(
    images: Float[Array, "n h w inputs"],
    weight: Float[Array, "inputs outputs"],
    *,
    precision: str | None = "highest",
) -> Float[Array, "n h w outputs"]:
    """Multiplies the channels of each pixel by a matrix; `precision` is that of this product and of its gradients'.

    >>> pointwise_conv(jnp.ones((1, 2, 2, 3)), jnp.ones((3, 5))).shape
    (1, 2, 2, 5)
    """
    return _matmul(images, weight, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(images: Array, weight: Array, precision: str | None) -> Array:
    return jnp.matmul(images, weight, precision=precision)


def _forward(images: Array, weight: Array, precision: str | None) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(images, weight, precision), (images, weight)


def _backward(precision: str | None, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    images, weight = saved
    pixels, pixel_grads = (x.reshape(-1, x.shape[-1]) for x in (images, grad))
    images_grad = jnp.matmul(grad, weight.T, precision=precision)
    over_pixels = (((0,), (0,)), ((), ()))
    return images_grad, lax.dot_general(pixels, pixel_grads, over_pixels, precision=precision)


_matmul.defvjp(_forward, _backward)
