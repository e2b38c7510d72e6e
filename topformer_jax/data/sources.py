"""Random access to the examples of a data set: folders of files, array_record shards, synthetic shapes.

A source knows nothing about decoding, order or randomness. It can be pickled: each worker process opens its own copy.
"""

import dataclasses
import functools
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from topformer_jax.data import cache, records, shapes
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG, SPLITS, Colour, DataSet, Layout, name_classes
from topformer_jax.data.classification import folders as class_folders
from topformer_jax.data.codecs import read_label_size
from topformer_jax.data.example import Example, Source
from topformer_jax.data.records import ArrayRecordSource
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

_NUMBERED = re.compile(r"\d+[\s:=.)-]+\S")  # a line of a list of classes with their numbers
_HEADING = re.compile(r"(class|label)(es|s)?([ _-]?names?)?:?|names?:?|.*:", re.IGNORECASE)
_TRY_WITHOUT_DATA = "to try without data: bash scripts/quickstart.sh"


def find_data_set(config: ConfigDict, classes: Sequence[str] = (), palette: Sequence[Colour] = ()) -> DataSet:
    """Looks up the config's data set: names and colours of its classes, layout of its files.

    Args:
        config: the settings.
        classes, palette: a checkpoint's own, where it has them: the data set's names are not read then.

    Raises:
        UserError: there is no such data set, or it has another number of classes than `model.num_classes`.
    """
    data, name = config.data, config.data.dataset
    is_classification = config.task == "classification"
    if name != "custom" and is_classification != (name == "imagenet"):
        raise UserError(
            f"task={config.task} cannot use data.dataset={name}: classification takes imagenet, or custom with the "
            "same layout; segmentation takes the others"
        )
    if name not in (*CATALOG, "custom", "imagenet"):
        raise UserError(f"there is no data set {name}: data.dataset is one of {', '.join(CATALOG)}, custom")
    names = tuple(classes) or _read_names(config)[0]
    found = DataSet(names, ()) if is_classification else name_classes(name, names, palette)
    if len(found.classes) > IGNORE_LABEL and not is_classification:
        raise UserError(
            f"{name} has {len(found.classes)} classes: at most 255 fit, as labels are bytes and 255 is void"
        )
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
    chosen = {"train": data.train_split, "validation": data.validation_split}
    chosen = {split: (folder,) for split, folder in chosen.items() if folder}
    if not chosen:
        return found
    if found.layout is None or data.source != "folder":
        raise UserError(
            f"data.train_split={data.train_split}, data.validation_split={data.validation_split}: these choose among "
            "the folders of a segmentation data set (data.source=folder)"
        )
    return dataclasses.replace(found, layout=dataclasses.replace(found.layout, **chosen))


def compare_classes(config: ConfigDict, classes: Sequence[str]) -> str:
    """What to say where the config's data set names its classes otherwise than a checkpoint; "" where it does not.

    Nothing is said where the data set is not there to be read, or the checkpoint names no classes.
    """
    is_named = config.data.dataset in CATALOG or config.data.class_names or config.data.root
    if not classes or not is_named:
        return ""
    try:
        names, where = _read_names(config)
    except UserError:
        return ""
    different = [label for label, pair in enumerate(zip(names, classes, strict=False)) if pair[0] != pair[1]]
    end = "the checkpoint's own names are used"
    if len(names) != len(classes):
        return f"{where} names {len(names)} classes, the checkpoint {len(classes)}: {end}"
    if not different:
        return ""
    label, more = different[0], f" (and {len(different) - 1} more)" if different[1:] else ""
    theirs, own = (
        repr(text if len(text) <= 40 else f"{text[:40]}...") for text in (names[label], classes[label])
    )
    found = f"label {label} is {theirs} there, {own} in the checkpoint{more}"
    return f"{where} differs from the checkpoint: {found}; {end}"


def check_class_folders(config: ConfigDict, classes: Sequence[str]) -> None:
    """Checks that a classifier's folders number their classes as its checkpoint does: a renamed one moves others.

    Raises:
        UserError: a name has another number.
    """
    names, where = _read_names(config)
    if where.startswith(class_folders.NAMES):  # names to show, in whatever order
        return
    numbers = {name: number for number, name in enumerate(classes) if classes.count(name) == 1}
    for number, name in enumerate(names):
        if numbers.get(name, number) != number:
            raise UserError(
                f"{where} give {name!r} the number {number}, the checkpoint {numbers[name]}: labels would be read as "
                "other classes; give the folders that it was trained on"
            )


def open_source(
    config: ConfigDict,
    split: str,
    make_progress: cache.MakeProgress = cache.NullProgress,
    *,
    classes: Sequence[str] = (),
) -> Source:
    """Opens the "train" or "validation" split of the config's data set; with data.cache, copies its shards first.

    `make_progress` makes what shows how much is copied, such as logs.Progress; `classes` as in `find_data_set`.

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
    _refuse_bucket_of_files(config)
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
    if data.source == "folder":
        if config.task == "classification":
            return class_folders.open_class_folder(data.root, split)
        return open_folder(data.dataset, found.layout, data.root, split)
    if data.source == "array_record":
        folder = records.find_records(data.root, data.dataset, _TRY_WITHOUT_DATA)
        if data.cache:
            copy = cache.copy_split(folder, data.dataset, split, data.cache, make_progress)
            return ArrayRecordSource(copy, split)
        return ArrayRecordSource(str(folder), split)
    raise UserError(f"there is no data.source {data.source}: folder, array_record or shapes")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Pairs of image and label files, sorted by name."""

    root: str
    names: tuple[str, ...]
    images: tuple[str, ...]  # paths below the root
    labels: tuple[str, ...]
    _: dataclasses.KW_ONLY
    pairing: str = ""  # what is said of labels that have not their images' names; empty: they have

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        image, label = (
            os.path.join(self.root, self.images[index]),
            os.path.join(self.root, self.labels[index]),
        )
        return Example(self.names[index], _read(image), _read(label), (image, label))

    def describe(self, index: int) -> tuple[str, int, int]:
        """An example's name, and how many bytes its image and its label have."""
        pair = (os.path.join(self.root, paths[index]) for paths in (self.images, self.labels))
        image, label = map(os.path.getsize, pair)
        return self.names[index], image, label

    def label_size(self, index: int) -> tuple[int, int]:
        label = os.path.join(self.root, self.labels[index])
        return read_label_size(_read(label, 24), label)

    def read_label_head(self, index: int) -> bytes:
        """The first bytes of an example's label."""
        return _read(os.path.join(self.root, self.labels[index]), 4096)


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


@dataclasses.dataclass(frozen=True)
class FolderListing:
    """A split's files: the pairs, and what has no partner."""

    pairs: FolderSource
    unlabelled: str  # what is said of images without a label; empty: there are none
    unused: tuple[str, ...]  # labels without an image, paths below the folder of labels
    unread: tuple[str, ...]  # files that are no images, paths below the folder of images
    label_files: frozenset[str]  # all files in the folder of labels, paths below it


def open_folder(dataset: str, layout: Layout | None, root: str, split: str) -> FolderSource:
    """Lists a split's files and checks that each image has a label.

    Raises:
        UserError: a folder is missing or holds no image, or an image has no label.
    """
    listing = list_folder(dataset, layout, root, split)
    if listing.unlabelled:
        raise UserError(listing.unlabelled)
    return listing.pairs


def list_folder(dataset: str, layout: Layout | None, root: str, split: str) -> FolderListing:
    """Lists a split's files, and pairs each image with its label.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    if layout is None:
        raise UserError(f"data set {dataset} has no folder layout: data.source=folder cannot read it")
    if files.is_in_bucket(root):
        raise UserError(_pack_first(dataset, root))
    base = pathlib.Path(root).expanduser()
    word = _find_word(layout, base, layout.train if split == "train" else layout.validation)
    image_folder, label_folder = (
        find_path(base, text.format(split=word)) for text in (layout.images, layout.labels)
    )
    needed = [base / image_folder, base / label_folder]
    if layout.names:
        needed.append(base / layout.names.format(split=word))
    missing = [path for path in [base, *needed] if not path.exists()]
    if missing or not root:
        lacking = missing[0].relative_to(base) if missing and missing[0] != base else "it"
        why = "it is a file" if base.is_file() else f"{lacking} does not exist"
        if split == "validation" and (base / find_path(base, layout.images.format(split="test"))).is_dir():
            why += " (to score on test: --config.data.validation_split=test)"
        raise _not_found(dataset, layout, base, why if root else "data.root is empty")

    paths = frozenset(list_files(base / image_folder))
    found = _find_files(base / image_folder, paths, layout.image_suffixes)
    unread = tuple(sorted(paths.difference(found.values())))
    images = found
    if layout.names:
        wanted = set(files.read_lines(needed[2]))
        absent = sorted(wanted - found.keys())
        if absent:
            raise UserError(
                f"{_count_images(absent)} in {needed[2]} without an image in {base / image_folder}"
            )
        images = {name: found[name] for name in wanted}
    if not images:
        kinds = " or ".join("*" + suffix for suffix in layout.image_suffixes)
        there = f", but {files.shorten(unread[0], 40)}" if unread else ""
        raise UserError(f"{base / image_folder} holds no {kinds}{there} ({_name_maker(dataset)})")

    paths = frozenset(list_files(base / label_folder))
    labels = _find_files(base / label_folder, paths, (layout.label_suffix,))
    label_of, pairing = _pair(images, labels, layout.label_suffix)
    names = [name for name in sorted(images) if label_of[name] in labels]
    without = [images[name] for name in sorted(images) if label_of[name] not in labels]
    pairs = FolderSource(
        str(base),
        tuple(names),
        tuple(str(image_folder / images[name]) for name in names),
        tuple(str(label_folder / labels[label_of[name]]) for name in names),
        pairing=pairing,
    )
    used = {label_of.get(name, name) for name in found}
    unused = tuple(sorted(path for name, path in labels.items() if name not in used))
    others = unused or (() if labels else sorted(paths))
    there = f", which has {files.shorten(others[0], 40)}" if others else ""
    unlabelled = (
        f"{_count_images(without)} in {base / image_folder} without a label: each needs a file "
        f"*{layout.label_suffix} in {label_folder}{there} ({_name_maker(dataset)})"
    )
    return FolderListing(pairs, unlabelled if without else "", unused, unread, paths)


def find_path(base: pathlib.Path, text: str) -> pathlib.PurePosixPath:
    """A path below a folder, in the upper and lower case that it has there; as it is where it is not there."""
    found = pathlib.PurePosixPath()
    for part in pathlib.PurePosixPath(text).parts:
        if not (base / found / part).exists() and (base / found).is_dir():
            names = sorted(path.name for path in (base / found).iterdir())
            part = next((name for name in names if name.lower() == part.lower()), part)
        found /= part
    return found


def _find_word(layout: Layout, base: pathlib.Path, words: Sequence[str]) -> str:
    """The word of a split whose folder of images is there; the first one where none is.

    Raises:
        UserError: several are.
    """
    there = [word for word in words if (base / find_path(base, layout.images.format(split=word))).is_dir()]
    if len(there) > 1:
        first, second = (layout.images.format(split=word) for word in there[:2])
        raise UserError(
            f"{first} and {second} are both in {base}: keep one, or choose by data.train_split, data.validation_split"
        )
    return there[0] if there else words[0]


def _pair(images: dict[str, str], labels: dict[str, str], suffix: str) -> tuple[dict[str, str], str]:
    """The label of each image, both without suffix, and what is said if their names differ by one ending.

    Raises:
        UserError: the labels of two endings are complete.
    """
    same = {name: name for name in images}
    if any(name in labels for name in images):
        return same, ""
    first = min(images)
    found = {f"their images' whole names: {images[first]}{suffix}": images}
    for ending in sorted(name.removeprefix(first) for name in labels if name.startswith(first)):
        # Not another image's name, or Cityscapes' raw ids.
        if not ending[0].isalnum() and not ending.endswith("labelIds"):
            found[f"their images' names and {ending}{suffix}"] = {name: name + ending for name in images}
    found = {
        text: label_of for text, label_of in found.items() if all(map(labels.__contains__, label_of.values()))
    }
    if len({tuple(label_of.items()) for label_of in found.values()}) > 1:
        first_text, second = list(found)[:2]
        raise UserError(f"each image has two labels, of {first_text}, and of {second}: keep one of them")
    text, label_of = next(iter(found.items()), ("", same))
    return label_of, f"labels have {text}" if text else ""


def _read_names(config: ConfigDict) -> tuple[tuple[str, ...], str]:
    """The names of the classes as the config's data set has them, and where they were found."""
    if config.task == "classification":
        return _read_class_names(config)
    if config.data.dataset == "custom":
        return _read_custom_classes(config)
    return CATALOG[config.data.dataset].classes, config.data.dataset


def _read_class_names(config: ConfigDict) -> tuple[tuple[str, ...], str]:
    """The names of a classifier's classes: of its folders, or as tensorflow-datasets has written them."""
    data = config.data
    if data.source == "folder":
        _refuse_bucket_of_files(config)
        names, root = class_folders.read_class_names(data.root), files.as_path(data.root)
        shown = (root / class_folders.NAMES).exists()
        return names, f"{class_folders.NAMES} in {root}" if shown else f"the folders of {root / 'train'}"
    folder = records.find_records(data.root, data.dataset, _TRY_WITHOUT_DATA)
    name = class_folders.NAMES if (folder / class_folders.NAMES).exists() else records.CLASS_NAMES
    return tuple(files.number_names(folder / name).values()), f"{name} in {folder}"


def _refuse_bucket_of_files(config: ConfigDict) -> None:
    if config.data.source == "folder" and files.is_in_bucket(config.data.root):
        raise UserError(_pack_first(config.data.dataset, config.data.root))


def _pack_first(dataset: str, root: str) -> str:
    """What to do where the files of a folder layout are in a bucket, slow with small files."""
    return (
        f"{root} is in a bucket, whose small files are not read one by one: pack a local copy by python "
        f"-m topformer_jax.prepare {dataset} --source DIR --output {root}/records --format array_record and train "
        f"with --config.data.source=array_record --config.data.root={root}/records"
    )


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
        inside = pathlib.Path(path).relative_to(folder).as_posix()
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _find_files(folder: pathlib.Path, paths: Iterable[str], suffixes: tuple[str, ...]) -> dict[str, str]:
    """Those of a folder's files that have one of the suffixes: path without suffix -> path."""
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
    return UserError(
        f"no {dataset} in {base.absolute()}: {why}; the layout must be {', '.join(folders)} "
        f"({_name_maker(dataset)}); point at it with --config.data.root=DIR; {_TRY_WITHOUT_DATA}"
    )


def _name_maker(dataset: str) -> str:
    """What makes a data set's folder."""
    origin = "annotations" if dataset == "custom" else "the downloads"
    return f"python -m topformer_jax.prepare {dataset} makes it of {origin}"


def _read(path: str, count: int = -1) -> bytes:
    """A file's bytes, or the first `count` of them."""
    with files.report_errors("read", path), files.open_regular(path) as file:
        return file.read(count)


def _read_custom_classes(config: ConfigDict) -> tuple[tuple[str, ...], str]:
    if config.data.class_names:
        names = tuple(config.data.class_names)
        _refuse_repetition(dict(enumerate(names, 1)), "data.class_names: name")
        return names, "data.class_names"
    _refuse_bucket_of_files(config)
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
        f"the custom data set's classes are unknown: {why}, one name a line in the order of the labels, or give "
        '--config.data.class_names=\'("name","name")\''
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
                f"{file}: line {number} is {kind}, {files.shorten(line, 40)!r}: expected one class name a line, in "
                f"the order of the labels, and nothing else{advice}"
            )


def _refuse_repetition(names: Mapping[int, str], where: str) -> None:
    first: dict[str, int] = {}
    for number, name in names.items():
        if first.setdefault(name, number) != number:
            raise UserError(
                f"{where} {number} repeats {files.shorten(name, 40)!r} of {first[name]}: give each class another name"
            )
