"""What the labels of a segmentation data set hold: values, classes, borders.

`label_rules.py` judges what is found here.
"""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Bool, Int64
from ml_collections import ConfigDict

from topformer_jax.data import cache, codecs, sources
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import SPLITS
from topformer_jax.data.example import Example
from topformer_jax.inspection.facts import (
    Fault,
    Inspection,
    Names,
    Size,
    SplitFacts,
    names_by_key,
    read_splits,
)
from topformer_jax.inspection.ramps import Ramps, count_ramps
from topformer_jax.runtime.errors import UserError

BEYOND = IGNORE_LABEL + 1  # the place of all values of 16 bits in tables of values
# Of a label's borders: at most 0.08 in clean sets (CamVid, shapes), 0.3 or more after a resize.
RAMPED_SHARE = 0.2
MIN_BORDERS = 20  # in a label, for a share of them to say anything
ByValue = Int64[np.ndarray, "values=257"]


class LabelFacts(NamedTuple):
    """What one label holds."""

    name: str
    kind: str  # of the file
    pixels: ByValue  # by stored value
    largest: int  # value
    ramps: Ramps
    palette: bytes = b""  # red, green, blue of each value
    turned: str = ""  # the image, if its EXIF orientation turns it and its size does not show it


@dataclasses.dataclass
class LabelSplit(SplitFacts[LabelFacts]):
    """What a split's files hold."""

    _: dataclasses.KW_ONLY
    classes: ByValue  # see `class_of_value`
    listing: sources.FolderListing | None = None  # of a folder
    kinds: dict[str, Names] = dataclasses.field(default_factory=names_by_key)  # labels by their file's kind
    # Of each value in palettes: the first label with each of two colours.
    colours: dict[int, dict[bytes, str]] = dataclasses.field(default_factory=lambda: defaultdict(dict))
    labels: int = 0  # that could be read
    pixels: ByValue = dataclasses.field(default_factory=lambda: np.zeros(BEYOND + 1, np.int64))
    holders: dict[int, Names] = dataclasses.field(default_factory=names_by_key)  # labels by values
    largest: int = 0  # value
    wrong: Names = dataclasses.field(default_factory=Names)  # labels with values of neither class nor void
    turned: Names = dataclasses.field(default_factory=Names)  # images, see `LabelFacts`
    void: Names = dataclasses.field(default_factory=Names)  # labels without a pixel of any class
    bordered: int = 0  # labels with `MIN_BORDERS` borders
    ramped: Names = dataclasses.field(default_factory=Names)  # those with soft ones
    ramp_pairs: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    ramp_values: set[int] = dataclasses.field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """Whether it can be opened, but holds no image, with or without label."""
        return super().is_empty and not (self.listing and self.listing.unlabelled)

    def add_label(self, label: LabelFacts) -> None:
        """Adds what one label holds."""
        self.labels += 1
        if label.turned:
            self.turned.add(label.turned)
        self.kinds[label.kind].add(label.name)
        self.pixels += label.pixels
        self.largest = max(self.largest, label.largest)
        for value in np.flatnonzero(label.pixels).tolist():
            self.holders[value].add(label.name)
            colour, seen = label.palette[3 * value : 3 * value + 3], self.colours[value]
            if colour and len(seen) < 2:
                seen.setdefault(colour, label.name)
        if label.pixels[self.classes < 0].any():
            self.wrong.add(label.name)
        elif not label.pixels[is_class(self.classes)].any():
            self.void.add(label.name)
        ramps = label.ramps
        if ramps.soft + ramps.hard >= MIN_BORDERS:
            self.bordered += 1
            if ramps.soft >= RAMPED_SHARE * (ramps.soft + ramps.hard):
                self.ramped.add(label.name)
                self.ramp_pairs |= ramps.pairs
                self.ramp_values |= ramps.between


@dataclasses.dataclass
class LabelInspection(Inspection):
    """A data set, what its splits hold, and the class that each stored value of a label means."""

    splits: dict[str, LabelSplit]
    classes: ByValue  # see `class_of_value`

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
) -> LabelInspection:
    """Reads the train and the validation split of the config's data set; the result does not depend on threads.

    Of each split the first `limit` examples are read, or all.

    Raises:
        UserError: the config does not fit the data set, or neither split can be opened.
    """
    data_set = sources.find_data_set(config)
    classes = class_of_value(config.model.num_classes, config.data.reduce_zero_label)
    splits = {name: LabelSplit(name, classes=classes) for name in SPLITS}

    def open_split(name: str) -> sources.Source:
        """With a folder's listing, of the images that have a label."""
        if config.data.source == "folder":
            listing = sources.list_folder(config.data.dataset, data_set.layout, config.data.root, name)
            splits[name].listing = listing
            if listing.unlabelled:
                return listing.pairs
        return sources.open_source(config, name, make_progress)

    read_splits(splits, open_split, read_label, orient=True, limit=limit, make_progress=make_progress)
    return LabelInspection(config, data_set, splits, classes)


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


def read_label(example: Example, size: Size | None) -> tuple[LabelFacts | None, Sequence[Fault]]:
    """Decodes a label, which should have its image's size, and counts what is in it."""
    data, name = example.label, example.where[1]
    try:
        values = codecs.read_label_values(data, name)
    except codecs.ColourLabelError:
        return None, [Fault("colour-label", name, _describe_channels(data))]
    except UserError as error:
        return None, [Fault.from_error("unreadable-label", name, error)]
    faults = []
    if size and size != values.shape:
        faults.append(Fault("size", name, _describe_sizes(example.image, size, values.shape)))
    pixels = np.bincount(np.minimum(values.astype(np.int64), BEYOND).ravel(), minlength=BEYOND + 1)
    largest = int(values.max(initial=0))
    kind = label_kind(data)
    palette = codecs.read_palette(data) if isinstance(data, bytes) else b""
    turned = example.where[0] if size and codecs.is_turned_unseen(example.image, size) else ""
    facts = LabelFacts(name, kind, pixels.astype(np.int64), largest, count_ramps(values), palette, turned)
    return facts, faults


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


def label_kind(label: bytes | np.ndarray) -> str:
    """What a label's file is, such as "grey PNG, 8 bits"."""
    if isinstance(label, np.ndarray):
        return "array"
    kind = "palette" if label[25] == codecs.PALETTE else "grey"
    return f"{kind} PNG, {label[24]} bit{'s' if label[24] > 1 else ''}"
