"""Sources: each data set's layout on disk, what is said where it is wrong, records without TensorFlow, shapes."""

import hashlib
import pathlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.data import shapes, sources
from topformer_jax.data.catalog import CATALOG
from topformer_jax.preparation import packing
from topformer_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 6)
PNG = cv2.imencode(".png", PIXELS)[1].tobytes()
JPEG = cv2.imencode(".jpg", np.repeat(PIXELS[..., None], 3, -1))[1].tobytes()
# For each data set: its config, then image and label of two training examples and of one for validation.
LAYOUTS: dict[str, tuple[Callable[[], ConfigDict], list[str]]] = {
    "ade20k": (
        lambda: config_lib.ade20k("tiny"),
        [
            *("images/training/b.jpg", "annotations/training/b.png"),
            *("images/training/a.jpg", "annotations/training/a.png"),
            *("images/validation/c.jpg", "annotations/validation/c.png"),
        ],
    ),
    "cityscapes": (
        lambda: config_lib.cityscapes("tiny"),
        [
            *("leftImg8bit/train/ulm/b_leftImg8bit.png", "gtFine/train/ulm/b_gtFine_labelTrainIds.png"),
            *("leftImg8bit/train/bonn/a_leftImg8bit.png", "gtFine/train/bonn/a_gtFine_labelTrainIds.png"),
            *("leftImg8bit/val/jena/c_leftImg8bit.png", "gtFine/val/jena/c_gtFine_labelTrainIds.png"),
        ],
    ),
    "context59": (
        lambda: config_lib.pascal_context("tiny", classes=59),
        [
            *("JPEGImages/b.jpg", "SegmentationClassContext/b.png"),
            *("JPEGImages/a.jpg", "SegmentationClassContext/a.png"),
            *("JPEGImages/c.jpg", "SegmentationClassContext/c.png"),
        ],
    ),
    "cocostuff10k": (
        lambda: config_lib.coco_stuff10k("tiny"),
        [
            *("images/train2014/b.jpg", "annotations/train2014/b_labelTrainIds.png"),
            *("images/train2014/a.jpg", "annotations/train2014/a_labelTrainIds.png"),
            *("images/test2014/c.jpg", "annotations/test2014/c_labelTrainIds.png"),
        ],
    ),
    "camvid": (
        lambda: config_lib.camvid("tiny"),
        [
            *("images/train/b.png", "annotations/train/b.png"),
            *("images/train/a.jpg", "annotations/train/a.png"),
            *("images/val/c.jpg", "annotations/val/c.png"),
        ],
    ),
    "custom": (
        lambda: config_lib.load(
            config_lib.ade20k("tiny"),
            {"data.dataset": "custom", "model.num_classes": 3, "data.class_names": ("sky", "sea", "sand")},
        ),
        [
            *("images/train/b.PNG", "annotations/train/b.png"),
            *("images/train/a.jpeg", "annotations/train/a.png"),
            *("images/val/c.jpg", "annotations/val/c.png"),
        ],
    ),
}


def write(root: pathlib.Path, dataset: str) -> ConfigDict:
    """Writes a small data set and returns a config that points at it."""
    make, paths = LAYOUTS[dataset]
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((PNG if file.suffix.lower() == ".png" else JPEG) + bytes([number]))
    if dataset == "context59":
        lists = root / "ImageSets/SegmentationContext"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("b\na\n\n")
        (lists / "val.txt").write_text("c\n")
    return config_lib.load(make(), {"data.root": str(root)})


def refusal(config: ConfigDict, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        sources.open_source(config, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_splits(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "custom")
    (tmp_path / "images/val").rename(tmp_path / "images/test")
    (tmp_path / "annotations/val").rename(tmp_path / "annotations/test")
    with pytest.raises(
        UserError, match=r"images/val does not exist \(to score on test: --config.data.validation_sp"
    ):
        sources.open_source(config, "validation")
    chosen = config_lib.load(config, {"data.validation_split": "test"})
    assert sources.open_source(chosen, "validation")[0].name == "c"
    assert len(sources.open_source(chosen, "train")) == 2
    swapped = config_lib.load(config, {"data.train_split": "test", "data.validation_split": "train"})
    assert [len(sources.open_source(swapped, split)) for split in sources.SPLITS] == [1, 2]
    packed = config_lib.load(chosen, {"data.source": "array_record"})
    with pytest.raises(UserError, match=r"data\.validation_split=test"):
        sources.open_source(packed, "validation")


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_layouts(tmp_path: pathlib.Path, dataset: str) -> None:
    config = write(tmp_path, dataset)
    paths = LAYOUTS[dataset][1]
    (tmp_path / paths[0]).with_name(".hidden.jpg").write_bytes(b"")  # as some systems leave them
    train, validation = (sources.open_source(config, split) for split in sources.SPLITS)
    assert (len(train), len(validation)) == (2, 1)
    assert isinstance(train, sources.Source)
    order = [2, 0]  # sorted by name
    for source, places in ((train, order), (validation, [4])):
        for index, place in enumerate(places):
            example = pickle.loads(pickle.dumps(source))[index]
            assert example.image == (tmp_path / paths[place]).read_bytes()
            assert example.label == (tmp_path / paths[place + 1]).read_bytes()
            assert example.where == (str(tmp_path / paths[place]), str(tmp_path / paths[place + 1]))
    suffix = "bonn/a" if dataset == "cityscapes" else "a"
    assert train[0].name == suffix
    assert len(sources.find_data_set(config).classes) == config.model.num_classes


def test_mini_ade(golden: Callable[[str], pathlib.Path]) -> None:
    root = golden("mini_ade")
    config = config_lib.load(config_lib.ade20k("tiny"), {"data.root": str(root)})
    train, validation = (sources.open_source(config, split) for split in sources.SPLITS)
    assert (len(train), len(validation)) == (48, 12)
    assert [train[i].name for i in (0, 47)] == ["ADE_train_00000001", "ADE_train_00000048"]
    assert validation[3].label == (root / "annotations/validation/ADE_val_00000004.png").read_bytes()


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_missing_data(tmp_path: pathlib.Path, dataset: str) -> None:
    config = config_lib.load(LAYOUTS[dataset][0](), {"data.root": str(tmp_path / "nowhere")})
    line = refusal(config)
    assert f"no {dataset} in {tmp_path / 'nowhere'}" in line
    for part in (
        "does not exist; the layout must be ",
        "--config.data.root=DIR",
        "bash scripts/quickstart.sh",
    ):
        assert part in line
    words = {"ade20k": "images/{training,validation}/**/*.jpg", "cityscapes": "*_gtFine_labelTrainIds.png"}
    assert words.get(dataset, "") in line
    if dataset == "context59":
        assert "ImageSets/SegmentationContext/{train,val}.txt" in line
    assert "data.root is empty" in refusal(config_lib.load(config, {"data.root": ""}))


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_incomplete_data(tmp_path: pathlib.Path, dataset: str) -> None:
    config = write(tmp_path, dataset)
    paths = LAYOUTS[dataset][1]
    (tmp_path / paths[1]).unlink()
    line = refusal(config)
    assert "1 image (" in line
    assert f"{pathlib.PurePath(paths[0]).name}) in " in line
    if dataset == "cityscapes":
        assert "(python -m topformer_jax.prepare cityscapes makes it of the downloads)" in line
    (tmp_path / paths[3]).unlink()
    line = refusal(config)
    assert "2 images (" in line
    for path in paths[0:3:2]:
        (tmp_path / path).unlink()
    line = refusal(config)
    assert ("without an image in" if dataset == "context59" else " holds no *") in line


def test_many_images_without_labels(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "ade20k")
    for number in range(7):
        (tmp_path / f"images/training/x{number}.jpg").write_bytes(JPEG)
    assert "7 images (x0.jpg, x1.jpg, x2.jpg, ...) in " in refusal(config)


def test_an_unreadable_file_is_named(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "ade20k")
    source = sources.open_source(config, "train")
    (tmp_path / "images/training/a.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*/images/training/a\.jpg: No such file"):
        source[0]


def test_custom_data(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "custom")
    found = sources.find_data_set(config)
    assert found.classes == ("sky", "sea", "sand")
    assert found.palette == ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    unnamed = config_lib.load(config, {"data.class_names": ()})
    assert f"write them to {tmp_path / 'classes.txt'}" in refusal(unnamed)
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nrock\n")
    assert "custom has 4 classes, the config's model 3: --config.model.num_classes=4" in refusal(unnamed)
    assert len(sources.find_data_set(config_lib.load(unnamed, {"model.num_classes": 4})).classes) == 4
    (tmp_path / "images/train/a.png").write_bytes(PNG)
    assert "a.jpeg and a.png in " in refusal(config)
    (tmp_path / "images/train/a.png").unlink()
    for folder, word, other in (("images", "Training", "VALID"), ("annotations", "TRAINING", "Valid")):
        (tmp_path / folder / "train").rename(tmp_path / folder / word)
        (tmp_path / folder / "val").rename(tmp_path / folder / other)
    for split, count in (("train", 2), ("validation", 1)):
        assert len(sources.open_source(config, split)) == count
    (tmp_path / "images/val").mkdir()
    assert "images/val and images/valid are both in " in refusal(config, "validation")


@pytest.mark.parametrize(
    ("images", "labels", "pairing"),
    [
        (["a.jpg", "b.BMP", "c.webp", "s/d.Tiff"], ["a.PNG", "b.png", "c.Png", "s/d.png"], ""),
        (["a.jpg", "ab.png"], ["a_mask.png", "ab_mask.png"], "labels have their images' names and _mask.png"),
        (["Zoe\u0308.jpg"], ["Zo\u00eb.png"], ""),
        (["a.jpg", "b.png"], ["a.jpg.png", "b.png.png"], "labels have their images' whole names: a.jpg.png"),
    ],
)
def test_names_of_labels(tmp_path: pathlib.Path, images: list[str], labels: list[str], pairing: str) -> None:
    config = write(tmp_path, "custom")
    shutil.rmtree(tmp_path / "images/train")
    shutil.rmtree(tmp_path / "annotations/train")
    for folder, paths in (("images", images), ("annotations", labels)):
        for path in paths:
            (tmp_path / folder / "train" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "train" / path).write_bytes(PNG)
        (tmp_path / folder / "train/loop").symlink_to(tmp_path / folder / "train")
    source = sources.open_source(config, "train")
    assert isinstance(source, sources.FolderSource)
    assert source.images == tuple(f"images/train/{path}" for path in images)
    assert source.labels == tuple(f"annotations/train/{path}" for path in labels)
    assert source.pairing == pairing


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (["a.jpg", "a.webp"], ["a.png"], "a.jpg and a.webp in "),
        (["a.jpg"], ["a.PNG", "a.png"], "a.PNG and a.png in "),
        (["p1.jpg"], ["p10.png"], "annotations/train, which has p10.png ("),
        (["a.jpg", "b.jpg"], ["a_m.png", "b_n.png"], "2 images (a.jpg, b.jpg) in "),
        (["a.heic"], ["a.png"], "or *.tiff, but a.heic ("),
        (
            ["a.jpg"],
            ["a_m.png", "a_n.png"],
            "two labels, of their images' names and _m.png, and of their images'",
        ),
        (["a.jpg"], ["a.jpg.png", "a_n.png"], "two labels, of their images' whole names: a.jpg.png, and of"),
    ],
)
def test_names_that_do_not_fit(
    tmp_path: pathlib.Path, images: list[str], labels: list[str], words: str
) -> None:
    config = write(tmp_path, "custom")
    for folder, paths in (("images", images), ("annotations", labels)):
        shutil.rmtree(tmp_path / folder / "train")
        (tmp_path / folder / "train").mkdir()
        for path in paths:
            (tmp_path / folder / "train" / path).write_bytes(PNG)
    line = refusal(config)
    assert words in line
    assert len(line.replace(str(tmp_path), "data/streets")) <= 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky\nsea\nsky\n", ": line 3 repeats 'sky' of 1: give each class another name"),
        ("# streets\nsky\nsea\nsand\n", ": line 1 is a comment, '# streets': expected one class name a line"),
        ("classes:\nsky\nsea\n", ": line 1 is a heading, 'classes:': expected"),
        ("Name\nsky\nsea\n", ": line 1 is a heading, 'Name': expected"),
        ("sky\nsea, sand\nrock\n", ": line 2 is several values, 'sea, sand': expected"),
        ("1 sky\n2 sea\n3 sand\n", ": line 1 is a number and a name, '1 sky': expected"),
    ],
)
def test_lists_of_classes_that_are_refused(tmp_path: pathlib.Path, text: str, words: str) -> None:
    config = config_lib.load(write(tmp_path, "custom"), {"data.class_names": ()})
    (tmp_path / "classes.txt").write_text(text)
    assert refusal(config).startswith(f"{tmp_path / 'classes.txt'}{words}")
    (tmp_path / "classes.txt").write_text("3d model\n2 wheeler\nsky: blue\n")
    assert sources.find_data_set(config).classes == ("3d model", "2 wheeler", "sky: blue")


def test_wrong_settings() -> None:
    config = config_lib.shapes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data.dataset": "cityscapes"}, "--config.model.num_classes=19"),
        ({"data.source": "folder"}, "configs/topformer_t_shapes.py"),
    ]
    for overrides, message in cases:
        assert message in refusal(config_lib.load(config, overrides))
    for key, value in (("dataset", "ade"), ("source", "tar")):
        with pytest.raises(UserError, match=rf"data\.{key} is '{value}': .*expected one of "):
            config_lib.load(config, {f"data.{key}": value})
    with pytest.raises(UserError, match=r"no images by class: .* does not exist; the layout must be train/"):
        sources.open_source(config_lib.imagenet("tiny"), "train")
    with pytest.raises(ValueError, match="none of"):
        sources.open_source(config, "test")


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_records_hold_the_files(tmp_path: pathlib.Path, dataset: str, capsys: pytest.CaptureFixture) -> None:
    config = write(tmp_path / "files", dataset)
    if dataset == "custom":
        config.data.class_names = ()
        (tmp_path / "files/classes.txt").write_text("sky\nsea\nsand\n")
    label = tmp_path / "files" / LAYOUTS[dataset][1][1]
    label.write_bytes(
        cv2.imencode(".png", PIXELS.astype(np.uint16) * 1000)[1].tobytes()
    )  # 16 bits stay 16 bits
    output = tmp_path / "records"
    folder = packing.build(dataset, config.data.root, str(output))
    assert capsys.readouterr().out == ""
    assert [path.name for path in output.iterdir()] == [dataset]  # nothing of TFDS's own is left behind
    for root in (output, output / dataset / "1.0.0"):
        records = config_lib.load(config, {"data.source": "array_record", "data.root": str(root)})
        for split in sources.SPLITS:
            expected = sources.open_source(config, split)
            found = pickle.loads(pickle.dumps(sources.open_source(records, split)))
            assert len(found) == len(expected)
            for index in range(len(expected)):
                assert found[index][:3] == expected[index][:3]
                assert f"(record {index} of {split} in {folder})" in found[index].where[1]
    label.write_bytes(label.read_bytes() + b"more")
    with pytest.raises(
        UserError, match="is there already, from other files or an earlier version: remove it"
    ):
        packing.build(dataset, config.data.root, str(output))


def test_records_that_are_not_there(tmp_path: pathlib.Path) -> None:
    overrides = {"data.source": "array_record", "data.root": str(tmp_path)}
    line = refusal(config_lib.load(config_lib.ade20k("tiny"), overrides))
    assert "python -m topformer_jax.prepare ade20k --source DIR --output DIR --format array_record" in line
    assert "bash scripts/quickstart.sh" in line
    (tmp_path / "dataset_info.json").write_text("{}")
    assert "features.json: No such file" in refusal(config_lib.load(config_lib.ade20k("tiny"), overrides))


@pytest.mark.parametrize("left", [0, 0.5])
def test_records_that_are_damaged(tmp_path: pathlib.Path, left: float) -> None:
    config = write(tmp_path / "files", "ade20k")
    folder = packing.build("ade20k", config.data.root, str(tmp_path / "records"))
    overrides = {"data.source": "array_record", "data.root": str(tmp_path / "records")}
    source = sources.open_source(config_lib.load(config, overrides), "train")
    (file,) = pathlib.Path(folder).glob("*train.array_record*")
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(
        UserError,
        match=r"record 1 of train in .* cannot be read \(.*\); copy it, or build the data set again",
    ):
        source[1]


def test_the_command_and_records_need_no_tensorflow(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "files", "ade20k")
    program = f"""
import runpy, sys
sys.argv = ["", "ade20k", "--source", "{tmp_path}/files", "--output", "{tmp_path}/out", "--format", "array_record"]
runpy.run_module("topformer_jax.prepare", run_name="__main__")
from topformer_jax import config
from topformer_jax.data import sources
settings = {{"data.source": "array_record", "data.root": "{tmp_path}/out"}}
print(len(sources.open_source(config.load(config.ade20k("tiny"), settings), "train")[1].image))
assert "tensorflow" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"--config.data.source=array_record --config.data.root={tmp_path}/out" in run.stdout
    assert run.stdout.splitlines()[-1] == str(len(JPEG) + 1)
    assert "train: 100%" in run.stderr
    (tmp_path / "files/annotations").rename(tmp_path / "files/labels")
    again = [sys.executable, "-m", "topformer_jax.prepare", "ade20k", "--source", f"{tmp_path}/files"]
    again += ["--output", "x", "--format", "array_record"]
    run = subprocess.run(again, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no ade20k in ")
    assert len(run.stderr.splitlines()) == 1


def test_shapes_depend_on_split_and_index_alone() -> None:
    drawn = [shapes.draw(split, index, 64) for split in ("train", "validation") for index in range(4)]
    again = [shapes.draw(split, index, 64) for split in ("train", "validation") for index in range(4)]
    for (image, label), (same_image, same_label) in zip(drawn, again, strict=True):
        np.testing.assert_array_equal(image, same_image)
        np.testing.assert_array_equal(label, same_label)
        assert image.shape[:2] == label.shape
    assert len({hashlib.sha256(image.tobytes()).digest() for image, _ in drawn}) == len(drawn)
    source = sources.open_source(config_lib.shapes(), "validation")
    assert len(source) == 64
    np.testing.assert_array_equal(source[5].image, shapes.draw("validation", 5, 160)[0])


def test_shapes_are_balanced_and_not_told_by_colour() -> None:
    assert len(CATALOG["shapes"].classes) == config_lib.shapes().model.num_classes == 10
    pixels, colours = np.zeros(10), np.zeros((10, 3))
    for index in range(120):
        image, label = shapes.draw("train", index, 160)
        pixels += np.bincount(label.ravel(), minlength=10)
        for channel in range(3):
            colours[:, channel] += np.bincount(label.ravel(), image[..., channel].ravel(), minlength=10)
    assert (pixels[:4] / pixels.sum() > 0.1).all()  # the grounds
    assert (pixels[4:] / pixels.sum() > 0.03).all()  # the shapes
    means = colours / pixels[:, None]
    assert np.ptp(means, 0).max() < 50  # of 255


def test_drawn_scenes_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.ShapesSource("train", 10, 48)
    assert source[3].image is source[3].image
    assert not np.asarray(source[3].image).flags.writeable
    assert len(pickle.dumps(source)) < 200
    assert pickle.loads(pickle.dumps(source)) == source
    monkeypatch.setattr(shapes, "MAX_CACHED_BYTES", 3 * 4 * 48**2)
    for index in range(10):
        np.testing.assert_array_equal(source[index].label, shapes.draw("train", index, 48)[1])
    assert len(source._scenes) == 3
