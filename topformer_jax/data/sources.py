"""Random access to the examples of a data set: folders of files, array_record shards, synthetic shapes.

A source knows nothing about decoding, order or randomness. It can be pickled: each worker process opens its own copy.
"""

import dataclasses
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from topformer_jax.data import records
from topformer_jax.data.batch import Example, Source
from topformer_jax.data.catalog import CATALOG, SPLITS, Colour, DataSet, Layout, name_classes
from topformer_jax.data.classification import images as class_images
from topformer_jax.data.codecs import read_label_size
from topformer_jax.data.shapes import ShapesSource
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

_NUMBERED = re.compile(r"\d+[\s:=.)-]+\S")  # a line of a list of classes with their numbers
_HEADING = re.compile(r"(class|label)(es|s)?([ _-]?names?)?:?|names?:?|.*:", re.IGNORECASE)
_TRY_WITHOUT_DATA = "to try without data: bash scripts/quickstart.sh"


def open_source(
    config: ConfigDict,
    split: str,
    make_progress: records.MakeProgress = records.SILENT,
    *,
    classes: Sequence[str] = (),
) -> Source:
    """Opens the "train" or "validation" split of the config's data set; with data.cache, copies its shards first.

    `make_progress` makes what shows how much is copied, such as logs.Progress; `classes` as in `find_data_set`.

    >>> from topformer_jax import config
    >>> source = open_source(config.shapes(), "validation")
    >>> len(source), source[0].name, source.label_size(0)
    (64, 'validation_000000', (144, 176))

    Raises UserError if the data is not where the config says, or incomplete.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {SPLITS}")
    data = config.data
    _refuse_bucket(data.dataset, data.root, data.source)
    found = find_data_set(config, classes)
    if (data.source == "shapes") != (data.dataset == "shapes"):
        raise UserError(
            f"data.source={data.source} does not hold data.dataset={data.dataset}: for the synthetic set both "
            "are shapes (configs/topformer_t_shapes.py), for others the source is folder or array_record"
        )
    if data.cache and data.source != "array_record":
        raise UserError(
            f"data.cache={data.cache} holds copies of array_record shards, but data.source={data.source}: leave it "
            "out, or pack the data set by python -m topformer_jax.prepare"
        )
    if data.source == "shapes":
        return ShapesSource(split, data.shapes[split], data.shapes.size)
    if data.source == "folder" and config.task == "classification":
        return class_images.open_class_folder(data.root, split)
    if data.source == "folder":
        return open_folder(data.dataset, found.layout, data.root, split)
    folder = records.find_records(data.root, data.dataset, _TRY_WITHOUT_DATA)
    if data.cache:
        folder = records.copy_split(folder, data.dataset, split, data.cache, make_progress)
    return records.ArrayRecordSource(os.fspath(folder), split)


def find_data_set(config: ConfigDict, classes: Sequence[str] = (), palette: Sequence[Colour] = ()) -> DataSet:
    """Looks up the config's data set: names and colours of its classes, layout of its files.

    With the `classes` and the `palette` of a checkpoint, the names of the data set are not read. Raises UserError if
    the task does not fit, or the data set has another number of classes than `model.num_classes`.
    """
    data, name = config.data, config.data.dataset
    is_classification = config.task == "classification"
    if name != "custom" and is_classification != (name == "imagenet"):
        raise UserError(
            f"task={config.task} cannot use data.dataset={name}: classification takes imagenet, or custom with the "
            "same layout; segmentation takes the others"
        )
    names = tuple(classes) or _read_names(config)[0]
    found = DataSet(names, ()) if is_classification else name_classes(name, names, palette)
    if len(found.classes) == 1:
        raise UserError(
            f"{name} has one class, {found.classes[0]}, which is nothing to learn: give what is around it a class of "
            "its own (prepare custom --background NAME does for annotations), or add classes"
        )
    if len(found.classes) != config.model.num_classes:
        raise UserError(
            f"{name} has {len(found.classes)} classes, the config's model {config.model.num_classes}: "
            f"--config.model.num_classes={len(found.classes)}"
        )
    words = {"train": data.train_split, "validation": data.validation_split}
    chosen: dict[str, Any] = {split: (word,) for split, word in words.items() if word}
    if not chosen:
        return found
    if found.layout is None or data.source != "folder":
        raise UserError(
            f"data.train_split={data.train_split}, data.validation_split={data.validation_split}: these choose among "
            "the folders of a segmentation data set (data.source=folder)"
        )
    return dataclasses.replace(found, layout=dataclasses.replace(found.layout, **chosen))


def compare_classes(config: ConfigDict, classes: Sequence[str]) -> str:
    """One line on how the class names of the config's data set differ from a checkpoint's; "" if they are the same.

    It is "" too if the data set cannot be read, or the checkpoint names no classes.
    """
    is_named = config.data.dataset in CATALOG or config.data.class_names or config.data.root
    if not classes or not is_named:
        return ""
    try:
        names, where = _read_names(config)
    except UserError:
        return ""
    end = "the checkpoint's own names are used"
    if len(names) != len(classes):
        return f"{where} names {len(names)} classes, the checkpoint {len(classes)}: {end}"
    different = [label for label, pair in enumerate(zip(names, classes, strict=True)) if pair[0] != pair[1]]
    if not different:
        return ""
    label, more = different[0], f" (and {len(different) - 1} more)" if different[1:] else ""
    theirs, own = (repr(files.shorten(text, 43)) for text in (names[label], classes[label]))
    place = f"label {label} is {theirs} there, {own} in the checkpoint{more}"
    return f"{where} differs from the checkpoint: {place}; {end}"


def check_class_folders(config: ConfigDict, classes: Sequence[str]) -> None:
    """Raises UserError unless a classifier's folders number their classes as its checkpoint does."""
    names, where = _read_names(config)
    if where.startswith(class_images.NAMES):  # names to show, in any order
        return
    numbers = {name: number for number, name in enumerate(classes) if classes.count(name) == 1}
    for number, name in enumerate(names):
        if numbers.get(name, number) != number:
            raise UserError(
                f"{where} give {name!r} the number {number}, the checkpoint {numbers[name]}: labels would be read as "
                "other classes; give the folders that it was trained on"
            )


def check_class_lines(lines: Mapping[int, str], file: files.Path | str, advice: str = "") -> None:
    """Refuses lines that are more or less than a name: the classes after them would have other numbers."""
    are_numbered = all(_NUMBERED.match(line) for line in lines.values())
    for number, line in lines.items():
        kinds = {
            "a comment": line.startswith("#"),
            "several values": any(sign in line for sign in ",;\t"),
            "a number and a name": are_numbered,
            "a heading": number == min(lines) and _HEADING.fullmatch(line),
        }
        if kind := next((kind for kind, holds in kinds.items() if holds), ""):
            raise UserError(
                f"{file}: line {number} is {kind}, {files.shorten(line, 40)!r}: expected one class name per line, in "
                f"the order of the labels, and nothing else{advice}"
            )


def _read_names(config: ConfigDict) -> tuple[tuple[str, ...], str]:
    """The names of the classes in the config's data set, and where they were found."""
    data = config.data
    if config.task == "segmentation":
        if data.dataset == "custom":
            return _read_custom_classes(config)
        return CATALOG[data.dataset].classes, data.dataset
    if data.source == "folder":
        _refuse_bucket(data.dataset, data.root)
        names, root = class_images.read_class_names(data.root), files.as_path(data.root)
        shown = (root / class_images.NAMES).exists()
        return names, f"{class_images.NAMES} in {root}" if shown else f"the folders of {root / 'train'}"
    folder = records.find_records(data.root, data.dataset, _TRY_WITHOUT_DATA)
    name = class_images.NAMES if (folder / class_images.NAMES).exists() else records.CLASS_NAMES
    return tuple(files.number_names(folder / name).values()), f"{name} in {folder}"


def _read_custom_classes(config: ConfigDict) -> tuple[tuple[str, ...], str]:
    if config.data.class_names:
        names = tuple(config.data.class_names)
        _refuse_repetition(dict(enumerate(names, 1)), "data.class_names: name")
        return names, "data.class_names"
    _refuse_bucket("custom", config.data.root, config.data.source)
    root = files.as_path(config.data.root or ".")
    places = [root / "classes.txt", root / "custom" / records.VERSION / "classes.txt"]
    with files.report_errors("read", root):
        if not files.is_in_bucket(root) and not root.is_dir():
            raise UserError(
                f"data.root={config.data.root} is {'a file' if root.exists() else 'not there'}: give "
                "--config.data.root=DIR, the folder that holds the custom data set and its classes.txt"
            )
        file = next((file for file in places if file.exists()), None)
    if file is not None and (lines := files.number_names(file)):
        # Names that prepare took from annotations may look like anything.
        if config.data.source == "folder" and not (root / "manifest.json").exists():
            check_class_lines(lines, file, " (names with commas: --config.data.class_names)")
        _refuse_repetition(lines, f"{file}: line")
        return tuple(lines.values()), f"{file.name} in {file.parent}"
    why = f"{file} holds none: write them there" if file else f"write them to {places[0]}"
    raise UserError(
        f"the custom data set's classes are unknown: {why}, one name per line in the order of the labels, or give "
        '--config.data.class_names=\'("name","name")\''
    )


def _refuse_repetition(names: Mapping[int, str], where: str) -> None:
    first: dict[str, int] = {}
    for number, name in names.items():
        if first.setdefault(name, number) != number:
            raise UserError(
                f"{where} {number} repeats {files.shorten(name, 40)!r} of {first[name]}: give each class another name"
            )


def _refuse_bucket(dataset: str, root: str, source: str = "folder") -> None:
    """Raises a UserError if the files of a folder layout are in a bucket, which is slow with small files."""
    if source == "folder" and files.is_in_bucket(root):
        raise UserError(
            f"{root} is in a bucket, whose small files are not read one by one: pack a local copy by python "
            f"-m topformer_jax.prepare {dataset} --source DIR --output {root}/records --format array_record and "
            f"train with --config.data.source=array_record --config.data.root={root}/records"
        )


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Pairs of image and label files, sorted by name."""

    root: str
    names: tuple[str, ...]
    images: tuple[str, ...]  # paths below the root
    labels: tuple[str, ...]
    _: dataclasses.KW_ONLY
    pairing: str = ""  # how the names of the labels differ from those of their images; empty: they do not

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        image, label = self._paths(index)
        return Example(self.names[index], _read(image), _read(label), (image, label))

    def describe(self, index: int) -> tuple[str, int, int]:
        """An example's name, and how many bytes its image and its label have."""
        image, label = map(os.path.getsize, self._paths(index))
        return self.names[index], image, label

    def label_size(self, index: int) -> tuple[int, int]:
        label = self._paths(index)[1]
        return read_label_size(_read(label, 24), label)

    def read_label_head(self, index: int) -> bytes:
        """The first bytes of an example's label."""
        return _read(self._paths(index)[1], 4096)

    def _paths(self, index: int) -> tuple[str, str]:
        return os.path.join(self.root, self.images[index]), os.path.join(self.root, self.labels[index])


@dataclasses.dataclass(frozen=True)
class FolderListing:
    """A split's files: the pairs, and what has no partner."""

    pairs: FolderSource
    unlabelled: str  # one line on the images without a label; empty: there are none
    unused: tuple[str, ...]  # labels without an image, paths below the folder of labels
    unread: tuple[str, ...]  # files that are no images, paths below the folder of images


def open_folder(dataset: str, layout: Layout | None, root: str, split: str) -> FolderSource:
    """Lists a split's files; a UserError if a folder is missing or holds no image, or an image has no label."""
    listing = list_folder(dataset, layout, root, split)
    if listing.unlabelled:
        raise UserError(listing.unlabelled)
    return listing.pairs


def list_folder(dataset: str, layout: Layout | None, root: str, split: str) -> FolderListing:
    """Lists a split's files, and pairs each image with its label; a UserError if a folder is missing or holds no
    image.
    """
    if layout is None:
        raise UserError(f"data set {dataset} has no folder layout: data.source=folder cannot read it")
    _refuse_bucket(dataset, root)
    base = pathlib.Path(root).expanduser()
    image_folder, label_folder, names_file = _find_folders(dataset, layout, root, split)

    image_files = list(list_files(base / image_folder))
    found = _find_files(base / image_folder, image_files, layout.image_suffixes)
    unread = tuple(sorted(set(image_files).difference(found.values())))
    images = found
    if names_file:
        wanted = set(files.read_lines(names_file))
        if absent := sorted(wanted - found.keys()):
            text = list_names(absent, "image", f" in {names_file} without an image in {base / image_folder}")
            raise UserError(text)
        images = {name: found[name] for name in wanted}
    if not images:
        kinds = " or ".join("*" + suffix for suffix in layout.image_suffixes)
        there = f", but {files.shorten(unread[0], 40)}" if unread else ""
        raise UserError(f"{base / image_folder} holds no {kinds}{there} {_name_maker(dataset)}")

    label_files = list(list_files(base / label_folder))
    labels = _find_files(base / label_folder, label_files, (layout.label_suffix,))
    label_of, pairing = _pair(images, labels, layout.label_suffix)
    names = [name for name in sorted(images) if label_of[name] in labels]
    image_paths = tuple(f"{image_folder}/{images[name]}" for name in names)
    label_paths = tuple(f"{label_folder}/{labels[label_of[name]]}" for name in names)
    pairs = FolderSource(str(base), tuple(names), image_paths, label_paths, pairing=pairing)
    used = {label_of.get(name, name) for name in found}
    unused = tuple(sorted(path for name, path in labels.items() if name not in used))
    unlabelled = ""
    if without := [images[name] for name in sorted(images) if label_of[name] not in labels]:
        others = unused or (() if labels else label_files)
        # Cityscapes has several label files per image: the raw one (labelIds) is the best example.
        others = sorted(others, key=lambda path: ("labelIds" not in path, path))
        there = f", which has {files.shorten(others[0], 40)}" if others else ""
        unlabelled = (
            f"{list_names(without, 'image')} in {base / image_folder} without a label: each needs a file "
            f"*{layout.label_suffix} in {label_folder}{there} {_name_maker(dataset)}"
        )
    return FolderListing(pairs, unlabelled, unused, unread)


def _find_folders(dataset: str, layout: Layout, root: str, split: str) -> tuple[str, str, pathlib.Path | None]:
    """A split's folders of images and labels, relative to the root, and the file of its images' names, if any."""
    base = pathlib.Path(root).expanduser()
    words = layout.train if split == "train" else layout.validation
    there = [word for word in words if (base / layout.images.format(split=word)).is_dir()]
    if len(there) > 1:
        first, second = (layout.images.format(split=word) for word in there[:2])
        raise UserError(
            f"{first} and {second} are both in {base}: keep one, or choose by data.train_split, data.validation_split"
        )
    paths = [text for text in (layout.images, layout.labels, layout.names) if text]
    image_folder, label_folder, *names = (text.format(split=(there or words)[0]) for text in paths)
    missing = [path for path in ("", image_folder, label_folder, *names) if not (base / path).exists()]
    if root and not missing:
        return image_folder, label_folder, base / names[0] if names else None
    if not root:
        why = "data.root is empty"
    else:
        why = "it is a file" if base.is_file() else f"{missing[0] or 'it'} does not exist"
    if split == "validation" and (base / layout.images.format(split="test")).is_dir():
        why += " (to score on test: --config.data.validation_split=test)"
    both = f"{{{layout.train[0]},{layout.validation[0]}}}"
    suffixes = (f"/**/*{layout.image_suffixes[0]}", f"/**/*{layout.label_suffix}", "")
    expected = [text.format(split=both) + suffix for text, suffix in zip(paths, suffixes, strict=False)]
    raise UserError(
        f"no {dataset} in {base.absolute()}: {why}; the layout must be {', '.join(expected)} "
        f"{_name_maker(dataset)}; point at it with --config.data.root=DIR"
    )


def _pair(images: dict[str, str], labels: dict[str, str], suffix: str) -> tuple[dict[str, str], str]:
    """The label of each image, both without suffix, and one line if their names differ by one ending."""
    same = {name: name for name in images}
    if any(name in labels for name in images):
        return same, ""
    first = min(images)
    found = {f"their images' whole names: {images[first]}{suffix}": images}
    for ending in sorted(name.removeprefix(first) for name in labels if name.startswith(first)):
        # Not another image's name, or Cityscapes' raw ids.
        if not ending[0].isalnum() and not ending.endswith("labelIds"):
            found[f"their images' names and {ending}{suffix}"] = {name: name + ending for name in images}
    found = {text: label_of for text, label_of in found.items() if labels.keys() >= set(label_of.values())}
    if len({tuple(label_of.items()) for label_of in found.values()}) > 1:
        first_text, second = list(found)[:2]
        raise UserError(f"each image has two labels, of {first_text}, and of {second}: keep one of them")
    text, label_of = next(iter(found.items()), ("", same))
    return label_of, f"labels have {text}" if text else ""


def list_names(names: Sequence[str], noun: str, rest: str = "", shown: int = 3) -> str:
    """How many of what, the first names, and what to say about them; empty if there are none.

    >>> list_names(["a.png", "b.png", "c.png", "d.png"], "label", " to remove")
    '4 labels (a.png, b.png, c.png, ...) to remove'
    """
    if not names:
        return ""
    plural = {"copy": "copies", "class": "classes"}.get(noun, f"{noun}s")
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)} {noun if len(names) == 1 else plural} ({', '.join(names[:shown])}{more}){rest}"


def list_files(folder: pathlib.Path) -> Iterator[str]:
    """The paths of all files below a folder, relative to it, with "/"; links are followed, hidden ones skipped."""
    targets: dict[str, str] = {}
    for path, folders, names in os.walk(folder, followlinks=True):
        targets[path] = os.path.realpath(path)
        above = (targets.get(str(parent)) for parent in pathlib.PurePath(path).parents)
        if targets[path] in above:  # a link to a folder that it is in
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = pathlib.Path(path).relative_to(folder)
        yield from ((inside / name).as_posix() for name in names if not name.startswith("."))


def _find_files(folder: pathlib.Path, paths: Iterable[str], suffixes: tuple[str, ...]) -> dict[str, str]:
    """The files with one of the suffixes: path without suffix -> path."""
    found: dict[str, str] = {}
    for path in paths:
        suffix = next((suffix for suffix in suffixes if path.lower().endswith(suffix.lower())), None)
        if suffix is None:
            continue
        name = unicodedata.normalize("NFC", path[: -len(suffix)])  # a Mac's names are decomposed
        if name in found:
            pair = " and ".join(sorted([found[name], path]))
            raise UserError(f"{pair} in {folder} would be of one example: keep one of them, or rename it")
        found[name] = path
    return found


def _name_maker(dataset: str) -> str:
    """The command that makes a data set's folder, in parentheses."""
    origin = "annotations" if dataset == "custom" else "the downloads"
    return f"(python -m topformer_jax.prepare {dataset} makes it from {origin})"


def _read(path: str, count: int = -1) -> bytes:
    with files.report_errors("read", path), files.open_regular(path) as file:
        return file.read(count)
