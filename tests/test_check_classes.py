"""The check of a classifier's data set: nothing is said of a healthy one, and of each broken one what is wrong.

`pytest -s tests/test_check_classes.py` shows the lines.
"""

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.broken_sets import PROBLEM, WARNING
from tests.commands import run_check
from tests.test_bad_input import Spoil, cut, resave
from tests.test_class_images import FOLDERS, write_images
from topformer_jax import check, config as config_lib
from topformer_jax.data import records
from topformer_jax.data.classification import folders as class_folders
from topformer_jax.inspection import class_rules, classes as class_inspection
from topformer_jax.inspection.rules import Finding
from topformer_jax.preparation import packing
from topformer_jax.runtime.errors import UserError

FIRST, SECOND, THIRD = FOLDERS
IMAGE = f"train/{FIRST}/{FIRST}_0.JPEG"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three classes, of each 4 images in train and 3 in validation."""
    return write_images(tmp_path_factory.mktemp("check") / "set")


@pytest.fixture
def spoilt(healthy: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy, to spoil."""
    return shutil.copytree(healthy, tmp_path / "set")


def settings(root: pathlib.Path, classes: int = 3) -> dict[str, Any]:
    return {"data.root": str(root), "model.num_classes": classes}


def configure(root: pathlib.Path, changes: dict[str, Any] | None = None, *, classes: int = 3) -> ConfigDict:
    return config_lib.load("topformer_t_imagenet", settings(root, classes) | (changes or {}))


def look_through(config: ConfigDict, limit: int | None = None) -> tuple[str, list[Finding]]:
    """The report and the findings."""
    found = class_inspection.inspect(config, limit=limit)
    findings = class_rules.find(found)
    return check.format_report(found, findings), findings


def write_tiny(root: pathlib.Path, counts: dict[str, list[int]]) -> pathlib.Path:
    """So many images of each class, all of them different."""
    number = 0
    for word, row in counts.items():
        for label, count in enumerate(row):
            folder = root / word / f"class_{label:02}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.array([[[number % 256, number // 256, 0]]], np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
                number += 1
    return root


def test_nothing_is_said_of_a_healthy_set(healthy: pathlib.Path) -> None:
    report, findings = look_through(configure(healthy))
    assert findings == []
    lines = [" ".join(line.split()) for line in report.splitlines()]
    assert "examples 12 9" in lines
    assert "images per class: smallest / median / largest 4 / 4 / 4 3 / 3 / 3" in lines
    assert f"1 {SECOND} 4 3" in lines
    assert lines[-1] == "training would start"
    assert "label" not in report


def copy(source: str, target: str) -> Spoil:
    return lambda root: shutil.copy(root / source, root / target)


def take_images(*folders: str) -> Spoil:
    """Leaves the folders empty."""

    def spoil(root: pathlib.Path) -> None:
        for folder in folders:
            for path in (root / folder).iterdir():
                path.unlink()

    return spoil


def flatten(root: pathlib.Path) -> None:
    """Validation in one folder, with a list that lacks an image."""
    lines = []
    for number, folder in enumerate(FOLDERS):
        for path in sorted((root / "val" / folder).iterdir()):
            lines.append(f"{path.name} {number}")
            path.rename(root / "val" / path.name)
        (root / "val" / folder).rmdir()
    (root / "val.txt").write_text("\n".join(lines[1:]))


def nest(root: pathlib.Path) -> None:
    """A TIFF file, an image in a folder of a class's folder, one beside the classes; and a text, which is none."""
    folder = root / "train" / FIRST
    shutil.copy(root / IMAGE, root / "train/beside.jpg")
    (folder / "deeper").mkdir()
    shutil.copy(root / IMAGE, folder / "deeper" / "image.JPEG")
    Image.open(root / IMAGE).save(folder / "image.tif")
    (folder / "notes.txt").write_text("")


# Of each: what spoils the set, changed settings, the level and the rule of the one finding, and words of its line.
BROKEN: dict[str, tuple[Spoil, dict[str, Any], str, str, str]] = {
    "empty image": (
        lambda root: (root / IMAGE).write_bytes(b""),
        {},
        *(PROBLEM, "unreadable-image", f"train: {IMAGE} is empty"),
    ),
    "cut-off image": (
        lambda root: cut(root / f"val/{THIRD}/{THIRD}_0.JPEG"),
        {},
        *(PROBLEM, "unreadable-image", f"validation: val/{THIRD}/{THIRD}_0.JPEG is cut off"),
    ),
    "skipped image": (
        lambda root: (root / IMAGE).write_text("no image"),
        {"data.skip_unreadable": True},
        *(WARNING, "unreadable-image", f"train: {IMAGE} cannot be decoded"),
    ),
    "copies in two classes": (
        copy(IMAGE, f"train/{SECOND}/x.jpg"),
        {},
        *(WARNING, "duplicates", f"train: 1 copy (train/{SECOND}/x.jpg = {IMAGE}) of an image"),
    ),
    "copies in both splits": (
        copy(IMAGE, f"val/{FIRST}/x.jpg"),
        {},
        *(WARNING, "duplicates-between-splits", f"1 image (val/{FIRST}/x.jpg = {IMAGE}) in both splits"),
    ),
    "a class that is not trained": (
        take_images(f"train/{SECOND}"),
        {},
        *(WARNING, "classes-never-occur", f"train: no image of 1 class ({SECOND}) of 3: not learned"),
    ),
    "a class that is not measured": (
        lambda root: shutil.rmtree(root / "val" / THIRD),
        {},
        *(WARNING, "classes-never-occur", f"validation: no image of 1 class ({THIRD}) of train"),
    ),
    "one class": (
        take_images(f"train/{SECOND}", f"train/{THIRD}"),
        {},
        *(PROBLEM, "one-class", f"train: {FIRST} is the only class with images"),
    ),
    "images at other places": (
        nest,
        {},
        *(WARNING, "unread-images", f"train: 3 images (train/beside.jpg, train/{FIRST}/deeper/image.JPEG, "),
    ),
    "no validation": (
        lambda root: shutil.rmtree(root / "val"),
        {},
        *(PROBLEM, "missing-split", "val does not exist: expected the validation split's images there"),
    ),
    "no image in validation": (
        take_images(*(f"val/{folder}" for folder in FOLDERS)),
        {},
        *(PROBLEM, "missing-split", "val holds no *.jpeg or "),
    ),
    "no image in train": (
        take_images(*(f"train/{folder}" for folder in FOLDERS)),
        {},
        *(PROBLEM, "missing-split", "train holds no *.jpeg or "),
    ),
    "a class that train lacks": (
        lambda root: (root / "val" / "n09999999").mkdir(),
        {},
        *(PROBLEM, "missing-split", "n09999999 is a class that "),
    ),
    "a list that lacks an image": (
        flatten,
        {},
        *(PROBLEM, "missing-split", f"val.txt has no line for {FIRST}_0.JPEG (1 of 9 images)"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sets(spoilt: pathlib.Path, name: str) -> None:
    spoil, changes, level, rule, words = BROKEN[name]
    spoil(spoilt)
    report, (finding,) = look_through(configure(spoilt, changes))
    print(f"\n{finding.rule}: {finding.text}")
    assert finding[:2] == (level, rule)
    assert words in finding.text
    assert "\n" not in finding.text
    verdict = "training would start" if level == WARNING else "training would not start: 1 problem"
    assert report.splitlines()[-1] == verdict


def test_one_folder(tmp_path: pathlib.Path) -> None:
    """The classes are as many as the folders, and one of them is refused."""
    root = write_tiny(tmp_path, {"train": [3], "val": [2]})
    with pytest.raises(UserError, match="has one class, class_00, which is nothing to learn"):
        look_through(configure(root, classes=2))


@pytest.mark.parametrize(("largest", "rules"), [(40, []), (41, ["uneven-classes"])])
def test_uneven_classes(tmp_path: pathlib.Path, largest: int, rules: list[str]) -> None:
    root = write_tiny(tmp_path, {"train": [largest, 2, 3], "val": [1, 1, 1]})
    _, findings = look_through(configure(root))
    assert [finding.rule for finding in findings] == rules
    for finding in findings:
        assert finding.level == "note"
        assert "train: class_00 has 41 images, class_01 2: " in finding.text


def test_many_classes(tmp_path: pathlib.Path) -> None:
    """Of more than fifty the table shows the smallest; the picture a curve."""
    counts = [3] * 60
    counts[20:32] = [2, 1, *[2] * 10]
    root = write_tiny(tmp_path / "set", {"train": counts, "val": [1] * 60})
    report, findings = look_through(configure(root, classes=60))
    assert findings == []
    _, _, table, _ = report.split("\n\n")
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows[:3] == [
        "the 10 smallest classes train validation",
        "21 class_21 1 1",
        "20 class_20 2 1",
    ]
    assert [row.split()[0] for row in rows[3:]] == [str(label) for label in range(22, 30)]
    out, _ = run_check("topformer_t_imagenet", settings(root, 60), tmp_path / "out", 0)
    assert "the 10 smallest classes" in out
    with Image.open(tmp_path / "out/classes.png") as image:
        assert image.size == (1100, 450)


def test_counts(spoilt: pathlib.Path) -> None:
    """The report's numbers against Pillow's and the folders'; files keep the orientation that they are stored in."""
    resave(spoilt / IMAGE, orientation=6)
    (spoilt / f"val/{SECOND}/{SECOND}_0.JPEG").unlink()
    found = class_inspection.inspect(configure(spoilt))
    report = json.loads(check.as_json(found, class_rules.find(found)))
    assert report["would_start"] is True
    assert "reduce_zero_label" not in report
    for word, name in (("train", "train"), ("val", "validation")):
        split, sizes = report["splits"][name], []
        for path in (spoilt / word).rglob("*.JPEG"):
            with Image.open(path) as image:
                sizes.append(image.size)
        assert split["examples"] == split["available"] == len(sizes)
        found_sizes = {(row["width"], row["height"]): row["images"] for row in split["sizes"]}
        assert found_sizes == {size: sizes.count(size) for size in sizes}
        assert split["classes"] == [
            {"name": folder, "images": len(list((spoilt / word / folder).iterdir()))} for folder in FOLDERS
        ]


def test_the_command(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def run(root: pathlib.Path, name: str, status: int, *flags: str, classes: int = 3) -> tuple[str, str]:
        return run_check("topformer_t_imagenet", settings(root, classes), tmp_path / name, status, *flags)

    out, err = run(spoilt, "good", 0)
    assert err == ""
    assert out.endswith((tmp_path / "good/report.txt").read_text())
    with Image.open(tmp_path / "good/classes.png") as image:
        image.load()
        assert image.size == (1100, 210)
        assert len(image.getcolors(1 << 20) or []) > 3
    cut(spoilt / IMAGE)
    shutil.rmtree(spoilt / "val")
    out, _ = run(spoilt, "bad", 1)
    assert out.splitlines()[-1] == "training would not start: 2 problems"
    assert "PROBLEMS\n  missing-split: validation: " in out
    assert f"unreadable-image: train: {IMAGE} is cut off" in out
    report = json.loads((tmp_path / "bad/report.json").read_text())
    assert [finding["rule"] for finding in report["findings"]] == ["missing-split", "unreadable-image"]
    for root, classes, words in (
        (tmp_path / "nowhere", 3, "nowhere does not exist; the layout must be train/<class>/*.JPEG"),
        (spoilt, 4, "imagenet has 3 classes, the config's model 4: --config.model.num_classes=3"),
    ):
        out, err = run(root, "none", 2, classes=classes)
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")
        assert words in err
    assert not (tmp_path / "none").exists()


def test_a_part(healthy: pathlib.Path) -> None:
    """The first examples are those of the first classes: nothing is said of the others."""
    report, findings = look_through(configure(healthy), limit=2)
    assert findings == []
    assert "first 2 of 12" in report
    assert FIRST not in report


def test_threads_do_not_change_the_report(spoilt: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in FOLDERS:
        cut(spoilt / f"train/{folder}/{folder}_3.JPEG")
        shutil.copy(spoilt / f"train/{folder}/{folder}_2.JPEG", spoilt / f"train/{folder}/x.JPEG")
    reports = []
    for threads in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        reports.append(look_through(configure(spoilt))[0])
    assert reports[0] == reports[1]
    assert f"train: train/{FIRST}/{FIRST}_3.JPEG is cut off: its end is missing; replace" in reports[0]
    assert f"(and 2 more: train/{SECOND}/{SECOND}_3.JPEG, train/{THIRD}/{THIRD}_3.JPEG)" in reports[0]
    assert "train: 3 copies (" in reports[0]


def test_records(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """array_record files, healthy and packed with what is wrong; and a class that is not among the names."""

    def pack(name: str) -> ConfigDict:
        packing.build("imagenet", str(spoilt), str(tmp_path / name))
        return configure(tmp_path / name, {"data.source": "array_record"})

    config = pack("records")
    assert look_through(config)[1] == []
    files, packed = (class_inspection.inspect(c).splits["train"] for c in (configure(spoilt), config))
    np.testing.assert_array_equal(files.class_images, packed.class_images)
    assert files.sizes == packed.sizes
    cut(spoilt / IMAGE)
    _, (finding,) = look_through(pack("spoilt"))
    assert finding[:2] == (PROBLEM, "unreadable-image")
    assert f"train: image {FIRST}/{FIRST}_0 is cut off" in finding.text
    folder = tmp_path / "records/imagenet" / records.VERSION
    (folder / class_folders.NAMES).write_text("one\ntwo\n")
    found = look_through(config_lib.load(config, {"model.num_classes": 2}))[1]
    assert [finding[:2] for finding in found] == [(PROBLEM, "unknown-class")] * 2
    assert f"train: label {THIRD}/{THIRD}_0 is 2: expected 0 to 1; check model.num_classes (and 3 more: " in (
        found[0].text
    )


def test_what_cannot_be_checked(healthy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="imagenet has 3 classes, the config's model 1000"):
        look_through(configure(healthy, classes=1000))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"train holds no folders: the layout must be train/<class>"):
        look_through(configure(tmp_path))
