"""Folders of images by class, as torchvision's ImageFolder and ImageNet's own archives lay them out.

    <root>/train/<class>/*.JPEG
    <root>/val/<class>/*.JPEG, or <root>/val/*.JPEG with a line "file class" for each, and no other, in <root>/val.txt
    <root>/classes.txt: names to show, a line a class; optional

A class's number is its place among the sorted folders of train; val.txt may give numbers or folders.
"""

import dataclasses
import os
import pathlib

import numpy as np

from topformer_jax.data.example import Example
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

NAMES = "classes.txt"
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")  # in lower case
LAYOUT = (
    "the layout must be train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG with val.txt; point at it with "
    "--config.data.root=DIR"
)
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}


@dataclasses.dataclass(frozen=True)
class ClassFolderSource:
    """Image files with the numbers of their classes. Arrays, since a million strings take 100 MB in each worker."""

    root: str
    images: np.ndarray  # paths below the root, as the file system has them
    labels: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        name = os.fsdecode(self.images[index])
        path = os.path.join(self.root, name)
        with files.report_errors("read", path), files.open_regular(path) as file:
            data = file.read()
        return Example(_stem(name), data, np.asarray(self.labels[index]), (path, f"the class of {path}"))

    def describe(self, index: int) -> tuple[str, int, str]:
        """An example's name, how many bytes its image has, and its class."""
        name = os.fsdecode(self.images[index])
        size = os.path.getsize(os.path.join(self.root, name))
        return _stem(name), size, f"class {self.labels[index]}"


def open_class_folder(root: str, split: str) -> ClassFolderSource:
    """Lists a split's files.

    Raises:
        UserError: a folder, a list or an image is missing, or a class is none of the training split's.
    """
    base = _find_base(root)
    numbers = {name: number for number, name in enumerate(read_class_folders(root))}
    word = _find_word(base, split)
    classes = _subfolders(base / word)
    rows: list[tuple[str, int]] = []
    for name in classes:
        if name not in numbers:
            raise UserError(f"{base / word / name} is a class that {base / 'train'} does not have")
        rows += [(f"{word}/{name}/{file}", numbers[name]) for file in _list_images(base / word / name)]
    if not classes:
        rows = [(f"{word}/{file}", label) for file, label in _read_list(base, word, numbers)]
    if not rows:
        raise UserError(f"{base / word} holds no {' or '.join('*' + suffix for suffix in SUFFIXES)}")
    return ClassFolderSource(
        str(base),
        np.array([os.fsencode(path) for path, _ in rows]),
        np.array([label for _, label in rows], np.int32),
    )


def read_class_folders(root: str) -> list[str]:
    """The names of the training split's folders, sorted: the classes in order.

    Raises:
        UserError: there are none.
    """
    base = _find_base(root)
    names = _subfolders(base / "train")
    if not names:
        raise UserError(f"{base / 'train'} holds no folders: {LAYOUT}")
    return names


def read_class_names(root: str) -> tuple[str, ...]:
    """The classes' names in order: the lines of classes.txt, or else their folders'.

    Raises:
        UserError: there are no folders, or another number of names.
    """
    folders = read_class_folders(root)
    file = _find_base(root) / NAMES
    if not file.exists():
        return tuple(folders)
    names = tuple(files.number_names(file).values())
    if len(names) != len(folders):
        raise UserError(
            f"{file} names {len(names)} classes, {file.parent / 'train'} has {len(folders)} folders: "
            "one name a line, in the order of the sorted folders"
        )
    return names


def _stem(path: str) -> str:
    """An image's path in its split, without suffix."""
    return path.partition("/")[2].rpartition(".")[0]


def _find_base(root: str) -> pathlib.Path:
    base = pathlib.Path(root).expanduser()
    if not root or not base.is_dir():
        why = f"{base.absolute()} does not exist" if root else "data.root is empty"
        raise UserError(f"no images by class: {why}; {LAYOUT}")
    return base


def _find_word(base: pathlib.Path, split: str) -> str:
    words = FOLDERS[split]
    word = next((word for word in words if (base / word).is_dir()), None)
    if word is None:
        raise UserError(f"{base / words[0]} does not exist: expected the {split} split's images there")
    return word


def _subfolders(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        return sorted(name for name in names if name.lower().endswith(SUFFIXES) and name[0] != ".")


def _read_list(base: pathlib.Path, word: str, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """The files of a flat folder with their classes, in the order of their names."""
    file = base / f"{word}.txt"
    if not file.exists():
        raise UserError(
            f"{base / word} has no folders of classes, and there is no {file}: write a line 'file class' for "
            "each image, or sort the images into folders"
        )
    labels: dict[str, int] = {}
    for line in files.read_lines(file):
        name, _, label = line.rpartition(" ")
        number = numbers.get(label, int(label) if label.isdecimal() and len(label) < 9 else -1)
        if not name or not 0 <= number < len(numbers):
            raise UserError(
                f"{file} holds {line!r}: expected a file and its class, a number below {len(numbers)} or a folder of "
                f"{base / 'train'}"
            )
        labels[name.strip()] = number
    found = _list_images(base / word)
    stems = {name: name.rpartition(".")[0] for name in found}
    if missing := [name for name in found if name not in labels and stems[name] not in labels]:
        raise UserError(f"{file} has no line for {missing[0]} ({len(missing)} of {len(found)} images)")
    if absent := labels.keys() - stems.keys() - set(stems.values()):
        raise UserError(
            f"{base / word} has no image {min(absent)}, which {file} names ({len(absent)} of {len(labels)} lines): "
            "copy the images again, or remove the lines"
        )
    return [(name, labels.get(name, labels.get(stems[name], -1))) for name in found]
