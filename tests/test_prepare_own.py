"""`prepare custom --from`: splits, names, classes and counts, which are the same for all formats."""

import io
import os
import pathlib
import shutil
import unicodedata
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.annotations import BACK, SQUARE, labelme, shape, write
from tests.miniatures import HEIGHT, WIDTH, grid, jpeg, png
from tests.test_prepare import refusal, run, tree
from topformer_jax import config as config_lib, prepare
from topformer_jax.data import sources
from topformer_jax.data.codecs import decode_label
from topformer_jax.preparation import own


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


def colours_set(*names: str, suffix: str = ".jpg") -> dict[str, Any]:
    """Pictures below images/ and their masks: a class at the left, void at the right."""
    mask = np.where((np.arange(WIDTH) < 5)[None, :, None], np.full((HEIGHT, 1, 3), 9), 0)
    files: dict[str, Any] = {"classes.txt": "roof 9 9 9\nwater 1 2 3\nVoid 0 0 0\n"}
    for seed, name in enumerate(names):
        files |= {f"images/{name}{suffix}": jpeg(seed), f"masks/{name}.png": png(mask)}
    return files


def make(tmp_path: pathlib.Path, files: dict[str, Any], *flags: str) -> dict[str, set[str]]:
    """Writes files into x, makes a set of them in made, and returns its pictures by folder, each with its label."""
    made, found = tmp_path / "made", {}
    run("custom", write(tmp_path / "x", files), made, "--from", "colours", *flags)
    for folder in (made / "images").iterdir():
        paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        assert all((made / "annotations" / folder.name / path.with_suffix(".png")).exists() for path in paths)
        found[folder.name] = {path.with_suffix("").as_posix() for path in paths}
    return found


def refuse(tmp_path: pathlib.Path, files: dict[str, Any], *flags: str) -> str:
    """Writes further files into x, and returns the line that refuses them."""
    return refusal("custom", write(tmp_path / "x", files), tmp_path / "b", "--from", "colours", *flags)


def test_colours(tmp_path: pathlib.Path) -> None:
    """A hash of the name shares the pictures: each stays in its split when others are added."""
    mask = np.resize(np.array([(10, 20, 30), (0, 0, 0), (255, 0, 1)]), (HEIGHT, WIDTH, 3))
    files: dict[str, Any] = {"classes.txt": "red roof 255 0 1\nwater 10 20 30\nvoid 0 0 0\n"}
    for number in range(40):
        files |= {f"images/{number:02}.JPG": jpeg(number), f"masks/{number:02}.png": png(mask)}
    make(tmp_path, files, "--validation", "0.25")
    assert (tmp_path / "made/classes.txt").read_text() == "red roof\nwater\n"
    train, validation = (read(tmp_path / "made", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 40
    assert 3 < len(validation) < 20
    for name, (image, found) in (train | validation).items():
        assert image == jpeg(int(name))
        np.testing.assert_array_equal(found, grid(1, 255, 0))
    more = {f"images/y/{n}.jpg": jpeg(n) for n in range(9)} | {f"masks/y/{n}.png": png(mask) for n in range(9)}
    run("custom", write(tmp_path / "x", more), tmp_path / "more", "--from", "colours", "--validation", "0.25")
    assert set(validation) <= set(read(tmp_path / "more", "validation"))
    mask[0, 0] = (10, 20, 31)
    line = refuse(tmp_path, {"masks/03.png": png(mask)})
    assert "masks/03.png: 2.08% of the pixels have colours that no class has, such as (10, 20, 31)" in line
    assert not list((tmp_path / "b").rglob("03.png"))


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
    assert set(prepare.KINDS) == set(prepare.READERS)
    (tmp_path / "x").mkdir()
    assert "by --from labelme, coco, colours, cvat, yolo, roboflow-masks, voc" in refusal(
        "custom", tmp_path / "x", tmp_path / "made"
    )
    assert not tree(tmp_path).keys()


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
        "val/a.jpg has 6 x 8 (the sides the other way round, as by an EXIF orientation): give both one size" in line
    )


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
    others = {"images/readme.md": "", "masks/old.png": png(grid(0)), f"images/{test}/new.jpg": jpeg(9)}
    found = make(tmp_path, colours_set(*names) | others)
    assert found == {"train": {"a/1", "b/1"}, "val": {"a/1"}, "test": {"1", "2"}}
    assert (tmp_path / "made/images/train/b/1.jpg").read_bytes() == jpeg(1)
    changes = {"data.dataset": "custom", "data.root": str(tmp_path / "made"), "model.num_classes": 2}
    config = config_lib.load(config_lib.ade20k("tiny"), changes | {"data.validation_split": "test"})
    assert [sources.open_source(config, "validation")[n].image for n in (0, 1)] == [jpeg(3), jpeg(4)]
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[:7] == [
        "pictures labels other files",
        "train (by folder) 2 2",
        "validation (by folder) 1 1",
        "test (by folder) 2 2",
        f"left out, without a mask: images/{test}/new.jpg 1",
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
    assert make(tmp_path, files | lists) == {"train": {"a", "town/e"}, "val": {"b"}, "test": {"c"}}
    out = capsys.readouterr().out
    assert "left out, in no list: images/d.jpg" in out
    assert "left out, in lists/VAL.txt, but without picture or label: lost" in out
    source = tmp_path / "x"
    line = refuse(tmp_path, {"test.txt": "c\na\n"})
    assert f"a is in {source}/Train.txt and in {source}/test.txt: a picture belongs to one" in line
    for folder, split in (("test", "test"), ("val", "validation")):
        line = refuse(tmp_path, colours_set(f"{folder}/f") | {"test.txt": "c\n", "Train.txt": "a\nf\n"})
        assert f"/f.jpg belongs to train by {source}/Train.txt and to {split} by its folder: make" in line
        shutil.rmtree(source / "images" / folder)
        shutil.rmtree(source / "masks" / folder)


def test_lines_of_lists(tmp_path: pathlib.Path) -> None:
    """A line is a path with blanks, or a path and its label's, whose name may be that of another picture."""
    lists = {"train.txt": "/home/me/my street.jpg\nimages/s/e.jpg masks/f.png\n", "val.txt": "images/f.jpg\n"}
    found = make(tmp_path, colours_set("my street", "my", "s/e", "f") | lists)
    assert found == {"train": {"my street", "s/e"}, "val": {"f"}}


@pytest.mark.parametrize(("names", "expected", "way"), [
    (["street_test/1", "test_a/2", "testset/3"], "test", "folder"),
    (["Test-dev/1", "TEST2017/2", "set.test/3"], "test", "folder"),
    (["valid/1", "devset/2", "val 2/3", "validation_b/4"], "validation", "folder"),
    (["test_1", "street-TEST", "Test3"], "test", "file name"),
    (["val_1", "dev-2", "VALID3"], "validation", "file name"),
    (["trainset/1", "training_b/2"], "train", "folder"),
    (["train_1", "street_train_2"], "train", "file name"),
])  # fmt: skip
def test_words_of_splits(
    names: list[str], expected: str, way: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word at the begin or end of a folder's or a file's name, beside pictures of no stated split."""
    others = [] if expected == "train" else ["a", "b", "c"]
    others += ["train/test_x", "val/y"] if expected != "validation" else []
    found = make(tmp_path, colours_set(*names, *others))
    out = capsys.readouterr().out
    assert len(found[own.FOLDERS[expected]]) == len(names) + (expected == "train")
    assert f"{expected} (by {way}" in out
    assert ("pictures without a split, used for train: 3" in out) == (expected != "train")
    if expected != "validation":
        assert "test_x" in found["train"]  # its folder is stronger than its name


def test_few_pictures(tmp_path: pathlib.Path) -> None:
    """Without a validation split, at least one picture of train is scored on, and none of test is moved."""
    found = make(tmp_path, colours_set("train/1", "train/2", "test_3"), "--validation", "0.001")
    assert found["test"] == {"test_3"}
    assert sorted([*found["train"], *found["val"]]) == ["1", "2"]
    assert len(found["val"]) == 1
    shutil.rmtree(tmp_path / "x")
    line = refuse(tmp_path, colours_set("test1", "test2"))
    assert "x gives no picture for train: 2 of test (by file name); put some into a folder train" in line


def test_strange_files_and_names(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links that lead nowhere or back, a Mac's files and decompositions, names that are no UTF-8."""
    names = unicodedata.normalize("NFC", "train/Zoë"), os.fsdecode(b"train/a\xff"), "val/b"
    files = colours_set(*names)
    files["masks/" + unicodedata.normalize("NFD", "train/Zoë.png")] = files.pop(f"masks/{names[0]}.png")
    files |= {"Icon\r": b"", "images/Icon\r": b"", "images/train/desktop.ini": b""}
    source = write(tmp_path / "x", files)
    (source / "images/loop").symlink_to(source)
    (source / "notes.txt").symlink_to(source / "nowhere")
    assert make(tmp_path, {}) == {"train": {"Zoë", "a_"}, "val": {"b"}}
    out = capsys.readouterr().out
    assert "names that are no text, with _ in its place: 2 (images/train/a?.jpg, masks/train/a?.png)" in out
    assert "not read: 1 .txt" in out
    (source / "masks/val/b.png").unlink()
    (source / "masks/val/b.png").symlink_to(source / "nowhere")
    line = refuse(tmp_path, {})
    assert f"cannot read {source}/masks/val/b.png: No such file or directory" in line


def test_a_source_is_a_folder_or_a_zip(tmp_path: pathlib.Path) -> None:
    for name in ("a.tar.gz", "a.json"):
        write(tmp_path, {name: b"x"})
        line = refusal("custom", tmp_path / name, tmp_path / "b", "--from", "coco")
        assert line == f"{tmp_path / name} is neither a folder nor a .zip file: unpack it for --source"
    (tmp_path / "bad.zip").write_bytes(b"PK")
    line = refusal("custom", tmp_path / "bad.zip", tmp_path / "b", "--from", "colours")
    assert "is cut off, damaged or no such archive (File is not a zip file): replace it" in line
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../../x.jpg", jpeg(1))
    line = refusal("custom", tmp_path / "bad.zip", tmp_path / "b", "--from", "colours")
    assert "'../../x.jpg' is no name for a file below a folder" in line
    assert not (tmp_path / "b").exists()


def test_a_background_of_masks_needs_void(tmp_path: pathlib.Path) -> None:
    """It takes the last label: those of the other classes stay."""
    make(tmp_path, colours_set("train/a", "val/b"), "--background", "sky")
    assert (tmp_path / "made/classes.txt").read_text() == "roof\nwater\nsky\n"
    assert read(tmp_path / "made", "train")["a"][1][0].tolist() == [0] * 5 + [2] * 3
    line = refuse(tmp_path, {"classes.txt": "roof 9 9 9\nwater 0 0 0\n"}, "--background", "sky")
    assert "no colour is void, so there is nothing for --background sky: leave it out" in line


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"classes.txt": "a 1 1 1\nb 1 1 1\n"}, "classes.txt gives a and b one colour, 1 1 1: masks cannot tell them"),
    ({"classes.txt": "a 1 1 1\nvoid 0 0 0\n"}, "has one class, a, so there is nothing to learn"),
    ({"classes.txt": "a 1 1 1\nvoid 0 0 0\na 2 2 2\n"}, "has the class 'a' twice"),
    ({"classes.txt": "a 1 1 256\n"}, "expected NAME RED GREEN BLUE (0 to 255), found 'a 1 1 256'"),
    ({"classes.txt": b"\xff\xfe"}, "classes.txt is not UTF-8 text"),
    ({"masks/train/a.bmp": b"x"}, "a.jpg has two masks, masks/train/a.bmp and masks/train/a.png: remove one"),
    ({"masks/train/a_mask.png": b"x"}, "a.jpg has two masks"),
    ({"masks/train/a.png": b""}, "x/masks/train/a.png is empty: replace or remove it"),
    ({"masks/train/a.png": png(np.zeros((3, 4, 3)))}, "a.png is of 4 x 3 pixels, but x/images/train/a.jpg has 8 x 6"),
    ({"masks/train/a.png": png(np.zeros((HEIGHT, WIDTH, 4)))}, "a.png: 100.00% of the pixels are transparent"),
    ({"images/train/test/b.jpg": jpeg(1), "masks/train/test/b.png": b""}, "lies in folders of test and train"),
    ({"images/train/b.jpg": jpeg(1), "masks/train/b-seg.png": b""},
     "images/train/b.jpg has no mask of its name, with or without _mask, -mask, _label, _gt; there are 3 pictures "
     "and 3 masks, such as masks/train/b-seg.png"),
    ({"images/train/a.jpeg": jpeg(1)}, "images/train/a.jpg would share one label: rename one"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "line"), WRONG)
def test_colours_that_are_not_clear_are_refused(
    files: dict[str, Any], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x", colours_set("train/a", "val/a") | files)
    said = refusal("custom", pathlib.Path("x"), pathlib.Path("made"), "--from", "colours")
    assert line in said
    assert len(said) <= 300
