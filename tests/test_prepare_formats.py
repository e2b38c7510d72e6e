"""`prepare custom --from` coco, cvat, yolo, roboflow-masks, voc: each label against one made here by other means."""

import io
import json
import pathlib
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from tests.miniatures import jpeg, png
from tests.test_prepare import refusal, run, tree
from tests.test_prepare_own import BACK, write

H, W = 40, 60
LINE = 300  # characters that a line of an error may have


def picture(seed: int, kind: str = ".jpg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)
    return cv2.imencode(kind, pixels)[1].tobytes()


def label(made: pathlib.Path, name: str) -> np.ndarray:
    """The values of a label that was made, by Pillow."""
    return np.array(Image.open(made / "annotations" / f"{name}.png"))


def palette_png(values: np.ndarray, *colours: tuple[int, int, int]) -> bytes:
    image, file = Image.fromarray(values.astype(np.uint8), "P"), io.BytesIO()
    image.putpalette([value for colour in colours for value in colour])
    image.save(file, "PNG")
    return file.getvalue()


def zip_of(files: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes | str) else json.dumps(content))
    return file.getvalue()


def instances(name: str, *rows: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A file of COCO that lists one picture."""
    image = {"id": 1, "file_name": name, "width": W, "height": H}
    annotations = [{"id": n, "image_id": 1, "iscrowd": 0, **row} for n, row in enumerate(rows)]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": [image], "categories": categories, "annotations": annotations} | fields


def box(x: int, y: int, right: int, bottom: int) -> list[float]:
    return [x, y, right, y, right, bottom, x, bottom]


def test_instances_of_coco(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rectangles between pixels by slices, a triangle and runs by pycocotools; the larger area is below."""
    blob = np.zeros((H, W), np.uint8, order="F")
    blob[2:9, 40:58] = 1
    blob[4, 45] = 0
    packed = masks.encode(blob)["counts"].decode()
    triangle = [30.5, 20.2, 55.1, 38.7, 20.3, 36.9]
    rows = [
        {"category_id": 3, "segmentation": [box(10, 10, 15, 15)]},  # small, first: it stays on top
        {"category_id": 7, "segmentation": [box(5, 5, 30, 20), box(0, 30, 4, 34)]},
        {"category_id": 3, "segmentation": {"size": [H, W], "counts": packed}},
        {"category_id": 7, "segmentation": [triangle]},
        {"category_id": 7, "segmentation": {"size": [H, W], "counts": [0, 2, H * W - 4, 2]}, "iscrowd": 1},
        {"category_id": 7, "segmentation": [], "bbox": [1, 22, 3, 2]},
        {"category_id": 7, "segmentation": [[1, 1, 2, 2]]},
    ]
    files = {
        "images/train/a.jpg": picture(1),
        "images/val/a.jpg": picture(2),
        "images/train/stray.jpg": picture(3),
        "annotations/instances_train.json": instances("a.jpg", *rows),
        "annotations/instances_val.json": instances("a.jpg"),
        "annotations/captions_val.json": {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "caption": "x"}],
        },
    }
    source = write(tmp_path / "x", files)
    assert "covers a part of the pictures only: give the rest a class by --background NAME" in refusal(
        "custom", source, tmp_path / "made", "--from", "coco"
    )
    run("custom", source, tmp_path / "made", "--from", "coco", *BACK)
    assert (tmp_path / "made/classes.txt").read_text() == "nothing\ncat\ndog\n"
    expected = np.zeros((H, W), np.uint8)
    with warnings.catch_warnings():  # of pycocotools with NumPy 2
        warnings.simplefilter("ignore")
        expected[masks.decode(masks.frPyObjects([triangle], H, W))[..., 0] > 0] = 2
    expected[5:20, 5:30] = expected[30:34, 0:4] = 2
    expected[10:15, 10:15] = 1
    expected[blob > 0] = 1
    expected[22:24, 1:4] = 255  # what the box alone tells
    expected[:2, 0] = expected[-2:, -1] = 2
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a"), expected)
    assert (label(tmp_path / "made", "val/a") == 0).all()
    assert (tmp_path / "made/images/train/a.jpg").read_bytes() == picture(1)
    assert (tmp_path / "made/images/val/a.jpg").read_bytes() == picture(2)
    out = capsys.readouterr().out
    assert "left out, in no annotation: images/train/stray.jpg" in out
    assert "left out, files without polygons, run lengths or boxes: annotations/captions_val.json" in out
    assert "pictures without annotations, all background in annotations/instances_val.json: 1" in out
    assert "crowds, drawn as their class in annotations/instances_train.json: 1" in out
    assert "boxes without a mask, whose pixels are void in annotations/instances_train.json: 1" in out
    assert "annotations without an area, left out in annotations/instances_train.json: 1" in out
    assert "drawn by their area, the largest first" in out


def test_coco_of_roboflow(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Category 0 names the group of the others, here as one of them; test is no train."""
    categories = [
        {"id": 0, "name": "crack", "supercategory": "none"},
        {"id": 1, "name": "crack", "supercategory": "crack"},
    ]
    row = {"category_id": 1, "segmentation": [box(0, 0, 20, 40)]}
    files: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        files[f"{split}/a.rf.1.jpg"] = picture(len(split))
        files[f"{split}/_annotations.coco.json"] = instances("a.rf.1.jpg", row, categories=categories)
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "coco", "--background", "wall")
    assert (tmp_path / "made/classes.txt").read_text() == "wall\ncrack\n"
    for split, seed in (("train", 5), ("val", 5), ("test", 4)):
        assert (tmp_path / f"made/images/{split}/a.rf.1.jpg").read_bytes() == picture(seed)
        np.testing.assert_array_equal(
            label(tmp_path / "made", f"{split}/a.rf.1"), np.arange(W)[None] // 20 * np.ones((H, 1)) < 1
        )
    out = capsys.readouterr().out
    assert "no class: category crack, which names the group of the others" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["train", "validation", "test"]


def panoptic(name: str, *segments: dict[str, Any]) -> dict[str, Any]:
    rows = [{"image_id": 1, "file_name": "a.png", "segments_info": list(segments)}]
    return {**instances(name), "annotations": rows}


def test_panoptic_pictures_of_one_name_and_masks_in_a_zip(tmp_path: pathlib.Path) -> None:
    ids = np.zeros((H, W, 3), np.uint8)
    ids[:20] = (7, 2, 1)  # id 7 + 2 * 256 + 65536
    segment = {"id": 7 + 512 + 65536, "category_id": 3}
    files: dict[str, Any] = {}
    for split in ("train", "val"):
        files[f"{split}2017/a.png"] = picture(len(split), ".png")
        files[f"annotations/panoptic_{split}2017.json"] = panoptic("a.png", segment)
        files[f"annotations/panoptic_{split}2017.zip"] = zip_of({f"panoptic_{split}2017/a.png": png(ids)})
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "coco")
    for split in ("train", "val"):
        assert (tmp_path / f"made/images/{split}/a.png").read_bytes() == picture(len(split), ".png")
        found = label(tmp_path / "made", f"{split}/a")
        assert (found[:20] == 0).all()
        assert (found[20:] == 255).all()  # what has no segment is void for panopticapi

    write(tmp_path / "x", {"annotations/panoptic_train2017/a.png": png(ids)})  # unpacked beside its zip file
    run("custom", tmp_path / "x", tmp_path / "other", "--from", "coco", *BACK)
    assert set(np.unique(label(tmp_path / "other", "train/a"))) == {0, 1}


def test_panoptic_masks_beside_their_file(tmp_path: pathlib.Path) -> None:
    """Mapillary's folders: training/images, training/v2.0/panoptic/panoptic_2020.json and masks beside it.

    Pictures may lie beside them too.
    """
    ids = np.full((H, W, 3), (1, 0, 0), np.uint8)
    files: dict[str, Any] = {"config_v2.0.json": {"labels": []}}
    for split in ("training", "validation"):
        files[f"{split}/images/a.jpg"] = picture(1)
        files[f"{split}/v2.0/panoptic/panoptic_2020.json"] = panoptic("a.jpg", {"id": 1, "category_id": 7})
        files[f"{split}/v2.0/panoptic/a.png"] = png(ids)
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "coco")
    assert (label(tmp_path / "made", "train/a") == 1).all()
    assert (tmp_path / "made/images/val/a.jpg").exists()
    for split in ("training", "validation"):
        (tmp_path / f"x/{split}/images/a.jpg").rename(tmp_path / f"x/{split}/v2.0/panoptic/a.jpg")
    run("custom", tmp_path / "x", tmp_path / "other", "--from", "coco")
    assert (label(tmp_path / "other", "train/v2.0/panoptic/a") == 1).all()
    deep = cv2.imencode(".png", ids.astype(np.uint16))[1].tobytes()
    write(tmp_path / "x", {f"{split}/v2.0/panoptic/a.png": deep})
    line = refusal("custom", tmp_path / "x", tmp_path / "deep", "--from", "coco")
    assert "panoptic/a.png holds none of its 1 segments: is it the mask of another picture?" in line


YAML = "path: ../sets/streets\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: cat\n  1: dog\n"


def test_yolo(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Polygons as OpenCV fills them, within a pixel of the outline; a picture without a file is background."""
    big = np.array([[3, 4], [50, 8], [44, 36], [6, 30]], float)
    small = np.array([[20, 12], [34, 14], [30, 24]], float)
    lines = [
        f"{number} " + " ".join(map(str, (points / (W, H)).ravel()))
        for number, points in ((1, small), (0, big))
    ]
    files = {
        "data.yaml": YAML,
        "images/train/a.JPG": picture(1),
        "images/train/b.jpg": picture(2),
        "images/val/a.jpg": picture(3),
        "images/val/b.jpg": picture(4),
        "labels/val/b.txt": "\n",
        "masks/train/a.png": png(np.zeros((H, W))),
        "labels/train/a.txt": "\n".join(lines) + "\n",
        "labels/val/a.txt": "1 0.5 0.5 0.2 0.4\n",
    }
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "yolo", *BACK)
    assert (tmp_path / "made/classes.txt").read_text() == "nothing\ncat\ndog\n"
    expected, edge = np.zeros((H, W), np.uint8), np.zeros((H, W), np.uint8)
    for points, value in ((big, 1), (small, 2)):
        cv2.fillPoly(expected, [points.astype(np.int32)], value)
        cv2.polylines(edge, [points.astype(np.int32)], True, 1, 3)
    found = label(tmp_path / "made", "train/a")
    np.testing.assert_array_equal(found[edge == 0], expected[edge == 0])
    assert (label(tmp_path / "made", "train/b") == 0).all()
    boxed = np.zeros((H, W), np.uint8)
    boxed[12:28, 24:36] = 255
    np.testing.assert_array_equal(label(tmp_path / "made", "val/a"), boxed)
    out = capsys.readouterr().out
    assert "pictures without a .txt, all background: 1" in out
    assert "left out, in no annotation: masks/train/a.png" in out
    assert "pictures with an empty .txt, all background: 1" in out
    assert "boxes without a polygon, whose pixels are void: 1" in out


def test_yolo_of_roboflow(tmp_path: pathlib.Path) -> None:
    """Its data.yaml is of another folder than its paths; test is of its own."""
    text = (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    )
    files: dict[str, Any] = {"data.yaml": text}
    for split in ("train", "valid", "test"):
        files[f"{split}/images/a.jpg"] = picture(len(split))
        files[f"{split}/labels/a.txt"] = "0 0 0 1 0 1 1 0 1\n"
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "yolo", *BACK)
    assert (tmp_path / "made/images/test/a.jpg").read_bytes() == picture(4)
    assert (label(tmp_path / "made", "test/a") == 1).all()
    beside: dict[str, Any] = {
        "data.yaml": "names: [cat, dog]\n"
    }  # a .txt named like a list of test is its picture's label
    beside |= {f"{name}.{end}": data for name in "012" for end, data in (("jpg", picture(1)), ("txt", ""))}
    beside |= {"test_7.jpg": picture(2), "test_7.txt": "0 0 0 1 0 1 1\n"}
    run("custom", write(tmp_path / "y", beside), tmp_path / "c", "--from", "yolo", *BACK)
    assert [path.stem for path in (tmp_path / "c/images/test").iterdir()] == ["test_7"]
    write(tmp_path / "x", {"data.yaml": text.replace("../test/images", "../train/images")})
    line = refusal("custom", tmp_path / "x", tmp_path / "b", "--from", "yolo", *BACK)
    assert "for test and for train: test on other pictures" in line


@pytest.mark.parametrize(
    ("text", "folders", "expected"),
    [
        ("train: images\nval: images/b\n", "abc", "train a, train c, val b"),  # the nearest folder
        ("train: 1.txt\nval: [2.txt]\ntest: 3.txt\n", "abc", "train a, val b, test c"),
        ("", "abc", "train a, val b, test c"),  # autosplit_*.txt
        ("train: images/a\nval: images/x_test\n", ("a", "x_test"), "train a, val x"),  # data.yaml decides
    ],
)
def test_splits_of_yolo(
    text: str,
    folders: Sequence[str],
    expected: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files: dict[str, Any] = {"data.yaml": f"{text}names: [cat, dog]\n", "labels/lost.txt": ""}
    for folder in folders:
        files[f"images/{folder}/{folder[0]}.jpg"] = picture(1)
        files[f"labels/{folder}/{folder[0]}.txt"] = "0 0 0 1 0 1 1\n"
    if folders == "abc" and "images" not in text:
        words = "123" if text else ("autosplit_train", "autosplit_val", "autosplit_test")
        files |= {f"{word}.txt": f"./images/{c}/{c}.jpg\n" for word, c in zip(words, folders, strict=True)}
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "yolo", *BACK)
    made = [
        f"{path.relative_to(tmp_path / 'made/images').parts[0]} {path.stem}"
        for path in tmp_path.glob("made/**/*.jpg")
    ]
    assert sorted(made) == sorted(expected.split(", "))
    assert re.search(
        "left out, without a picture: labels/lost.txt +1$", capsys.readouterr().out, re.MULTILINE
    )


HALVES = np.repeat([[0, 1]], H, 0).repeat(W // 2, 1)


@pytest.mark.parametrize(
    "text",
    [
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:128,0,9::\n",
        "background 0 0 0\ncar 128 0 9\n",
    ],
)
def test_cvat(text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own labelmap.txt, and lists of subsets."""
    mask = np.zeros((H, W, 3), np.uint8)
    mask[HALVES > 0] = (128, 0, 9)
    files: dict[str, Any] = {"labelmap.txt": text, "SegmentationObject/a.png": png(mask)}
    for name in "abcd":
        files[f"JPEGImages/{name}.jpg"] = picture(1)
        files[f"SegmentationClass/{name}.png"] = png(mask)
    for split, names in (("train", "ab"), ("Validation", "c"), ("test", "d")):
        files[f"ImageSets/Segmentation/{split}.txt"] = "".join(f"{name}\n" for name in names)
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "cvat")
    assert (tmp_path / "made/classes.txt").read_text() == "background\ncar\n"
    for name in ("train/a", "train/b", "val/c", "test/d"):
        np.testing.assert_array_equal(label(tmp_path / "made", name), HALVES)
    out = capsys.readouterr().out
    assert re.search(r"^train \(by list\) +2 +2$", out, re.MULTILINE)
    assert "left out, in no annotation: SegmentationObject/a.png" in out


def test_several_tasks_of_cvat(tmp_path: pathlib.Path) -> None:
    """Each has the list of classes; pictures of one name may have equal masks."""
    mask = png(HALVES[..., None] * np.array([128, 0, 9]))
    task: dict[str, Any] = {"labelmap.txt": "background:0,0,0::\ncar:128,0,9::\n"}
    task |= {"JPEGImages/a.jpg": picture(1), "SegmentationClass/a.png": mask}
    files = {"train.zip": zip_of(task)} | {f"val/{name}": data for name, data in task.items()}
    files["val/JPEGImages/a.jpg"] = picture(2)
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "cvat")
    for split in ("train", "val"):
        np.testing.assert_array_equal(label(tmp_path / "made", f"{split}/a"), HALVES)
    write(tmp_path / "x", {"val/labelmap.txt": "car:0,0,0::\nbackground:128,0,9::\n"})
    line = refusal("custom", tmp_path / "x", tmp_path / "b", "--from", "cvat")
    assert "labelmap.txt has other classes than " in line


def test_masks_of_roboflow(tmp_path: pathlib.Path) -> None:
    files: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        files[f"{split}/_classes.csv"] = "Pixel Value, Class\n0, background\n2, crack\n"
        files[f"{split}/a.jpg"] = picture(1)
        files[f"{split}/a_mask.png"] = png(2 * HALVES)
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "roboflow-masks")
    assert (tmp_path / "made/classes.txt").read_text() == "background\ncrack\n"
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(label(tmp_path / "made", f"{split}/a"), HALVES)
    write(tmp_path / "x", {"train/a_mask.png": png(255 * HALVES)})
    line = refusal("custom", tmp_path / "x", tmp_path / "b", "--from", "roboflow-masks")
    assert "train/a_mask.png holds 255, which stands for no class" in line


def test_folders_of_voc(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.where(HALVES > 0, 15, 255)
    colours = [(n, n, n) for n in range(256)]
    files: dict[str, Any] = {}
    for name in "abc":
        files[f"JPEGImages/{name}.jpg"] = picture(1)
        files[f"SegmentationClass/{name}.png"] = palette_png(values, *colours)
    files["JPEGImages/unlabelled.jpg"] = picture(2)
    files["ImageSets/Segmentation/train.txt"] = "a\nb\nlost\n"
    files["ImageSets/Segmentation/val.txt"] = "c\n"
    files["ImageSets/Main/test.txt"] = "a\n"
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "voc")
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a"), values)
    assert (tmp_path / "made/classes.txt").read_text().splitlines()[15] == "person"
    out = capsys.readouterr().out
    assert "left out, without a mask: JPEGImages/unlabelled.jpg" in out
    assert "train.txt, but without picture or label: lost" in out

    write(tmp_path / "x", {"class_names.txt": "_background_\ncar\n"})
    assert "holds 15, which stands for no class" in refusal(
        "custom", tmp_path / "x", tmp_path / "b", "--from", "voc"
    )
    other = palette_png(values, *reversed(colours))
    write(tmp_path / "x", {"SegmentationClass/b.png": other})
    line = refusal("custom", tmp_path / "x", tmp_path / "c", "--from", "voc")
    assert "a.png and SegmentationClass/b.png have different palettes, so 15 may be two classes" in line
    unused = [(n, n, n) if n in (15, 255) else (1, 2, 3) for n in range(256)]
    write(tmp_path / "x", {"SegmentationClass/b.png": palette_png(values, *unused)})
    (tmp_path / "x/class_names.txt").unlink()
    run("custom", tmp_path / "x", tmp_path / "d", "--from", "voc")
    write(tmp_path / "x", {"SegmentationClass/b.png": png(values)})
    line = refusal("custom", tmp_path / "x", tmp_path / "e", "--from", "voc")
    assert "SegmentationClass/b.png is grey and SegmentationClass/c.png has a palette" in line


def test_a_mask_of_a_pictures_very_name_comes_first(tmp_path: pathlib.Path) -> None:
    """a_gt.png is the mask of a_gt.jpg, and no second one of a.jpg."""
    files: dict[str, Any] = {"classes.txt": "a\nb\n"}
    for name, values in (("a", HALVES), ("a_gt", 1 - HALVES), ("b", HALVES)):
        files |= {f"JPEGImages/{name}.jpg": picture(1), f"SegmentationClass/{name}.png": png(values)}
    write(tmp_path / "x", files | {"train.txt": "a\na_gt\n", "val.txt": "b\n"})
    run("custom", tmp_path / "x", tmp_path / "made", "--from", "voc", "--background", "border")
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a"), HALVES)
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a_gt"), 1 - HALVES)
    assert (tmp_path / "made/classes.txt").read_text() == "a\nb\nborder\n"  # numbers stay


ROW = {"category_id": 3, "segmentation": [box(0, 0, 9, 9)]}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "two categories of id 3"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "a "}]}, "has the class 'a' twice"),
        (
            {"categories": [{"id": 3, "name": "a\u2028b"}, {"id": 4, "name": "c"}]},
            "give it a name of one line",
        ),
        ({"categories": [{"id": 3, "name": " "}, {"id": 4, "name": "c"}]}, "the name of class 0 is ' '"),
        ({"categories": [{"id": 3, "name": None}]}, "Expected `str`, got `null` - at `$.categories[0].name`"),
        ({"annotations": [{**ROW, "image_id": 2}]}, "annotation 0 is of image 2, which it does not list"),
        (
            {"annotations": [{**ROW, "image_id": 1, "category_id": 9}]},
            "of category 9, which it does not list",
        ),
        (
            {"annotations": [{**ROW, "image_id": 1, "segmentation": [[1, 2, 3, 4, 5, 6, 7]]}]},
            "polygon of 7 numbers",
        ),
        (
            {"annotations": [{**ROW, "image_id": 1, "segmentation": [box(1000000, 0, 1000009, 9)]}]},
            "lies outside of its picture of 60 x 40 pixels",
        ),
        (
            {"annotations": [{**ROW, "image_id": 1, "segmentation": {"size": [H, W], "counts": "021O"}}]},
            "the runs of a mask are of",
        ),
        (
            {"annotations": [{**ROW, "image_id": 1, "segmentation": {"size": [H, W], "counts": [1 << 40]}}]},
            "the runs of a mask are of 1099511627776 pixels, and its picture has 2400",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.jpg", "width": W, "height": 30}]},
            "is of 60 x 30 pixels, but",
        ),
        (
            {"images": [{"id": 1, "file_name": "../../etc/b.jpg"}]},
            "names ../../etc/b.jpg, which is not below",
        ),
        (
            {"annotations": [{**ROW, "image_id": 1, "segmentation": {"size": [W, H], "counts": [0, H * W]}}]},
            "a mask in x/train/x.json: a.jpg is of 40 x 60 pixels, but x/train/a.jpg has 60 x 40 (the sides",
        ),
        (
            {"images": [{"id": 1, "file_name": "b.jpg"}]},
            "names b.jpg, which is not below --source for train (there is val/b.jpg)",
        ),
        ({"annotations": [{**ROW, "image_id": 1, "segmentation": [["a"]]}]}, "Expected `float`, got `str`"),
        (
            {"images": [{"id": 1, "file_name": "a.JPG"}]},
            "a.JPG, which is not below --source for train (there is train/a.jpg): copy it there, or correct the name",
        ),
        ({"images": [{"id": 1, "file_name": "x.json"}]}, "names x.json, which is no picture that is read"),
        (
            {"annotations": [{"category_id": 3, "image_id": 1, "bbox": [1, 1, 2, 2]}]},
            "train/x.json, val/x.json has no polygons or run lengths: boxes say no pixel's class",
        ),
        ({"images": 3}, "Expected `array | null`, got `int` - at `$.images`"),
    ],
)
def test_wrong_files_of_coco_are_one_line(
    change: dict[str, Any], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files: dict[str, Any] = {name: picture(1) for name in ("train/a.jpg", "val/a.jpg", "val/b.jpg")}
    for split in ("train", "val"):
        files[f"{split}/x.json"] = instances("a.jpg", ROW) | change
    write(tmp_path / "x", files)
    said = refusal("custom", pathlib.Path("x"), pathlib.Path("made"), "--from", "coco", *BACK)
    assert line in said
    assert len(said) <= LINE


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("yolo", {"labels/train/a.txt": "0 0.1 0.2\n"}, "a.txt, line 1: expected CLASS X Y X Y X Y ..."),
        ("yolo", {"labels/train/a.txt": "0 nan 0 1 0 1 1\n"}, "line 1: expected CLASS X Y"),
        (
            "yolo",
            {"labels/train/a.txt": "5 0 0 1 0 1 1\n"},
            "line 1 is of class 5, which data.yaml does not name",
        ),
        ("yolo", {"labels/train/a.txt": "0 10 20 30 20 30 40\n"}, "lies outside of its picture"),
        ("yolo", {"data.yaml": "names: [a, [b]]\n"}, "x/data.yaml is not the YAML file that was expected"),
        ("yolo", {"data.yaml": "names: [no, yes]\n"}, "x/data.yaml is not the YAML file that was expected"),
        ("yolo", {"data.yaml": "names: [\n"}, "x/data.yaml is not the YAML file that was expected"),
        (
            "yolo",
            {"data.yaml": "a: [\n"},
            "x holds neither a data.yaml with names of classes nor a classes.txt",
        ),
        ("yolo", {"b.yaml": "names: [a]\n"}, "x/b.yaml and x/data.yaml both name classes, and differ"),
        (
            "yolo",
            {"data.yaml": YAML.replace("images/train", "images/test"), "images/test/a.jpg": b""},
            "x/images/test/a.jpg belongs to train by data.yaml and to test by its folder",
        ),
        ("yolo", {"data.yaml": YAML.replace("images/val", "images/other")}, "for val, which is not below x"),
        ("yolo", {"data.yaml": YAML + "nc: 3\n"}, "x/data.yaml has 2 names and says nc: 3: make them agree"),
        ("yolo", {"data.yaml": YAML + "kpt_shape: [17, 2]\n"}, "its labels are points of poses, no polygons"),
        (
            "yolo",
            {f"labels/{split}/a.txt": "0 0.5 0.5 0.2 0.2\n" for split in ("train", "val")},
            "x has no polygon in a .txt, and boxes say no pixel's class",
        ),
        ("cvat", {"labelmap.txt": "a:1,2::\n"}, "expected NAME RED GREEN BLUE (0 to 255), found 'a:1,2::'"),
        ("cvat", {"labelmap.txt": "a:1,2,3::\nb:1,2,3::\n"}, "gives a and b one colour, 1 2 3"),
        (
            "cvat",
            {},
            "x holds no labelmap.txt with the colours of the classes (it holds 2 .jpg, 2 .txt, 1 .yaml)",
        ),
        ("voc", {}, "x holds no picture below segmentationclass/ (it holds 2 .jpg, 2 .txt, 1 .yaml)"),
        (
            "voc",
            {"SegmentationClass/a.png": b"", "classes.txt": "classes:\na\nb\n"},
            "x/classes.txt: line 1 is a heading, 'classes:': expected one class name a line",
        ),
        (
            "yolo",
            {"data.yaml": "", "labels/classes.txt": "a\n \nb\n"},
            "labels/classes.txt: line 2 is blank, and the names",
        ),
        ("yolo", {"data.yaml": "", "classes.txt": "0 a\n1 b\n"}, "line 1 is a number and a name, '0 a'"),
        ("roboflow-masks", {}, "holds no _classes.csv"),
        ("roboflow-masks", {"_classes.csv": "Pixel Value,Class\n0,a\n0,b\n"}, "the value 0 is there twice"),
        ("labelme", {}, "x holds no .json of labelme"),
    ],
)
def test_wrong_files_of_others_are_one_line(
    kind: str, change: dict[str, Any], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files: dict[str, Any] = {"data.yaml": YAML}
    for split in ("train", "val"):
        files |= {f"images/{split}/a.jpg": picture(1), f"labels/{split}/a.txt": "0 0 0 1 0 1 1\n"}
    write(tmp_path / "x", files | change)
    said = refusal("custom", pathlib.Path("x"), pathlib.Path("made"), "--from", kind, *BACK)
    assert line in said
    assert len(said) <= LINE


def test_pycocotools_is_named_where_it_is_missing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    write(tmp_path / "x", {"data.yaml": YAML, "images/train/a.jpg": jpeg(1)})
    line = refusal("custom", tmp_path / "x", tmp_path / "made", "--from", "yolo", *BACK)
    assert "pip install 'topformer_jax[annotations]'" in line
    assert not tree(tmp_path / "made")
