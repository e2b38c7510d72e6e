"""What the loader makes and the training step takes: images, labels, and a batch of them."""

from typing import TypedDict

import numpy as np
from jaxtyping import Array, Int32, UInt8

from topformer_jax.ops import IGNORE_LABEL

__all__ = ["IGNORE_LABEL", "Batch", "Image", "Labels"]

Image = UInt8[np.ndarray, "h w 3"]  # RGB
Labels = UInt8[np.ndarray, "h w"]  # class indices; IGNORE_LABEL where a pixel belongs to none


class Batch(TypedDict):
    """A training batch: NumPy arrays on the host, JAX arrays on the devices; a plain dict in memory.

    A label is a map of classes, or one class in classification. Maps and their images are padded at the bottom and on
    the right: `size` is the (height, width) that is not padding.
    `index` is an example's place in the data set. With `epoch` and the seed, it decides the random draws.
    """

    image: UInt8[Array | np.ndarray, "n h w 3"]
    label: UInt8[Array | np.ndarray, "n h w"] | Int32[Array | np.ndarray, " n"]
    size: Int32[Array | np.ndarray, "n 2"]
    index: Int32[Array | np.ndarray, " n"]
    epoch: Int32[Array | np.ndarray, " n"]
