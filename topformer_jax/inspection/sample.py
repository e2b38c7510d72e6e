"""A look at some labels before a training: whether they hold anything to learn. `check` reads all of them."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import cv2
import numpy as np
from ml_collections import ConfigDict

from topformer_jax.data import codecs, loader
from topformer_jax.data.catalog import DataSet
from topformer_jax.data.classification import images as class_images
from topformer_jax.data.example import Example, SegmentationSource, Source
from topformer_jax.data.sources import FolderSource
from topformer_jax.inspection import label_rules, rules
from topformer_jax.inspection.facts import ExampleFacts
from topformer_jax.inspection.labels import (
    BEYOND,
    LabelFacts,
    LabelInspection,
    LabelSplit,
    class_of_value,
    label_kind,
)
from topformer_jax.inspection.ramps import Ramps
from topformer_jax.runtime.errors import UserError

EXAMPLES = 64  # of a split, evenly spaced, until two classes are seen
PIXELS = 2**28  # of these examples' labels, about: fewer examples of large ones


def look_at_labels(config: ConfigDict, data_set: DataSet, splits: Mapping[str, Source]) -> list[str]:
    """Looks for two classes in each split. Every process of a run sees the same examples.

    Labels that cannot be read are passed over: the loader names them, or skips them.

    Returns:
        Warnings, a line each: train holds one class, labels are of several palettes or kinds, or have other names
        than their images.

    Raises:
        UserError: a split's labels hold no class, and all were looked at.
    """
    if config.data.source == "shapes":
        return []
    find = _find_in_classes if config.task == "classification" else _find_in_maps
    pairings = [(name, source.pairing) for name, source in splits.items() if isinstance(source, FolderSource)]
    found = [f"{name}: {pairing}" for name, pairing in pairings if pairing]
    return [f"{config.data.root}: {text}" for text in (*found, *find(config, data_set, splits))]


def _find_in_maps(config: ConfigDict, data_set: DataSet, splits: Mapping[str, Source]) -> list[str]:
    classes = class_of_value(config.model.num_classes, config.data.reduce_zero_label)
    found = {name: LabelSplit(name, classes=classes, available=len(splits[name])) for name in splits}
    inspection = LabelInspection(config, data_set, found, classes)
    chosen = {name: _choose_examples(source) for name, source in splits.items()}
    heads = {head for source in splits.values() for head in _read_heads(source)}
    for name, source in splits.items():
        for label, depth in _read_sample(source, _count_values, chosen[name]):
            label = label._replace(name=f"{name}/{label.name}")
            found[name].add(ExampleFacts(label.name, label=label, depth=depth))
            is_plain = len(heads) <= 1 and not codecs.describe_depth(depth)
            if is_plain and np.count_nonzero(inspection.class_pixels(name)) > 1:
                break
    for finding in rules.dark_images(inspection):
        raise UserError(f"{config.data.root}: {finding.text}")
    findings = label_rules.find_in_sample(inspection)
    is_whole = all(len(chosen[name]) == len(source) for name, source in splits.items())
    for finding in findings:
        if finding.rule != "one-class" and is_whole:
            raise UserError(f"{config.data.root}: {finding.text}")
    said = (*label_rules.label_palettes(inspection), *label_rules.label_kinds(inspection), *findings)
    return [finding.text for finding in said]


def _find_in_classes(config: ConfigDict, data_set: DataSet, splits: Mapping[str, Source]) -> list[str]:
    source = splits["train"]
    labels = _read_sample(
        source, lambda example: int(class_images.read_label(example, config)), _spread(source)
    )
    first = next(labels, None)
    if first is None or any(label != first for label in labels):
        return []
    looked_at = f"{min(len(source), EXAMPLES)} of {len(source):,} images"
    return [f"train: {data_set.classes[first]} is the only class in {looked_at}: add images of the others"]


def _read_heads(source: Source) -> Iterator[tuple[str, bytes]]:
    """Kinds and palettes of a folder's labels, by their first bytes: reading all of each label takes long."""
    if not isinstance(source, FolderSource):
        return
    for index in _spread(source):
        with contextlib.suppress(UserError):
            head = source.read_label_head(index)
            if head.startswith(codecs.PNG):
                yield label_kind(head), codecs.read_palette(head)


def _spread(source: Source) -> list[int]:
    """The indices of the examples that are looked at."""
    return np.linspace(0, len(source) - 1, min(len(source), EXAMPLES)).round().astype(int).tolist()


def _choose_examples(source: Source) -> list[int]:
    """`_spread`, or every n-th of it: about `PIXELS` in their labels together, where all can be read."""
    indices, total = _spread(source), 0
    for index in indices:
        with contextlib.suppress(UserError):
            total += math.prod(cast(SegmentationSource, source).label_size(index))
    return indices[:: max(1, -(-total // PIXELS))]


def _read_sample(source: Source, read: Callable[[Example], Any], indices: Sequence[int]) -> Iterator[Any]:
    """What `read` gives for examples of a source, but for those that cannot be read."""

    def read_example(index: int) -> Any:
        try:
            return read(source[index])
        except UserError:
            return None

    results = loader.map_in_threads(read_example, indices)
    yield from (result for result in results if result is not None)


def _count_values(example: Example) -> tuple[LabelFacts, int]:
    """A label's pixels by value, and the bits of its image where it has 16.

    Counted by OpenCV, since `np.bincount` would take eight times the label's memory.
    """
    values = codecs.read_label_values(example.label, example.where[1])
    counts = cv2.calcHist([values], [0], None, [2**16], [0, 2**16]).ravel().astype(np.int64)
    pixels = np.append(counts[:BEYOND], counts[BEYOND:].sum())
    palette = codecs.read_palette(example.label) if isinstance(example.label, bytes) else b""
    kind, largest = label_kind(example.label), int(values.max(initial=0))
    facts = LabelFacts(example.name, kind, pixels, largest, Ramps(), palette)
    return facts, codecs.read_depth(example.image, example.name)
