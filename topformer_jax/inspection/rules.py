"""What is wrong or suspicious in a data set: a small function a rule, over what `facts.py` has counted.

A rule's docstring says what it sees and why that is suspicious; its findings say what to change. At a problem
training would stop, or learn nonsense; with a warning it would go on; a note is worth knowing. Here are the rules
of all data sets; `label_rules.py` and `class_rules.py` add those of a task.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from topformer_jax.data import codecs
from topformer_jax.data.catalog import SPLITS
from topformer_jax.inspection.facts import Inspection, Names

Level = Literal["problem", "warning", "note"]


class Finding(NamedTuple):
    """One line of the report: what was seen, what it probably means, what to change."""

    level: Level
    rule: str
    text: str


def missing_split(inspection: Inspection) -> Iterator[Finding]:
    """A split that cannot be opened or holds nothing: training opens both before its first step."""
    for split in inspection.splits.values():
        if split.refusal:
            yield Finding("problem", "missing-split", f"{split.name}: {split.refusal}")
        elif split.is_empty:
            yield Finding("problem", "missing-split", f"{split.name} holds no examples: build it again")


def damaged_file(inspection: Inspection) -> Iterator[Finding]:
    """Files that the loader refuses: empty, cut off, damaged, not an image, masks of colours, sizes that differ."""
    skip = inspection.config.data.skip_unreadable
    for split in inspection.splits.values():
        for (rule, words), names in split.faults.items():
            # Only training skips them, and stops if there are no others.
            survives = skip and split.name == "train" and split.intact > 0
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


def dark_images(inspection: Inspection) -> Iterator[Finding]:
    """Images of 16 bits, of which none uses the highest ones: such as a camera's 12 bits that were not scaled."""
    depths = [item for split in inspection.splits.values() for item in split.depths.items()]
    if words := codecs.describe_depth(max((bits for bits, _ in depths), default=0)):
        names = sum((names for _, names in depths), Names())
        yield Finding("problem", "dark-images", f"{names.of('image')} of {words}")


def find_absent_classes(
    inspection: Inspection, counts: Mapping[str, Int64[np.ndarray, " classes"]]
) -> tuple[list[str], list[str]]:
    """The classes that do not occur in train, and those of train that do not occur in validation.

    None of a split that was read in part or holds no class, and none where train holds one class alone, which is
    another finding.

    Args:
        inspection: the data set.
        counts: of each class, by split.
    """
    trained, measured = (counts[name] > 0 for name in SPLITS)
    train, validation = (inspection.splits[name] for name in SPLITS)
    names = np.array(inspection.data_set.classes)
    if trained.sum() <= 1:
        return [], []
    return (
        names[~trained].tolist() if train.is_whole else [],
        names[trained & ~measured].tolist() if measured.any() and validation.is_whole else [],
    )


def list_classes(names: list[str]) -> str:
    """How many classes, and the names of the first."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"
