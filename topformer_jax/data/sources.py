"""Random access to the examples of a data set: folders of files, array_record shards, synthetic shapes.

A source knows nothing about decoding, order or randomness. It can be pickled: each worker process opens its own copy.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from topformer_jax.data import shapes
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG, SPLITS, DataSet, Layout, custom
from topformer_jax.data.codecs import read_label_size
from topformer_jax.errors import UserError

VERSION = "1.0.0"  # of the array_record builders
_TRY_WITHOUT_DATA = "to try without data: bash scripts/quickstart.sh"


class Example(NamedTuple):
    """One example as it is stored: the bytes of its files, or arrays where there are no files."""

    name: str  # the image's path in its split, without suffix
    image: bytes | np.ndarray
    label: bytes | np.ndarray
    where: tuple[str, str]  # image and label, as error messages name them


@runtime_checkable
class Source(Protocol):
    """One split of a data set, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads an example; raises a UserError if it cannot be read."""

    def label_size(self, index: int) -> tuple[int, int]:
        """(height, width) of an example's label in pixels, and so of its image, without decoding either."""


def find_data_set(config: ConfigDict) -> DataSet:
    """Looks up the config's data set: names and colours of its classes, layout of its files.

    Raises:
        UserError: there is no such data set, or it has another number of classes than `model.num_classes`.
    """
    name = config.data.dataset
    if name == "custom":
        found = custom(_read_custom_classes(config))
    elif name in CATALOG:
        found = CATALOG[name]
    else:
        raise UserError(f"there is no data set {name}: data.dataset is one of {', '.join(CATALOG)}, custom")
    if len(found.classes) > IGNORE_LABEL:
        raise UserError(
            f"{name} has {len(found.classes)} classes: at most 255 fit, as labels are bytes and 255 is void"
        )
    if len(found.classes) != config.model.num_classes:
        raise UserError(
            f"{name} has {len(found.classes)} classes, the config's model {config.model.num_classes}: "
            f"--config.model.num_classes={len(found.classes)}"
        )
    return found


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens the "train" or "validation" split of the config's data set.

    >>> from topformer_jax import config
    >>> source = open_source(config.shapes(), "validation")
    >>> len(source), source[0].name, source.label_size(0)
    (64, 'validation_000000', (144, 176))

    Raises:
        UserError: the data is not where the config says, or incomplete.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {SPLITS}")
    data = config.data
    found = find_data_set(config)
    if (data.source == "shapes") != (data.dataset == "shapes"):
        raise UserError(
            f"data.source={data.source} does not hold data.dataset={data.dataset}: for the synthetic set both "
            "are shapes (configs/topformer_t_shapes.py), for others the source is folder or array_record"
        )
    if data.source == "shapes":
        return ShapesSource(split, data.shapes[split], data.shapes.size)
    if data.source == "folder":
        return open_folder(data.dataset, found.layout, data.root, split)
    if data.source == "array_record":
        return ArrayRecordSource(str(_find_records(data.root, data.dataset)), split)
    raise UserError(f"there is no data.source {data.source}: folder, array_record or shapes")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Pairs of image and label files, sorted by name."""

    root: str
    names: tuple[str, ...]
    images: tuple[str, ...]  # paths below the root
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        image, label = (
            os.path.join(self.root, self.images[index]),
            os.path.join(self.root, self.labels[index]),
        )
        return Example(self.names[index], _read(image), _read(label), (image, label))

    def label_size(self, index: int) -> tuple[int, int]:
        label = os.path.join(self.root, self.labels[index])
        return read_label_size(_read(label, 24), label)


@dataclasses.dataclass
class ArrayRecordSource:
    """The shards that scripts/build_dataset.py wrote: TFDS records that hold the files' bytes unchanged."""

    folder: str
    split: str

    def __post_init__(self) -> None:
        import tensorflow_datasets as tfds  # takes half a second

        skip = tfds.decode.SkipDecoding()
        try:
            builder = tfds.builder_from_directory(self.folder)
            decoders: Any = {"image": skip, "label": skip}
            self._records: Any = builder.as_data_source(self.split, decoders=decoders)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"the {self.split} split in {self.folder} cannot be opened ({error}): build it again with "
                "scripts/build_dataset.py"
            ) from None

    def __reduce__(self) -> tuple:
        return ArrayRecordSource, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
            name = record["name"].decode()
        except IndexError:
            raise
        except Exception as error:  # a damaged file raises errors of many types
            reason = (str(error) or type(error).__name__).split("\n")[0]
            raise UserError(
                f"record {index} of {self.split} in {self.folder} cannot be read ({reason}): copy it or build it "
                "again (scripts/build_dataset.py)"
            ) from None
        where = f"{name} (record {index} of {self.split} in {self.folder})"
        return Example(name, record["image"], record["label"], (f"image {where}", f"label {where}"))

    def label_size(self, index: int) -> tuple[int, int]:
        example = self[index]
        return read_label_size(example.label, example.where[1])


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """Synthetic scenes (shapes.py), drawn on first use and then cached; their arrays are read-only."""

    split: str
    count: int
    size: int  # pixels

    @functools.cached_property
    def _scenes(self) -> shapes.SceneCache:
        return shapes.SceneCache(self.split, self.size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        image, label = self._scenes[index]
        name = f"{self.split}_{index:06d}"
        return Example(name, image, label, (f"shapes image {name}", f"shapes label {name}"))

    def label_size(self, index: int) -> tuple[int, int]:
        return read_label_size(self[index].label, self.split)


def open_folder(dataset: str, layout: Layout | None, root: str, split: str) -> FolderSource:
    """Lists a split's files and checks that each image has a label.

    Raises:
        UserError: a folder is missing or holds no image, or an image has no label.
    """
    if layout is None:
        raise UserError(f"data set {dataset} has no folder layout: data.source=folder cannot read it")
    base = pathlib.Path(root).expanduser()
    words = layout.train if split == "train" else layout.validation
    word = next((w for w in words if (base / layout.images.format(split=w)).is_dir()), words[0])
    image_folder, label_folder = (
        pathlib.PurePosixPath(text.format(split=word)) for text in (layout.images, layout.labels)
    )
    needed = [base / image_folder, base / label_folder]
    if layout.names:
        needed.append(base / layout.names.format(split=word))
    missing = [path for path in [base, *needed] if not path.exists()]
    if missing or not root:
        why = "it is a file" if base.is_file() else f"{missing[0]} does not exist" if missing else ""
        raise _not_found(dataset, layout, base, why if root else "data.root is empty")

    images = _find_images(base / image_folder, layout.image_suffixes)
    if layout.names:
        wanted = set(_read_lines(needed[2]))
        absent = sorted(wanted - images.keys())
        if absent:
            raise UserError(
                f"{_count_images(absent)} in {needed[2]} without an image in {base / image_folder}"
            )
        images = {name: images[name] for name in wanted}
    if not images:
        kinds = " or ".join("*" + suffix for suffix in layout.image_suffixes)
        raise _not_found(dataset, layout, base, f"{base / image_folder} holds no {kinds}")

    labels = set(_list_files(base / label_folder))
    names = sorted(images)
    unlabelled = [images[name] for name in names if name + layout.label_suffix not in labels]
    if unlabelled:
        hint = f" ({layout.label_hint})" if layout.label_hint else ""
        raise UserError(
            f"{_count_images(unlabelled)} in {base / image_folder} without a label: each needs a file "
            f"*{layout.label_suffix} in {base / label_folder}{hint}"
        )
    return FolderSource(
        str(base),
        tuple(names),
        tuple(str(image_folder / images[name]) for name in names),
        tuple(str(label_folder / (name + layout.label_suffix)) for name in names),
    )


def _list_files(folder: pathlib.Path) -> Iterator[str]:
    """The paths of all files below a folder, relative to it, with "/"; hidden ones are skipped."""
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = pathlib.Path(path).relative_to(folder).as_posix()
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _find_images(folder: pathlib.Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The files with one of the suffixes: path without suffix -> path."""
    found: dict[str, str] = {}
    for path in _list_files(folder):
        suffix = next((suffix for suffix in suffixes if path.lower().endswith(suffix)), None)
        if suffix is None:
            continue
        name = path[: -len(suffix)]
        if name in found:
            pair = " and ".join(sorted([found[name], path]))
            raise UserError(f"{pair} in {folder} would share one label: keep one of them")
        found[name] = path
    return found


def _count_images(paths: list[str]) -> str:
    """How many images, and the first few of their paths."""
    kind = "1 image" if len(paths) == 1 else f"{len(paths)} images"
    return f"{kind} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"


def _not_found(dataset: str, layout: Layout, base: pathlib.Path, why: str) -> UserError:
    folders = []
    for text, suffix in ((layout.images, layout.image_suffixes[0]), (layout.labels, layout.label_suffix)):
        words = f"{{{layout.train[0]},{layout.validation[0]}}}"
        folders.append(f"{text.format(split=words)}/**/*{suffix}")
    if layout.names:
        folders.append(layout.names.format(split=f"{{{layout.train[0]},{layout.validation[0]}}}"))
    hint = f" ({layout.label_hint})" if layout.label_hint else ""
    return UserError(
        f"no {dataset} in {base.absolute()}: {why}; the layout must be {', '.join(folders)}{hint}; point at it "
        f"with --config.data.root=DIR; {_TRY_WITHOUT_DATA}"
    )


def _read(path: str, count: int = -1) -> bytes:
    """A file's bytes, or the first `count` of them."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_custom_classes(config: ConfigDict) -> tuple[str, ...]:
    if config.data.class_names:
        return tuple(config.data.class_names)
    root = epath.Path(config.data.root or ".").expanduser()
    if not root.is_dir():
        raise UserError(
            f"data.root={config.data.root} is {'a file' if root.exists() else 'not there'}: give "
            "--config.data.root=DIR, the folder that holds the custom data set and its classes.txt"
        )
    files = [root / "classes.txt", root / "custom" / VERSION / "classes.txt"]
    file = next((file for file in files if file.exists()), None)
    names = _read_lines(file) if file else []
    if not names:
        why = f"{file} holds none: write them there" if file else f"write them to {files[0]}"
        raise UserError(
            f"the custom data set's classes are unknown: {why}, one name a line in the order of the labels, or give "
            '--config.data.class_names=\'("name","name")\''
        )
    return tuple(names)


def _read_lines(file: pathlib.Path | epath.Path) -> list[str]:
    """A text file's non-blank lines, stripped."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8, one name a line") from None
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror or error}; expected one name a line"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _find_records(root: str, dataset: str) -> epath.Path:
    """The folder that scripts/build_dataset.py wrote: the root itself, or below it."""
    base = epath.Path(root).expanduser()
    for folder in (base, base / VERSION, base / dataset / VERSION):
        if root and (folder / "dataset_info.json").exists():
            return folder
    raise UserError(
        f"no array_record {dataset} in {root or 'data.root, which is empty'}: looked for "
        f"{dataset}/{VERSION}/dataset_info.json; build it with python scripts/build_dataset.py "
        f"--dataset {dataset} --source DIR --output DIR and give --config.data.root=DIR; {_TRY_WITHOUT_DATA}"
    )
