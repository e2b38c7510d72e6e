"""Bilinear resize and adaptive average pooling on PyTorch's sampling grids.

Both are linear in each axis, so both are written as two products with constant matrices: a TPU's matrix
unit does them, autodiff gives two products back, and every exporter knows them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from topformer_jax.ops import at_least_float32


def resize(
    images: Float[Array, "n h w c"], size: tuple[int, int], *, precision: str | None = "highest"
) -> Float[Array, "n height width c"]:
    """Resizes to `size` = (height, width) as `torch.nn.functional.interpolate(mode="bilinear")` does.

    Half-pixel centres (`align_corners=False`), no antialiasing; the grid is computed in the precision that
    PyTorch computes it in. `precision` is that of the two products.
    """
    with jax.named_scope("resize"):
        return _apply(images, size, bilinear_matrix, precision)


def adaptive_avg_pool(
    images: Float[Array, "n h w c"], size: tuple[int, int], *, precision: str | None = "highest"
) -> Float[Array, "n height width c"]:
    """Averages over `size` = (height, width) windows as `torch.nn.functional.adaptive_avg_pool2d` does.

    Window i of m over n values spans `floor(i n / m) .. ceil((i + 1) n / m)`, so windows overlap
    where m does not divide n.
    """
    with jax.named_scope("pool"):
        return _apply(images, size, pooling_matrix, precision)


@functools.lru_cache(maxsize=512)
def bilinear_matrix(size: int, new_size: int, dtype: str = "float32") -> np.ndarray:
    """The `[new_size, size]` matrix of a 1-D bilinear resize: see `bilinear_taps`."""
    lower, upper, fraction = bilinear_taps(size, new_size, dtype)
    matrix = np.zeros((new_size, size), fraction.dtype)
    rows = np.arange(new_size)
    np.add.at(matrix, (rows, lower), 1 - fraction)
    np.add.at(matrix, (rows, upper), fraction)
    matrix.flags.writeable = False  # it is shared by every caller through the cache
    return matrix


def bilinear_taps(
    size: int, new_size: int, dtype: str = "float32"
) -> tuple[Int[np.ndarray, " pixels"], Int[np.ndarray, " pixels"], Float[np.ndarray, " pixels"]]:
    """The two sources of each of `new_size` pixels, and the second one's share.

    The source position of output i is `max(scale * (i + 0.5) - 0.5, 0)` with `scale = size / new_size`, rounded
    as PyTorch's kernels round it: the scale to `dtype` (float32 or float64), then product and difference once,
    in a fused multiply-add. At 600 pixels that is worth 3e-5 of a weight.
    """
    real = np.dtype(dtype).type
    scale = np.longdouble(real(size) / real(new_size))
    position = np.maximum(scale * (np.arange(new_size) + 0.5) - 0.5, 0).astype(real)
    lower = np.minimum(np.floor(position).astype(np.int64), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    return lower, upper, np.clip(position - lower.astype(real), real(0), real(1))


@functools.lru_cache(maxsize=512)
def pooling_matrix(size: int, new_size: int, dtype: str = "float32") -> np.ndarray:
    """The `[new_size, size]` matrix of a 1-D adaptive average pooling: row i is 1 / length on its window."""
    matrix = np.zeros((new_size, size), np.dtype(dtype))
    for i in range(new_size):
        start, stop = i * size // new_size, -(-(i + 1) * size // new_size)
        matrix[i, start:stop] = 1 / (stop - start)
    matrix.flags.writeable = False
    return matrix


def _apply(
    images: Array, size: tuple[int, int], matrix: Callable[[int, int, str], np.ndarray], precision: str | None
) -> Array:
    """Applies the matrix of each axis, the width first: the larger product then runs over whole rows.

    The matrices are broadcast over the batch so that neither product needs a transpose, forward or backward.
    """
    n, h, w, c = images.shape
    height, width = size
    dtype = images.dtype
    wide = at_least_float32(dtype)
    precision = precision if dtype == wide else None
    product = functools.partial(jnp.matmul, precision=precision, preferred_element_type=wide)
    if w != width:
        across = jnp.broadcast_to(matrix(w, width, wide.name).astype(dtype), (n * h, width, w))
        images = product(across, images.reshape(n * h, w, c)).astype(dtype).reshape(n, h, width, c)
    if h != height:
        down = jnp.broadcast_to(matrix(h, height, wide.name).astype(dtype), (n, height, h))
        images = product(down, images.reshape(n, h, width * c)).astype(dtype).reshape(n, height, width, c)
    return images
