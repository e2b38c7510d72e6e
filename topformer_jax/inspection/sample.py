"""A look at some labels before a training: whether they hold anything to learn. `check` reads all of them."""

import contextlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from topformer_jax.data import codecs
from topformer_jax.data.batch import Source
from topformer_jax.data.catalog import DataSet
from topformer_jax.data.sources import FolderSource
from topformer_jax.inspection import contents as contents_lib, rules
from topformer_jax.inspection.contents import Contents, ExampleContents, SplitContents
from topformer_jax.runtime.errors import UserError

EXAMPLES = 64  # of a split, evenly spaced, until two classes are seen


def look_at_labels(config: ConfigDict, data_set: DataSet, splits: Mapping[str, Source]) -> list[str]:
    """Looks for two classes in each split. Every process of a run sees the same examples.

    The loader names labels that cannot be read, or skips them; they do not count here. Returns warnings, one line
    each: train holds one class, labels are of several palettes or kinds, or they have other names than their images.
    Raises UserError if the labels of a split hold no class, and all were looked at; or if images are nearly black.
    """
    if config.data.source == "shapes":
        return []
    is_uniform = len(set().union(*(_read_heads(source) for source in splits.values()))) <= 1
    contents = Contents(config, data_set, {})
    found = {}
    for name, source in splits.items():
        examples: list[ExampleContents] = []
        values: set[int] = set()
        for example in contents_lib.read_examples(source, _spread(source), config, with_images=False):
            if not example.pixels:
                continue
            examples.append(example)
            values |= example.pixels.keys() & contents.class_of.keys()
            if is_uniform and len(values) > 1 and not codecs.describe_depth(example.depth):
                break
        pairing = source.pairing if isinstance(source, FolderSource) else ""
        found[name] = SplitContents(name, available=len(source), examples=examples, pairing=pairing)
    contents = Contents(config, data_set, found)
    for finding in rules.dark_images(contents):
        raise UserError(f"{config.data.root}: {finding.text}")
    void = [finding for finding in rules.void_labels(contents) if finding.level == "problem"]
    findings = (rules.explain_values(contents) or void) if void else list(rules.one_class(contents))
    if void and all(len(source) <= EXAMPLES for source in splits.values()):
        raise UserError(f"{config.data.root}: {findings[0].text}")
    texts = [f"{split.name}: {split.pairing}" for split in found.values() if split.pairing]
    said = (*rules.label_palettes(contents), *rules.label_kinds(contents), *findings)
    return [f"{config.data.root}: {text}" for text in (*texts, *(finding.text for finding in said))]


def _spread(source: Source) -> list[int]:
    """The indices of the examples that are looked at."""
    return np.linspace(0, len(source) - 1, min(len(source), EXAMPLES)).round().astype(int).tolist()


def _read_heads(source: Source) -> set[tuple[str, bytes]]:
    """Kinds and palettes of a folder's labels, by their first bytes: reading all of each label takes long."""
    heads: set[tuple[str, bytes]] = set()
    if not isinstance(source, FolderSource):
        return heads
    for index in _spread(source):
        with contextlib.suppress(UserError):
            head = source.read_label_head(index)
            if head.startswith(codecs.PNG):
                heads.add((contents_lib.label_kind(head), codecs.read_palette(head)))
    return heads
