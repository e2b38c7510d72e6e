"""The rules of classifiers' data sets (see `rules.py`), over what `classes.py` has counted."""

from collections.abc import Iterator

import numpy as np

from topformer_jax.data.classification import folders as class_folders
from topformer_jax.inspection import rules
from topformer_jax.inspection.classes import ClassInspection
from topformer_jax.inspection.rules import Finding, list_classes

UNEVEN = 20  # times as many images in the largest class as in the smallest one


def find(inspection: ClassInspection) -> list[Finding]:
    """All findings."""
    return [finding for rule in RULES for finding in rule(inspection)]


def unread_images(inspection: ClassInspection) -> Iterator[Finding]:
    """Images that the loader passes over: beside the classes' folders, in folders within them, or TIFF files."""
    for split in inspection.splits.values():
        if split.unread.count:
            suffixes = ", ".join("*" + suffix for suffix in class_folders.SUFFIXES)
            text = (
                f"{split.name}: {split.unread.of('image')} not read: only {suffixes} directly in a class's folder "
                "are; move or convert them, or remove them"
            )
            yield Finding("warning", "unread-images", text)


def one_class(inspection: ClassInspection) -> Iterator[Finding]:
    """One class everywhere in train: the network learns to answer it."""
    train = inspection.splits["train"]
    present = np.flatnonzero(train.class_images).tolist()
    if train.is_whole and len(present) == 1:
        name = inspection.data_set.classes[present[0]]
        text = f"train: {name} is the only class with images: add the images of the others"
        yield Finding("problem", "one-class", text)


def classes_that_never_occur(inspection: ClassInspection) -> Iterator[Finding]:
    """Classes without an image: not learned where they are missing in train, not measured in validation."""
    images = {name: split.class_images for name, split in inspection.splits.items()}
    untrained, unmeasured = rules.find_absent_classes(inspection, images)
    if untrained:
        count = len(inspection.data_set.classes)
        text = f"train: no image of {list_classes(untrained)} of {count}: not learned; add their images"
        yield Finding("warning", "classes-never-occur", text)
    if unmeasured:
        text = f"validation: no image of {list_classes(unmeasured)} of train: the scores say nothing of them"
        yield Finding("warning", "classes-never-occur", text)


def uneven_classes(inspection: ClassInspection) -> Iterator[Finding]:
    """Classes with few images beside those with many: learned late, and seldom answered."""
    train, names = inspection.splits["train"], inspection.data_set.classes
    present = np.flatnonzero(train.class_images)
    if not train.is_whole or not len(present):
        return
    counts = train.class_images[present]
    largest, smallest = counts.max(), counts.min()
    if largest > UNEVEN * smallest:
        text = (
            f"train: {names[present[counts.argmax()]]} has {largest:,} images, {names[present[counts.argmin()]]} "
            f"{smallest:,}: classes with few are learned late, and seldom answered"
        )
        yield Finding("note", "uneven-classes", text)


RULES = (
    rules.missing_split,
    unread_images,
    rules.damaged_file,
    rules.dark_images,
    rules.copies_within_a_split,
    rules.copies_between_the_splits,
    one_class,
    classes_that_never_occur,
    uneven_classes,
)
