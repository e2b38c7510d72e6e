"""The images of a classifier: folders on the disk, and one example on the host, a random crop or the centre.

    <root>/train/<class>/*.JPEG
    <root>/val/<class>/*.JPEG, or <root>/val/*.JPEG and <root>/val.txt with a line "file class" for each image
    <root>/classes.txt: names to show, one per line; optional

The number of a class is its place among the sorted folders of train; val.txt may give numbers or folders. Flip,
normalisation, erasing and mixup follow on the device (`augment.py`).
"""

import dataclasses
import math
import os
import pathlib
from typing import TypedDict

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Int32
from ml_collections import ConfigDict

from topformer_jax.data import codecs
from topformer_jax.data.batch import Example, Image
from topformer_jax.data.catalog import IMAGE_SUFFIXES
from topformer_jax.data.classification.rand_augment import rand_augment
from topformer_jax.data.transforms import Size
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

NAMES = "classes.txt"
LAYOUT = (
    "the layout must be train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG with val.txt; point at it with "
    "--config.data.root=DIR"
)
ASPECT = (3 / 4, 4 / 3)  # width by height of a random crop
RAND_AUGMENT_STD = 0.5  # of the magnitude
TRIES = 10  # crops that are drawn before the centre is taken
Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels


@dataclasses.dataclass(frozen=True)
class ClassFolderSource:
    """Image files with the numbers of their classes. Arrays, since a million strings take 100 MB in each worker."""

    root: str
    images: np.ndarray  # paths below the root, as the file system has them
    labels: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        name, path = self._find(index)
        with files.report_errors("read", path), files.open_regular(path) as file:
            data = file.read()
        return Example(name, data, np.asarray(self.labels[index]), (path, f"the class of {path}"))

    def describe(self, index: int) -> tuple[str, int, str]:
        """An example's name, how many bytes its image has, and its class."""
        name, path = self._find(index)
        return name, os.path.getsize(path), f"class {self.labels[index]}"

    def _find(self, index: int) -> tuple[str, str]:
        """An example's name (the image's path in its split, without suffix), and the path of its file."""
        image = os.fsdecode(self.images[index])
        return image.partition("/")[2].rpartition(".")[0], os.path.join(self.root, image)


def open_class_folder(root: str, split: str) -> ClassFolderSource:
    """Lists a split's files.

    Raises UserError if a folder, a list or an image is missing, or a class is none of the training split's.
    """
    base = _find_base(root)
    numbers = {name: number for number, name in enumerate(read_class_folders(root))}
    words = ("train",) if split == "train" else ("val", "validation")
    word = next((word for word in words if (base / word).is_dir()), None)
    if word is None:
        raise UserError(f"{base / words[0]} does not exist: expected the {split} split's images there")
    classes = _list_folders(base / word)
    rows: list[tuple[str, int]] = []
    for name in classes:
        if name not in numbers:
            raise UserError(f"{base / word / name} is a class that {base / 'train'} does not have")
        rows += [(f"{word}/{name}/{file}", numbers[name]) for file in _list_images(base / word / name)]
    if not classes:
        rows = [(f"{word}/{file}", label) for file, label in _read_list(base, word, numbers)]
    if not rows:
        raise UserError(f"{base / word} holds no {' or '.join('*' + suffix for suffix in IMAGE_SUFFIXES)}")
    paths = np.array([os.fsencode(path) for path, _ in rows])
    return ClassFolderSource(str(base), paths, np.array([label for _, label in rows], np.int32))


def read_class_folders(root: str) -> list[str]:
    """The names of the training split's folders, sorted: the classes in order; a UserError if there are none."""
    base = _find_base(root)
    names = _list_folders(base / "train")
    if not names:
        raise UserError(f"{base / 'train'} holds no folders: {LAYOUT}")
    return names


def read_class_names(root: str) -> tuple[str, ...]:
    """The lines of classes.txt, or else the names of the folders; a UserError if their numbers differ."""
    folders = read_class_folders(root)
    file = _find_base(root) / NAMES
    if not file.exists():
        return tuple(folders)
    names = tuple(files.number_names(file).values())
    if len(names) != len(folders):
        raise UserError(
            f"{file} names {len(names)} classes, {file.parent / 'train'} has {len(folders)} folders: "
            "one name per line, in the order of the sorted folders"
        )
    return names


def _find_base(root: str) -> pathlib.Path:
    base = pathlib.Path(root).expanduser()
    if not root or not base.is_dir():
        why = f"{base.absolute()} does not exist" if root else "data.root is empty"
        raise UserError(f"no images by class: {why}; {LAYOUT}")
    return base


def _list_folders(folder: pathlib.Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: pathlib.Path) -> list[str]:
    names = os.listdir(folder)
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")


def _read_list(base: pathlib.Path, word: str, numbers: dict[str, int]) -> list[tuple[str, int]]:
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


class ClassExample(TypedDict):
    """A training example: an image of the crop's size, its class, and that size (height, width)."""

    image: Image
    label: np.int32
    size: Int32[np.ndarray, "2"]


def make_training_example(example: Example, config: ConfigDict, rng: np.random.Generator) -> ClassExample:
    """Decodes a random crop, resizes it bilinearly to `data.crop_size`, and applies RandAugment.

    A JPEG is decoded at a half, a quarter or an eighth if the crop is still as large as the result. So bilinear
    weights never shrink it by much more than 2; other files are averaged over areas instead. Files keep the
    orientation that they are stored in, as in torchvision. Raises UserError if the file is damaged, or the model
    lacks its class.
    """
    data, where = example.image, example.where[0]
    target = config.data.crop_size
    size = codecs.read_jpeg_size(data)
    if size is None:
        image = codecs.decode_image(data, where, orient=False)
        top, left, height, width = random_box((image.shape[0], image.shape[1]), config.data.crop_area, rng)
    else:
        top, left, height, width = random_box(size, config.data.crop_area, rng)
        reduction = choose_reduction((height, width), target)
        image = codecs.decode_image(data, where, reduction=reduction, orient=False)
        bottom, right = -(-(top + height) // reduction), -(-(left + width) // reduction)
        top, left = top // reduction, left // reduction
        height, width = bottom - top, right - left
    is_small = min(height / target[0], width / target[1]) < 2
    method = cv2.INTER_LINEAR if is_small else cv2.INTER_AREA
    image = cv2.resize(image[top : top + height, left : left + width], target[::-1], interpolation=method)
    if config.data.rand_augment:
        image = rand_augment(image, magnitude=config.data.rand_augment, std=RAND_AUGMENT_STD, rng=rng)
    return {"image": image, "label": read_label(example, config), "size": np.array(target, np.int32)}


def random_box(size: Size, area: tuple[float, float], rng: np.random.Generator) -> Box:
    """torchvision's `RandomResizedCrop`: a box of a random area and aspect ratio, anywhere in an image of (height,
    width).

    `area` is the range of the box's share of the image. It and the logarithm of the aspect ratio are drawn uniformly.
    Returns the first of ten boxes that fits; else the largest one in the centre with an allowed aspect ratio.
    """
    height, width = size
    for _ in range(TRIES):
        pixels = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        across, down = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = int(rng.integers(0, height - down + 1))
            return top, int(rng.integers(0, width - across + 1)), down, across
    down = max(min(height, round(width / ASPECT[0])), 1)
    across = max(min(width, round(height * ASPECT[1])), 1)
    return (height - down) // 2, (width - across) // 2, down, across


def choose_reduction(size: Size, target: Size) -> int:
    """The largest of 1, 2, 4 and 8 that leaves both sides at least as long as the target's.

    >>> choose_reduction((448, 600), (224, 224)), choose_reduction((447, 2000), (224, 224))
    (2, 1)
    """
    ratio = min(size[0] / target[0], size[1] / target[1])
    return next(each for each in (8, 4, 2, 1) if each <= max(ratio, 1))


def make_evaluation_image(example: Example, config: ConfigDict) -> Image:
    """The centre, `data.crop_size`, of an image whose short side is resized to that size / `evaluation.crop_pct`.

    The short side is rounded down, as in timm. The result has the bytes of torchvision's `Resize` (bicubic) and
    `CenterCrop`. Raises UserError if the file is damaged.
    """
    image = codecs.decode_image(example.image, example.where[0], orient=False)
    height, width = image.shape[:2]
    short = int(max(config.data.crop_size) / config.evaluation.crop_pct)
    down, across = (int(short * side / min(height, width)) for side in (height, width))
    picture = PIL.Image.fromarray(image).resize((across, down), PIL.Image.Resampling.BICUBIC)
    rows, columns = config.data.crop_size
    top, left = round((down - rows) / 2), round((across - columns) / 2)
    return np.array(picture)[top : top + rows, left : left + columns]


def read_label(example: Example, config: ConfigDict) -> np.int32:
    """An example's class; a UserError if the model has no such class."""
    label = int(np.asarray(example.label).item())
    if not 0 <= label < config.model.num_classes:
        raise UserError(
            f"{example.where[1]} is {label}: expected 0 to {config.model.num_classes - 1}; check model.num_classes"
        )
    return np.int32(label)
