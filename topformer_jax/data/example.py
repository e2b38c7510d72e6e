"""What the sources of data give: examples by index."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Example(NamedTuple):
    """One example as it is stored: the bytes of its files, or arrays where there are no files.

    A classifier's label is the number of a class, an array of no axes.
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
