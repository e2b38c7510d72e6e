"""Depthwise convolution: one k x k filter a channel.

XLA's grouped convolution is 10 to 25 times slower on a CPU than k*k shifted multiply-adds, and its gradients
more so; elsewhere the library's own is the default. `choose` is the one place that decides.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32

METHODS = ("auto", "shifted", "library")
# XLA's CPU backend keeps the sums of so many pixels of so many arrays in registers and reads each value once; over
# longer stretches it takes 2 to 5 times as long.
BLOCK, ARRAYS = 8, 9


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
    library = functools.partial(library_conv, stride=stride, groups=images.shape[-1], precision=precision)
    with jax.named_scope("depthwise"):
        return choose(method, functools.partial(_shifted, stride=stride), library, images, kernel)


def choose(
    method: str,
    shifted: Callable[[Array, Array], Array],
    library: Callable[[Array, Array], Array],
    images: Array,
    kernel: Array,
) -> Array:
    """The convolution in the form that `method` names: see `depthwise_conv`."""
    match method:
        case "library":
            return library(images, kernel)
        case "shifted":
            return shifted(images, kernel)
        case "auto":
            return lax.platform_dependent(images, kernel, cpu=shifted, default=library)
    raise ValueError(f"depthwise method {method!r}: expected one of {', '.join(METHODS)}")


def library_conv(
    images: Float[Array, "n h w inputs"],
    kernel: Float[Array, "k k fan outputs"],
    *,
    stride: int,
    groups: int,
    precision: str | None,
) -> Float[Array, "n height width outputs"]:
    """XLA's own convolution, with `k // 2` zeros around the image."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(images: Array, kernel: Array, stride: int) -> Array:
    k = kernel.shape[0]
    return _weighted_sum(
        image_windows(images, k, stride), lambda row, column: kernel[row, column, 0], k
    ).astype(images.dtype)


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

    # With respect to the filter: k*k sums over the batch and the pixels.
    wide = at_least_float32(images.dtype)
    windows = image_windows(images, k, stride)
    sums = channel_sums([window.astype(wide) * grad.astype(wide) for window in windows])
    kernel_grad = jnp.stack(sums).reshape(k, k, 1, c)
    return image_grad.astype(images.dtype), kernel_grad.astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def image_windows(images: Float[Array, "n h w c"], k: int, stride: int) -> list[Array]:
    """What each of the k*k filter values is multiplied with, each `[n, height, width, c]`, row by row."""
    pad = k // 2
    _, h, w, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return _windows(padded, k, stride, ((h - 1) // stride + 1, (w - 1) // stride + 1))


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


def channel_sums(values: Sequence[Float[Array, "n h w c"]]) -> list[Float[Array, " c"]]:
    """The sum of each array over all axes but the last: blocks of pixels first, then the blocks."""
    _, *sides, c = values[0].shape
    pixels = math.prod(sides)
    # A block lies within an image, so that images on several devices stay there. Few sizes have no such divisor.
    block = next((size for size in range(BLOCK, 3, -1) if pixels % size == 0), pixels)
    zero = jnp.zeros((), values[0].dtype)
    sums: list[Array] = []
    for start in range(0, len(values), ARRAYS):
        part = [array.reshape(-1, block, c) for array in values[start : start + ARRAYS]]
        sums += lax.reduce(part, [zero] * len(part), _add, (1,))
    return [array.sum(0) for array in sums]


def _add(left: list[Array], right: list[Array]) -> list[Array]:
    return [a + b for a, b in zip(left, right, strict=True)]
