"""Depthwise convolution: one k x k filter for each channel.

On a CPU, XLA's grouped convolution is 10 to 25 times slower than k*k multiply-adds of shifted slices, and its
gradients are slower still. So there are two implementations, "shifted" for CPUs, and for training on
TPUs, and "library" (XLA's); `dispatch` chooses between them.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32

Form = Callable[[Array, Array], Array]
METHODS = ("auto", "shifted", "library")
# `sum_over_pixels` adds up blocks of this many pixels, of this many arrays together. XLA's CPU backend then keeps the
# sums in registers and reads each value once; with larger blocks it takes 2 to 5 times as long.
BLOCK_PIXELS, BLOCK_ARRAYS = 8, 9


def depthwise_conv(
    images: Float[Array, "n h w c"],
    kernel: Float[Array, "k k 1 c"],
    stride: int = 1,
    *,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n height width c"]:
    """Convolves each channel with its own filter, with `k // 2` zeros on every side, as `torch.nn.Conv2d` pads.

    Sums are computed in at least float32; the result has the dtype of the images.

    Args:
        images: any feature maps.
        kernel: k is odd.
        stride: of both axes; the result has `(h - 1) // stride + 1` rows, and columns likewise.
        method: "shifted", "library", or "auto": "shifted" where the program runs on a CPU, or on a TPU and gradients
            are taken, "library" elsewhere. A program to be exported needs one of the first two, since with "auto"
            it contains both.
        precision: of the products in the library's convolution.

    Raises:
        ValueError: there is no such method.

    >>> depthwise_conv(jnp.ones((1, 5, 6, 2)), jnp.ones((3, 3, 1, 2)), 2)[0, :, :, 0].tolist()
    [[4.0, 6.0, 6.0], [6.0, 9.0, 9.0], [4.0, 6.0, 6.0]]
    """
    library = functools.partial(library_conv, stride=stride, groups=images.shape[-1], precision=precision)
    blocks, whole = (functools.partial(_shifted, stride=stride, inference=form) for form in (None, library))
    with jax.named_scope("depthwise"):
        return dispatch(method, blocks, library, images, kernel, tpu=whole)


def dispatch(
    method: str,
    shifted: Callable[[Array, Array], Array],
    library: Callable[[Array, Array], Array],
    images: Array,
    kernel: Array,
    tpu: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Runs the implementation that `method` names (see `depthwise_conv`); "auto" is decided when XLA compiles.

    `tpu` is what "auto" takes on a TPU, the library's if None.
    """
    match method:
        case "library":
            return library(images, kernel)
        case "shifted":
            return shifted(images, kernel)
        case "auto":
            return lax.platform_dependent(images, kernel, cpu=shifted, tpu=tpu or library, default=library)
    raise ValueError(f"depthwise method {method!r}: expected one of {', '.join(METHODS)}")


def library_conv(
    images: Float[Array, "n h w inputs"],
    kernel: Float[Array, "k k group_inputs outputs"],
    *,
    stride: int,
    groups: int,
    precision: str | None,
) -> Float[Array, "n height width outputs"]:
    """XLA's convolution, with `k // 2` zeros on every side."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted(images: Array, kernel: Array, stride: int, inference: Form | None) -> Array:
    """The multiply-adds.

    `inference` computes the output where no gradient is taken, for TPUs: it moves a quarter of the bytes there, and
    the filter's gradient is plain sums. None is for CPUs, where that gradient is `sum_over_pixels`.
    """
    return _multiply_add(images, kernel, stride) if inference is None else inference(images, kernel)


def _multiply_add(images: Array, kernel: Array, stride: int) -> Array:
    k = kernel.shape[0]
    return _sum_products(
        shifted_slices(images, k, stride), lambda row, column: kernel[row, column, 0], k
    ).astype(images.dtype)


def _shifted_forward(
    images: Array, kernel: Array, stride: int, inference: Form | None
) -> tuple[Array, tuple[Array, Array]]:
    return _multiply_add(images, kernel, stride), (images, kernel)


def _shifted_backward(
    stride: int, inference: Form | None, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    images, kernel = saved
    k = kernel.shape[0]
    pad = k // 2
    n, h, w, c = images.shape
    height, width = grad.shape[1:3]
    zero = jnp.zeros((), grad.dtype)

    # Of the images: the gradient, dilated by the stride, correlated with the flipped filter.
    after = k - 1 - pad
    dilated = lax.pad(
        grad,
        zero,
        (
            (0, 0, 0),
            (after, h - 1 - (height - 1) * stride + pad, stride - 1),
            (after, w - 1 - (width - 1) * stride + pad, stride - 1),
            (0, 0, 0),
        ),
    )
    slices = _slice_shifted(dilated, k, 1, (h, w))
    image_grad = _sum_products(slices, lambda row, column: kernel[k - 1 - row, k - 1 - column, 0], k)

    # Of the filter: k*k sums over the batch and the pixels.
    accum_dtype = at_least_float32(images.dtype)
    slices = shifted_slices(images, k, stride)
    products = [view.astype(accum_dtype) * grad.astype(accum_dtype) for view in slices]
    sums = sum_over_pixels(products) if inference is None else [jnp.sum(x, (0, 1, 2)) for x in products]
    kernel_grad = jnp.stack(sums).reshape(k, k, 1, c)
    return image_grad.astype(images.dtype), kernel_grad.astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def shifted_slices(images: Float[Array, "n h w c"], k: int, stride: int) -> list[Array]:
    """For each of the k*k filter weights, row by row, the values that it is multiplied with.

    They are strided slices of the zero-padded images, each `[n, height, width, c]`, the convolution's output size.
    """
    pad = k // 2
    _, h, w, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return _slice_shifted(padded, k, stride, ((h - 1) // stride + 1, (w - 1) // stride + 1))


def _slice_shifted(padded: Array, k: int, stride: int, size: tuple[int, int]) -> list[Array]:
    """The k*k slices of padded images, shifted by (row, column), row by row; each is `[n, *size, c]`."""
    n, _, _, c = padded.shape
    height, width = (stride * (extent - 1) + 1 for extent in size)
    return [
        lax.slice(padded, (0, row, column, 0), (n, row + height, column + width, c), (1, stride, stride, 1))
        for row in range(k)
        for column in range(k)
    ]


def _sum_products(slices: list[Array], weight: Callable[[int, int], Array], k: int) -> Array:
    """The sum over the filter of slice times `weight(row, column)`, in at least float32."""
    accum_dtype = at_least_float32(slices[0].dtype)
    terms = (
        view.astype(accum_dtype) * weight(*divmod(index, k)).astype(accum_dtype)
        for index, view in enumerate(slices)
    )
    return functools.reduce(jnp.add, terms)


def sum_over_pixels(values: Sequence[Float[Array, "n h w c"]]) -> list[Float[Array, " c"]]:
    """Sums each array over all axes but the last: within blocks of pixels first, then over the blocks."""
    _, *sides, c = values[0].shape
    pixels = math.prod(sides)
    # Blocks do not cross images, so a batch that is sharded over devices needs no transfers. Where no block size from
    # 4 to 8 divides the pixels of an image, an image is one block.
    block = next((size for size in range(BLOCK_PIXELS, 3, -1) if pixels % size == 0), pixels)
    zero = jnp.zeros((), values[0].dtype)
    sums: list[Array] = []
    for start in range(0, len(values), BLOCK_ARRAYS):
        blocks = [array.reshape(-1, block, c) for array in values[start : start + BLOCK_ARRAYS]]
        sums += lax.reduce(blocks, [zero] * len(blocks), _add, (1,))
    return [array.sum(0) for array in sums]


def _add(left: list[Array], right: list[Array]) -> list[Array]:
    return [a + b for a, b in zip(left, right, strict=True)]
