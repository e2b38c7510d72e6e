"""The 1x1 convolution as a matrix product, with a weight gradient that needs no copies.

JAX's own gradient computes the transposed weight gradient and transposes it back, for which XLA's CPU backend copies
the gradient of the feature map into another layout. For 4 x 256 x 256 pixels, 16 to 64 channels, on 2 cores, that
takes 54 ms; the gradient below takes 38 ms. Within a training step of Tiny it is 140 ms against 7 ms.

Where no gradient is taken, a CPU computes a product of few input channels as multiply-adds of the channels. XLA fuses
those with the BatchNorm, the ReLU and the padding that follow, so the largest feature map of the network is written
once instead of twice: for 256 x 256 pixels, 16 to 64 channels, on 2 cores, 1.3 ms instead of 2.4 ms.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32
from topformer_jax.ops.depthwise import dispatch, library_conv

# Up to this many input channels are multiplied and added one by one. A whole Tiny (1 x 512 x 512) takes 16.5 ms
# with products alone, 15.5 ms with a limit of 16, and 18.7 ms with one of 64.
MAX_TERMS = 24


def pointwise_conv(
    images: Float[Array, "n h w inputs"],
    weight: Float[Array, "inputs outputs"],
    *,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n h w outputs"]:
    """Multiplies the channels of each pixel by a matrix; `precision` is that of this product and of its gradients'.

    `method` is that of `depthwise_conv`, and decides about programs without gradients: "shifted" are multiply-adds of
    few input channels, "library" is XLA's convolution, in which exporters see the layer. All else is a product.

    >>> pointwise_conv(jnp.ones((1, 2, 2, 3)), jnp.ones((3, 5))).shape
    (1, 2, 2, 5)
    """
    return _pointwise(images, weight, method, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pointwise(images: Array, weight: Array, method: str, precision: str | None) -> Array:
    """What runs where no gradient is taken; with gradients `_forward` does."""
    if method == "library":
        return library_conv(images, weight[None, None], stride=1, groups=1, precision=precision)
    matmul = functools.partial(jnp.matmul, precision=precision)
    if len(weight) > MAX_TERMS:
        return matmul(images, weight)
    return dispatch(method, _sum_channels, matmul, images, weight)


def _sum_channels(images: Array, weight: Array) -> Array:
    """The product as multiply-adds of one input channel after the other, in at least float32."""
    accum_dtype = at_least_float32(images.dtype)
    # The barrier keeps XLA from computing the images anew for each of their channels.
    values, weight = lax.optimization_barrier(images).astype(accum_dtype), weight.astype(accum_dtype)
    terms = (values[..., channel : channel + 1] * row for channel, row in enumerate(weight))
    return functools.reduce(jnp.add, terms).astype(images.dtype)


def _forward(
    images: Array, weight: Array, method: str, precision: str | None
) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(images, weight, precision=precision), (images, weight)


def _backward(
    method: str, precision: str | None, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    images, weight = saved
    pixels, pixel_grads = (x.reshape(-1, x.shape[-1]) for x in (images, grad))
    images_grad = jnp.matmul(grad, weight.T, precision=precision)
    over_pixels = (((0,), (0,)), ((), ()))
    return images_grad, lax.dot_general(pixels, pixel_grads, over_pixels, precision=precision)


_pointwise.defvjp(_forward, _backward)
