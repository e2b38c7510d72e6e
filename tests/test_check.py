"""The check of a data set: it says nothing about a healthy one, and about each broken one what is wrong.

`pytest -s tests/test_check.py` shows the lines.
"""

import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests import broken_sets
from tests.broken_sets import (
    CLASSES,
    COUNTS,
    FOLDERS,
    IMAGE,
    IMAGES_BY_CLASS,
    LABEL_MAPS,
    PICTURE,
    PROBLEM,
    WARNING,
    every,
    labels,
    put,
)
from tests.commands import command, refused_command
from tests.test_bad_input import cut, rewrite
from tests.test_class_images import write_images
from topformer_jax import check, config as config_lib
from topformer_jax.data import records
from topformer_jax.data.classification import images as class_images
from topformer_jax.inspection import contents as contents_lib, rules
from topformer_jax.preparation import packing
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

RECIPES = {"maps": "topformer_t_ade", "classes": "topformer_t_imagenet"}
# Two sets: label maps of 19 classes, and images in the folders of three classes, 4 in train and 3 in validation.
SETTINGS: dict[str, dict[str, Any]] = {
    "maps": {"data.dataset": "custom", "data.reduce_zero_label": False, "data.crop_size": (64, 64),
     "model.num_classes": CLASSES},
    "classes": {"model.num_classes": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("check")
    broken_sets.write(root / "maps")
    write_images(root / "classes")
    return root


@pytest.fixture
def spoilt(healthy: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy, to spoil."""
    return shutil.copytree(healthy, tmp_path / "set")


def configure(root: pathlib.Path, changes: dict[str, Any] | None = None, kind: str = "") -> ConfigDict:
    kind = kind or root.name
    return config_lib.load(RECIPES[kind], SETTINGS[kind] | {"data.root": str(root)} | (changes or {}))


def look_through(config: ConfigDict, limit: int | None = None) -> tuple[list[rules.Finding], dict[str, Any]]:
    """The findings and the report."""
    contents = contents_lib.read_contents(config, limit=limit)
    found = rules.find(contents)
    return found, check.make_report(contents, found)


def find(config: ConfigDict) -> list[rules.Finding]:
    """The problems and the warnings."""
    return [finding for finding in look_through(config)[0] if finding.level != "note"]


def test_nothing_is_said_about_a_healthy_set(healthy: pathlib.Path) -> None:
    notes, report = look_through(configure(healthy / "maps", {"data.crop_size": (512, 512)}))
    assert [(note.level, note.rule) for note in notes] == [("note", "small-images")]
    findings, report = look_through(configure(healthy / "classes"))
    assert findings == []
    lines = [" ".join(line.split()) for line in check.format_report(report).splitlines()]
    assert "examples 12 9" in lines
    assert "images per class: smallest / median / largest 4 / 4 / 4 3 / 3 / 3" in lines
    assert f"1 {FOLDERS[1]} 4 3" in lines
    assert lines[-1] == "training would start"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("maps", name) for name in LABEL_MAPS] + [("classes", name) for name in IMAGES_BY_CLASS],
)
def test_broken_sets(spoilt: pathlib.Path, kind: str, name: str) -> None:
    spoil, level, rule, words, *changes = (LABEL_MAPS if kind == "maps" else IMAGES_BY_CLASS)[name]
    spoil(spoilt / kind)
    found = find(configure(spoilt / kind, *changes))
    print("\n".join(["", *(f"{finding.rule}: {finding.text}" for finding in found)]))
    assert {finding[:2] for finding in found} == {(level, rule)}
    splits = {finding.text.partition(":")[0] for finding in found}
    assert len(found) == len(splits), "one finding, or one per split"
    assert words in found[0].text
    assert all("\n" not in finding.text for finding in found)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_length_of_a_training(healthy: pathlib.Path, kind: str) -> None:
    """Epochs become steps, whatever --limit is; a warm-up that does not end is named."""
    changes = {"schedule.epochs": 6, "schedule.warmup_steps": 2, "batch_size": 8, "data.mixup_alpha": 0.0}
    pictures = COUNTS["train"] if kind == "maps" else 12
    steps = -(-6 * pictures // 8)
    length = rules.Finding("note", "length", f"6 epochs of {pictures} pictures = {steps} steps of 8 images")
    found, _ = look_through(configure(healthy / kind, changes), limit=2)
    assert length in found
    assert not [each for each in found if each.rule == "warm-up"]
    found, _ = look_through(configure(healthy / kind, changes | {"schedule.warmup_steps": steps}))
    assert [each.level for each in found if each.rule == "warm-up"] == ["warning"]


def test_palettes_that_agree(spoilt: pathlib.Path) -> None:
    """A palette may be cut after the last value of its picture."""
    root = spoilt / "maps"
    broken_sets.renumber(root)
    path = labels(root)[-1]
    with Image.open(labels(root)[0]) as other:
        palette = other.getpalette() or []
    pixels = np.where(open_image(path) == 255, 0, open_image(path)).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.putpalette(palette[: 3 * CLASSES])
    image.save(path)
    assert find(configure(root)) == []


def test_ade20k(golden: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Its files count from 1; the miniature has 24 of the 150 classes, and never the last one."""
    root = shutil.copytree(golden("mini_ade"), tmp_path / "ade")
    config = config_lib.load("topformer_t_ade", {"data.root": str(root)})
    (finding,) = find(config)
    assert finding[:2] == (WARNING, "classes-never-occur")
    assert "126 classes (" in finding.text
    forgotten = config_lib.load(config, {"data.reduce_zero_label": False})
    (finding,) = find(forgotten)
    assert finding[:2] == (PROBLEM, "zero-label-not-reduced")
    every(lambda label: (label - 1).astype(np.uint8))(root)
    every(put(0))(root)  # the first class, which the miniature does not have
    (finding,) = find(config)
    assert finding[:2] == (PROBLEM, "zero-label-reduced-twice")
    assert {finding.rule for finding in find(forgotten)} == {"classes-never-occur"}


def open_image(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_counts_of_label_maps(healthy: pathlib.Path) -> None:
    """The report's numbers against NumPy's and Pillow's."""
    root = healthy / "maps"
    _, report = look_through(configure(root))
    for folder, name in (("train", "train"), ("val", "validation")):
        arrays = [open_image(path) for path in labels(root, folder)]
        split = report["splits"][name]
        assert split["examples"] == split["available"] == split["labels"] == len(arrays) == COUNTS[folder]
        joined = np.concatenate([array.ravel() for array in arrays])
        values, counts = np.unique(joined, return_counts=True)
        assert split["values"] == dict(zip(values.tolist(), counts.tolist(), strict=True))
        assert split["void_pixels"] == (joined == 255).sum()
        for number in range(CLASSES):
            assert split["classes"][number] == {
                "name": f"class {number}",
                "pixels": (joined == number).sum(),
                "labels": sum((array == number).any() for array in arrays),
            }
        sizes = {(row["height"], row["width"]): row["images"] for row in split["sizes"]}
        opened = [array.shape for array in map(open_image, (root / "images" / folder).iterdir())]
        assert sizes == {shape[:2]: opened.count(shape) for shape in opened}
        assert split["label_files"] == {"grey PNG, 8 bits": len(arrays)}


def write_tiny(root: pathlib.Path, counts: dict[str, list[int]]) -> pathlib.Path:
    """So many images of each class, all of them different."""
    number = 0
    for word, row in counts.items():
        for label, count in enumerate(row):
            folder = root / word / f"class_{label:03}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.array([[[number % 256, number // 256, 0]]], np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
                number += 1
    return root


@pytest.mark.parametrize(("largest", "expected"), [(40, []), (41, ["uneven-classes"])])
def test_uneven_classes(tmp_path: pathlib.Path, largest: int, expected: list[str]) -> None:
    root = write_tiny(tmp_path, {"train": [largest, 2, 3], "val": [1, 1, 1]})
    findings, _ = look_through(configure(root, kind="classes"))
    assert [finding.rule for finding in findings] == expected
    for finding in findings:
        assert finding.level == "note"
        assert "train: class_000 has 41 images, class_001 2: " in finding.text


def settings(root: pathlib.Path, **changes: Any) -> list[str]:
    """The command's words."""
    values = SETTINGS[root.name] | {"data.root": root} | changes
    return ["--config", RECIPES[root.name], *(f"--config.{key}={value}" for key, value in values.items())]


@pytest.mark.parametrize("kind", RECIPES)
def test_the_command(
    spoilt: pathlib.Path,
    tmp_path: pathlib.Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, image = spoilt / kind, IMAGE if kind == "maps" else PICTURE
    out = command(check.main, *settings(root), "--output", tmp_path / "good")
    assert out.splitlines()[-1] == "training would start"
    assert out.endswith((tmp_path / "good/report.txt").read_text())
    with Image.open(tmp_path / "good/classes.png") as picture:
        assert picture.size[0] == 1100
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > len(SETTINGS)
    part = command(check.main, *settings(root), "--output", tmp_path / "part", "--limit", "2")
    assert "first 2 of 1" in part
    assert "expected 1 or more" in refused_command(check.main, *settings(root), "--limit", "0")
    cut(root / image)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["check", *map(str, settings(root)), "--output", str(tmp_path / "bad")])
    with pytest.raises(SystemExit) as end:
        cli.run(check.main)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (1, "")
    assert out.splitlines()[-1] == "training would not start: 1 problem"
    assert f"PROBLEMS\n  unreadable-image: train: {image} is cut off" in out
    report = json.loads((tmp_path / "bad/report.json").read_text())
    assert report["would_start"] is False
    problems = [finding["rule"] for finding in report["findings"] if finding["level"] == PROBLEM]
    assert problems == ["unreadable-image"]


def test_a_classifier_of_many_classes(tmp_path: pathlib.Path) -> None:
    """The table shows the smallest classes, the picture a curve."""
    counts = [2] * (check.MAX_NAMED + 1)
    counts[20] = 1
    root = write_tiny(tmp_path / "classes", {"train": counts, "val": [1] * len(counts)})
    words = settings(root, **{"model.num_classes": len(counts)})
    out = command(check.main, *words, "--output", tmp_path / "out")
    rows = [" ".join(line.split()) for line in out.split("\n\n")[3].splitlines()]
    assert rows[:3] == ["the 10 smallest classes train validation", "20 class_020 1 1", "0 class_000 2 1"]
    with Image.open(tmp_path / "out/classes.png") as image:
        assert image.size == (1100, 450)


def test_the_first_examples_of_a_classifier_say_nothing_about_classes(healthy: pathlib.Path) -> None:
    findings, report = look_through(configure(healthy / "classes"), limit=2)
    assert findings == []
    assert FOLDERS[0] not in check.format_report(report)


def test_records_of_label_maps(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """array_record files, healthy and packed with what is wrong."""
    root = spoilt / "maps"

    def pack(name: str) -> ConfigDict:
        packing.build("custom", str(root), str(tmp_path / name))
        return configure(tmp_path / name, {"data.source": "array_record"}, "maps")

    config = pack("records")
    assert find(config) == []
    files, packed = (look_through(each)[1]["splits"] for each in (configure(root), config))
    assert files == packed
    cut(root / IMAGE)
    rewrite(root / "annotations/val/1.png", put(25))
    found = find(pack("spoilt"))
    assert [finding.rule for finding in found] == ["unreadable-image", "values-beyond-classes"]
    assert "train: image 3 is cut off" in found[0].text
    assert "25 in 1 label (label 1), 5 of " in found[1].text


def test_records_of_images_by_class(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A class that is not among the names."""
    packing.build("imagenet", str(spoilt / "classes"), str(tmp_path / "records"))
    config = configure(tmp_path / "records", {"data.source": "array_record"}, "classes")
    assert find(config) == []
    (tmp_path / "records/imagenet" / records.VERSION / class_images.NAMES).write_text("one\ntwo\n")
    found = find(config_lib.load(config, {"model.num_classes": 2}))
    assert [finding[:2] for finding in found] == [(PROBLEM, "unknown-class")] * 2
    name = f"label {FOLDERS[2]}/{FOLDERS[2]}_0"
    assert f"train: {name} is 2: expected 0 to 1; check model.num_classes (and 3 others (" in found[0].text


def test_what_cannot_be_checked(healthy: pathlib.Path, spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="custom has 19 classes, the config's model 7"):
        find(configure(healthy / "maps", {"model.num_classes": 7}))
    with pytest.raises(UserError, match="imagenet has 3 classes, the config's model 1000"):
        find(configure(healthy / "classes", {"model.num_classes": 1000}))
    (spoilt / "maps/classes.txt").write_text("crack\n")
    with pytest.raises(UserError, match="has one class, crack, which is nothing to learn"):
        find(configure(spoilt / "maps"))
    line = refused_command(check.main, *settings(tmp_path / "maps"), "--output", tmp_path / "out")
    assert "is not there: give " in line
    assert not (tmp_path / "out").exists()
