"""The network's convolutions, in the form that is fastest on each platform.

Depthwise: on a CPU, XLA's grouped convolution is 10 to 25 times slower than k*k multiply-adds of shifted slices. On a
TPU the multiply-adds move fewer bytes in training, and more in inference. GPUs use XLA's convolution, but for the
gradient of the images: XLA pads and writes what multiply-adds read in the same kernel as the layer before.

1x1: a matrix product. JAX's own weight gradient copies feature maps on a CPU: 140 ms in a training step of Tiny, 7 ms
here. In inference a CPU multiplies few input channels one by one, which XLA fuses with the layers that follow: 1.3 ms
instead of 2.4 ms for 256 x 256 pixels, 16 to 64 channels, 2 cores.

The method "single_op" is XLA's convolution everywhere: one operation per layer, as exporters need.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32

# `sum_over_pixels` adds up blocks of this many pixels, of this many arrays together. XLA's CPU backend then keeps the
# sums in registers and reads each value once; with larger blocks it takes 2 to 5 times as long.
BLOCK_PIXELS, BLOCK_ARRAYS = 8, 9
# Up to this many input channels of a 1x1 convolution are multiplied one by one. A whole Tiny (1 x 512 x 512) takes
# 16.5 ms with products only, 15.5 ms with a limit of 16, and 18.7 ms with one of 64.
MAX_TERMS = 24


def conv(
    images: Float[Array, "n h w inputs"],
    kernel: Float[Array, "k k group_inputs outputs"],
    stride: int = 1,
    *,
    groups: int = 1,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n height width outputs"]:
    """Convolves with `k // 2` zeros on every side, as `torch.nn.Conv2d` pads.

    Sums are computed in at least float32; the result has the dtype of the images.

    Args:
        images: any feature maps.
        kernel: k is odd.
        stride: of both axes; the result has `(h - 1) // stride + 1` rows, and columns likewise.
        groups: the channels are split into.
        method: "auto": the fastest form for the platform that the program is compiled for; "single_op": XLA's
            convolution. A program to be exported needs "single_op".
        precision: of matrix products and XLA's convolutions, and of their gradients.

    >>> conv(jnp.ones((1, 5, 6, 2)), jnp.ones((3, 3, 1, 2)), 2, groups=2)[0, :, :, 0].tolist()
    [[4.0, 6.0, 6.0], [6.0, 9.0, 9.0], [4.0, 6.0, 6.0]]
    """
    k, _, group_inputs, outputs = kernel.shape
    if method == "auto" and group_inputs == 1 and groups == outputs:
        with jax.named_scope("depthwise"):
            return _depthwise(images, kernel, stride, precision)
    if method == "auto" and k == stride == groups == 1:
        return _pointwise(images, kernel[0, 0], precision)
    return _xla_conv(images, kernel, stride, groups, precision)


def _xla_conv(images: Array, kernel: Array, stride: int, groups: int, precision: str | None) -> Array:
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
def _depthwise(images: Array, kernel: Array, stride: int, precision: str | None) -> Array:
    """The depthwise convolution where no gradient is taken; with gradients `_depthwise_forward` runs."""
    shifted = functools.partial(multiply_add, stride=stride)
    return lax.platform_dependent(images, kernel, cpu=shifted, default=_xla_depthwise(images, stride, precision))


def _xla_depthwise(images: Array, stride: int, precision: str | None) -> Callable[[Array, Array], Array]:
    return functools.partial(_xla_conv, stride=stride, groups=images.shape[-1], precision=precision)


def _depthwise_forward(
    images: Array, kernel: Array, stride: int, precision: str | None
) -> tuple[Array, tuple[Array, Array]]:
    shifted, xla = functools.partial(multiply_add, stride=stride), _xla_depthwise(images, stride, precision)
    return lax.platform_dependent(images, kernel, cpu=shifted, tpu=shifted, default=xla), (images, kernel)


def _depthwise_backward(
    stride: int, precision: str | None, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    def xla(images: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
        _, pull_back = jax.vjp(_xla_depthwise(images, stride, precision), images, kernel)
        image_grad, kernel_grad = pull_back(grad)
        return image_grad, kernel_grad

    def on_gpu(images: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
        _, kernel_grad = xla(images, kernel, grad)
        return _image_gradient(images, kernel, grad, stride), kernel_grad

    shifted = functools.partial(multiply_add_gradients, stride=stride)
    on_cpu = functools.partial(shifted, sum_pixels=sum_over_pixels)
    return lax.platform_dependent(*saved, grad, cpu=on_cpu, tpu=shifted, cuda=on_gpu, rocm=on_gpu, default=xla)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _sum_plainly(values: Sequence[Array]) -> list[Array]:
    return [jnp.sum(array, (0, 1, 2)) for array in values]


def multiply_add(images: Array, kernel: Array, stride: int) -> Array:
    """The depthwise convolution as k*k multiply-adds of shifted slices."""
    k = kernel.shape[0]
    return _sum_products(_slices_of_images(images, k, stride), kernel.reshape(k * k, -1)).astype(images.dtype)


def _image_gradient(images: Array, kernel: Array, grad: Array, stride: int) -> Array:
    """The gradient, dilated by the stride, correlated with the flipped filter."""
    k = kernel.shape[0]
    pad = k // 2
    _, h, w, _ = images.shape
    height, width = grad.shape[1:3]
    after = k - 1 - pad
    padding = (
        (0, 0, 0),
        (after, h - 1 - (height - 1) * stride + pad, stride - 1),
        (after, w - 1 - (width - 1) * stride + pad, stride - 1),
        (0, 0, 0),
    )
    dilated = lax.pad(grad, jnp.zeros((), grad.dtype), padding)
    products = _sum_products(_slice_shifted(dilated, k, 1, (h, w)), kernel.reshape(k * k, -1)[::-1])
    return products.astype(images.dtype)


def multiply_add_gradients(
    images: Array,
    kernel: Array,
    grad: Array,
    stride: int,
    sum_pixels: Callable[[Sequence[Array]], list[Array]] = _sum_plainly,
) -> tuple[Array, Array]:
    """The gradients of `multiply_add` in the images and the kernel: k*k sums over the batch and the pixels."""
    image_grad = _image_gradient(images, kernel, grad, stride)
    accum_dtype = at_least_float32(images.dtype)
    slices = _slices_of_images(images, kernel.shape[0], stride)
    sums = sum_pixels([view.astype(accum_dtype) * grad.astype(accum_dtype) for view in slices])
    kernel_grad = jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)
    return image_grad, kernel_grad


def _slices_of_images(images: Array, k: int, stride: int) -> list[Array]:
    """For each of the k*k filter weights, the values `[n, height, width, c]` that it is multiplied with."""
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


def _sum_products(slices: Sequence[Array], weights: Array) -> Array:
    """The sum of each slice times its row of weights `[slices, c]`, in at least float32."""
    accum_dtype = at_least_float32(slices[0].dtype)
    weights = weights.astype(accum_dtype)
    terms = (view.astype(accum_dtype) * weights[index] for index, view in enumerate(slices))
    return functools.reduce(jnp.add, terms)


def sum_over_pixels(values: Sequence[Float[Array, "n h w c"]]) -> list[Float[Array, " c"]]:
    """Sums each array over all axes but the last: within blocks of pixels first, then over the blocks."""
    _, *sides, c = values[0].shape
    pixels = math.prod(sides)
    # Blocks do not cross images, so a batch that is sharded over devices needs no transfers. If no block size from
    # 4 to 8 divides the pixels of an image, an image is one block.
    block = next((size for size in range(BLOCK_PIXELS, 3, -1) if pixels % size == 0), pixels)
    zero = jnp.zeros((), values[0].dtype)
    sums: list[Array] = []
    for start in range(0, len(values), BLOCK_ARRAYS):
        blocks = [array.reshape(-1, block, c) for array in values[start : start + BLOCK_ARRAYS]]
        sums += lax.reduce(blocks, [zero] * len(blocks), functools.partial(jax.tree.map, jnp.add), (1,))
    return [array.sum(0) for array in sums]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pointwise(images: Array, weight: Array, precision: str | None) -> Array:
    """The 1x1 convolution where no gradient is taken; with gradients `_pointwise_forward` runs."""
    matmul = functools.partial(jnp.matmul, precision=precision)
    if len(weight) > MAX_TERMS:
        return matmul(images, weight)
    return lax.platform_dependent(images, weight, cpu=_sum_channels, default=matmul)


def _sum_channels(images: Array, weight: Array) -> Array:
    """The product as multiply-adds of one input channel after the other."""
    # The barrier keeps XLA from computing the images again for each of their channels.
    images = lax.optimization_barrier(images)
    channels = [images[..., channel : channel + 1] for channel in range(len(weight))]
    return _sum_products(channels, weight).astype(images.dtype)


def _pointwise_forward(images: Array, weight: Array, precision: str | None) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(images, weight, precision=precision), (images, weight)


def _pointwise_backward(precision: str | None, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    images, weight = saved
    pixels, pixel_grads = (x.reshape(-1, x.shape[-1]) for x in (images, grad))
    images_grad = jnp.matmul(grad, weight.T, precision=precision)
    over_pixels = (((0,), (0,)), ((), ()))
    return images_grad, lax.dot_general(pixels, pixel_grads, over_pixels, precision=precision)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)
