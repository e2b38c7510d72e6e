"""Images of different sizes on one canvas: what the layers must know so that each image alone counts.

The network has one program for each shape of its input, the canvas. A smaller image lies at the canvas's top left,
and its size is data. The layers then compute exactly what they would of the image alone:

- a convolution with a kernel above 1x1 sets what is outside of the image to zero before it reads it, as its own
  padding would be;
- pooling and resizes are products with a matrix for each axis; the matrices of the image's own size are passed in,
  with zeros for everything outside of it;
- attention gives no weight to keys outside of the image;
- everything else works on each pixel alone, so that the values outside never reach the image.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from topformer_jax.ops.resample import Matrices, bilinear_matrix, pooling_matrix

# The resizes inside the segmenter, (stride before, stride after), and what makes the matrix of an axis: pooling of
# the tokens, the injections' and the head's bilinear resizes.
RESIZES: dict[tuple[int, int], Callable[[int, int, str], np.ndarray]] = {
    **dict.fromkeys([(4, 64), (8, 64), (16, 64), (32, 64)], pooling_matrix),
    **dict.fromkeys([(64, 8), (64, 16), (64, 32), (16, 8), (32, 8)], bilinear_matrix),
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("size", "matrices"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class ImageArea:
    """Where the images of a batch lie on their canvases; made by `make_image_area` for one image, then stacked.

    Attributes:
        size: int32 `[n, 2]`, (height, width) of each image, pixels of the network's input.
        matrices: of the resizes in `RESIZES`, for rows and columns, each `[n, after, before]`.
    """

    size: Int32[np.ndarray | Array, "*n 2"] | None = None
    matrices: Mapping[tuple[int, int], Matrices] = dataclasses.field(default_factory=dict)

    def size_at(self, stride: int) -> Int32[Array, "n 2"] | None:
        """The images' sizes on feature maps of a stride; None for `WHOLE`."""
        return None if self.size is None else jnp.asarray((self.size - 1) // stride + 1)

    def matrices_between(self, before: int, after: int) -> Matrices | None:
        """The matrices of a resize from one stride to another; None for `WHOLE`."""
        return self.matrices.get((before, after))

    def on_canvas(self, canvas: tuple[int, int]) -> "ImageArea":
        """The same images on a smaller canvas: the corners of the matrices."""
        height, width = canvas

        def corner(matrix: np.ndarray | Array, side: int, before: int, after: int) -> np.ndarray | Array:
            return matrix[..., : _ceil_divide(side, after), : _ceil_divide(side, before)]

        matrices = {
            (before, after): (corner(rows, height, before, after), corner(columns, width, before, after))
            for (before, after), (rows, columns) in self.matrices.items()
        }
        return ImageArea(self.size, matrices)


# Every image fills its canvas: the plain network.
WHOLE = ImageArea()


def make_image_area(size: tuple[int, int], canvas: tuple[int, int], dtype: str) -> ImageArea:
    """The area of one image, in numpy, without the batch axis.

    Args:
        size: (height, width) of the image, pixels of the network's input.
        canvas: of the canvas, likewise.
        dtype: of the matrices, float32 or float64.
    """
    rows, columns = (_axis_matrices(size[axis], canvas[axis], dtype) for axis in (0, 1))
    return ImageArea(np.array(size, np.int32), {key: (rows[key], columns[key]) for key in RESIZES})


@functools.lru_cache(maxsize=512)
def _axis_matrices(pixels: int, canvas: int, dtype: str) -> dict[tuple[int, int], np.ndarray]:
    """The matrices of one axis; cached, since images of a data set share few sizes."""
    matrices = {}
    for (before, after), make in RESIZES.items():
        matrix = np.zeros((_ceil_divide(canvas, after), _ceil_divide(canvas, before)), dtype)
        small = make(_ceil_divide(pixels, before), _ceil_divide(pixels, after), dtype)
        matrix[: small.shape[0], : small.shape[1]] = small
        matrices[before, after] = matrix
    return matrices


def _ceil_divide(pixels: int, stride: int) -> int:
    return -(-pixels // stride)


def image_mask(size: Int32[Array, "n 2"], height: int, width: int) -> Bool[Array, "n height width"]:
    """Which positions of feature maps lie inside of the images of these sizes at their stride."""
    rows = jnp.arange(height, dtype=size.dtype) < size[:, :1]
    columns = jnp.arange(width, dtype=size.dtype) < size[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def zero_outside(x: Float[Array, "n h w c"], size: Int32[Array, "n 2"] | None) -> Float[Array, "n h w c"]:
    """Feature maps with zeros outside of the images; unchanged where `size` is None."""
    if size is None:
        return x
    return jnp.where(image_mask(size, *x.shape[1:3])[..., None], x, jnp.zeros((), x.dtype))
