"""The contents of a data set: what the files of each example hold. `rules.py` judges them.

Each example is read once. About one kilobyte per example stays in memory.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict

from topformer_jax.data import codecs, loader, records, sources
from topformer_jax.data.batch import IGNORE_LABEL, Example, Source
from topformer_jax.data.catalog import IMAGE_SUFFIXES, SPLITS, DataSet
from topformer_jax.data.classification import images as class_images
from topformer_jax.data.classification.images import ClassFolderSource
from topformer_jax.data.sources import FolderSource
from topformer_jax.data.transforms import Size
from topformer_jax.runtime.errors import UserError

OUT_OF_RANGE = IGNORE_LABEL + 1  # stands for every value of 16 bits that is larger than 255
KEPT_PAIRS, KEPT_VALUES = 3, 2  # of the soft borders in a label: the rule asks for no more


class Fault(NamedTuple):
    """Why the loader refuses a file."""

    rule: str
    name: str  # of the file
    words: str  # the same for all files with this fault


class BoundaryStats(NamedTuple):
    """How the values of a label change along its rows."""

    soft: int = 0
    hard: int = 0
    # At soft borders: some (smaller, larger) values on their two sides, and some values in them.
    pairs: frozenset[tuple[int, int]] = frozenset()
    between: frozenset[int] = frozenset()


class ExampleContents(NamedTuple):
    """What the files of one example hold."""

    image: str  # name of the file
    label: str = ""
    faults: tuple[Fault, ...] = ()
    digest: bytes = b""  # of the image
    size: Size | None = None  # of the image
    depth: int = 0  # the bits that the values of an image of 16 bits take
    is_turned: bool = False  # by an EXIF orientation that does not change the size
    kind: str = ""  # of the label's file
    pixels: Mapping[int, int] = {}  # of the label, by value; {class: 1} for a classifier; empty if unreadable
    largest: int = 0  # value in the label
    palette: bytes = b""  # red, green, blue of each value in the label
    borders: BoundaryStats = BoundaryStats()


@dataclasses.dataclass(frozen=True)
class SplitContents:
    """What the files of a split hold."""

    name: str
    refusal: str = ""  # why the split cannot be opened
    available: int = 0  # examples
    examples: Sequence[ExampleContents] = ()  # those that were read
    unlabelled: str = ""  # what the loader says about images without a label
    unused: Sequence[str] = ()  # labels without an image
    unread: Sequence[str] = ()  # files beside the images that the loader does not read
    pairing: str = ""  # which ending the labels have that their images do not have

    @property
    def is_whole(self) -> bool:
        """Whether all examples were read."""
        return not self.refusal and len(self.examples) == self.available

    @functools.cached_property
    def labels(self) -> list[ExampleContents]:
        """The examples whose label could be read."""
        return [example for example in self.examples if example.pixels]

    @functools.cached_property
    def pixels(self) -> collections.Counter[int]:
        """Pixels by stored value; for a classifier, images by class."""
        return _add_up(example.pixels for example in self.labels)

    @functools.cached_property
    def label_counts(self) -> collections.Counter[int]:
        """How many labels hold each stored value."""
        return collections.Counter(value for example in self.labels for value in example.pixels)


@dataclasses.dataclass(frozen=True)
class Contents:
    """A data set, and what its splits hold."""

    config: ConfigDict
    data_set: DataSet
    splits: Mapping[str, SplitContents]

    @property
    def is_classification(self) -> bool:
        return self.config.task == "classification"

    @functools.cached_property
    def labels(self) -> list[ExampleContents]:
        """The examples of both splits whose label could be read."""
        return [example for split in self.splits.values() for example in split.labels]

    @functools.cached_property
    def class_of(self) -> dict[int, int]:
        """The class of each stored value that means one."""
        classes, first = self.config.model.num_classes, int(self.config.data.reduce_zero_label)
        if self.is_classification:
            return {value: value for value in range(classes)}
        return {value: value - first for value in range(first, min(classes + first, IGNORE_LABEL))}

    @property
    def void(self) -> set[int]:
        """The stored values that mean no class."""
        return {IGNORE_LABEL, 0} if self.config.data.reduce_zero_label else {IGNORE_LABEL}

    @functools.cached_property
    def pixels(self) -> collections.Counter[int]:
        """Pixels of both splits by stored value."""
        return _add_up(split.pixels for split in self.splits.values())

    @functools.cached_property
    def wrong_values(self) -> list[int]:
        """The stored values that are neither a class nor void."""
        return sorted(self.pixels.keys() - self.class_of.keys() - self.void)

    def labels_with(self, *values: int) -> list[str]:
        """The names of the labels that hold one of the values."""
        return [example.label for example in self.labels if not example.pixels.keys().isdisjoint(values)]

    def per_class(self, counts: Mapping[int, int]) -> Int64[np.ndarray, " classes"]:
        """Counts by stored value as an array of counts by class."""
        result = np.zeros(len(self.data_set.classes), np.int64)
        for value, label in self.class_of.items():
            result[label] = counts[value]
        return result


def _add_up(counts: Iterable[Mapping[int, int]]) -> collections.Counter[int]:
    total = collections.Counter[int]()
    for each in counts:
        total.update(each)
    return total


def read_contents(
    config: ConfigDict, *, limit: int | None = None, make_progress: records.MakeProgress = records.SILENT
) -> Contents:
    """Reads the train and the validation split of the config's data set, or the first `limit` examples of each.

    Raises UserError if the config does not fit the data set, or neither split can be opened.
    """
    data_set = sources.find_data_set(config)
    opened: dict[str, Source] = {}
    splits: dict[str, SplitContents] = {}
    errors = []
    for name in SPLITS:
        try:
            opened[name], splits[name] = _open_split(config, data_set, name, make_progress)
        except UserError as error:
            splits[name] = SplitContents(name, refusal=error.line)
            errors.append(error)
    if not opened:
        raise errors[0]
    counts = {name: min(len(source), limit or len(source)) for name, source in opened.items()}
    done = itertools.count(1)
    with make_progress(sum(counts.values()), "examples") as progress:
        for name, source in opened.items():
            examples = []
            for example in read_examples(source, range(counts[name]), config):
                examples.append(example)
                progress.update(next(done))
            splits[name] = dataclasses.replace(splits[name], examples=examples)
    return Contents(config, data_set, splits)


def _open_split(
    config: ConfigDict, data_set: DataSet, name: str, make_progress: records.MakeProgress
) -> tuple[Source, SplitContents]:
    """A split's source, which has only the images with a label; and what the listing of its folder tells."""
    fields: dict[str, Any] = {}
    source: Source | None = None
    if config.data.source == "folder" and config.task == "segmentation":
        listing = sources.list_folder(config.data.dataset, data_set.layout, config.data.root, name)
        fields = {"unlabelled": listing.unlabelled, "pairing": listing.pairs.pairing}
        fields["unread"] = listing.unread if config.data.dataset == "custom" else ()
        if listing.unlabelled:
            source = listing.pairs
        else:  # if images have no label either, the names do not match: one thing to fix
            fields["unused"] = listing.unused
    if source is None:
        source = sources.open_source(config, name, make_progress)
    if isinstance(source, ClassFolderSource):
        fields["unread"] = _find_unread(source)
    return source, SplitContents(name, available=len(source), **fields)


def _find_unread(source: ClassFolderSource) -> list[str]:
    """Images in a classifier's folder that are no examples: they do not lie directly in the folder of a class."""
    folder = os.fsdecode(source.images[0]).partition("/")[0]
    examples = set(source.images.tolist())
    paths = (f"{folder}/{path}" for path in sources.list_files(pathlib.Path(source.root, folder)))
    return sorted(
        path for path in paths if path.lower().endswith(IMAGE_SUFFIXES) and os.fsencode(path) not in examples
    )


def read_examples(
    source: Source, indices: Sequence[int], config: ConfigDict, *, with_images: bool = True
) -> Iterator[ExampleContents]:
    """The contents of some examples in order, read by threads; `with_images` decodes and hashes the images too."""
    root = source.root if isinstance(source, FolderSource | ClassFolderSource) else ""

    def read_example(index: int) -> ExampleContents:
        try:
            example = source[index]
        except UserError as error:
            name = f"example {index}"
            return ExampleContents(name, faults=(Fault("unreadable-file", name, error.line),))
        image, label = (
            where.replace(f"{root}/", "", 1) if root else f"{kind} {example.name}"
            for kind, where in zip(("image", "label"), example.where, strict=True)
        )
        return _inspect_example(example._replace(where=(image, label)), config, with_images)

    return loader.map_in_threads(read_example, indices)


def _inspect_example(example: Example, config: ConfigDict, with_images: bool) -> ExampleContents:
    """What an example holds; what cannot be read is among its faults."""
    image, label = example.where
    is_classification = config.task == "classification"
    size: Size | None = None
    faults: list[Fault] = []
    fields: dict[str, Any] = {}
    try:
        if with_images and (data := bytes(example.image)):
            fields["digest"] = hashlib.blake2b(data, digest_size=16).digest()
        fields["depth"] = codecs.read_depth(example.image, image)
        if with_images:
            size = codecs.decode_image(example.image, image, orient=not is_classification).shape[:2]
    except UserError as error:
        faults.append(Fault("unreadable-image", image, _remove_name(error, image)))
    try:
        if is_classification:
            fields["pixels"] = {int(class_images.read_label(example, config)): 1}
        else:
            values = codecs.read_label_values(example.label, label)
            fields |= _describe_label(example.label, values)
            fields["is_turned"] = size is not None and codecs.is_turned_unseen(example.image, size)
            if size and size != values.shape:
                faults.append(Fault("size", label, _explain_size(example.image, values)))
    except codecs.ColourLabelError:
        faults.append(Fault("colour-label", label, _explain_channels(example.label)))
    except UserError as error:
        rule = "unknown-class" if is_classification else "unreadable-label"
        faults.append(Fault(rule, label, _remove_name(error, label)))
    return ExampleContents(image, label, tuple(faults), size=size, **fields)


def _remove_name(error: UserError, name: str) -> str:
    """The line of an error, which begins with the name of the file, without this name."""
    return error.line.removeprefix(name).removeprefix(":").strip()


def _describe_label(label: bytes | np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """The fields of a label map: how its file stores it, and which values it has where."""
    pixels = np.zeros(OUT_OF_RANGE + 1, np.int64)
    for row in values:  # of all rows at once, np.bincount would take eight bytes per pixel
        pixels += np.bincount(np.minimum(row, np.uint16(OUT_OF_RANGE)), minlength=len(pixels))
    return {
        "kind": label_kind(label),
        "pixels": {value: int(pixels[value]) for value in np.flatnonzero(pixels).tolist()},
        "largest": int(values.max(initial=0)),
        "palette": codecs.read_palette(label) if isinstance(label, bytes) else b"",
        "borders": count_borders(values),
    }


def label_kind(label: bytes | np.ndarray) -> str:
    """What a label's file is, such as "grey PNG, 8 bits"."""
    if isinstance(label, np.ndarray):
        return "array"
    kind = "palette" if label[25] == codecs.PALETTE else "grey"
    return f"{kind} PNG, {label[24]} bit{'s' if label[24] > 1 else ''}"


def count_borders(values: np.ndarray) -> BoundaryStats:
    """Counts the borders along the rows of a label, uint8 or uint16 `[h, w]`, between values 2 or more apart.

    A border is hard where one value meets the other. It is soft where the values rise or fall from one to the other
    over single pixels: an interpolating resize or a lossy format makes this from a hard one.

    >>> count_borders(np.array([[1, 1, 4, 7, 7, 2, 2, 3, 3]], np.uint8))
    BoundaryStats(soft=1, hard=1, pairs=frozenset({(1, 7)}), between=frozenset({4}))
    """
    rows, columns = np.nonzero(values[:, 1:] != values[:, :-1])
    if not len(rows):
        return BoundaryStats()
    left, right = values[rows, columns].astype(np.int64), values[rows, columns + 1].astype(np.int64)
    # A run: changes at neighbouring pixels.
    is_first = np.append(True, (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1))
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], len(rows)) - 1
    length = last - first + 1
    is_monotone = np.abs(np.add.reduceat(np.sign(right - left), first)) == length
    start, end = left[first], right[last]
    soft = is_monotone & (length > 1)
    hard = (length == 1) & (np.abs(end - start) >= 2)
    pairs = np.unique(np.sort(np.stack([start[soft], end[soft]], 1), axis=1), axis=0)[:KEPT_PAIRS]
    between = np.unique(left[np.repeat(soft, length) & ~is_first])[:KEPT_VALUES]
    numbers = frozenset(map(tuple, pairs.tolist())), frozenset(between.tolist())
    return BoundaryStats(int(soft.sum()), int(hard.sum()), *numbers)


def _explain_channels(label: bytes | np.ndarray) -> str:
    pixels = cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is not None and (pixels[..., :3] == pixels[..., :1]).all():
        return "repeats one value in all channels: save one of them"
    return "is a mask of colours: write the number of each colour's class instead, as one channel"


def _explain_size(image: bytes | np.ndarray, values: np.ndarray) -> str:
    if codecs.decode_image(image, "", orient=False).shape[:2] == values.shape:
        cause = "has the size of its image without the EXIF rotation, which the loader applies"
        return f"{cause}: rotate the label, or save the image without EXIF"
    return "has another size than its image: make it again at the image's size, with nearest neighbour"
