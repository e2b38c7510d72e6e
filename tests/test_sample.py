"""The look at labels before a training: labels without a class end it, one class is said; the rest is read little."""

import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.commands import FOLDER, TINY, refused_here
from tests.test_bad_input import rewrite
from topformer_jax import config as config_lib
from topformer_jax.data import sources
from topformer_jax.data.batch import Example
from topformer_jax.inspection.sample import EXAMPLES, look_at_labels
from topformer_jax.runtime.errors import UserError

Change = Callable[[np.ndarray], np.ndarray]


def change_labels(root: pathlib.Path, folder: str, change: Change) -> None:
    for path in (root / "annotations" / folder).iterdir():
        rewrite(path, change)


def fill(value: int) -> Change:
    return lambda label: np.full_like(label, value)


def look(root: pathlib.Path, changes: dict[str, Any] | None = None) -> list[str]:
    settings = TINY | FOLDER | {"data.root": str(root)} | (changes or {})
    config = config_lib.load(config_lib.shapes(), settings)
    splits = {name: sources.open_source(config, name) for name in ("train", "validation")}
    return look_at_labels(config, sources.find_data_set(config), splits)


@pytest.mark.parametrize(("folder", "change", "changes", "words"), [
    ("val", fill(255), {}, "validation: no pixel of any class, only 255, in 3 labels: 255 is void: "),
    ("*", lambda label: np.where(label > 4, 255, 0).astype(np.uint8), {"data.reduce_zero_label": True},
     "and 10, the last class before reduction, in none: they seem to be reduced already; --config.data.redu"),
    ("*", fill(0), {"data.reduce_zero_label": True},
     "only 0, in 8 labels: 0 is void by data.reduce_zero_label: for a class, --config.data.reduce_z"),
    ("*", fill(10), {}, "where the classes are 0 to 9 and void is 255: perhaps they count from 1"),
    ("*", fill(77), {}, "77 in 11 labels (annotations/train/0.png, "),
])  # fmt: skip
def test_labels_without_a_class_end_it(
    root: pathlib.Path, tmp_path: pathlib.Path, folder: str, change: Change, changes: dict, words: str
) -> None:
    for each in ("train", "val") if folder == "*" else (folder,):
        change_labels(root, each, change)
    line = refused_here(tmp_path / "run", FOLDER | {"data.root": root} | changes)
    assert line.startswith(f"error: {root}: ")
    assert words in line
    assert len(line.removeprefix(f"error: {root}: ")) <= 240
    assert not (tmp_path / "run").exists()  # nothing is compiled before the folder is made


def test_one_class_is_a_warning(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look(root) == []
    change_labels(root, "train", lambda label: np.where(label > 4, 255, 0).astype(np.uint8))
    words = "train: class 0 is the only class in 8 labels: if 255 is meant as a class, write its number instead"
    assert look(root) == [f"{root}: {words}"]
    (tmp_path / "file").write_text("in the way, which ends the command later")
    refused_here(tmp_path / "file", FOLDER | {"data.root": root})
    assert capsys.readouterr().out.splitlines()[0] == f"warning: {root}: {words}"


def test_palettes_that_differ_are_a_warning(root: pathlib.Path) -> None:
    """Colours that each file numbers anew, as Pillow's adaptive palettes do: values 0 and 1 change places in one."""
    paths = sorted((root / "annotations/train").iterdir())
    for path in paths:
        swapped = path == paths[-1]
        with Image.open(path) as label:
            image = Image.fromarray(np.asarray(label) > 4).convert("L").point([int(swapped), *[1 - swapped] * 255])
        image.putpalette([0, 128, 0, 128, 0, 0] if swapped else [128, 0, 0, 0, 128, 0])
        image.save(path)
    assert look(root) == [
        f"{root}: 0 is #800000 in the palette of annotations/train/0.png, #008000 in that of "
        "annotations/train/7.png: write class numbers, or masks of colours for prepare custom --from colours",
        f"{root}: labels of 2 kinds (palette PNG, 1 bit: annotations/train/0.png; grey PNG, 8 bits: "
        "annotations/val/0.png): make sure that each number is the same class in all",
    ]


@pytest.mark.parametrize("value", [2**12 - 1, 2**15])
def test_pictures_of_few_bits_in_16(root: pathlib.Path, value: int) -> None:
    """Where all are such, they would be nearly black. One dark picture among others stops nothing."""
    for path in (root / "images/train").iterdir():
        path.unlink()
        cv2.imwrite(str(path.with_suffix(".png")), np.full((72, 72, 3), 2**12 - 1, np.uint16))
    cv2.imwrite(str(root / "images/train/0.png"), np.full((72, 72, 3), value, np.uint16))
    if value >= 2**15:
        assert look(root) == []
        return
    with pytest.raises(UserError, match=r"images .*of 12 bits in 16, which would be nearly black: scale"):
        look(root)


def test_labels_with_an_ending_are_said(root: pathlib.Path) -> None:
    for path in (root / "annotations/train").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.PNG"))
    assert look(root) == [f"{root}: train: labels have their images' names and _mask.png"]


class Reading:
    """A source of labels of two rows that counts what is read."""

    def __init__(self, values: list[int]):
        self.values = values
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Example:
        self.read.add(index)
        label = np.full((2, 3), self.values[index], np.uint16)
        return Example(str(index), label, label, ("image", "label"))


def look_at(train: Reading, classes: int = 10) -> list[str]:
    settings = FOLDER | {"data.class_names": tuple(map(str, range(classes))), "model.num_classes": classes}
    config = config_lib.load(config_lib.shapes(), settings)
    return look_at_labels(config, sources.find_data_set(config), {"train": train, "validation": train})


def test_the_examples_are_spread_over_the_split_and_few() -> None:
    train = Reading([7] * 10_000)
    (line,) = look_at(train)
    assert "7 is the only class in 64 of 10,000 labels" in line
    gaps = np.diff(sorted(train.read))
    assert (len(train.read), min(train.read), max(train.read)) == (EXAMPLES, 0, 9_999)
    assert gaps.max() - gaps.min() <= 1
    # A damaged or wrong one is the loader's to name.
    mixed = Reading([300, 12, *[2] * 5])
    (line,) = look_at(mixed)
    assert "2 is the only class in 7 labels" in line


def test_two_classes_end_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    train = Reading([0, 255] * 5_000 + [1])
    assert look_at(train) == []
    assert len(train.read) <= EXAMPLES
    first = Reading([*range(10)] * 1_000)
    assert look_at(first) == []
    assert len(first.read) < 20  # two, and what the threads have begun


def test_one_class_of_a_classifier(tmp_path: pathlib.Path) -> None:
    def look_at(counts: dict[str, int], name: str) -> list[str]:
        for split in ("train", "val"):
            for word, count in counts.items():
                (tmp_path / name / split / word).mkdir(parents=True)
                for number in range(count):
                    path = tmp_path / name / split / word / f"{word}{number}.png"
                    assert cv2.imwrite(str(path), np.full((4, 4, 3), number, np.uint8))
        changes = {"data.root": str(tmp_path / name), "model.num_classes": 2}
        config = config_lib.load("topformer_t_imagenet", changes)
        splits = {name: sources.open_source(config, name) for name in ("train", "validation")}
        return look_at_labels(config, sources.find_data_set(config), splits)

    (line,) = look_at({"cat": 70, "dog": 0}, "one")
    assert "train: cat is the only class in 64 of 70 images: add images of the others" in line
    assert look_at({"cat": 70, "dog": 9}, "two") == []


def test_shapes_are_not_looked_at() -> None:
    config = config_lib.shapes()
    assert look_at_labels(config, sources.find_data_set(config), {"train": Reading([255])}) == []
