"""`prepare custom --from`: labelme, COCO panoptic and colour masks become a custom data set."""

import base64
import io
import json
import os
import pathlib
import shutil
import unicodedata
import zipfile
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.miniatures import HEIGHT, WIDTH, grid, jpeg, png, write_zip
from tests.test_prepare import refusal, run, tree
from topformer_jax import config as config_lib, prepare
from topformer_jax.data import sources
from topformer_jax.data.codecs import decode_label
from topformer_jax.preparation import downloads, own

SQUARE = [[2, 1], [5, 1], [5, 4], [2, 4]]
BACK = ("--background", "nothing")


def write(root: pathlib.Path, files: dict[str, Any]) -> pathlib.Path:
    """Writes files: bytes as they are, text, or anything else as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def shape(label: str, points: Sequence[Sequence[float]], kind: str = "polygon") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


def labelme(
    image: str | None,
    *shapes: dict[str, Any],
    data: bytes | None = None,
    size: tuple[int | None, int | None] = (HEIGHT, WIDTH),
) -> dict[str, Any]:
    inside = base64.b64encode(data).decode() if data else None
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": inside,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def read(root: pathlib.Path, split: str) -> dict[str, tuple[bytes | np.ndarray, np.ndarray]]:
    """Image bytes and decoded labels of a made data set, by its config."""
    classes = len((root / "classes.txt").read_text().splitlines())
    changes = {"data.dataset": "custom", "data.root": str(root), "model.num_classes": classes}
    config = config_lib.load(config_lib.ade20k("tiny"), changes | {"data.reduce_zero_label": False})
    source = sources.open_source(config, split)
    examples = (source[index] for index in range(len(source)))
    return {
        example.name: (
            example.image,
            decode_label(example.label, example.name, classes=classes, reduce_zero_label=False),
        )
        for example in examples
    }


def test_a_picture_inside_of_its_file(tmp_path: pathlib.Path) -> None:
    inner = png(np.full((HEIGHT, WIDTH, 3), 9))
    files = {
        f"{split}/town/b.json": labelme(
            "..\\b.png", shape("car", SQUARE), shape("tree", [[7, 5], [6, 3]], "rectangle"), data=inner
        )
        for split in ("train", "val")
    }
    run(
        "custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "labelme", "--background", "void"
    )
    assert (tmp_path / "made/classes.txt").read_text() == "car\ntree\n"
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[1:5, 2:6] = 0  # the outline belongs to a shape
    expected[3:6, 6:8] = 1
    image, found = read(tmp_path / "made", "train")["town/b"]
    assert image == inner
    np.testing.assert_array_equal(found, expected)


def test_polygons_are_those_of_opencv(tmp_path: pathlib.Path) -> None:
    """Integer corners: what OpenCV fills, within a pixel of the outline, which differs between renderers."""
    generator = np.random.default_rng(0)
    files: dict[str, Any] = {}
    polygons = {}
    for number in range(8):
        points = generator.integers(0, 100, (3, 2)).tolist()
        polygons[f"{number}"] = points
        split = "val" if number == 0 else "train"
        files[f"{split}/{number}.png"] = png(np.zeros((100, 100, 3)))
        files[f"{split}/{number}.json"] = labelme(f"{number}.png", shape("x", points), size=(100, 100))
    run(
        "custom",
        write(tmp_path / "drawn", files),
        tmp_path / "made",
        "--from",
        "labelme",
        "--background",
        "no",
    )
    found = read(tmp_path / "made", "train") | read(tmp_path / "made", "validation")
    for name, points in polygons.items():
        canvas = np.zeros((100, 100), np.uint8)
        cv2.fillPoly(canvas, [np.array(points)], 1)
        edge = np.zeros_like(canvas)
        cv2.polylines(edge, [np.array(points)], True, 1, 3)
        wrong = (found[name][1] != canvas) & (edge == 0)
        assert not wrong.any()
        assert canvas.sum() > 20


def ids(*values: int) -> bytes:
    """A panoptic mask of stripes: red + 256 green + 65536 blue."""
    stripes = grid(*values)
    return png(np.stack([stripes & 255, stripes >> 8 & 255, stripes >> 16], -1))


def test_colours(tmp_path: pathlib.Path) -> None:
    mask = np.resize(np.array([(10, 20, 30), (0, 0, 0), (255, 0, 1)]), (HEIGHT, WIDTH, 3))
    files: dict[str, Any] = {"classes.txt": "red roof 255 0 1\nwater 10 20 30\nvoid 0 0 0\n"}
    files |= {f"images/{n:02}.JPG": jpeg(n) for n in range(40)} | {
        f"masks/{n:02}.png": png(mask) for n in range(40)
    }
    run(
        "custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "colours", "--validation", "0.25"
    )
    assert (tmp_path / "made/classes.txt").read_text() == "red roof\nwater\n"
    train, validation = (read(tmp_path / "made", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 40
    assert 3 < len(validation) < 20
    for name, (image, found) in (train | validation).items():
        assert image == jpeg(int(name))
        np.testing.assert_array_equal(found, grid(1, 255, 0))
    # A picture stays in its split when others are added.
    more = {f"images/y/{n}.jpg": jpeg(n) for n in range(9)} | {
        f"masks/y/{n}.png": png(mask) for n in range(9)
    }
    run("custom", write(tmp_path / "x", more), tmp_path / "more", "--from", "colours", "--validation", "0.25")
    assert set(validation) <= set(read(tmp_path / "more", "validation"))
    line = refusal("custom", tmp_path / "x", tmp_path / "made", "--from", "colours", "--validation", "0.25")
    assert "was made of something else (other archives)" in line

    mask[0, 0] = (10, 20, 31)
    write(tmp_path / "x", {"masks/03.png": png(mask)})
    line = refusal("custom", tmp_path / "x", tmp_path / "new", "--from", "colours")
    assert "masks/03.png: 2.08% of the pixels have colours that no class has, such as (10, 20, 31)" in line
    assert not list((tmp_path / "new").rglob("03.png"))


def test_records_of_own_data(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "classes.txt": "a 1 1 1\nb 2 2 2\n",
        **{f"images/{s}/x.jpg": jpeg(1) for s in ("train", "val", "test")},
    }
    files |= {f"masks/{s}/x.png": png(np.ones((HEIGHT, WIDTH, 3))) for s in ("train", "val", "test")}
    run(
        "custom",
        write(tmp_path / "x", files),
        tmp_path / "m",
        "--from",
        "colours",
        "--format",
        "array_record",
    )
    assert "note: 1 pictures of test are not packed: records hold train and" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "m/custom/1.0.0").iterdir()} >= {"classes.txt", "manifest.json"}
    changes = {"data.dataset": "custom", "data.source": "array_record", "data.root": str(tmp_path / "m")}
    config = config_lib.load(config_lib.ade20k("tiny"), changes | {"model.num_classes": 2})
    example = sources.open_source(config, "train")[0]
    assert (example.name, example.image) == ("x", jpeg(1))


@pytest.mark.parametrize(
    ("kind", "files", "line"),
    [
        (
            "labelme",
            {"a.json": labelme("a.jpg", shape("x", SQUARE))},
            "a.json is of a.jpg, which is not below --source: put it beside the file",
        ),
        ("labelme", {"a.json": "[]"}, "holds no .json of labelme, with shapes (it holds 1 .json)"),
        (
            "labelme",
            {"a.json": '[{"shapes": []}]'},
            "a.json is not the JSON file that was expected (Expected `object`, got `array`)",
        ),
        (
            "labelme",
            {"a.json": {"shapes": [{}]}},
            "expected (Object missing required field `points` - at `$.shapes[0]`)",
        ),
        (
            "labelme",
            {"a.json": labelme("a.jpg"), "a.jpg": b"text"},
            "a.jpg cannot be decoded: it is not an image",
        ),
        (
            "labelme",
            {
                **{
                    f"{s}/a.json": labelme("a.jpg", shape("x", [[1, 1], [2, 2]], "polygon"))
                    for s in ("train", "val")
                },
                **{f"{s}/a.jpg": jpeg(1) for s in ("train", "val")},
            },
            "a.json: shape 0 is a polygon of 2 points, which is not drawn: expected a polygon of 3 or",
        ),
        (
            "labelme",
            {
                "classes.txt": "x\n_background_\n",
                "train/a.json": labelme("a.jpg", shape("x", SQUARE)),
                "train/a.jpg": jpeg(1),
            },
            "gives no picture for validation: 1 of train (by a hash of the name and folder); put some into a",
        ),
        (
            "labelme",
            {
                "classes.txt": "y\n",
                **{f"{s}/a.json": labelme("a.jpg", shape("x", SQUARE)) for s in ("train", "val")},
                **{f"{s}/a.jpg": jpeg(1) for s in ("train", "val")},
            },
            "a.json: x is not in classes.txt: add it there",
        ),
        ("colours", {"images/a.jpg": jpeg(1)}, "holds no classes.txt"),
        (
            "colours",
            {"classes.txt": "road 1 2\n"},
            "expected NAME RED GREEN BLUE (0 to 255), found 'road 1 2'",
        ),
        (
            "colours",
            {"classes.txt": "road 1 2 3\nsea 3 2 1\n", "images/a.jpg": jpeg(1)},
            "x holds no picture below masks/ (it holds 1 .",
        ),
        ("coco", {"images/a.jpg": jpeg(1)}, "holds no .json of COCO with panoptic segments, polygons or"),
        (
            "colours",
            {
                "classes.txt": "road 1 2 3\nsea 3 2 1\n",
                **{f"images/train/a.{suffix}": jpeg(1) for suffix in ("jpg", "jpeg")},
                "masks/train/a.png": ids(1),
                "images/val/a.jpg": jpeg(1),
                "masks/val/a.png": ids(1),
            },
            "images/train/a.jpg would share one label: keep one, or rename it",
        ),
    ],
)
def test_bad_annotations_are_one_line(
    kind: str, files: dict[str, Any], line: str, tmp_path: pathlib.Path
) -> None:
    write(tmp_path / "x", files)
    assert line in refusal("custom", tmp_path / "x", tmp_path / "made", "--from", kind)


def test_what_was_edited_is_not_taken_for_complete(tmp_path: pathlib.Path) -> None:
    """Also where every file keeps its size."""
    drawing = {f"{s}/a.json": labelme("a.jpg", shape("cat", SQUARE)) for s in ("train", "val")}
    write(tmp_path / "x", drawing | {f"{s}/a.jpg": jpeg(1) for s in ("train", "val")})
    run("custom", tmp_path / "x", tmp_path / "made", "--from", "labelme", *BACK)
    run("custom", tmp_path / "x", tmp_path / "made", "--from", "labelme", *BACK)
    write(tmp_path / "x", {"val/a.json": labelme("a.jpg", shape("dog", SQUARE))})
    line = refusal("custom", tmp_path / "x", tmp_path / "made", "--from", "labelme", *BACK)
    assert "was made of something else (other classes, archives)" in line
    line = refusal("custom", tmp_path / "x", tmp_path / "x" / "made", "--from", "labelme", *BACK)
    assert "lies in --source" in line


def test_custom_needs_a_kind(tmp_path: pathlib.Path) -> None:
    assert set(prepare.KINDS) == set(downloads.READERS)
    (tmp_path / "x").mkdir()
    assert "by --from labelme, coco, colours, cvat, yolo, roboflow-masks, voc" in refusal(
        "custom", tmp_path / "x", tmp_path / "made"
    )
    assert not tree(tmp_path).keys()


def test_shares_are_even() -> None:
    """Of 2000 names a tenth, within 5 standard deviations (13.4)."""
    found = [own._hash(f"town/{number:04}") < 0.1 for number in range(2000)]
    assert abs(sum(found) - 200) < 67


def test_a_turned_picture_is_drawn_as_it_is_shown(tmp_path: pathlib.Path) -> None:
    """labelme turns pictures by their EXIF orientation, and so does the decoder."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(file, "JPEG", exif=exif)
    drawing = labelme("a.jpg", shape("x", SQUARE), size=(WIDTH, HEIGHT))
    files = {f"{s}/a.json": drawing for s in ("train", "val")}
    pictures = {f"{s}/a.jpg": file.getvalue() for s in ("train", "val")}
    run("custom", write(tmp_path / "x", files | pictures), tmp_path / "made", "--from", "labelme", *BACK)
    assert read(tmp_path / "made", "train")["a"][1].shape == (WIDTH, HEIGHT)
    write(tmp_path / "x", {"val/a.json": labelme("a.jpg", shape("x", SQUARE))})
    line = refusal("custom", tmp_path / "x", tmp_path / "other", "--from", "labelme", *BACK)
    assert "val/a.json is of 8 x 6 pixels, but" in line
    assert (
        "val/a.jpg has 6 x 8 (the sides the other way round, as by an EXIF orientation): give both one size"
        in line
    )


def colours_set(*names: str, suffix: str = ".jpg") -> dict[str, Any]:
    """Pictures below images/ and their masks: a class at the left, void at the right."""
    mask = np.where((np.arange(WIDTH) < 5)[None, :, None], np.full((HEIGHT, 1, 3), 9), 0)
    files: dict[str, Any] = {"classes.txt": "roof 9 9 9\nwater 1 2 3\nVoid 0 0 0\n"}
    for seed, name in enumerate(names):
        files |= {f"images/{name}{suffix}": jpeg(seed), f"masks/{name}.png": png(mask)}
    return files


def made_names(made: pathlib.Path) -> dict[str, set[str]]:
    """The pictures of each folder of a made set, each with its label."""
    found = {}
    for folder in (made / "images").iterdir():
        paths = [path for path in folder.rglob("*") if path.is_file()]
        found[folder.name] = {path.relative_to(folder).with_suffix("").as_posix() for path in paths}
        labels = [path for path in (made / "annotations" / folder.name).rglob("*") if path.is_file()]
        assert len(labels) == len(paths)
    return found


@pytest.mark.parametrize(
    "words",
    [("train", "val", "test"), ("Training", "VALID", "Testing"), ("train2017", "validation", "test set")],
)
def test_each_picture_goes_where_it_belongs(
    words: tuple[str, str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folders, in any case; two of one name stay apart, and test is scored and never trained on."""
    train, validation, test = words
    names = [f"{train}/a/1", f"{train}/b/1", f"{validation}/a/1", f"{test}/1", f"{test}/2"]
    source = write(
        tmp_path / "x", colours_set(*names) | {"images/readme.md": "", "masks/old.png": png(grid(0))}
    )
    run("custom", source, tmp_path / "made", "--from", "colours")
    assert made_names(tmp_path / "made") == {"train": {"a/1", "b/1"}, "val": {"a/1"}, "test": {"1", "2"}}
    assert (tmp_path / "made/images/train/b/1.jpg").read_bytes() == jpeg(1)
    changes = {"data.dataset": "custom", "data.root": str(tmp_path / "made"), "model.num_classes": 2}
    config = config_lib.load(config_lib.ade20k("tiny"), changes | {"data.validation_split": "test"})
    assert [sources.open_source(config, "validation")[n].image for n in (0, 1)] == [jpeg(3), jpeg(4)]
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[:6] == [
        "pictures labels other files",
        "train (by folder) 2 2",
        "validation (by folder) 1 1",
        "test (by folder) 2 2",
        "left out, without a picture: masks/old.png 1",
        "not read: 1 .md 1",
    ]


def test_lists_divide_the_pictures(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = colours_set("a", "b", "c", "d", "town/e")
    lists = {
        "Train.txt": "a.jpg\nimages/town/e.jpg masks/town/e.png\n",
        "lists/VAL.txt": "./b\nlost\n",
        "test.txt": "c\n",
    }
    source = write(tmp_path / "x", files | lists)
    run("custom", source, tmp_path / "made", "--from", "colours")
    assert made_names(tmp_path / "made") == {"train": {"a", "town/e"}, "val": {"b"}, "test": {"c"}}
    out = capsys.readouterr().out
    assert "left out, in no list: images/d.jpg" in out
    assert "left out, in lists/VAL.txt, but without picture or label: lost" in out
    write(source, {"test.txt": "c\na\n"})
    line = refusal("custom", source, tmp_path / "b", "--from", "colours")
    assert f"a is in {source}/Train.txt and in {source}/test.txt: a picture belongs to one" in line
    for folder, split in (("test", "test"), ("val", "validation")):
        write(source, colours_set(f"{folder}/f") | {"test.txt": "c\n", "Train.txt": "a\nf\n"})
        line = refusal("custom", source, tmp_path / "b", "--from", "colours")
        assert (
            f"/f.jpg belongs to train by {source}/Train.txt and to {split} by its folder: make them" in line
        )
        shutil.rmtree(source / "images" / folder)
        shutil.rmtree(source / "masks" / folder)


def test_lines_of_lists(tmp_path: pathlib.Path) -> None:
    """A line is a path with blanks, or a path and its label's, whose name may be that of another picture."""
    lists = {"train.txt": "/home/me/my street.jpg\nimages/s/e.jpg masks/f.png\n", "val.txt": "images/f.jpg\n"}
    source = write(tmp_path / "x", colours_set("my street", "my", "s/e", "f") | lists)
    run("custom", source, tmp_path / "made", "--from", "colours")
    assert made_names(tmp_path / "made") == {"train": {"my street", "s/e"}, "val": {"f"}}


@pytest.mark.parametrize(
    ("names", "expected", "way"),
    [
        (["street_test/1", "test_a/2", "testset/3"], "test", "folder"),
        (["Test-dev/1", "TEST2017/2", "set.test/3"], "test", "folder"),
        (["valid/1", "devset/2", "val 2/3", "validation_b/4"], "validation", "folder"),
        (["test_1", "street-TEST", "Test3"], "test", "file name"),
        (["val_1", "dev-2", "VALID3"], "validation", "file name"),
        (["trainset/1", "training_b/2"], "train", "folder"),
        (["train_1", "street_train_2"], "train", "file name"),
    ],
)
def test_words_of_splits(
    names: list[str], expected: str, way: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word at the begin or end of a folder's or a file's name, beside pictures of no stated split."""
    others = [] if expected == "train" else ["a", "b", "c"]
    others += ["train/test_x", "val/y"] if expected != "validation" else []
    source = write(tmp_path / "x", colours_set(*names, *others))
    run("custom", source, tmp_path / "made", "--from", "colours")
    found = made_names(tmp_path / "made")
    out = capsys.readouterr().out
    assert len(found[own.FOLDERS[expected]]) == len(names) + (expected == "train")
    assert f"{expected} (by {way}" in out
    assert ("of no stated split, which are of train: 3" in out) == (expected != "train")
    if expected != "validation":
        assert "test_x" in found["train"]  # its folder is stronger than its name


def test_pictures_of_test_alone_are_refused(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "x", colours_set("train_1", "train_2", "train_3", "test_4"))
    run("custom", source, tmp_path / "made", "--from", "colours")  # shares the pictures of train
    assert made_names(tmp_path / "made")["test"] == {"test_4"}
    source = write(tmp_path / "y", colours_set("test1", "test2"))
    line = refusal("custom", source, tmp_path / "b", "--from", "colours")
    assert "y gives no picture for train: 2 of test (by file name); put some into a folder train" in line


@pytest.mark.parametrize("backup", ["backup.zip", "train/old/train.zip"])
def test_a_backup_beside_its_files_is_not_read(
    backup: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = colours_set("train/a", "val/b")
    source = write(tmp_path / "x", files)
    copies = {f"x/{name}": files[name] for name in ("images/train/a.jpg", "masks/train/a.png")}
    write_zip(source / backup, copies)
    run("custom", source, tmp_path / "made", "--from", "colours")
    assert f"left out, copies of files beside them: {backup}" in capsys.readouterr().out
    assert made_names(tmp_path / "made") == {"train": {"a"}, "val": {"b"}}
    write_zip(source / "c.zip", copies | {"x/images/train/c.jpg": jpeg(7)})
    line = refusal("custom", source, tmp_path / "b", "--from", "colours")
    assert "c.zip holds 2 of the pictures and masks that lie beside it, such as x/images/train/a.jpg" in line


def test_strange_files_and_names(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links that lead nowhere or back, a Mac's files and decompositions, names that are no UTF-8."""
    names = unicodedata.normalize("NFC", "train/Zoë"), os.fsdecode(b"train/a\xff"), "val/b"
    files = colours_set(*names)
    files["masks/" + unicodedata.normalize("NFD", "train/Zoë.png")] = files.pop(f"masks/{names[0]}.png")
    source = write(
        tmp_path / "x", files | {"Icon\r": b"", "images/Icon\r": b"", "images/train/desktop.ini": b""}
    )
    (source / "images/loop").symlink_to(source)
    (source / "notes.txt").symlink_to(source / "nowhere")
    run("custom", source, tmp_path / "made", "--from", "colours")
    assert made_names(tmp_path / "made") == {"train": {"Zoë", "a_"}, "val": {"b"}}
    out = capsys.readouterr().out
    assert (
        "note: names that are no text, with _ in its place: 2 (images/train/a?.jpg, masks/train/a?.png)"
        in out
    )
    assert "not read: 1 .txt" in out
    (source / "masks/val/b.png").unlink()
    (source / "masks/val/b.png").symlink_to(source / "nowhere")
    line = refusal("custom", source, tmp_path / "b", "--from", "colours")
    assert f"cannot read {source}/masks/val/b.png: No such file or directory" in line


@pytest.mark.parametrize("name", ["a.tar.gz", "a.rar", "a.7z", "a.json"])
def test_a_source_is_a_folder_or_a_zip(name: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path, {name: b"x"})
    line = refusal("custom", tmp_path / name, tmp_path / "b", "--from", "coco")
    assert (
        line
        == f"{tmp_path / name} is neither a folder nor a .zip file: unpack it, and give the folder as --source"
    )


def test_a_background_of_masks_needs_void(tmp_path: pathlib.Path) -> None:
    """It takes the last label: those of the other classes stay."""
    files = colours_set("train/a", "val/b")
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "colours", "--background", "sky")
    assert (tmp_path / "made/classes.txt").read_text() == "roof\nwater\nsky\n"
    assert read(tmp_path / "made", "train")["a"][1][0].tolist() == [0] * 5 + [2] * 3
    write(tmp_path / "x", {"classes.txt": "roof 9 9 9\nwater 0 0 0\n"})
    line = refusal("custom", tmp_path / "x", tmp_path / "b", "--from", "colours", "--background", "sky")
    assert "no colour is void, so there is nothing for --background sky: leave it out" in line


def test_without_a_validation_split_train_is_shared(tmp_path: pathlib.Path) -> None:
    """Of few pictures at least one is scored on, and none of test is moved."""
    source = write(tmp_path / "x", colours_set("train/1", "train/2", "test/3"))
    run("custom", source, tmp_path / "made", "--from", "colours", "--validation", "0.001")
    found = made_names(tmp_path / "made")
    assert found["test"] == {"3"}
    assert sorted([*found["train"], *found["val"]]) == ["1", "2"]
    assert len(found["val"]) == 1


def test_archives_are_read_like_folders(tmp_path: pathlib.Path) -> None:
    files = {f"test data/{name}": data for name, data in colours_set("train/a", "val/a").items()}
    with zipfile.ZipFile(tmp_path / "drawn.ZIP", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    run("custom", tmp_path / "drawn.ZIP", tmp_path / "made", "--from", "colours")
    assert made_names(tmp_path / "made") == {"train": {"a"}, "val": {"a"}}
    (tmp_path / "bad.zip").write_bytes(b"PK")
    line = refusal("custom", tmp_path / "bad.zip", tmp_path / "b", "--from", "colours")
    assert "is cut off, damaged or no such archive (File is not a zip file): replace or remove it" in line
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../../x.jpg", jpeg(1))
    line = refusal("custom", tmp_path / "bad.zip", tmp_path / "b", "--from", "colours")
    assert "'../../x.jpg' is no name for a file below a folder" in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("suffix", [".bmp", ".TIF", ".tiff", ".webp", ".PNG"])
def test_pictures_of_other_formats_are_read(suffix: str, tmp_path: pathlib.Path) -> None:
    """They are copied as they are: training reads them."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file,
        {".TIF": "TIFF"}.get(suffix, suffix[1:].upper()),
        **({"lossless": True} if suffix == ".webp" else {}),
    )
    files = colours_set("train/a", "val/a", suffix=suffix)
    files |= {name: file.getvalue() for name in files if name.endswith(suffix)}
    files["images/test/a.jpg"] = b"without a mask"
    run("custom", write(tmp_path / "x", files), tmp_path / "made", "--from", "colours")
    (made,) = (tmp_path / "made/images/train").iterdir()
    np.testing.assert_array_equal(np.array(Image.open(made)), pixels)
    assert made.read_bytes() == file.getvalue()


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"classes.txt": "a 1 1 1\nb 1 1 1\n"},
            "classes.txt gives a and b one colour, 1 1 1: masks cannot tell them",
        ),
        ({"classes.txt": "a 1 1 1\nvoid 0 0 0\n"}, "has one class, a, so there is nothing to learn"),
        (
            {"masks/train/a.bmp": b"x"},
            "a.jpg has two masks, masks/train/a.bmp and masks/train/a.png: remove one",
        ),
        ({"masks/train/a_mask.png": b"x"}, "a.jpg has two masks"),
        ({"classes.txt": "a 1 1 1\nvoid 0 0 0\na 2 2 2\n"}, "has the class 'a' twice"),
        ({"classes.txt": "a 1 1 256\n"}, "found 'a 1 1 256'"),
        ({"masks/train/a.png": b""}, "x/masks/train/a.png is empty: replace or remove it"),
        (
            {"masks/train/a.png": png(np.zeros((3, 4, 3)))},
            "a.png is of 4 x 3 pixels, but x/images/train/a.jpg has 8 x 6",
        ),
        (
            {"masks/train/a.png": png(np.zeros((HEIGHT, WIDTH, 4)))},
            "a.png: 100.00% of the pixels are transparent: save the mask without transparency",
        ),
        (
            {"images/train/b.jpg": jpeg(1), "masks/train/b-seg.png": b""},
            "images/train/b.jpg has no mask: expected its name, or this and _mask, -mask, _label, _gt, with one of "
            ".png, .bmp, .tif, .tiff, .webp; there are 3 pictures and 3 masks (such as masks/train/b-seg.png)",
        ),
        ({"classes.txt": b"\xff\xfe"}, "classes.txt is not UTF-8 text"),
        (
            {"images/train/test/b.jpg": jpeg(1), "masks/train/test/b.png": b""},
            "lies in folders of test and train",
        ),
    ],
)
def test_colours_that_are_not_clear_are_refused(
    files: dict[str, Any], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x", colours_set("train/a", "val/a") | files)
    said = refusal("custom", pathlib.Path("x"), pathlib.Path("made"), "--from", "colours")
    assert line in said
    assert len(said) <= 300
