"""`prepare custom --from labelme`: each shape against what Pillow draws by labelme's documented rules."""

import base64
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.miniatures import jpeg, png
from tests.test_prepare import refusal, run
from tests.test_prepare_formats import H, W, label, picture
from tests.test_prepare_own import BACK, labelme, shape, write

BOX = [[10, 10], [40, 10], [40, 30], [10, 30]]


def drawn(*shapes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A set of one picture in train and one in val, both with these shapes."""
    files: dict[str, Any] = {}
    for split in ("train", "val"):
        files[f"{split}/a.jpg"] = picture(1)
        files[f"{split}/a.json"] = labelme("a.jpg", *shapes, size=(H, W)) | fields
    return files


def make(tmp_path: pathlib.Path, files: dict[str, Any], *flags: str) -> np.ndarray:
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", *flags)
    return label(tmp_path / "made", "train/a")


def classes(tmp_path: pathlib.Path) -> list[str]:
    return (tmp_path / "made/classes.txt").read_text().splitlines()


def polygon(points: Sequence[Sequence[float]]) -> np.ndarray:
    canvas = Image.new("1", (W, H))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points], fill=1, outline=1)
    return np.array(canvas)


@pytest.mark.parametrize("flags", [(), ("--background", "_background_"), ("--background", "street")])
def test_ignored_and_background(flags: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    """As labelme2voc: __ignore__ is -1, which is saved as 255, and _background_ is 0."""
    hole = [[20.0, 15.0], [30.0, 15.0], [30.0, 25.0]]
    shapes = [
        shape("car", BOX),
        shape("__ignore__", hole),
        shape("_background_", [[0, 0], [3, 3]], "rectangle"),
    ]
    found = make(tmp_path, drawn(*shapes), *flags)
    assert classes(tmp_path) == [flags[1] if flags else "_background_", "car"]
    expected = polygon(BOX).astype(np.uint8)
    expected[polygon(hole)] = 255
    np.testing.assert_array_equal(found, expected)


def test_labels_txt_gives_the_order(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the source or, as in labelme's own examples, beside it."""
    text = "__ignore__\n_background_\ntruck\ncar\n"
    found = make(tmp_path, drawn(shape("car", BOX)) | {"labels.txt": text})
    assert classes(tmp_path) == ["_background_", "truck", "car"]
    np.testing.assert_array_equal(found, 2 * polygon(BOX))
    write(tmp_path / "y", drawn(shape("car", BOX)))
    write(tmp_path, {"labels.txt": text})
    run("custom", tmp_path / "y", tmp_path / "other", "--from", "labelme")
    assert (tmp_path / "other/classes.txt").read_text() == "_background_\ntruck\ncar\n"
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
    whole = [[0, 0], [W, H]]
    make(tmp_path, drawn(shape("wall", whole, "rectangle"), shape("crack", BOX)))
    assert classes(tmp_path) == ["crack", "wall"]


MASK = np.array([[0, 1, 1], [1, 1, 0]], np.uint8)


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
            draw.rectangle(
                (min(x, edge_x), min(y, edge_y), max(x, edge_x), max(y, edge_y)), fill=1, outline=1
            )
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
        ("rectangle", BOX),
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
    found = make(tmp_path, drawn(shape("car", points, kind) | {"mask": mask}), *BACK)
    np.testing.assert_array_equal(found, expect_drawn(kind, points))
    assert ("lines and points: 2, drawn as labelme does" in capsys.readouterr().out) == (
        kind in ("line", "linestrip", "point")
    )


def test_labels_that_are_numbers_or_differ_by_blanks(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, corner = [[0, 0], [5, 0], [5, 5]], [[50, 0], [59, 0], [59, 9]]
    found = make(
        tmp_path,
        drawn(shape("car ", BOX), shape("car", small), shape(1, small), shape("Void", corner)),  # type: ignore[arg-type]
        *BACK,
    )
    assert classes(tmp_path) == ["nothing", "1", "car"]
    expected = 2 * polygon(BOX)
    expected[polygon(small)] = 1
    expected[polygon(corner)] = 255  # void is no class, whatever the background
    np.testing.assert_array_equal(found, expected)
    assert "labels by other names: 1 (written 1), car (written 'car ')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("json_name", "picture_name", "stated"),
    [
        ("train/json/1.json", "train/images/1.jpg", "..\\images\\1.jpg"),
        ("train/json/1.json", "train/images/1.jpg", "../images/1.jpg"),
        ("train/1.json", "train/1.jpg", "C:\\Users\\me\\Pictures\\1.jpg"),
        ("train/1.json", "train/1.JPG", "/home/me/old name.jpg"),
        ("train/1.json", "train/1.jpg", None),
        ("train/json/1.json", "train/img/1.jpg", "1.jpg"),
    ],
)
def test_the_picture_of_a_file(
    json_name: str, picture_name: str, stated: str | None, tmp_path: pathlib.Path
) -> None:
    """Where imagePath says, with separators of any system; by its own name; or the only one of that name."""
    files: dict[str, Any] = {}
    for split in ("train", "val"):
        text = labelme(stated, shape("car", BOX), size=(H, W))
        files[json_name.replace("train", split)] = text
        files[picture_name.replace("train", split)] = picture(len(split))
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", *BACK)
    (made,) = (tmp_path / "made/images/train").rglob("*.*")
    assert made.read_bytes() == picture(5)
    np.testing.assert_array_equal(label(tmp_path / "made", f"train/{made.stem}"), polygon(BOX))


def test_the_folder_of_a_file_says_the_split(tmp_path: pathlib.Path) -> None:
    """Where the pictures of all splits are in one folder."""
    files: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        files[f"images/{split}.jpg"] = picture(1)
        files[f"json/{split}/x.json"] = labelme(f"../../images/{split}.jpg", shape("car", BOX), size=(H, W))
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", *BACK)
    for name in ("train/train", "val/valid", "test/test"):
        assert (tmp_path / f"made/images/{name}.jpg").exists()


def test_pictures_without_a_file_are_counted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And files of other tools, which end nothing."""
    files = drawn(shape("car", BOX)) | {"train/b.jpg": jpeg(1), "train/c.heic": b"x", "notes.txt": "x"}
    files |= {"train/d.jpg": picture(1), "train/d.json": labelme("d.jpg", size=(H, W))}
    make(tmp_path, files | {"a.json": "[]", "b.json": "{", "c.json": "[" * 100000, "d.yaml": "a: ["}, *BACK)
    out = capsys.readouterr().out
    assert re.search(r"left out, in no annotation: train/b.jpg +1$", out, re.MULTILINE)
    assert "files without a shape, all background: 1" in out
    assert re.search(r"left out, files without shapes: a.json, b.json, c.json +3$", out, re.MULTILINE)
    assert re.search(r"not read: 1 .yaml, 1 .txt, 1 .heic +3$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (drawn(shape(None, BOX)), "train/a.json: shape 0 has a blank label: give it a name"),  # type: ignore[arg-type]
        (drawn(shape("  ", BOX)), "train/a.json: shape 0 has a blank label: give it a name"),
        (
            drawn(shape("car", BOX), imageWidth=2 * W),
            "train/a.json is of 120 x 40 pixels, but x/train/a.jpg has 60 x 40",
        ),
        (
            drawn(shape("car", [[900, 9], [999, 9], [999, 30]])),
            "(999, 30) lies outside of its picture of 60 x 40",
        ),
        (drawn(shape("car", BOX, "cuboid")), "shape 0 is a cuboid of 4 points, which is not drawn: expected"),
        (
            drawn(shape("car", [[5, 6], [7, 7]], "mask") | {"mask": "eA=="}),
            "shape 0 holds a mask that is no picture",
        ),
        (
            drawn(
                shape("car", [[5, 6], [9, 7]], "mask") | {"mask": base64.b64encode(png(255 * MASK)).decode()}
            ),
            "shape 0 is a mask of 2 points, which is not drawn: expected a polygon of 3 or more points, a rectangle",
        ),
        (
            drawn(shape("car", BOX)) | {"train/b.json": labelme("a.jpg")},
            "a.jpg has two annotations, x/train/a.json and x/train/b.json",
        ),
        (drawn(shape("car", BOX), imagePath="b.heic") | {"train/a.jpg": b""}, "a.jpg is empty"),
        (drawn(shape("car", [["1", 2]])), "Expected `float`, got `str` - at `$.shapes[0].points[0][0]`"),  # type: ignore[list-item]
        ({"a.json": '"shapes"' + "[" * 100000}, "a.json is not the JSON file that was expected"),
    ],
)
def test_wrong_files_are_one_line(
    files: dict[str, Any], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x", files)
    said = refusal("custom", pathlib.Path("x"), pathlib.Path("made"), "--from", "labelme", *BACK)
    assert line in said
    assert len(said) <= 300
