"""The convolution of an image's few channels, which starts the network.

On a CPU it is k*k*inputs multiply-adds of whole images, as in `depthwise.py`: in half the time of XLA's convolution
(4 x 512 x 512 x 3 to 16 channels, k 3, stride 2, 2 cores: 4.3 ms and 10.9 ms; filter gradient 9.7 ms and 15.5 ms).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32
from topformer_jax.ops.depthwise import channel_sums, choose, image_windows, library_conv


def stem_conv(
    images: Float[Array, "n h w inputs"],
    kernel: Float[Array, "k k inputs outputs"],
    stride: int = 1,
    *,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n height width outputs"]:
    """Convolves with `k // 2` zeros around the image (k odd); `method` is that of `depthwise_conv`."""
    library = functools.partial(library_conv, stride=stride, groups=1, precision=precision)
    with jax.named_scope("stem"):
        return choose(method, functools.partial(_shifted, stride=stride), library, images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(images: Array, kernel: Array, stride: int) -> Array:
    k, _, inputs, _ = kernel.shape
    wide = at_least_float32(images.dtype)
    weights = kernel.astype(wide).reshape(k * k, inputs, -1)
    terms = (
        window[..., i : i + 1].astype(wide) * weights[place, i]
        for place, window in enumerate(image_windows(images, k, stride))
        for i in range(inputs)
    )
    return functools.reduce(jnp.add, terms).astype(images.dtype)


def _forward(images: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(images, kernel, stride), (images, kernel)


def _backward(stride: int, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    images, kernel = saved
    k, _, inputs, _ = kernel.shape
    wide = at_least_float32(images.dtype)
    products = [
        window[..., i : i + 1].astype(wide) * grad.astype(wide)
        for window in image_windows(images, k, stride)
        for i in range(inputs)
    ]
    kernel_grad = jnp.stack(channel_sums(products)).reshape(kernel.shape).astype(kernel.dtype)
    # Nobody trains an image, so this is for completeness: XLA leaves out what is not asked for.
    library = functools.partial(library_conv, stride=stride, groups=1, precision="highest")
    _, pullback = jax.vjp(lambda images: library(images, kernel), images)
    return (*pullback(grad), kernel_grad)


_shifted.defvjp(_forward, _backward)
