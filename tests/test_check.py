"""The check of a data set: nothing is said of a healthy one, and of each broken one the one thing that is wrong.

`pytest -s tests/test_check.py` shows the lines.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests import broken_sets
from tests.broken_sets import BROKEN, CLASSES, COUNTS, IMAGE, PROBLEM, WARNING, every, labels, put
from tests.commands import run_check
from tests.test_bad_input import cut, rewrite
from topformer_jax import check, config as config_lib
from topformer_jax.inspection import label_rules, labels as label_inspection, ramps, rules
from topformer_jax.preparation import packing
from topformer_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A custom data set of 19 classes: synthetic scenes, whose right halves have classes of their own, and void."""
    root = tmp_path_factory.mktemp("check") / "set"
    broken_sets.write(root)
    return root


@pytest.fixture
def spoilt(healthy: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy, to spoil."""
    return shutil.copytree(healthy, tmp_path / "set")


def settings(root: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """The settings for a custom data set; `changes` with "_" for "."."""
    return {
        "data.dataset": "custom",
        "data.root": str(root),
        "data.reduce_zero_label": False,
        "data.crop_size": (64, 64),
        "model.num_classes": CLASSES,
        **changes,
    }


def configure(root: pathlib.Path, **changes: Any) -> ConfigDict:
    return config_lib.load("topformer_t_ade", settings(root, **changes))


def look_through(config: ConfigDict, limit: int | None = None) -> list[rules.Finding]:
    """The problems and the warnings."""
    found = label_rules.find(label_inspection.inspect(config, limit=limit))
    return [finding for finding in found if finding.level != "note"]


def test_nothing_is_said_of_a_healthy_set(healthy: pathlib.Path) -> None:
    assert look_through(configure(healthy)) == []
    as_words = {"data.reduce_zero_label": False, "data.crop_size": (512, 512)}
    notes = label_rules.find(label_inspection.inspect(configure(healthy, **as_words)))
    assert [(note.level, note.rule) for note in notes if note.rule != "rare-classes"] == [
        ("note", "small-images")
    ]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sets(spoilt: pathlib.Path, name: str) -> None:
    spoil, changes, level, rule, words = BROKEN[name]
    spoil(spoilt)
    found = look_through(configure(spoilt, **changes))
    print("\n".join(["", *(f"{finding.rule}: {finding.text}" for finding in found)]))
    expected = {(level, rule)}
    assert {finding[:2] for finding in found} == expected
    per_split = {
        name for name in ("train", "validation") if any(f.text.startswith(f"{name}: ") for f in found)
    }
    assert len(found) == max(len(per_split), 1)  # one, or one a split
    assert words in found[0].text
    assert all("\n" not in finding.text for finding in found)


def test_palettes_that_agree(spoilt: pathlib.Path) -> None:
    """A palette may be cut after the last value of its picture."""
    broken_sets.renumber(spoilt)
    (finding,) = look_through(configure(spoilt))
    assert finding[:2] == (PROBLEM, "label-palettes")
    assert "annotations/val/5.png" in finding.text
    path = labels(spoilt)[-1]
    with Image.open(labels(spoilt)[0]) as other:
        palette = other.getpalette() or []
    pixels = np.where(open_image(path) == 255, 0, open_image(path)).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.putpalette(palette[: 3 * CLASSES])
    image.save(path)
    assert look_through(configure(spoilt)) == []


def test_labels_that_need_the_reduction(spoilt: pathlib.Path) -> None:
    every(lambda label: (label + 1).astype(np.uint8))(spoilt)  # void is 0
    assert look_through(configure(spoilt, **{"data.reduce_zero_label": True})) == []


def test_ade20k(golden: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Its files count from 1; the miniature has 24 of the 150 classes, and never the last one."""
    root = shutil.copytree(golden("mini_ade"), tmp_path / "ade")
    config = config_lib.load("topformer_t_ade", {"data.root": str(root)})
    (finding,) = look_through(config)
    assert finding[:2] == (WARNING, "classes-never-occur")
    assert "126 classes (" in finding.text
    forgotten = config_lib.load(config, {"data.reduce_zero_label": False})
    (finding,) = look_through(forgotten)
    assert finding[:2] == (PROBLEM, "zero-label-not-reduced")
    every(lambda label: (label - 1).astype(np.uint8))(root)
    every(put(0))(root)  # the first class, which the miniature does not have
    (finding,) = look_through(config)
    assert finding[:2] == (PROBLEM, "zero-label-reduced-twice")
    assert {finding.rule for finding in look_through(forgotten)} == {"classes-never-occur"}


def test_synthetic_shapes() -> None:
    changes = {"data.shapes.train": 60, "data.shapes.validation": 30, "data.shapes.size": 64}
    assert look_through(config_lib.load("topformer_t_shapes", changes)) == []


@pytest.mark.parametrize("seed", range(4))
def test_ramps(seed: int) -> None:
    """Against the definition, pixel by pixel."""
    rng = np.random.default_rng(seed)
    label = np.repeat(rng.integers(0, 6, (8, 30)), rng.integers(1, 4, 30), 1).astype(np.uint8)
    soft, hard, pairs, between = 0, 0, set(), set()
    for row in label.tolist():
        start = 0
        while start < len(row) - 1:
            end = start
            while end < len(row) - 1 and row[end] != row[end + 1]:
                end += 1
            steps = row[start : end + 1]
            if len(steps) == 2 and abs(steps[0] - steps[1]) >= 2:
                hard += 1
            if len(steps) > 2 and (steps == sorted(steps) or steps == sorted(steps, reverse=True)):
                soft += 1
                pairs.add((min(steps), max(steps)))
                between |= set(steps[1:-1])
            start = end + 1
    assert soft > 3
    assert hard > 3
    assert ramps.count_ramps(label) == (soft, hard, pairs, between)
    assert ramps.count_ramps(label[:, :1]) == ramps.Ramps()


def run(root: pathlib.Path, output: pathlib.Path, status: int, *flags: str) -> tuple[str, str]:
    return run_check("topformer_t_ade", settings(root), output, status, *flags)


def test_the_command(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out, err = run(spoilt, tmp_path / "good", 0)
    assert out.splitlines()[-1] == "training would start"
    assert err == ""
    assert out.endswith((tmp_path / "good/report.txt").read_text())
    with Image.open(tmp_path / "good/classes.png") as image:
        image.load()
        assert image.size[0] > 800
        assert len(image.getcolors(1 << 20) or []) > CLASSES
    cut(spoilt / IMAGE)
    out, _ = run(spoilt, tmp_path / "bad", 1)
    assert out.splitlines()[-1] == "training would not start: 1 problem"
    assert f"PROBLEMS\n  unreadable-image: train: {IMAGE} is cut off" in out
    report = json.loads((tmp_path / "bad/report.json").read_text())
    assert report["would_start"] is False
    out, _ = run(spoilt, tmp_path / "part", 0, "--limit", "2")
    assert "first 2 of 10" in out
    for flags, root in (((), tmp_path / "nowhere"), (("--limit", "0"), spoilt)):
        out, err = run(root, tmp_path / "none", 2, *flags)
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")
    assert not (tmp_path / "none").exists()


def open_image(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_counts(healthy: pathlib.Path) -> None:
    """The report's numbers against NumPy's and Pillow's."""
    found = label_inspection.inspect(configure(healthy))
    report = json.loads(check.as_json(found, label_rules.find(found)))
    for folder, name in (("train", "train"), ("val", "validation")):
        arrays = [open_image(path) for path in labels(healthy, folder)]
        split = report["splits"][name]
        assert split["examples"] == split["available"] == split["labels"] == len(arrays) == COUNTS[folder]
        joined = np.concatenate([array.ravel() for array in arrays])
        values, counts = np.unique(joined, return_counts=True)
        assert split["values"] == {str(v): int(c) for v, c in zip(values, counts, strict=True)}
        assert split["void_pixels"] == (joined == 255).sum()
        for number in range(CLASSES):
            assert split["classes"][number] == {
                "name": f"class {number}",
                "pixels": (joined == number).sum(),
                "labels": sum((array == number).any() for array in arrays),
            }
        sizes = {(row["height"], row["width"]): row["images"] for row in split["sizes"]}
        opened = [array.shape for array in map(open_image, (healthy / "images" / folder).iterdir())]
        assert sizes == {shape[:2]: opened.count(shape) for shape in opened}
        assert split["label_files"] == {"grey PNG, 8 bits": len(arrays)}


def test_threads_do_not_change_the_report(spoilt: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        cut(spoilt / f"images/train/{number}.jpg")
    reports = []
    for threads in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        found = label_inspection.inspect(configure(spoilt))
        reports.append(check.format_report(found, label_rules.find(found)))
    assert reports[0] == reports[1]
    assert (
        "images/train/0.jpg is cut off: its end is missing; replace or remove it (and 4 more: " in reports[0]
    )


def test_records(spoilt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """array_record files, healthy and packed with what is wrong."""

    def pack(name: str) -> ConfigDict:
        packing.build("custom", str(spoilt), str(tmp_path / name))
        return configure(tmp_path / name, **{"data.source": "array_record"})

    config = pack("records")
    assert look_through(config) == []
    files, records = (label_inspection.inspect(c).splits["train"] for c in (configure(spoilt), config))
    np.testing.assert_array_equal(files.pixels, records.pixels)
    assert files.sizes == records.sizes
    cut(spoilt / IMAGE)
    rewrite(spoilt / "annotations/val/1.png", put(25))
    found = look_through(pack("spoilt"))
    assert [finding.rule for finding in found] == ["unreadable-image", "values-beyond-classes"]
    assert "train: image 3 is cut off" in found[0].text
    assert "25 in 1 label (label 1), 5 of " in found[1].text


def test_what_cannot_be_checked(healthy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="custom has 19 classes, the config's model 7"):
        look_through(configure(healthy, **{"model.num_classes": 7}))
    with pytest.raises(UserError, match="is not there: give "):
        look_through(configure(tmp_path / "nowhere"))
