"""What the files of a data set hold: each example is read once, and of each split only sums and a few names are kept.

`rules.py` judges what is found here. The memory does not grow with the examples, but for 16 bytes and a name of each.
"""

import collections
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Bool, Int64
from ml_collections import ConfigDict

from topformer_jax.data import cache, codecs, loader, sources
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import SPLITS, DataSet
from topformer_jax.data.ramps import Ramps, count_ramps
from topformer_jax.errors import UserError

BEYOND = IGNORE_LABEL + 1  # the place of all values of 16 bits in tables of values
RAMPED_SHARE = (
    0.2  # of a label's borders: at most 0.08 in clean sets (CamVid, shapes), 0.3 or more after a resize
)
MIN_BORDERS = 20  # in a label, for a share of them to say anything
SHOWN_NAMES = 3
Size = tuple[int, int]  # (height, width) in pixels
ByValue = Int64[np.ndarray, "values=257"]


class ExampleFacts(NamedTuple):
    """What one example's files hold; empty where they cannot be read."""

    image: str  # names of the files
    label: str
    faults: tuple[tuple[str, str, str], ...] = ()  # of each: the rule, the file's name, what is said of it
    digest: bytes = b""
    size: Size | None = None  # of the image
    kind: str = ""  # of the label file
    pixels: ByValue | None = None  # by stored value of the label
    largest: int = 0  # value
    ramps: Ramps = Ramps()


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


def _names_by_key() -> dict:
    return collections.defaultdict(Names)


@dataclasses.dataclass
class SplitFacts:
    """What a split's files hold."""

    name: str
    refusal: str = ""  # why the split cannot be opened; empty: it can
    listing: sources.FolderListing | None = None  # of a folder
    available: int = 0  # examples
    examples: int = 0  # that were read
    faults: dict[tuple[str, str], Names] = dataclasses.field(
        default_factory=_names_by_key
    )  # by rule and words
    images: dict[bytes, str] = dataclasses.field(default_factory=dict)  # the first image with each digest
    copies: Names = dataclasses.field(default_factory=Names)  # of images in the same split
    sizes: collections.Counter[Size] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    labels: int = 0  # that could be read
    pixels: ByValue = dataclasses.field(default_factory=lambda: np.zeros(BEYOND + 1, np.int64))
    holders: dict[int, Names] = dataclasses.field(
        default_factory=_names_by_key
    )  # labels by the values in them
    largest: int = 0  # value
    wrong: Names = dataclasses.field(
        default_factory=Names
    )  # labels with values that are neither class nor void
    void: Names = dataclasses.field(default_factory=Names)  # labels without a pixel of any class
    bordered: int = 0  # labels with `MIN_BORDERS` borders
    ramped: Names = dataclasses.field(default_factory=Names)  # those with soft ones
    ramp_pairs: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    ramp_values: set[int] = dataclasses.field(default_factory=set)

    def add(self, example: ExampleFacts, classes: ByValue) -> None:
        """Adds what one example holds; `classes` are those of `class_of_value`."""
        self.examples += 1
        for rule, name, words in example.faults:
            self.faults[rule, words].add(name)
        if example.digest in self.images:
            self.copies.add(f"{example.image} = {self.images[example.digest]}")
        elif example.digest:
            self.images[example.digest] = example.image
        if example.size:
            self.sizes[example.size] += 1
        if example.pixels is None:
            return
        self.labels += 1
        self.kinds[example.kind] += 1
        self.pixels += example.pixels
        self.largest = max(self.largest, example.largest)
        for value in np.flatnonzero(example.pixels).tolist():
            self.holders[value].add(example.label)
        if example.pixels[classes < 0].any():
            self.wrong.add(example.label)
        elif not example.pixels[is_class(classes)].any():
            self.void.add(example.label)
        ramps = example.ramps
        if ramps.soft + ramps.hard >= MIN_BORDERS:
            self.bordered += 1
            if ramps.soft >= RAMPED_SHARE * (ramps.soft + ramps.hard):
                self.ramped.add(example.label)
                self.ramp_pairs |= ramps.pairs
                self.ramp_values |= ramps.between


@dataclasses.dataclass
class Inspection:
    """A data set, what its splits hold, and the class that each stored value of a label means."""

    config: ConfigDict
    data_set: DataSet
    classes: ByValue  # see `class_of_value`
    splits: dict[str, SplitFacts]

    def class_pixels(self, split: str) -> Int64[np.ndarray, " classes"]:
        """A split's pixels of each class."""
        inside = is_class(self.classes)
        counts = np.zeros(len(self.data_set.classes), np.int64)
        counts[self.classes[inside]] = self.splits[split].pixels[inside]
        return counts

    def class_labels(self, split: str) -> Int64[np.ndarray, " classes"]:
        """How many labels of a split hold each class."""
        counts = np.zeros(len(self.data_set.classes), np.int64)
        for value, names in self.splits[split].holders.items():
            if is_class(self.classes)[value]:
                counts[self.classes[value]] = names.count
        return counts

    def void_pixels(self, split: str) -> int:
        """A split's pixels that belong to no class, as they should."""
        return int(self.splits[split].pixels[self.classes == IGNORE_LABEL].sum())


def inspect(
    config: ConfigDict,
    *,
    limit: int | None = None,
    make_progress: cache.MakeProgress = cache.Silence,
) -> Inspection:
    """Reads the train and the validation split of the config's data set; the result does not depend on threads.

    Args:
        config: of the data.
        limit: examples of each split that are read, from the first on; None: all.
        make_progress: makes what shows how many examples are read, such as logs.Progress.

    Raises:
        UserError: the config does not fit the data set, or neither split can be opened.
    """
    data_set = sources.find_data_set(config)
    classes = class_of_value(config.model.num_classes, config.data.reduce_zero_label)
    splits, opened, errors = {}, {}, []
    for name in SPLITS:
        splits[name] = SplitFacts(name)
        try:
            splits[name].listing, opened[name] = _open_split(config, data_set, name, make_progress)
            splits[name].available = len(opened[name])
        except UserError as error:
            splits[name].refusal = error.line
            errors.append(error)
    if not opened:
        raise errors[0]
    counts = {name: min(len(source), limit or len(source)) for name, source in opened.items()}
    done = 0
    with make_progress(sum(counts.values()), "examples") as progress:
        for name, source in opened.items():
            for example in _inspect_examples(source, counts[name]):
                splits[name].add(example, classes)
                done += 1
                progress.update(done)
    return Inspection(config, data_set, classes, splits)


def class_of_value(classes: int, reduce_zero_label: bool) -> ByValue:
    """The class that each stored value means, 0 to 255 and `BEYOND`: its index, IGNORE_LABEL, or -1 for none.

    >>> class_of_value(2, reduce_zero_label=True)[[0, 1, 2, 3, 255, 256]].tolist()
    [255, 0, 1, -1, 255, -1]
    """
    table, allowed = codecs.label_table(classes, reduce_zero_label)
    return np.append(np.where(allowed, table.astype(np.int64), -1), -1)


def is_class(classes: ByValue) -> Bool[np.ndarray, "values=257"]:
    """Which stored values mean a class."""
    return (classes >= 0) & (classes != IGNORE_LABEL)


def _open_split(
    config: ConfigDict, data_set: DataSet, split: str, make_progress: cache.MakeProgress
) -> tuple[sources.FolderListing | None, sources.Source]:
    """A split's source; with a folder's listing, of the images that have a label."""
    data, listing = config.data, None
    if data.source == "folder":
        listing = sources.list_folder(data.dataset, data_set.layout, data.root, split)
        if listing.unlabelled:
            return listing, listing.pairs
    return listing, sources.open_source(config, split, make_progress)


def _inspect_examples(source: sources.Source, count: int) -> Iterator[ExampleFacts]:
    """The facts of the first `count` examples in order, by threads: decoding and hashing free Python's lock."""
    root = source.root + "/" if isinstance(source, sources.FolderSource) else ""

    def inspect_one(index: int) -> ExampleFacts:
        try:
            example = source[index]
        except UserError as error:
            name = f"example {index}"
            return ExampleFacts(name, name, (("unreadable-file", name, error.line),))
        image, label = (
            where.removeprefix(root) if root else f"{kind} {example.name}"
            for kind, where in zip(("image", "label"), example.where, strict=True)
        )
        return inspect_example(example.image, example.label, image, label)

    return loader.map_in_threads(inspect_one, range(count))


def inspect_example(
    image: bytes | np.ndarray, label: bytes | np.ndarray, image_name: str, label_name: str
) -> ExampleFacts:
    """Decodes an example's files and counts what is in them; what cannot be decoded is among its faults."""
    faults: list[tuple[str, str, str]] = []
    facts = ExampleFacts(image_name, label_name, digest=_digest(image))
    size = None
    try:
        size = codecs.decode_image(image, image_name).shape[:2]
        facts = facts._replace(size=size)
    except UserError as error:
        faults.append(("unreadable-image", image_name, _without_name(error.line, image_name)))
    try:
        values = codecs.read_label_values(label, label_name)
    except codecs.ColourLabelError:
        faults.append(("colour-label", label_name, _describe_channels(label)))
        return facts._replace(faults=tuple(faults))
    except UserError as error:
        faults.append(("unreadable-label", label_name, _without_name(error.line, label_name)))
        return facts._replace(faults=tuple(faults))
    if size and size != values.shape:
        faults.append(("size", label_name, _describe_sizes(image, size, values.shape)))
    pixels = np.bincount(np.minimum(values.astype(np.int64), BEYOND).ravel(), minlength=BEYOND + 1)
    return facts._replace(
        faults=tuple(faults),
        kind=_label_kind(label, values),
        pixels=pixels.astype(np.int64),
        largest=int(values.max(initial=0)),
        ramps=count_ramps(values),
    )


def _digest(image: bytes | np.ndarray) -> bytes:
    data = np.ascontiguousarray(image).data if isinstance(image, np.ndarray) else image
    return hashlib.blake2b(data, digest_size=16).digest() if len(image) else b""


def _without_name(line: str, name: str) -> str:
    """What an error says of a file, without its name: the same for all files with this fault."""
    return line.removeprefix(name).removeprefix(":").strip()


def _describe_channels(label: bytes | np.ndarray) -> str:
    """What is said of a PNG of several channels."""
    pixels = cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is not None and (pixels[..., :3] == pixels[..., :1]).all():
        return "repeats one value in all channels: save one of them"
    return "is a mask of colours: write the number of each colour's class instead, as one channel"


def _describe_sizes(image: bytes | np.ndarray, size: Size, label: Size) -> str:
    """What is said of a label of another size than its image."""
    if isinstance(image, bytes) and size == label[::-1]:
        with PIL.Image.open(io.BytesIO(image)) as header:
            if header.size == size:  # as (width, height): the file's own sides are the label's
                return (
                    "has the size of its image without the EXIF rotation, which the loader applies: rotate the "
                    "label, or save the image without EXIF"
                )
    return "has another size than its image: make it again at the image's size, with nearest neighbour"


def _label_kind(label: bytes | np.ndarray, values: np.ndarray) -> str:
    if isinstance(label, np.ndarray):
        return "array"
    kind = "palette" if label[25] == codecs.PALETTE else "grey"
    return f"{kind} PNG, {8 * values.itemsize} bits"
