"""`prepare custom --from`: the labels of each format against labels made here by other means."""

import base64
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as masks

from tests.annotations import BACK, FORMATS, SPLITS, draw, labelme, make, palette_png, shape, write
from tests.miniatures import jpeg, png, write_zip
from tests.test_prepare import refusal, run, tree

H, W = 40, 60
HALVES = np.repeat([[0, 1]], H, 0).repeat(W // 2, 1)


def picture(seed: int, kind: str = ".jpg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)
    return cv2.imencode(kind, pixels)[1].tobytes()


def label(made: pathlib.Path, name: str) -> np.ndarray:
    """The values of a label that was made, by Pillow."""
    return np.array(Image.open(made / "annotations" / f"{name}.png"))


def classes(made: pathlib.Path) -> list[str]:
    return (made / "classes.txt").read_text().splitlines()


def names(made: pathlib.Path) -> str:
    """The pictures of a made set with their folders of splits, each with its label."""
    for path in (made / "images").rglob("*.*"):
        assert (made / "annotations" / path.relative_to(made / "images")).with_suffix(".png").exists()
    paths = (path.relative_to(made / "images") for path in (made / "images").rglob("*.*"))
    return ", ".join(sorted(f"{path.parts[0]} {path.stem}" for path in paths))


@pytest.mark.parametrize("place", ["folder", "zip"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_makes_one_data_set(kind: str, place: str, tmp_path: pathlib.Path) -> None:
    source, made = write(tmp_path / "x", make(kind)), tmp_path / "made"
    if place == "zip":
        source = pathlib.Path(shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path, "x"))
    run("custom", source, made, "--from", *FORMATS[kind][0])
    order = classes(made)
    assert sorted(order) == ["car", "street"]
    for split, letters in SPLITS.items():
        assert {path.stem for path in (made / "images" / split).rglob("*.jpg")} == {*letters}
        for name in letters:
            image, values = draw(name)
            assert (made / f"images/{split}/{name}.jpg").read_bytes() == image
            found = label(made, f"{split}/{name}")
            np.testing.assert_array_equal(found == order.index("car"), values == 1)
            assert set(np.unique(found)) == {0, 1}


# COCO


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
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    files = {
        "images/train/a.jpg": picture(1),  # of one name
        "images/val/a.jpg": picture(2),
        "images/train/stray.jpg": picture(3),
        "annotations/instances_train.json": instances("a.jpg", *rows),
        "annotations/instances_val.json": instances("a.jpg"),
        "annotations/captions_val.json": captions,
    }
    source, made = write(tmp_path / "x", files), tmp_path / "made"
    assert "does not say what pixels without an annotation are: give them a class by --background NAME" in refusal(
        "custom", source, made, "--from", "coco"
    )
    run("custom", source, made, "--from", "coco", *BACK)
    assert classes(made) == ["nothing", "cat", "dog"]
    expected = np.zeros((H, W), np.uint8)
    with warnings.catch_warnings():  # of pycocotools with NumPy 2
        warnings.simplefilter("ignore")
        expected[masks.decode(masks.frPyObjects([triangle], H, W))[..., 0] > 0] = 2
    expected[5:20, 5:30] = expected[30:34, 0:4] = 2
    expected[10:15, 10:15] = 1
    expected[blob > 0] = 1
    expected[22:24, 1:4] = 255  # what the box alone tells
    expected[:2, 0] = expected[-2:, -1] = 2
    np.testing.assert_array_equal(label(made, "train/a"), expected)
    assert (label(made, "val/a") == 0).all()
    assert (made / "images/train/a.jpg").read_bytes() == picture(1)
    assert (made / "images/val/a.jpg").read_bytes() == picture(2)
    out = capsys.readouterr().out
    for line in (
        "left out, in no annotation: images/train/stray.jpg",
        "left out, files without polygons, run lengths or boxes: annotations/captions_val.json",
        "pictures without annotations, all background in annotations/instances_val.json: 1",
        "crowds, drawn as their class in annotations/instances_train.json: 1",
        "boxes without a mask, whose pixels are void in annotations/instances_train.json: 1",
        "annotations without an area, left out in annotations/instances_train.json: 1",
        "drawn by their area, the largest first",
    ):
        assert line in out


def test_panoptic_masks(tmp_path: pathlib.Path) -> None:
    """Pixels without a segment are void, or what --background says."""
    ids = np.zeros((H, W, 3), np.uint8)
    ids[:20] = (7, 2, 1)  # id 7 + 2 * 256 + 65536
    rows = [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 66055, "category_id": 3}]}]
    files: dict[str, Any] = {}
    for split in ("train", "val"):
        files[f"{split}2017/a.png"] = picture(len(split), ".png")  # as the mask is called
        files[f"annotations/panoptic_{split}2017.json"] = instances("a.png", annotations=rows)
        files[f"annotations/panoptic_{split}2017/a.png"] = png(ids)
    packed = f"panoptic_{split}2017/a.png"  # val's masks stay in their zip, as COCO gives them
    write_zip(tmp_path / "x/annotations/panoptic_val2017.zip", {packed: files.pop(f"annotations/{packed}")})
    for flags, cat, rest in (((), 0, 255), (BACK, 1, 0)):
        made = tmp_path / str(rest)
        run("custom", write(tmp_path / "x", files), made, "--from", "coco", *flags)
        for split in ("train", "val"):
            assert (made / f"images/{split}/a.png").read_bytes() == picture(len(split), ".png")
            found = label(made, f"{split}/a")
            assert (found[:20] == cat).all()
            assert (found[20:] == rest).all()
    deep = cv2.imencode(".png", ids.astype(np.uint16))[1].tobytes()
    write(tmp_path / "x", {"annotations/panoptic_val2017/a.png": deep})  # a folder comes before its zip
    line = refusal("custom", tmp_path / "x", tmp_path / "deep", "--from", "coco")
    assert "panoptic_val2017/a.png holds none of its 1 segments: is it of another picture?" in line
    shutil.rmtree(tmp_path / "x/annotations/panoptic_val2017")
    packed_masks = tmp_path / "x/annotations/panoptic_val2017.zip"
    packed_masks.write_bytes(b"PK")
    line = refusal("custom", tmp_path / "x", tmp_path / "other", "--from", "coco")
    assert "panoptic_val2017.zip (2 bytes) is cut off, damaged or no such archive" in line
    packed_masks.unlink()
    line = refusal("custom", tmp_path / "x", tmp_path / "other", "--from", "coco")
    assert "a.png, which is not there: put it there" in line


# YOLO

YAML = "train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"


def test_yolo(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Polygons as OpenCV fills them, within a pixel of the outline; a picture without a file is background."""
    big = np.array([[3, 4], [50, 8], [44, 36], [6, 30]], float)
    small = np.array([[20, 12], [34, 14], [30, 24]], float)
    lines = [
        f"{number} " + " ".join(map(str, (points / (W, H)).ravel())) for number, points in ((1, small), (0, big))
    ]
    files = {
        "data.yaml": YAML,
        **{f"images/{name}": picture(1) for name in ("train/a.JPG", "train/b.jpg", "val/a.jpg", "val/b.jpg")},
        "labels/val/b.txt": "\n",
        "masks/train/a.png": png(np.zeros((H, W))),
        "labels/train/a.txt": "\n".join(lines) + "\n",
        "labels/val/a.txt": "1 0.5 0.5 0.2 0.4\n",
        "labels/lost.txt": "",
    }
    made = tmp_path / "made"
    run("custom", write(tmp_path / "x", files), made, "--from", "yolo", *BACK)
    assert classes(made) == ["nothing", "cat", "dog"]
    expected, edge = np.zeros((H, W), np.uint8), np.zeros((H, W), np.uint8)
    for points, value in ((big, 1), (small, 2)):
        cv2.fillPoly(expected, [points.astype(np.int32)], value)
        cv2.polylines(edge, [points.astype(np.int32)], True, 1, 3)
    np.testing.assert_array_equal(label(made, "train/a")[edge == 0], expected[edge == 0])
    assert (label(made, "train/b") == 0).all()
    boxed = np.zeros((H, W), np.uint8)
    boxed[12:28, 24:36] = 255
    np.testing.assert_array_equal(label(made, "val/a"), boxed)
    out = capsys.readouterr().out
    assert "pictures without a .txt, all background: 1" in out
    assert "left out, in no annotation: masks/train/a.png" in out
    assert re.search("left out, without a picture: labels/lost.txt +1$", out, re.MULTILINE)
    assert "pictures with an empty .txt, all background: 1" in out
    assert "boxes without a polygon, whose pixels are void: 1" in out


@pytest.mark.parametrize(
    ("text", "folders", "expected"),
    [
        ("train: images\nval: images/b\n", "abc", "train a, train c, val b"),  # the nearest folder
        ("train: 1.txt\nval: [2.txt]\ntest: 3.txt\n", "abc", "test c, train a, val b"),
        ("", "abc", "test c, train a, val b"),  # autosplit_*.txt
        ("train: images/a\nval: images/x_test\n", ("a", "x_test"), "train a, val x"),  # data.yaml decides
        (
            "train: ../a/images\nval: ../b/images\ntest: ../c/images\n",
            "abc",
            "test c, train a, val b",
        ),  # Roboflow
    ],
)
def test_splits_of_yolo(text: str, folders: Sequence[str], expected: str, tmp_path: pathlib.Path) -> None:
    files: dict[str, Any] = {"data.yaml": f"{text}names: [cat, dog]\n"}
    for folder in folders:
        image, labels = f"images/{folder}", f"labels/{folder}"
        if "../" in text:
            image, labels = f"{folder}/images", f"{folder}/labels"
        files |= {f"{image}/{folder[0]}.jpg": picture(1), f"{labels}/{folder[0]}.txt": "0 0 0 1 0 1 1\n"}
    if "images" not in text:
        words = "123" if text else ("autosplit_train", "autosplit_val", "autosplit_test")
        files |= {f"{word}.txt": f"./images/{c}/{c}.jpg\n" for word, c in zip(words, folders, strict=True)}
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "yolo", *BACK)
    assert names(tmp_path / "made") == expected


def test_labels_of_yolo_beside_their_pictures(tmp_path: pathlib.Path) -> None:
    """A .txt that is called like a list of test is its picture's label."""
    files: dict[str, Any] = {"data.yaml": "names: [cat, dog]\n"}
    files |= {"test_7.jpg": picture(2), "test_7.txt": "0 0 0 1 0 1 1\n"}
    files |= {f"{name}.{end}": data for name in "012" for end, data in (("jpg", picture(1)), ("txt", ""))}
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "yolo", *BACK)
    assert [path.stem for path in (tmp_path / "made/images/test").iterdir()] == ["test_7"]


def test_pycocotools_is_named_where_it_is_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    write(tmp_path / "x", {"data.yaml": YAML, "images/train/a.jpg": jpeg(1)})
    line = refusal("custom", tmp_path / "x", tmp_path / "made", "--from", "yolo", *BACK)
    assert "pip install 'topformer_jax[annotations]'" in line
    assert not tree(tmp_path / "made")


# Masks


def test_folders_of_voc(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.where(HALVES > 0, 15, 255)
    colours = [(n, n, n) for n in range(256)]
    files: dict[str, Any] = {f"JPEGImages/{name}.jpg": picture(1) for name in ("a", "b", "c", "unlabelled")}
    files |= {f"SegmentationClass/{name}.png": palette_png(values, *colours) for name in "abc"}
    files["ImageSets/Segmentation/train.txt"] = "a\nb\nlost\n"
    files["ImageSets/Segmentation/val.txt"] = "c\n"
    files["ImageSets/Main/test.txt"] = "a\n"
    source = write(tmp_path / "x", files)
    run("custom", source, tmp_path / "made", "--from", "voc")
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a"), values)
    assert classes(tmp_path / "made")[15] == "person"
    out = capsys.readouterr().out
    assert "left out, without a mask: JPEGImages/unlabelled.jpg" in out
    assert "train.txt, but without picture or label: lost" in out
    changes = (
        ({"class_names.txt": "_background_\ncar\n"}, "holds 15, which stands for no class"),
        (
            {"SegmentationClass/b.png": palette_png(values, *reversed(colours))},
            "a.png and SegmentationClass/b.png have different palettes, so 15 may be two classes",
        ),
        ({"SegmentationClass/b.png": png(values)}, "b.png is grey and SegmentationClass/c.png has a palette"),
    )
    for change, line in changes:
        write(source, change)
        assert line in refusal("custom", source, tmp_path / "b", "--from", "voc")
        (source / "class_names.txt").unlink(missing_ok=True)
    unused = [(n, n, n) if n in (15, 255) else (1, 2, 3) for n in range(256)]
    write(source, {"SegmentationClass/b.png": palette_png(values, *unused)})
    run("custom", source, tmp_path / "d", "--from", "voc")


def test_a_mask_of_a_pictures_very_name_comes_first(tmp_path: pathlib.Path) -> None:
    """a_gt.png is the mask of a_gt.jpg, and no second one of a.jpg. A new background has the last number."""
    files: dict[str, Any] = {"classes.txt": "a\nb\n"}
    for name, values in (("a", HALVES), ("a_gt", 1 - HALVES), ("b", HALVES)):
        files |= {f"JPEGImages/{name}.jpg": picture(1), f"SegmentationClass/{name}.png": png(values)}
    write(tmp_path / "x", files | {"train.txt": "a\na_gt\n", "val.txt": "b\n"})
    run("custom", tmp_path / "x", tmp_path / "made", "--from", "voc", "--background", "border")
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a"), HALVES)
    np.testing.assert_array_equal(label(tmp_path / "made", "train/a_gt"), 1 - HALVES)
    assert classes(tmp_path / "made") == ["a", "b", "border"]


# labelme

BOX = [[10, 10], [40, 10], [40, 30], [10, 30]]
MASK = np.array([[0, 1, 1], [1, 1, 0]], np.uint8)


def drawn(*shapes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A set of one picture in train and one in val, both with these shapes."""
    files: dict[str, Any] = {f"{split}/a.jpg": picture(1) for split in ("train", "val")}
    drawing = labelme("a.jpg", *shapes, size=(H, W)) | fields
    return files | {f"{split}/a.json": drawing for split in ("train", "val")}


def make_label(tmp_path: pathlib.Path, files: dict[str, Any], *flags: str) -> np.ndarray:
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", *flags)
    return label(tmp_path / "made", "train/a")


def polygon(points: Sequence[Sequence[float]]) -> np.ndarray:
    canvas = Image.new("1", (W, H))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points], fill=1, outline=1)
    return np.array(canvas)


@pytest.mark.parametrize("flags", [(), ("--background", "_background_"), ("--background", "street")])
def test_ignored_and_background(flags: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    """As labelme2voc: __ignore__ is -1, which is saved as 255, and _background_ is 0."""
    hole = [[20.0, 15.0], [30.0, 15.0], [30.0, 25.0]]
    corner = shape("_background_", [[0, 0], [3, 3]], "rectangle")
    found = make_label(tmp_path, drawn(shape("car", BOX), shape("__ignore__", hole), corner), *flags)
    assert classes(tmp_path / "made") == [flags[1] if flags else "_background_", "car"]
    expected = polygon(BOX).astype(np.uint8)
    expected[polygon(hole)] = 255
    np.testing.assert_array_equal(found, expected)


def test_labels_txt_gives_the_order(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the source or, as in labelme's own examples, beside it."""
    text = "__ignore__\n_background_\ntruck\ncar\n"
    files = drawn(shape("car", BOX)) | {"labels.txt": text}
    np.testing.assert_array_equal(make_label(tmp_path, files), 2 * polygon(BOX))
    assert classes(tmp_path / "made") == ["_background_", "truck", "car"]
    assert f"the order of the classes is that of {tmp_path}/x/labels.txt" in capsys.readouterr().out
    write(tmp_path, {"labels.txt": text})
    run("custom", write(tmp_path / "y", drawn(shape("car", BOX))), tmp_path / "other", "--from", "labelme")
    assert classes(tmp_path / "other") == ["_background_", "truck", "car"]
    assert f"the order of the classes is that of {tmp_path}/labels.txt" in capsys.readouterr().out
    write(tmp_path / "x", {"labels.txt": "__ignore__\n_background_\ntruck\n"})
    line = refusal("custom", tmp_path / "x", tmp_path / "b", "--from", "labelme")
    assert "a.json: car is not in labels.txt: add it there" in line


def test_a_set_that_is_not_fully_labelled_needs_a_background(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "x", drawn(shape("crack", BOX)))
    line = refusal("custom", tmp_path / "x", tmp_path / "made", "--from", "labelme")
    assert "a.json: no shape covers 72.88% of the picture: give the rest a class by --background NAME" in line
    assert not (tmp_path / "made").exists()
    line = refusal("custom", tmp_path / "x", tmp_path / "made", "--from", "labelme", "--background", "void")
    assert "has one class, crack, so there is nothing to learn" in line
    wall = shape("wall", [[0, 0], [W, H]], "rectangle")
    found = make_label(tmp_path, drawn(wall, shape("crack", BOX)))
    assert classes(tmp_path / "made") == ["crack", "wall"]
    np.testing.assert_array_equal(found == 0, polygon(BOX))


def expect_drawn(kind: str, points: Sequence[Sequence[float]]) -> np.ndarray:
    """labelme's shape_to_mask: lines of 10 pixels, points of radius 5, the outline belongs to the shape."""
    canvas = Image.new("1", (W, H))
    draw = ImageDraw.Draw(canvas)
    (x, y), (edge_x, edge_y) = points[0], points[-1]
    match kind:
        case "circle" | "point":
            radius = float(np.hypot(edge_x - x, edge_y - y)) if kind == "circle" else 5
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
        case "rectangle" if len(points) == 2:
            corners = (min(x, edge_x), min(y, edge_y), max(x, edge_x), max(y, edge_y))
            draw.rectangle(corners, fill=1, outline=1)
        case "line" | "linestrip":
            joint = "curve" if kind == "linestrip" else None
            draw.line([(a, b) for a, b in points], fill=1, width=10, joint=joint)
        case "mask":
            found = np.zeros((H, W), bool)
            found[6:8, 5:8] = MASK
            return found
        case _:
            return polygon(points)
    return np.array(canvas)


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("polygon", [[1.5, 2.5], [50.2, 7.9], [33.3, 38.8]]),
        ("rectangle", [[40, 30], [10, 12]]),
        ("rectangle", BOX),  # of X-AnyLabeling
        ("rotation", [[20, 5], [40, 15], [32, 30], [12, 20]]),
        ("oriented_rectangle", [[20, 5], [40, 15], [32, 30], [12, 20]]),
        ("circle", [[30, 20], [36, 28]]),
        ("line", [[5, 5], [50, 30]]),
        ("linestrip", [[5, 5], [30, 30], [50, 8]]),
        ("point", [[30, 20]]),
        ("mask", [[5, 6], [7, 7]]),
    ],
)
def test_shapes_are_drawn_as_labelme_draws_them(
    kind: str, points: list[list[float]], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = base64.b64encode(png(MASK)).decode()
    found = make_label(tmp_path, drawn(shape("car", points, kind, mask=mask)), *BACK)
    np.testing.assert_array_equal(found, expect_drawn(kind, points))
    is_thin = kind in ("line", "linestrip", "point")
    assert ("lines and points: 2, drawn as labelme does" in capsys.readouterr().out) == is_thin


def test_labels_that_are_numbers_or_differ_by_blanks(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, corner = [[0, 0], [5, 0], [5, 5]], [[50, 0], [59, 0], [59, 9]]
    shapes = shape("car ", BOX), shape("car", small), shape(1, small), shape("Void", corner)
    found = make_label(tmp_path, drawn(*shapes), *BACK)
    assert classes(tmp_path / "made") == ["nothing", "1", "car"]
    expected = 2 * polygon(BOX)
    expected[polygon(small)] = 1
    expected[polygon(corner)] = 255  # void is no class, whatever the background
    np.testing.assert_array_equal(found, expected)
    assert "labels written differently: 1 (as 1), car (as 'car ')" in capsys.readouterr().out


@pytest.mark.parametrize(("json_name", "picture_name", "stated"), [
    ("train/json/1.json", "train/images/1.jpg", "..\\images\\1.jpg"),
    ("train/json/1.json", "train/images/1.jpg", "../images/1.jpg"),
    ("train/1.json", "train/1.jpg", "C:\\Users\\me\\Pictures\\1.jpg"),
    ("train/1.json", "train/1.JPG", "/home/me/old name.jpg"),
    ("train/1.json", "train/1.jpg", None),
    ("train/json/1.json", "train/img/1.jpg", "1.jpg"),
])  # fmt: skip
def test_the_picture_of_a_file(json_name: str, picture_name: str, stated: str | None, tmp_path: pathlib.Path) -> None:
    """By the path in imagePath, with separators of any system; by its own name; or the only one of that name."""
    files: dict[str, Any] = {}
    for split in ("train", "val"):
        files[json_name.replace("train", split)] = labelme(stated, shape("car", BOX), size=(H, W))
        files[picture_name.replace("train", split)] = picture(len(split))
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", *BACK)
    (made,) = (tmp_path / "made/images/train").rglob("*.*")
    assert made.read_bytes() == picture(5)
    np.testing.assert_array_equal(label(tmp_path / "made", f"train/{made.stem}"), polygon(BOX))


def test_a_picture_inside_of_its_file(tmp_path: pathlib.Path) -> None:
    inner = picture(3, ".png")
    corner = shape("tree", [[0, 0], [1, 1]], "rectangle")
    drawing = labelme("..\\b.png", shape("car", BOX), corner, data=inner, size=(H, W))
    files = {f"{split}/town/b.json": drawing for split in ("train", "val")}
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", "--background", "void")
    assert classes(tmp_path / "made") == ["car", "tree"]
    expected = np.where(polygon(BOX), 0, 255)
    expected[:2, :2] = 1
    np.testing.assert_array_equal(label(tmp_path / "made", "train/town/b"), expected)
    assert (tmp_path / "made/images/train/town/b.png").read_bytes() == inner


def test_files_without_a_picture_and_pictures_without_a_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And files of other tools, which end nothing. The folder of a file says the split of its picture."""
    files = drawn(shape("car", BOX)) | {
        "train/b.jpg": jpeg(1),
        "train/c.heic": b"x",
        "notes.txt": "x",
        "y.zip": "x",
    }
    files |= {"train/d.jpg": picture(1), "train/d.json": labelme("d.jpg", size=(H, W))}
    files |= {"images/e.jpg": picture(1), "json/test/e.json": labelme("../../images/e.jpg", size=(H, W))}
    make_label(tmp_path, files | {"a.json": "[]", "b.json": "{", "c.json": "[" * 100000, "d.yaml": "a: ["}, *BACK)
    assert names(tmp_path / "made") == "test e, train a, train d, val a"
    out = capsys.readouterr().out
    assert re.search(r"left out, in no annotation: train/b.jpg +1$", out, re.MULTILINE)
    assert "files without a shape, all background: 2" in out
    assert re.search(r"left out, files without shapes: a.json, b.json, c.json +3$", out, re.MULTILINE)
    assert re.search(r"not read: .*1 .zip.* +4$", out, re.MULTILINE)


# Files that are wrong

ROW = {"category_id": 3, "segmentation": [box(0, 0, 9, 9)]}


def row(**fields: Any) -> dict[str, Any]:
    """The annotations of a file of COCO."""
    return {"annotations": [{**ROW, "image_id": 1, **fields}]}


def runs(size: list[int], counts: Any) -> dict[str, Any]:
    return row(segmentation={"size": size, "counts": counts})


def categories(*names: Any, first: int = 3) -> dict[str, Any]:
    return {"categories": [{"id": first * (n > 0) + 3, "name": name} for n, name in enumerate(names)]}


def image(name: str, **fields: Any) -> dict[str, Any]:
    return {"images": [{"id": 1, "file_name": name} | fields]}


def both(name: str, content: Any) -> dict[str, Any]:
    return {name.format(split): content for split in ("train", "val")}


# The format, a change of a good set of it (for coco: of its file), and a part of the line.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("coco", categories("a", "b", first=0), "two categories of id 3"),
    ("coco", categories("a\u2028b", "c"), "name it in one line"),
    ("coco", categories(None), "Expected `str`, got `null` - at `$.categories[0].name`"),
    ("coco", row(image_id=2), "annotation 0 is of image 2, which it does not list"),
    ("coco", row(category_id=9), "of category 9, which it does not list"),
    ("coco", row(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "polygon of 7 numbers"),
    ("coco", row(segmentation=[box(10**6, 0, 10**6 + 9, 9)]), "lies outside of its picture of 60 x 40 pixels"),
    ("coco", row(segmentation=[], bbox=[1, 1, 2, 2]), "has no polygons or run lengths: boxes say no pixel's class"),
    ("coco", runs([H, W], "021O"), "the runs of a mask are of"),
    ("coco", runs([H, W], [1 << 40]), "the runs of a mask are of 1099511627776 pixels, and its picture has 2400"),
    ("coco", runs([W, H], [0, H * W]), "is of 40 x 60 pixels, but its picture has 60 x 40 (the sides"),
    ("coco", image("a.jpg", width=W, height=30), "is of 60 x 30 pixels, but"),
    ("coco", image("../../etc/c.jpg"), "names ../../etc/c.jpg, which is not below"),
    ("coco", image("b.jpg"), "names b.jpg, which is not below --source for train (there is val/b.jpg)"),
    ("coco", image("a.JPG"), "a.JPG, which is not below --source for train (there is train/a.jpg): copy it there"),
    ("coco", image("x.json"), "names x.json, which is no picture that is read"),
    ("coco", {"images": 3}, "Expected `array | null`, got `int` - at `$.images`"),
    ("yolo", {"labels/train/a.txt": "0 0.1 0.2\n"}, "a.txt, line 1: expected CLASS X Y X Y X Y ..."),
    ("yolo", {"labels/train/a.txt": "0 nan 0 1 0 1 1\n"}, "line 1: expected CLASS X Y"),
    ("yolo", {"labels/train/a.txt": "5 0 0 1 0 1 1\n"}, "line 1 is of class 5, not in data.yaml"),
    ("yolo", {"labels/train/a.txt": "0 10 20 30 20 30 40\n"}, "lies outside of its picture"),
    ("yolo", {"data.yaml": "names: [no, yes]\n"}, "x/data.yaml is not the YAML file that was expected"),
    ("yolo", {"data.yaml": "a: [\n"}, "x holds neither a data.yaml with names of classes nor a classes.txt"),
    ("yolo", {"b.yaml": "names: [a]\n"}, "x/b.yaml and x/data.yaml both name classes, and differ"),
    ("yolo", {"data.yaml": YAML + "test: images/train\n"}, "for test and for train: test on other pictures"),
    ("yolo", {"data.yaml": YAML.replace("images/train", "images/test"), "images/test/a.jpg": b""},
     "x/images/test/a.jpg belongs to train by data.yaml and to test by its folder"),
    ("yolo", {"data.yaml": YAML.replace("images/val", "images/other")}, "for val, which is not below x"),
    ("yolo", {"data.yaml": YAML + "nc: 3\n"}, "x/data.yaml has 2 names and says nc: 3: make them agree"),
    ("yolo", {"data.yaml": YAML + "kpt_shape: [17, 2]\n"}, "its labels are points of poses, no polygons"),
    ("yolo", both("labels/{}/a.txt", "0 0.5 0.5 0.2 0.2\n"), "x has no polygon in a .txt, and boxes say no pixel's"),
    ("yolo", {"data.yaml": "", "labels/classes.txt": "a\n \nb\n"}, "classes.txt: line 2 is blank, and the names"),
    ("yolo", {"data.yaml": "", "classes.txt": "0 a\n1 b\n"}, "line 1 is a number and a name, '0 a'"),
    ("cvat", {"labelmap.txt": "a:1,2::\n"}, "expected NAME RED GREEN BLUE (0 to 255), found 'a:1,2::'"),
    ("cvat", {"a/labelmap.txt": "a:1,2,3::\n", "b/labelmap.txt": "b:1,2,3::\n"}, "has other classes than a/labelmap"),
    ("cvat", {}, "x holds no labelmap.txt, which lists classes (it holds 2 .jpg, 2 .txt, 1 .yaml)"),
    ("voc", {}, "x has no picture below segmentationclass/ (it holds 2 .jpg, 2 .txt, 1 .yaml)"),
    ("voc", {"SegmentationClass/a.png": b"", "classes.txt": "classes:\na\nb\n"},
     "x/classes.txt: line 1 is a heading, 'classes:': expected one class name per line"),
    ("roboflow-masks", {}, "holds no _classes.csv"),
    ("roboflow-masks", {"_classes.csv": "Pixel Value,Class\n0,a\n0,b\n"}, "the value 0 is there twice"),
    ("roboflow-masks", {"_classes.csv": "0,a\n1,b\n"} | both("images/{}/a_mask.png", png(255 * HALVES)),
     "a_mask.png holds 255, which stands for no class"),
    ("labelme", {"train/a.json": "", "val/a.json": ""}, "x holds no .json of labelme, with shapes"),
    ("labelme", drawn(shape(None, BOX)), "train/a.json: shape 0 has a blank label: give it a name"),
    ("labelme", drawn(shape("car", BOX), imageWidth=2 * W), "of 120 x 40 pixels, but x/train/a.jpg has 60 x 40"),
    ("labelme", drawn(shape("car", [[900, 9], [999, 9], [999, 30]])), "lies outside of its picture of 60 x 40"),
    ("labelme", drawn(shape("car", BOX, "cuboid")), "shape 0 is a cuboid of 4 points, which is not drawn: expected"),
    ("labelme", drawn(shape("car", BOX[:2])), "shape 0 is a polygon of 2 points, which is not drawn: expected"),
    ("labelme", drawn(shape("car", [[5, 6], [7, 7]], "mask", mask="eA==")), "holds a mask that is no picture"),
    ("labelme", drawn(shape("car", [[5, 6], [9, 7]], "mask", mask=base64.b64encode(png(255 * MASK)).decode())),
     "shape 0 is a mask of 2 points, which is not drawn: expected a polygon of 3 or more points, a rectangle"),
    ("labelme", {"train/b.json": labelme("a.jpg")}, "a.jpg has two annotations, x/train/a.json and x/train/b.json"),
    ("labelme", {"train/b.json": labelme("b.jpg")}, "b.json names b.jpg, which is not below --source: copy it there"),
    ("labelme", {"train/b.json": labelme("b.heic")}, "b.json names b.heic, which is no picture that is read"),
    ("labelme", {"train/a.jpg": b""}, "a.jpg is empty"),
    ("labelme", drawn(shape("car", [["1", 2]])), "Expected `float`, got `str` - at `$.shapes[0].points[0][0]`"),
    ("labelme", {"a.json": '"shapes"' + "[" * 100000}, "a.json is not the JSON file that was expected"),
    ("labelme", {"classes.txt": "y\n"}, "a.json: car is not in classes.txt: add it there"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "line"), WRONG)
def test_wrong_files_are_one_line(
    kind: str, change: dict[str, Any], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "coco":
        files: dict[str, Any] = {name: picture(1) for name in ("train/a.jpg", "val/a.jpg", "val/b.jpg")}
        files |= both("{}/x.json", instances("a.jpg", ROW) | change)
    elif kind == "labelme":
        files = drawn(shape("car", BOX)) | change
    else:
        files = {"data.yaml": YAML} | both("images/{}/a.jpg", picture(1)) | both("labels/{}/a.txt", "0 0 0 1 0 1 1\n")
        files |= change
    write(tmp_path / "x", files)
    flags = () if kind == "roboflow-masks" else BACK
    said = refusal("custom", pathlib.Path("x"), pathlib.Path("made"), "--from", kind, *flags)
    assert line in said
    assert len(said) <= 300
