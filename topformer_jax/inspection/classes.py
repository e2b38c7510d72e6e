"""What a classifier's data set holds: images, and how many of them each class has.

`class_rules.py` judges what is found here.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict

from topformer_jax.data import cache, sources
from topformer_jax.data.catalog import IMAGE_SUFFIXES, SPLITS
from topformer_jax.data.classification import images as class_images
from topformer_jax.data.classification.folders import ClassFolderSource
from topformer_jax.data.example import Example
from topformer_jax.inspection.facts import (
    SHOWN_NAMES,
    Fault,
    Inspection,
    Names,
    Size,
    SplitFacts,
    read_splits,
)
from topformer_jax.runtime.errors import UserError


@dataclasses.dataclass
class ClassSplit(SplitFacts[int]):
    """What a split's files hold."""

    _: dataclasses.KW_ONLY
    class_images: Int64[np.ndarray, " classes"]  # how many each class has, damaged ones too
    unread: Names = dataclasses.field(default_factory=Names)  # images in the folder that are no examples

    def add_label(self, label: int) -> None:
        """Adds an image's class."""
        self.class_images[label] += 1


@dataclasses.dataclass
class ClassInspection(Inspection):
    """A classifier's data set, and what its splits hold."""

    splits: dict[str, ClassSplit]


def inspect(
    config: ConfigDict,
    *,
    limit: int | None = None,
    make_progress: cache.MakeProgress = cache.Silence,
) -> ClassInspection:
    """Reads the train and the validation split of the config's data set; the result does not depend on threads.

    Args:
        config: the settings.
        limit: how many examples of each split to read; None: all.
        make_progress: makes what shows how many are read.

    Raises:
        UserError: the config does not fit the data set, or neither split can be opened.
    """
    data_set = sources.find_data_set(config)
    none = np.zeros(len(data_set.classes), np.int64)
    splits = {name: ClassSplit(name, class_images=none.copy()) for name in SPLITS}

    def open_split(name: str) -> sources.Source:
        source = sources.open_source(config, name, make_progress)
        if isinstance(source, ClassFolderSource):
            splits[name].unread = _find_unread(source)
        return source

    def read_label(example: Example, _: Size | None) -> tuple[int | None, Sequence[Fault]]:
        try:
            return int(class_images.read_label(example, config)), ()
        except UserError as error:
            return None, [Fault.from_error("unknown-class", example.where[1], error)]

    read_splits(splits, open_split, read_label, orient=False, limit=limit, make_progress=make_progress)
    return ClassInspection(config, data_set, splits)


def _find_unread(source: ClassFolderSource) -> Names:
    """Images in the split's folder that are no examples: beside the classes' folders, deeper, or of other formats."""
    word = os.fsdecode(source.images[0]).partition("/")[0]
    examples = set(source.images.tolist())
    paths = (f"{word}/{path}" for path in sources.list_files(pathlib.Path(source.root, word)))
    unread = sorted(
        path for path in paths if path.lower().endswith(IMAGE_SUFFIXES) and os.fsencode(path) not in examples
    )
    return Names(len(unread), unread[:SHOWN_NAMES])
