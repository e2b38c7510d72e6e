"""Data sets to check: a healthy one, and what spoils it."""

import pathlib
import shutil
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from tests.test_bad_input import cut, resave, rewrite
from tests.test_class_images import FOLDERS
from topformer_jax.data import shapes

CLASSES = 19  # as many as Cityscapes has
# Cityscapes' own ids of its classes, in the order of the classes (labels.py of cityscapesscripts).
RAW_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], np.uint8)
COUNTS = {"train": 10, "val": 6}
Change = Callable[[np.ndarray], np.ndarray]


def write(root: pathlib.Path) -> None:
    """Writes a custom data set of 19 classes: scenes, whose right halves have classes of their own, and void."""
    for folder, split in (("train", "train"), ("val", "validation")):
        for number in range(COUNTS[folder]):
            image, label = shapes.draw(split, number, 96)
            label[:, label.shape[1] // 2 :] += 9
            label[:3] = 255
            for kind, suffix, array in (("images", "jpg", image[..., ::-1]), ("annotations", "png", label)):
                (root / kind / folder).mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(root / kind / folder / f"{number}.{suffix}"), array)
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(CLASSES)))


def labels(root: pathlib.Path, folder: str = "*") -> list[pathlib.Path]:
    return sorted(root.glob(f"annotations/{folder}/*.png"))


def every(change: Change, folder: str = "*") -> Callable[[pathlib.Path], None]:
    """Changes all labels."""

    def spoil(root: pathlib.Path) -> None:
        for path in labels(root, folder):
            rewrite(path, change)

    return spoil


def one(file: str, spoil: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], object]:
    """Spoils one file."""
    return lambda root: spoil(root / file)


def deepen(path: pathlib.Path) -> None:
    """Puts a PNG of 12 bits in 16 in an image's place, under its name."""
    pixels = np.asarray(cv2.imread(str(path))).astype(np.uint16) * 16
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def put(value: int, dtype: type = np.uint8) -> Change:
    """Writes a value into 5 pixels."""

    def change(label: np.ndarray) -> np.ndarray:
        label = label.astype(dtype)
        label[50, :5] = value
        return label

    return change


def where_class(change: Change) -> Change:
    """Changes all pixels but void ones."""
    return lambda label: np.where(label == 255, label, change(label)).astype(label.dtype)


def flip_a_byte(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def colour(label: np.ndarray) -> np.ndarray:
    """A mask of colours, by PASCAL VOC's rule or any other."""
    return np.stack([label * 37, label * 91, label * 53], -1)


def soften(method: int, factor: float) -> Change:
    """What a resize and one back leave of a label; void stays where it was."""

    def change(label: np.ndarray) -> np.ndarray:
        small = cv2.resize(label, None, fx=factor, fy=factor, interpolation=method)
        return cv2.resize(small, label.shape[::-1], interpolation=cv2.INTER_LINEAR)

    return where_class(change)


def copy(source: str, target: str) -> Callable[[pathlib.Path], object]:
    return lambda root: shutil.copy(root / source, root / target)


def take_away(folder: str) -> Callable[[pathlib.Path], object]:
    return lambda root: shutil.rmtree(root / folder)


def take_images(*folders: str) -> Callable[[pathlib.Path], object]:
    """Leaves the folders empty."""

    def spoil(root: pathlib.Path) -> None:
        for path in [path for folder in folders for path in (root / folder).iterdir()]:
            path.unlink()

    return spoil


def nest(root: pathlib.Path) -> None:
    """An image in a folder of a class's folder, one beside the classes; and a text, which is none."""
    folder = root / "train" / FIRST
    shutil.copy(root / PICTURE, root / "train/beside.jpg")
    (folder / "deeper").mkdir()
    shutil.copy(root / PICTURE, folder / "deeper" / "image.JPEG")
    (folder / "notes.txt").write_text("")


def name_as_cityscapes(root: pathlib.Path) -> None:
    for path in labels(root):
        path.rename(path.with_name(f"{path.stem}_gtFine_labelIds.png"))


def drop(lost: int) -> Change:
    """A class becomes another."""
    return lambda label: np.where(label == lost, (lost + 1) % CLASSES, label).astype(np.uint8)


def save_alpha(path: pathlib.Path) -> None:
    Image.open(path).convert("LA").save(path)


def renumber(root: pathlib.Path) -> None:
    """Labels with one palette, but for the last one's, whose colours have other numbers."""
    colours = np.random.default_rng(0).permutation(768).astype(np.uint8)
    for path in labels(root):
        image = Image.fromarray(np.asarray(Image.open(path)))
        image.putpalette(np.roll(colours, 3 if path == labels(root)[-1] else 0).tobytes())
        image.save(path)


IMAGE, LABEL = "images/train/3.jpg", "annotations/train/3.png"
FIRST, SECOND, THIRD = FOLDERS  # of a classifier
PICTURE = f"train/{FIRST}/{FIRST}_0.JPEG"
PROBLEM, WARNING = "problem", "warning"
# What spoils a set of label maps, the level and the rule of the one finding, words of its text, and changed settings.
LABEL_MAPS: dict[str, tuple] = {
    "cut-off image": (one(IMAGE, cut), PROBLEM, "unreadable-image", f"train: {IMAGE} is cut off"),
    "12 bits in 16": (one(IMAGE, deepen), PROBLEM, "dark-images",
     f"1 image ({IMAGE}) of 12 bits in 16, which would be nearly black: scale the values"),
    "image turned by 180 degrees": (one(IMAGE, lambda path: resave(path, orientation=3)), WARNING, "turned-images",
     f"1 image ({IMAGE}) turned or mirrored by the EXIF orientation"),
    "labels of another suffix": (lambda root: [path.rename(path.with_suffix(".tif")) for path in labels(root, "val")],
     PROBLEM, "image-without-label", "annotations/val, which has 0.tif (python -m"),
    "damaged label": (one(LABEL, flip_a_byte), PROBLEM, "unreadable-label", f"{LABEL} is a damaged PNG"),
    "skipped image": (one(IMAGE, cut), WARNING, "unreadable-image", f"train: {IMAGE} is cut off",
     {"data.skip_unreadable": True}),
    "image without label": (one(LABEL, pathlib.Path.unlink), PROBLEM, "image-without-label", "1 image (3.jpg) in "),
    "label without image": (copy(LABEL, "annotations/train/x.png"), WARNING, "label-without-image",
     "train: 1 label (x.png) without an image"),
    "another size": (one(LABEL, lambda path: rewrite(path, lambda label: label[:-1])), PROBLEM, "size",
     f"{LABEL} has another size than its image"),
    "EXIF": (one("images/train/4.jpg", lambda path: resave(path, orientation=8)), PROBLEM, "size",
     "annotations/train/4.png has the size of its image without the EXIF rotation"),
    "a value too many": (one(LABEL, lambda path: rewrite(path, put(25))), PROBLEM, "values-beyond-classes",
     f"25 in 1 label ({LABEL}), 5 of 146,256 pixels"),
    "16 bits": (one(LABEL, lambda path: rewrite(path, put(2570, np.uint16))), PROBLEM, "values-beyond-classes",
     f"up to 2570 in 1 label ({LABEL}), 5 of "),
    "a label of 16 bits": (one(LABEL, lambda path: rewrite(path, lambda label: label.astype(np.uint16))), WARNING,
     "label-kinds", f"labels of 2 kinds (grey PNG, 8 bits: annotations/train/0.png; grey PNG, 16 bits: {LABEL}): "),
    "palettes": (renumber, PROBLEM, "label-palettes", "in the palette of annotations/train/0.png, #"),
    "grey levels": (every(where_class(lambda label: label * 13)), PROBLEM, "values-beyond-classes",
     "if they are grey levels of a mask of colours"),
    "raw Cityscapes ids": (every(where_class(lambda label: RAW_IDS[np.minimum(label, 18)])), PROBLEM,
     "raw-cityscapes-ids", "19, 20, 21, 22, ..., 33 in 16 labels (annotations/train/0.png, "),
    "names of raw Cityscapes labels": (name_as_cityscapes, PROBLEM, "raw-cityscapes-ids",
     "which has 0_gtFine_labelIds.png"),
    "labels that count from 1": (every(where_class(lambda label: label + 1)), PROBLEM, "zero-label-not-reduced",
     "the classes are 0 to 18 and void is 255: perhaps they count from 1: --config"),
    "a class more": (every(put(19)), PROBLEM, "zero-label-not-reduced",
     "which makes 0 void; or add a class: --config.model.num_classes=20"),
    "254": (every(lambda label: np.where(label == 255, 254, label).astype(np.uint8)), PROBLEM,
     "zero-label-reduced-twice", "254 in 16 labels (annotations/train/0.png, "),
    "reduced on disk and again": (lambda _: None, WARNING, "zero-label-reduced-twice",
     ", and 19, the last class before reduction, in none", {"data.reduce_zero_label": True}),
    "colours": (every(colour), PROBLEM, "colour-label", "is a mask of colours: write the number"),
    "alpha": (one(LABEL, save_alpha), PROBLEM, "colour-label", f"{LABEL} repeats one value in all channels"),
    **{f"interpolated {name} {factor}": (every(soften(method, factor)), PROBLEM, "interpolated-labels",
     "where classes meet, 16 labels (") for name, method,
     factor in [("bilinear", cv2.INTER_LINEAR, 0.7), ("area", cv2.INTER_AREA, 0.5)]},
    "a class that is not trained": (every(drop(7), "train"), WARNING, "classes-never-occur",
     "train: no pixel of 1 class (class 7) of 19: not"),
    "a class that is not measured": (every(drop(7), "val"), WARNING, "classes-never-occur",
     "validation: no pixel of 1 class (class 7) of train"),
    "a void label": (one(LABEL, lambda path: rewrite(path, lambda label: np.full_like(label, 255))), WARNING,
     "void-labels", f"train: no class, only void, in 1 label ({LABEL}) of 10"),
    "nothing but void": (every(lambda label: np.full_like(label, 255), "train"), PROBLEM, "void-labels",
     "train: no pixel of any class, only 255, in 10 labels: 255 is void: write the"),
    "one class": (every(where_class(lambda label: np.full_like(label, 4))), PROBLEM, "one-class",
     "train: class 4 is the only class in 10 labels: check the labels"),
    "masks of 0 and 255": (every(lambda label: np.where(label < 9, 0, 255).astype(np.uint8)), PROBLEM, "one-class",
     "if 255 is meant as a class, write its number instead"),
    "copies in a split": (lambda root:
     [shutil.copy(root / name, root / name.replace("3", "x")) for name in (IMAGE, LABEL)], WARNING, "duplicates",
     f"train: 1 copy (images/train/x.jpg = {IMAGE})"),
    "copies between the splits": (lambda root:
     [shutil.copy(root / f, root / f.replace("train/3", "val/x")) for f in (IMAGE, LABEL)], WARNING,
     "duplicates-between-splits", f"1 image (images/val/x.jpg = {IMAGE}) in both splits"),
    "no validation": (take_away("images/val"), PROBLEM, "missing-split", "images/val does not exist"),
}  # fmt: skip
# The same for a set of images by class.
IMAGES_BY_CLASS: dict[str, tuple] = {
    "empty image": (one(PICTURE, lambda path: path.write_bytes(b"")), PROBLEM, "unreadable-image",
     f"train: {PICTURE} is empty"),
    "skipped image": (one(PICTURE, lambda path: path.write_text("no image")), WARNING, "unreadable-image",
     f"train: {PICTURE} cannot be decoded", {"data.skip_unreadable": True}),
    "copies in two classes": (copy(PICTURE, f"train/{SECOND}/x.jpg"), WARNING, "duplicates",
     f"train: 1 copy (train/{SECOND}/x.jpg = {PICTURE}) of an image"),
    "copies in both splits": (copy(PICTURE, f"val/{FIRST}/x.jpg"), WARNING, "duplicates-between-splits",
     f"1 image (val/{FIRST}/x.jpg = {PICTURE}) in both splits"),
    "a class that is not trained": (take_images(f"train/{SECOND}"), WARNING, "classes-never-occur",
     f"train: no image of 1 class ({SECOND}) of 3: not learned"),
    "a class that is not measured": (take_away(f"val/{THIRD}"), WARNING, "classes-never-occur",
     f"validation: no image of 1 class ({THIRD}) of train"),
    "one class": (take_images(f"train/{SECOND}", f"train/{THIRD}"), PROBLEM, "one-class",
     f"train: {FIRST} is the only class in 4 images"),
    "images at other places": (nest, WARNING, "unread-files",
     f"train: 2 files (train/beside.jpg, train/{FIRST}/deeper/image.JPEG)"),
    "no validation": (take_away("val"), PROBLEM, "missing-split", "val does not exist: expected the valid"),
    "no image in train": (*(take_images(*(f"train/{folder}" for folder in FOLDERS)), PROBLEM, "missing-split"),
     "train holds no *.jpg or "),
}  # fmt: skip
