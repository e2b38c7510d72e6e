"""Depthwise convolution: one k x k filter a channel.

XLA's grouped convolution is 10 to 25 times slower on a CPU than k*k shifted multiply-adds, and its gradients
more so; elsewhere the library's own is the default. `depthwise_conv` is the one place that chooses.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32

METHODS = ("auto", "shifted", "library")


def depthwise_conv(
    images: Float[Array, "n h w c"],
    kernel: Float[Array, "k k 1 c"],
    stride: int = 1,
    *,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n height width c"]:
    """Convolves every channel with its own filter, `k // 2` zeros around the image (k odd).

    The output is `(h - 1) // stride + 1` high, the width likewise. `method` is "shifted", "library" or
    "auto": shifted where the program runs on a CPU, the library elsewhere. A program that is exported needs
    an explicit choice, since "auto" leaves both branches in it.
    """
    library = functools.partial(_library, stride=stride, precision=precision)
    shifted = functools.partial(_shifted, stride=stride)
    with jax.named_scope("depthwise"):
        if method == "library":
            return library(images, kernel)
        if method == "shifted":
            return shifted(images, kernel)
        if method == "auto":
            return lax.platform_dependent(images, kernel, cpu=shifted, default=library)
    raise ValueError(f"depthwise method {method!r}: expected one of {', '.join(METHODS)}")


def _library(images: Array, kernel: Array, stride: int, precision: str | None) -> Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=images.shape[-1],
        precision=precision,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(images: Array, kernel: Array, stride: int) -> Array:
    k = kernel.shape[0]
    pad = k // 2
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = _windows(padded, k, stride, ((h - 1) // stride + 1, (w - 1) // stride + 1))
    return _weighted_sum(windows, lambda row, column: kernel[row, column, 0], k).astype(images.dtype)


def _shifted_forward(images: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(images, kernel, stride), (images, kernel)


def _shifted_backward(stride: int, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    images, kernel = saved
    k = kernel.shape[0]
    pad = k // 2
    n, h, w, c = images.shape
    height, width = grad.shape[1:3]
    zero = jnp.zeros((), grad.dtype)

    # With respect to the image: the gradient, spread out by the stride, correlated with the flipped filter.
    rest = k - 1 - pad
    spread = lax.pad(
        grad,
        zero,
        (
            (0, 0, 0),
            (rest, h - 1 - (height - 1) * stride + pad, stride - 1),
            (rest, w - 1 - (width - 1) * stride + pad, stride - 1),
            (0, 0, 0),
        ),
    )
    windows = _windows(spread, k, 1, (h, w))
    image_grad = _weighted_sum(windows, lambda row, column: kernel[k - 1 - row, k - 1 - column, 0], k)

    # With respect to the filter: k*k sums over the batch and the pixels, in one pass. All of them are one
    # variadic reduction over h, which XLA's CPU backend divides over n and vectorises over (w, c); those are
    # summed after it.
    wide = at_least_float32(images.dtype)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    products = [
        window.astype(wide) * grad.astype(wide) for window in _windows(padded, k, stride, (height, width))
    ]
    sums = lax.reduce(
        products,
        [jnp.zeros((), wide)] * len(products),
        lambda left, right: [a + b for a, b in zip(left, right, strict=True)],
        (1,),
    )
    kernel_grad = jnp.stack([rows.sum((0, 1)) for rows in sums]).reshape(k, k, 1, c)
    return image_grad.astype(images.dtype), kernel_grad.astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _windows(padded: Array, k: int, stride: int, size: tuple[int, int]) -> list[Array]:
    """The k*k shifted, strided views of a padded image, each `[n, *size, c]`, row by row."""
    n, _, _, c = padded.shape
    height, width = (stride * (extent - 1) + 1 for extent in size)
    return [
        lax.slice(padded, (0, row, column, 0), (n, row + height, column + width, c), (1, stride, stride, 1))
        for row in range(k)
        for column in range(k)
    ]


def _weighted_sum(windows: list[Array], weight: Callable[[int, int], Array], k: int) -> Array:
    """Sums `window * weight(row, column)` in at least float32."""
    wide = at_least_float32(windows[0].dtype)
    terms = (
        window.astype(wide) * weight(*divmod(index, k)).astype(wide) for index, window in enumerate(windows)
    )
    return functools.reduce(jnp.add, terms)
