"""What is wrong or suspicious in a data set: a small function a rule, over what `inspection.py` has counted.

A rule's docstring says what it sees and why that is suspicious; its findings say what to change. At a problem
training would stop, or learn nonsense; with a warning it would go on; a note is worth knowing.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import SPLITS
from topformer_jax.data.inspection import BEYOND, SHOWN_NAMES, Inspection, Names
from topformer_jax.data.transforms import fit_size

Level = Literal["problem", "warning", "note"]

ZERO_LABEL_IS_VOID = ("ade20k", "context59")  # in the label files of these data sets, and 255 is in none
CITYSCAPES_CLASSES, LARGEST_CITYSCAPES_ID = 19, 33
RAMPED_LABELS = 0.1  # of the labels with borders: fewer are no sign of a resize
RARE = 0.001  # of the labelled pixels


class Finding(NamedTuple):
    """One line of the report: what was seen, what it probably means, what to change."""

    level: Level
    rule: str
    text: str


def find(inspection: Inspection) -> list[Finding]:
    """All findings; what follows from wrong values, such as classes that do not occur, is not among them."""
    findings = [finding for rule in FILE_RULES for finding in rule(inspection)]
    values = next((found for rule in VALUE_RULES if (found := list(rule(inspection)))), [])
    return findings + (values or [finding for rule in CLASS_RULES for finding in rule(inspection)])


# Files


def missing_split(inspection: Inspection) -> Iterator[Finding]:
    """A split that cannot be opened or holds nothing: training opens both before its first step."""
    for split in inspection.splits.values():
        if split.refusal:
            yield Finding("problem", "missing-split", f"{split.name}: {split.refusal}")
        elif not split.available and not (split.listing and split.listing.unlabelled):
            yield Finding("problem", "missing-split", f"{split.name} holds no examples: build it again")


def image_without_label(inspection: Inspection) -> Iterator[Finding]:
    """Images without a label: training refuses the folder. Files *_labelIds.png there are Cityscapes' raw labels."""
    for split in inspection.splits.values():
        if not split.listing or not split.listing.unlabelled:
            continue
        raw = [path for path in sorted(split.listing.label_files) if path.endswith("labelIds.png")]
        if raw:
            names = Names(len(raw), raw[:SHOWN_NAMES])
            text = (
                f"{split.name}: {split.listing.unlabelled}; raw ids, not classes, are in {names.of('file')}"
            )
            yield Finding("problem", "raw-cityscapes-ids", text)
        else:
            yield Finding("problem", "image-without-label", f"{split.name}: {split.listing.unlabelled}")


def label_without_image(inspection: Inspection) -> Iterator[Finding]:
    """Labels that no image belongs to: not read, but perhaps their images are missing or have other names."""
    for split in inspection.splits.values():
        unused = split.listing.unused if split.listing else ()
        # Where images lack labels too, the names do not match: one thing to mend.
        if unused and split.listing and not split.listing.unlabelled:
            names = Names(len(unused), list(unused[:SHOWN_NAMES])).of("label")
            text = f"{split.name}: {names} without an image: not read; add the images, or remove the labels"
            yield Finding("warning", "label-without-image", text)


def damaged_file(inspection: Inspection) -> Iterator[Finding]:
    """Files that the loader refuses: empty, cut off, damaged, not an image, masks of colours, sizes that differ."""
    skip = inspection.config.data.skip_unreadable
    for split in inspection.splits.values():
        for (rule, words), names in split.faults.items():
            # Only training skips them, and stops if there are no others.
            survives = skip and split.name == "train" and split.labels > 0
            others = Names(names.count - 1, names.first[1:])
            more = f" (and {others.count} more: {others})" if others.count else ""
            first = "" if rule == "unreadable-file" else f"{names.first[0]} "
            yield Finding("warning" if survives else "problem", rule, f"{split.name}: {first}{words}{more}")


def copies_within_a_split(inspection: Inspection) -> Iterator[Finding]:
    """The same image, byte for byte, more than once in a split: it counts as often."""
    for split in inspection.splits.values():
        if split.copies.count:
            text = f"{split.name}: {split.copies.of('copy', 'copies')} of an image: remove all but one"
            yield Finding("warning", "duplicates", text)


def copies_between_the_splits(inspection: Inspection) -> Iterator[Finding]:
    """Images of validation that are trained on: the scores tell less than they seem to."""
    train, validation = (inspection.splits[name].images for name in SPLITS)
    names = Names()
    for digest, name in validation.items():
        if digest in train:
            names.add(f"{name} = {train[digest]}")
    if names.count:
        text = f"{names.of('image')} in both splits: scores will be too high; remove one of each"
        yield Finding("warning", "duplicates-between-splits", text)


# Values of labels, of both splits. The first rule that finds something explains the values.


def interpolated_labels(inspection: Inspection) -> Iterator[Finding]:
    """Classes that change over single pixels of the values between them (`ramps.py`), at borders of many pairs.

    A resize with interpolation, or a lossy format on the way, invents classes along each border. One thin class
    between others, such as an outline, has one value only and is none of this.
    """
    splits = inspection.splits.values()
    names = sum((split.ramped for split in splits), Names())
    bordered = sum(split.bordered for split in splits)
    pairs = set().union(*(split.ramp_pairs for split in splits))
    between = set().union(*(split.ramp_values for split in splits))
    if names.count and names.count >= RAMPED_LABELS * bordered and len(pairs) >= 3 and len(between) >= 2:
        text = (
            f"single pixels of the values in between where classes meet, in {names.of('label')} of {bordered}: "
            "resized with interpolation, or saved as JPEG; make them again with nearest neighbour"
        )
        yield Finding("problem", "interpolated-labels", text)


def raw_cityscapes_ids(inspection: Inspection) -> Iterator[Finding]:
    """Values up to 33 in labels of 19 classes: Cityscapes' own ids, of which 19 are classes, in another order."""
    beyond = _beyond(inspection)
    if (
        inspection.config.model.num_classes == CITYSCAPES_CLASSES
        and len(beyond) >= 3
        and beyond[-1] <= LARGEST_CITYSCAPES_ID
    ):
        text = (
            f"{beyond[0]} to {beyond[-1]} in {_wrong(inspection).of('label')}, where the classes are 0 to 18: raw "
            "Cityscapes ids; use the *_labelTrainIds.png files, which csCreateTrainIdLabelImgs makes"
        )
        yield Finding("problem", "raw-cityscapes-ids", text)


def zero_label_reduced_twice(inspection: Inspection) -> Iterator[Finding]:
    """254 in labels: void (255) reduced again. Or reduction of labels that hold 255 and 0, but not the last value.

    Files that need the reduction hold 1 to the number of classes, and 0 for void.
    """
    config, beyond, pixels = inspection.config, _beyond(inspection), _pixels(inspection)
    classes = config.model.num_classes
    if beyond == [254]:
        text = (
            f"254 in {_wrong(inspection).of('label')}, which is void reduced once more: zero-label reduction was "
            "applied twice; make the labels again from the originals"
        )
        yield Finding("problem", "zero-label-reduced-twice", text)
    elif (
        config.data.reduce_zero_label
        and not beyond
        and pixels[IGNORE_LABEL]
        and pixels[0]
        and not pixels[classes]
    ):
        level: Level = "problem" if config.data.dataset in ZERO_LABEL_IS_VOID else "warning"
        splits = inspection.splits.values()
        names = sum((split.holders.get(IGNORE_LABEL, Names()) for split in splits), Names())
        text = (
            f"255 in {names.of('label')}, and {classes}, the last class with reduction, in none: they seem to be "
            "reduced already; --config.data.reduce_zero_label=false"
        )
        yield Finding(level, "zero-label-reduced-twice", text)


def zero_label_not_reduced(inspection: Inspection) -> Iterator[Finding]:
    """Labels that count from 1: the value after the last class and no other; or ADE20K's own, which hold no 255."""
    config, beyond, pixels = inspection.config, _beyond(inspection), _pixels(inspection)
    classes = config.model.num_classes
    if config.data.reduce_zero_label:
        return
    if beyond == [classes]:
        void = " and 0 is void" if pixels[0] else ""
        other = f"; or there is a class more: --config.model.num_classes={classes + 1}" if pixels[0] else ""
        text = (
            f"{classes} in {_wrong(inspection).of('label')}, where the classes are 0 to {classes - 1}: perhaps they "
            f"count from 1{void}: --config.data.reduce_zero_label=true{other}"
        )
        yield Finding("problem", "zero-label-not-reduced", text)
    elif config.data.dataset in ZERO_LABEL_IS_VOID and not beyond and pixels.any() and not pixels[255]:
        text = (
            f"labels of {config.data.dataset} without any 255 count from 1, and 0 is void: "
            "--config.data.reduce_zero_label=true"
        )
        yield Finding("problem", "zero-label-not-reduced", text)


def values_beyond_the_classes(inspection: Inspection) -> Iterator[Finding]:
    """Values that are neither a class nor 255: the loader stops at them."""
    config, beyond, pixels = inspection.config, _beyond(inspection), _pixels(inspection)
    if not beyond:
        return
    largest = max(split.largest for split in inspection.splits.values())
    classes, first = config.model.num_classes, int(config.data.reduce_zero_label)
    count = int(pixels[beyond].sum())
    if largest > IGNORE_LABEL:
        advice = "values of 16 bits are no class numbers: write 0, 1, ... and 255 for void"
    elif len(beyond) >= 2 and largest > 2 * classes:
        advice = "if they are grey levels of a mask of colours, write the classes' numbers instead"
    else:
        advice = "check data.dataset, model.num_classes and data.reduce_zero_label"
    text = (
        f"{_describe_values(beyond, largest)} in {_wrong(inspection).of('label')}, {count:,} of "
        f"{pixels.sum():,} pixels, where the classes are {first} to {classes - 1 + first} and void is 255: {advice}"
    )
    yield Finding("problem", "values-beyond-classes", text)


# Classes


def void_labels(inspection: Inspection) -> Iterator[Finding]:
    """Labels that are void everywhere: nothing is learned from them, and without others the loss is of nothing."""
    for split in inspection.splits.values():
        names = split.void
        if names.count:
            level: Level = "problem" if names.count == split.labels else "warning"
            text = f"{split.name}: no class, only void, in {names.of('label')} of {split.labels}: "
            yield Finding(level, "void-labels", text + "label them, or remove them")


def one_class(inspection: Inspection) -> Iterator[Finding]:
    """One class everywhere in train: the network learns to answer it. With 255, often a mask of 0 and 255."""
    present = np.flatnonzero(inspection.class_pixels("train")).tolist()
    if len(present) != 1 or len(inspection.data_set.classes) == 1:
        return
    mask = inspection.void_pixels("train") > 0 and present == [0]
    advice = "if 255 is meant as a class, write its number instead" if mask else "check the labels"
    text = f"train: {inspection.data_set.classes[present[0]]} is the only class in the labels: {advice}"
    yield Finding("problem", "one-class", text)


def classes_that_never_occur(inspection: Inspection) -> Iterator[Finding]:
    """Classes without a pixel: not learned where they are missing in train, not measured in validation.

    Says nothing of a split that was read in part, that has no label, or where `one_class` has said it.
    """
    names = inspection.data_set.classes
    trained, measured = (inspection.class_pixels(name) > 0 for name in SPLITS)
    train, validation = (inspection.splits[name] for name in SPLITS)
    if trained.sum() > 1 and train.examples == train.available:
        absent = [names[label] for label in np.flatnonzero(~trained)]
        # The labels may count from 1, and the last class be missing by chance.
        from_one = not trained[0] and not inspection.config.data.reduce_zero_label
        advice = (
            "if labels count from 1, --config.data.reduce_zero_label=true" if from_one else "check the labels"
        )
        if absent:
            text = f"train: no pixel of {_list_classes(absent)} of {len(names)}: not learned; {advice}"
            yield Finding("warning", "classes-never-occur", text)
    if measured.any() and trained.sum() > 1 and validation.examples == validation.available:
        absent = [names[label] for label in np.flatnonzero(trained & ~measured)]
        if absent:
            text = f"validation: no pixel of {_list_classes(absent)} of train: mIoU leaves them out unless predicted"
            yield Finding("warning", "classes-never-occur", text)


# Notes


def small_images(inspection: Inspection) -> Iterator[Finding]:
    """Images that are enlarged to fill a crop."""
    data = inspection.config.data
    sizes = inspection.splits["train"].sizes
    small = [size for size in sizes if size[0] < data.crop_size[0] or size[1] < data.crop_size[1]]
    if small:
        factor = max(fit_size(size, data.scale)[0] / size[0] for size in small)
        text = (
            f"train: {sum(sizes[size] for size in small)} of {sizes.total()} images are smaller than data.crop_size="
            f"{data.crop_size}; data.scale={data.scale} makes them up to {factor:.2f} times as large"
        )
        yield Finding("note", "small-images", text)


def rare_classes(inspection: Inspection) -> Iterator[Finding]:
    """Classes with few pixels: learned late, and their IoU varies from run to run."""
    pixels = inspection.class_pixels("train")
    shares = pixels / max(pixels.sum(), 1)
    rare = [inspection.data_set.classes[label] for label in np.flatnonzero((shares > 0) & (shares < RARE))]
    if rare:
        text = f"train: {_list_classes(rare)} of {len(pixels)} hold less than {RARE:.1%} of the labelled pixels each"
        yield Finding("note", "rare-classes", text)


FILE_RULES = (
    missing_split,
    image_without_label,
    label_without_image,
    damaged_file,
    copies_within_a_split,
    copies_between_the_splits,
)
VALUE_RULES = (
    interpolated_labels,
    raw_cityscapes_ids,
    zero_label_reduced_twice,
    zero_label_not_reduced,
    values_beyond_the_classes,
)
CLASS_RULES = (void_labels, one_class, classes_that_never_occur, small_images, rare_classes)


def _pixels(inspection: Inspection) -> np.ndarray:
    """Pixels of both splits by stored value."""
    return np.sum([split.pixels for split in inspection.splits.values()], axis=0)


def _beyond(inspection: Inspection) -> list[int]:
    """The stored values that are neither a class nor void."""
    return np.flatnonzero((_pixels(inspection) > 0) & (inspection.classes < 0)).tolist()


def _wrong(inspection: Inspection) -> Names:
    """The labels that hold such values."""
    return sum((split.wrong for split in inspection.splits.values()), Names())


def _list_classes(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"


def _describe_values(values: list[int], largest: int) -> str:
    """The first values and the last one."""
    numbers = [str(value) for value in values if value < BEYOND] + (
        [f"up to {largest}"] if BEYOND in values else []
    )
    return ", ".join(numbers) if len(numbers) <= 5 else f"{', '.join(numbers[:4])}, ..., {numbers[-1]}"
