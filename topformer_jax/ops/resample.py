"""Bilinear resize and adaptive average pooling that compute exactly what PyTorch's do.

Both are linear and separable, so both are two products with constant matrices, one for each axis. Products run on
the matrix units of TPUs and GPUs, their gradients are products again, and every exporter supports them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from topformer_jax.ops import at_least_float32

Extent = Any  # pixels: a number, or a symbol of `jax.export`
# The matrices of a resize's rows and columns, `[after, before]`; where every image has its own, `[n, after, before]`.
Matrix = Float[np.ndarray | Array, "*_n _after _before"]
Matrices = tuple[Matrix, Matrix]


def resize(
    images: Float[Array, "n h w c"],
    size: tuple[Extent, Extent],
    *,
    matrices: Matrices | None = None,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n height width c"]:
    """Resizes bilinearly, exactly as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.

    Args:
        images: any feature maps; the result has their dtype, sums are computed in at least float32.
        size: (height, width) of the result, pixels.
        matrices: one pair for each image, for images that are smaller than their canvas.
        method: "single_op": two products with one matrix for all images, as exporters need; sizes may be symbols.
            "auto": a product for each image and row, which is faster in training.
        precision: of the two matrix products.

    >>> resize(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1), (1, 4)).ravel().tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    with jax.named_scope("resize"):
        if method == "single_op" and matrices is None:
            return plain_resize(images, size=tuple(size), precision=precision)
        return _resample(images, size, matrices, bilinear_matrix, precision)


def adaptive_avg_pool(
    images: Float[Array, "n h w c"],
    size: tuple[Extent, Extent],
    *,
    matrices: Matrices | None = None,
    method: str = "auto",
    precision: str | None = "highest",
) -> Float[Array, "n height width c"]:
    """Averages over windows, exactly as `torch.nn.functional.adaptive_avg_pool2d`; arguments as for `resize`.

    Window i of m over n values spans `floor(i n / m) .. ceil((i + 1) n / m)`, so windows overlap if m does not divide
    n.

    >>> adaptive_avg_pool(jnp.arange(4.0).reshape(1, 1, 4, 1), (1, 2)).ravel().tolist()
    [0.5, 2.5]
    >>> adaptive_avg_pool(jnp.arange(4.0).reshape(1, 1, 4, 1), (1, 3)).ravel().tolist()
    [0.5, 1.5, 2.5]
    """
    with jax.named_scope("pool"):
        if method == "single_op" and matrices is None:
            return plain_pool(images, size=tuple(size), precision=precision)
        return _resample(images, size, matrices, pooling_matrix, precision)


@functools.partial(jax.jit, static_argnames=("size", "precision"))
def plain_resize(
    images: Float[Array, "n h w c"], size: tuple[Extent, Extent], precision: str | None
) -> Float[Array, "n height width c"]:
    """`resize` with method "single_op"; the LiteRT exporter finds it by its name and writes a resize of its own."""
    return _multiply_axes(images, size, bilinear_matrix, precision)


@functools.partial(jax.jit, static_argnames=("size", "precision"))
def plain_pool(
    images: Float[Array, "n h w c"], size: tuple[Extent, Extent], precision: str | None
) -> Float[Array, "n height width c"]:
    """`adaptive_avg_pool` with method "single_op"; see `plain_resize`."""
    return _multiply_axes(images, size, pooling_matrix, precision)


def _multiply_axes(
    images: Array,
    size: tuple[Extent, Extent],
    axis_matrix: Callable[[int, int, str], np.ndarray],
    precision: str | None,
) -> Array:
    dtype = images.dtype
    accum_dtype = at_least_float32(dtype)
    precision = precision if dtype == accum_dtype else None
    for axis, new in ((2, size[1]), (1, size[0])):
        if images.shape[axis] != new:
            matrix = axis_matrix_of(axis_matrix, images.shape[axis], new, accum_dtype.name)
            over = (((axis,), (1,)), ((), ()))
            product = lax.dot_general(images, jnp.asarray(matrix, dtype), over, precision, accum_dtype)
            images = jnp.moveaxis(product, -1, axis).astype(dtype)
    return images


@functools.lru_cache(maxsize=512)
def bilinear_matrix(size: int, new_size: int, dtype: str = "float32") -> np.ndarray:
    """The `[new_size, size]` matrix of a bilinear resize of one axis (read-only). `dtype`: see `bilinear_taps`.

    >>> bilinear_matrix(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    lower, upper, fraction = bilinear_taps(size, new_size, dtype)
    matrix = np.zeros((new_size, size), fraction.dtype)
    rows = np.arange(new_size)
    np.add.at(matrix, (rows, lower), 1 - fraction)
    np.add.at(matrix, (rows, upper), fraction)
    matrix.flags.writeable = False  # the cache returns the same array to every caller
    return matrix


def bilinear_taps(
    size: int, new_size: int, dtype: str = "float32"
) -> tuple[Int[np.ndarray, " pixels"], Int[np.ndarray, " pixels"], Float[np.ndarray, " pixels"]]:
    """For each of `new_size` output pixels, the two input pixels it interpolates and the weight of the second.

    Output i samples the input at `max(scale * (i + 0.5) - 0.5, 0)` with `scale = size / new_size`, rounded as in
    PyTorch's kernels: the scale to `dtype` (float32 or float64), the multiplication and subtraction once, as a fused
    multiply-add. At 600 pixels, other roundings change a weight by up to 3e-5.
    """
    float_type = np.dtype(dtype).type
    scale = np.longdouble(float_type(size) / float_type(new_size))
    position = np.maximum(scale * (np.arange(new_size) + 0.5) - 0.5, 0).astype(float_type)
    lower = np.minimum(np.floor(position).astype(np.int64), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    return lower, upper, np.clip(position - lower.astype(float_type), float_type(0), float_type(1))


@functools.lru_cache(maxsize=512)
def pooling_matrix(size: int, new_size: int, dtype: str = "float32") -> np.ndarray:
    """The `[new_size, size]` matrix of an adaptive average pooling of one axis (read-only).

    >>> pooling_matrix(4, 3).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    matrix = np.zeros((new_size, size), np.dtype(dtype))
    for i in range(new_size):
        start, stop = i * size // new_size, -(-(i + 1) * size // new_size)
        matrix[i, start:stop] = 1 / (stop - start)
    matrix.flags.writeable = False
    return matrix


def _resample(
    images: Array,
    size: tuple[Extent, Extent],
    matrices: Matrices | None,
    axis_matrix: Callable[[int, int, str], np.ndarray],
    precision: str | None,
) -> Array:
    """Multiplies each axis by its matrix, the width first, so that the larger product has contiguous rows.

    The matrices are broadcast over the batch, so that no product needs a transpose, forward or backward.
    """
    n, h, w, c = images.shape
    height, width = size
    dtype = images.dtype
    accum_dtype = at_least_float32(dtype)
    precision = precision if dtype == accum_dtype else None
    matmul = functools.partial(jnp.matmul, precision=precision, preferred_element_type=accum_dtype)
    rows, columns = (None, None) if matrices is None else matrices
    if columns is not None or w != width:
        columns = axis_matrix(w, width, accum_dtype.name) if columns is None else columns.repeat(h, 0)
        matrix = jnp.broadcast_to(columns.astype(dtype), (n * h, width, w))
        images = matmul(matrix, images.reshape(n * h, w, c)).astype(dtype).reshape(n, h, width, c)
    if rows is not None or h != height:
        rows = axis_matrix(h, height, accum_dtype.name) if rows is None else rows
        matrix = jnp.broadcast_to(rows.astype(dtype), (n, height, h))
        images = matmul(matrix, images.reshape(n, h, width * c)).astype(dtype).reshape(n, height, width, c)
    return images


def axis_matrix_of(
    make: Callable[[int, int, str], np.ndarray], size: Extent, new_size: Extent, dtype: str = "float32"
) -> Float[np.ndarray | Array, "_after _before"]:
    """The matrix of `make`, `bilinear_matrix` or `pooling_matrix`; if a size is a symbol, the program makes it."""
    if isinstance(size, int) and isinstance(new_size, int):
        return make(size, new_size, dtype)
    before, after = jnp.arange(size), jnp.arange(new_size)[:, None]
    length, new_length = jnp.asarray(size), jnp.asarray(new_size)
    if make is pooling_matrix:
        divisor = jnp.broadcast_to(new_length, after.shape)
        start = lax.div(after * length, divisor)
        stop = lax.div((after + 1) * length + new_length - 1, divisor)  # rounded up
        inside = (before >= start) & (before < stop)
        return jnp.where(inside, 1 / (stop - start).astype(dtype), jnp.zeros((), dtype))
    scale = length.astype(dtype) / new_length.astype(dtype)
    position = jnp.clip(scale * (after.astype(dtype) + 0.5) - 0.5, 0, (length - 1).astype(dtype))
    return jnp.maximum(1 - jnp.abs(position - before.astype(dtype)), 0)
