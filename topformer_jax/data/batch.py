"""What sources, the loader and the training step pass to each other: examples, images, labels and batches."""

from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Array, Int32, UInt8

from topformer_jax.ops import IGNORE_LABEL

__all__ = ["IGNORE_LABEL", "Batch", "Example", "Image", "Labels", "SegmentationSource", "Source"]

Image = UInt8[np.ndarray, "h w 3"]  # RGB
Labels = UInt8[np.ndarray, "h w"]  # class indices; IGNORE_LABEL where a pixel belongs to none


class Example(NamedTuple):
    """One example as it is stored: the bytes of its files, or arrays if there are no files.

    The label of a classifier is the number of a class, an array of no axes.
    """

    name: str  # the image's path in its split, without suffix
    image: bytes | np.ndarray
    label: bytes | np.ndarray
    where: tuple[str, str]  # image and label, as error messages name them


@runtime_checkable
class Source(Protocol):
    """One split of a data set, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads an example; raises a UserError if it cannot be read."""


@runtime_checkable
class SegmentationSource(Source, Protocol):
    """A source whose labels are maps."""

    def label_size(self, index: int) -> tuple[int, int]:
        """(height, width) of an example's label in pixels, and so of its image, without decoding either."""


class Batch(TypedDict):
    """A training batch: NumPy arrays on the host, JAX arrays on the devices; a plain dict in memory.

    A label is a map of classes, or one class in classification. Maps and their images are padded at the bottom and on
    the right: `size` is the (height, width) that is not padding. `index` is the example's place in the data set. The
    seed, `epoch` and `index` decide its random draws. An example that is drawn for a class has a number of its own
    instead of the epoch, counted down from 2**31 - 1, since an epoch may have several draws of one example.
    """

    image: UInt8[Array | np.ndarray, "n h w 3"]
    label: UInt8[Array | np.ndarray, "n h w"] | Int32[Array | np.ndarray, " n"]
    size: Int32[Array | np.ndarray, "n 2"]
    index: Int32[Array | np.ndarray, " n"]
    epoch: Int32[Array | np.ndarray, " n"]
