"""What the files of a data set hold: each example is read once, and of each split only sums and a few names are kept.

Here is what all tasks share; `labels.py` counts label maps, `classes.py` the images of classes.
`rules.py` judges what is found. The memory does not grow with the examples, but for 16 bytes and a name of each.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from topformer_jax.data import cache, codecs, loader
from topformer_jax.data.catalog import DataSet
from topformer_jax.data.classification.folders import ClassFolderSource
from topformer_jax.data.example import Example, Source
from topformer_jax.data.sources import FolderSource
from topformer_jax.runtime.errors import UserError

SHOWN_NAMES = 3
Size = tuple[int, int]  # (height, width) in pixels
Label = TypeVar("Label")  # what is kept of a label


class Fault(NamedTuple):
    """Why the loader refuses a file."""

    rule: str
    name: str  # of the file
    words: str  # what is said of it, the same for all files with this fault

    @classmethod
    def from_error(cls, rule: str, name: str, error: UserError) -> "Fault":
        """A fault that is said in an error's line, which begins with the file's name."""
        return cls(rule, name, error.line.removeprefix(name).removeprefix(":").strip())


@dataclasses.dataclass(frozen=True)
class ExampleFacts(Generic[Label]):
    """What one example's files hold; empty where they cannot be read."""

    image: str  # name of the file
    faults: tuple[Fault, ...] = ()
    digest: bytes = b""
    size: Size | None = None  # of the image
    label: Label | None = None
    depth: int = 0  # of an image of 16 bits: how many its values take


# Of an example and the size of its image: what is kept of the label, and what is wrong with it.
LabelReader = Callable[[Example, Size | None], tuple[Label | None, Sequence[Fault]]]


@dataclasses.dataclass
class Names:
    """How many files have something in common, and the names of the first of them."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN_NAMES:
            self.first.append(name)

    def __add__(self, other: "Names") -> "Names":
        return Names(self.count + other.count, (self.first + other.first)[:SHOWN_NAMES])

    def __str__(self) -> str:
        return ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")

    def of(self, singular: str, plural: str = "") -> str:
        """How many of what, and the names of the first.

        >>> Names(4, ["a.png", "b.png", "c.png"]).of("label")
        '4 labels (a.png, b.png, c.png, ...)'
        """
        return f"{self.count} {singular if self.count == 1 else plural or singular + 's'} ({self})"


def names_by_key() -> dict:
    """Names of files by something that they have in common."""
    return collections.defaultdict(Names)


@dataclasses.dataclass
class SplitFacts(Generic[Label]):
    """What a split's files hold."""

    name: str
    refusal: str = ""  # why the split cannot be opened; empty: it can
    available: int = 0  # examples
    examples: int = 0  # that were read
    intact: int = 0  # examples without a fault
    faults: dict[tuple[str, str], Names] = dataclasses.field(
        default_factory=names_by_key
    )  # by rule and words
    images: dict[bytes, str] = dataclasses.field(default_factory=dict)  # the first image with each digest
    copies: Names = dataclasses.field(default_factory=Names)  # of images in the same split
    sizes: collections.Counter[Size] = dataclasses.field(default_factory=collections.Counter)
    depths: dict[int, Names] = dataclasses.field(
        default_factory=names_by_key
    )  # images of 16 bits by those in use

    @property
    def is_whole(self) -> bool:
        """Whether all of its examples were read."""
        return not self.refusal and self.examples == self.available

    @property
    def is_empty(self) -> bool:
        """Whether it can be opened, but holds nothing."""
        return not self.refusal and not self.available

    def add(self, example: ExampleFacts[Label]) -> None:
        """Adds what one example holds."""
        self.examples += 1
        self.intact += not example.faults
        for rule, name, words in example.faults:
            self.faults[rule, words].add(name)
        if example.digest in self.images:
            self.copies.add(f"{example.image} = {self.images[example.digest]}")
        elif example.digest:
            self.images[example.digest] = example.image
        if example.size:
            self.sizes[example.size] += 1
        if example.depth:
            self.depths[example.depth].add(example.image)
        if example.label is not None:
            self.add_label(example.label)

    def add_label(self, label: Label) -> None:
        """Adds what one label holds."""
        raise NotImplementedError


@dataclasses.dataclass
class Inspection:
    """A data set, and what its splits hold."""

    config: ConfigDict
    data_set: DataSet
    splits: Mapping[str, SplitFacts]


def read_splits(
    splits: Mapping[str, SplitFacts[Label]],
    open_split: Callable[[str], Source],
    read_label: LabelReader[Label],
    *,
    orient: bool,
    limit: int | None,
    make_progress: cache.MakeProgress,
) -> None:
    """Reads the splits' examples; the result does not depend on threads.

    Args:
        splits: by name, to be filled; `open_split` opens one of them.
        read_label: what is kept of a label, None where it cannot be read; and what is wrong with it.
        orient: whether images are rotated by their EXIF orientation.
        limit: how many examples of each to read; None: all.
        make_progress: makes what shows how many are read.

    Raises:
        UserError: no split can be opened.
    """
    opened, errors = {}, []
    for name, split in splits.items():
        try:
            opened[name] = open_split(name)
            split.available = len(opened[name])
        except UserError as error:
            split.refusal = error.line
            errors.append(error)
    if not opened:
        raise errors[0]
    counts = {name: min(len(source), limit or len(source)) for name, source in opened.items()}
    done = 0
    with make_progress(sum(counts.values()), "examples") as progress:
        for name, source in opened.items():
            for example in _read_examples(source, counts[name], read_label, orient):
                splits[name].add(example)
                done += 1
                progress.update(done)


def _read_examples(
    source: Source, count: int, read_label: LabelReader[Label], orient: bool
) -> Iterator[ExampleFacts[Label]]:
    """The facts of the first `count` examples in order, by threads: decoding and hashing free Python's lock."""
    root = source.root if isinstance(source, FolderSource | ClassFolderSource) else ""

    def read_example(index: int) -> ExampleFacts[Label]:
        try:
            example = source[index]
        except UserError as error:
            name = f"example {index}"
            return ExampleFacts(name, (Fault("unreadable-file", name, error.line),))
        image, label = (
            where.replace(f"{root}/", "", 1) if root else f"{kind} {example.name}"
            for kind, where in zip(("image", "label"), example.where, strict=True)
        )
        return _inspect_example(example._replace(where=(image, label)), read_label, orient)

    return loader.map_in_threads(read_example, range(count))


def _inspect_example(example: Example, read_label: LabelReader[Label], orient: bool) -> ExampleFacts[Label]:
    """Decodes an example's image and reads its label; what cannot be read is among its faults."""
    name, size, depth = example.where[0], None, 0
    faults = []
    try:
        size = codecs.decode_image(example.image, name, orient=orient).shape[:2]
        depth = codecs.read_depth(example.image, name)
    except UserError as error:
        faults.append(Fault.from_error("unreadable-image", name, error))
    label, more = read_label(example, size)
    return ExampleFacts(name, (*faults, *more), _digest(example.image), size, label, depth)


def _digest(image: bytes | np.ndarray) -> bytes:
    data = np.ascontiguousarray(image).data if isinstance(image, np.ndarray) else image
    return hashlib.blake2b(data, digest_size=16).digest() if len(image) else b""
