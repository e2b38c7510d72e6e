"""Sources: each data set's layout on disk, what is said where it is wrong, records without TensorFlow, shapes."""

import pathlib
import pickle
import shutil
from collections.abc import Callable

import cv2
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.config.settings import DATASETS
from topformer_jax.data import shapes, sources
from topformer_jax.data.catalog import CATALOG
from topformer_jax.preparation import packing
from topformer_jax.preparation.releases import RELEASES
from topformer_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PIXELS = np.arange(24, dtype=np.uint8).reshape(4, 6)
PNG = cv2.imencode(".png", PIXELS)[1].tobytes()
JPEG = cv2.imencode(".jpg", np.repeat(PIXELS[..., None], 3, -1))[1].tobytes()
CUSTOM = {"data.dataset": "custom", "model.num_classes": 3, "data.class_names": ("sky", "sea", "sand")}
# For each data set: its config, and the paths of an image and its label, of {} for the split and {} for the name.
LAYOUTS: dict[str, tuple[Callable[[], ConfigDict], str, str, str, str]] = {
    "ade20k": (lambda: config_lib.ade20k("tiny"), *("images/{}/{}.jpg", "annotations/{}/{}.png", "training",
     "validation")),
    "cityscapes": (lambda: config_lib.cityscapes("tiny"), *("leftImg8bit/{}/ulm/{}_leftImg8bit.png",
     "gtFine/{}/ulm/{}_gtFine_labelTrainIds.png", "train", "val")),
    "context59": (lambda: config_lib.pascal_context("tiny", classes=59), *("JPEGImages/{1}.jpg",
     "SegmentationClassContext/{1}.png", "train", "val")),
    "cocostuff10k": (lambda: config_lib.coco_stuff10k("tiny"), *("images/{}/{}.jpg",
     "annotations/{}/{}_labelTrainIds.png", "train2014", "test2014")),
    "custom": (lambda: config_lib.load(config_lib.ade20k("tiny"), CUSTOM), *("images/{}/{}.JPEG",
     "annotations/{}/{}.png", "train", "val")),
}  # fmt: skip


def paths(dataset: str) -> list[str]:
    """Image and label of two training examples and of one for validation."""
    _, image, label, train, validation = LAYOUTS[dataset]
    examples = ((train, "b"), (train, "a"), (validation, "c"))
    return [text.format(word, name) for word, name in examples for text in (image, label)]


def write(root: pathlib.Path, dataset: str) -> ConfigDict:
    """Writes a small data set and returns a config that points at it."""
    for number, path in enumerate(paths(dataset)):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((PNG if file.suffix.lower() == ".png" else JPEG) + bytes([number]))
    if dataset == "context59":
        lists = root / "ImageSets/SegmentationContext"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("b\na\n\n")
        (lists / "val.txt").write_text("c\n")
    return config_lib.load(LAYOUTS[dataset][0](), {"data.root": str(root)})


def refusal(config: ConfigDict, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        sources.open_source(config, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_splits(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "custom")
    (tmp_path / "images/val").rename(tmp_path / "images/test")
    (tmp_path / "annotations/val").rename(tmp_path / "annotations/test")
    words = "images/val does not exist (to score on test: --config.data.validation_split=test)"
    assert words in refusal(config, "validation")
    swapped = config_lib.load(config, {"data.train_split": "test", "data.validation_split": "train"})
    assert [len(sources.open_source(swapped, split)) for split in sources.SPLITS] == [1, 2]
    packed = config_lib.load(swapped, {"data.source": "array_record"})
    assert "data.train_split=test, data.validation_split=train: these choose among" in refusal(packed)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_layouts(tmp_path: pathlib.Path, dataset: str) -> None:
    config, names = write(tmp_path, dataset), paths(dataset)
    (tmp_path / names[0]).with_name(".hidden.jpg").write_bytes(b"")  # as some systems leave them
    train, validation = (sources.open_source(config, split) for split in sources.SPLITS)
    assert (len(train), len(validation)) == (2, 1)
    assert isinstance(train, sources.Source)
    for source, index, place in ((train, 0, 2), (train, 1, 0), (validation, 0, 4)):  # sorted by name
        example, image, label = source[index], tmp_path / names[place], tmp_path / names[place + 1]
        assert (example.image, example.label) == (image.read_bytes(), label.read_bytes())
        assert example.where == (str(image), str(label))
    assert train[0].name == ("ulm/a" if dataset == "cityscapes" else "a")
    assert len(sources.find_data_set(config).classes) == config.model.num_classes
    assert pickle.loads(pickle.dumps(train)) == train
    (tmp_path / names[1]).unlink()
    assert "1 image (" in (line := refusal(config))
    made = "annotations" if dataset == "custom" else "the downloads"
    assert f"(python -m topformer_jax.prepare {dataset} makes it from {made})" in line
    (tmp_path / names[2]).unlink()
    if dataset == "context59":
        assert "1 image (a) in " in (line := refusal(config))
        assert "train.txt without an image in" in line


def test_raw_cityscapes_labels_are_named(tmp_path: pathlib.Path) -> None:
    config, label = write(tmp_path, "cityscapes"), paths("cityscapes")[1]
    for name in paths("cityscapes")[1::2]:
        (tmp_path / name).unlink()
    raw = label.replace("TrainIds", "Ids")
    for name in (raw, *(raw.replace("labelIds", kind) for kind in ("color", "instanceIds"))):
        (tmp_path / name).write_bytes(PNG)
    assert f"which has ulm/{pathlib.Path(raw).name} " in refusal(config)


@pytest.mark.parametrize(("dataset", "layout"), [
    ("ade20k", "images/{training,validation}/**/*.jpg, annotations/{training,validation}/**/*.png"),
    ("cityscapes", "gtFine/{train,val}/**/*_gtFine_labelTrainIds.png"),
    ("context59", "ImageSets/SegmentationContext/{train,val}.txt"),
])  # fmt: skip
def test_missing_data(tmp_path: pathlib.Path, dataset: str, layout: str) -> None:
    config = config_lib.load(LAYOUTS[dataset][0](), {"data.root": str(tmp_path / "nowhere")})
    line = refusal(config)
    assert f"no {dataset} in {tmp_path / 'nowhere'}: it does not exist; the layout must be " in line
    for part in (layout, "--config.data.root=DIR"):
        assert part in line
    assert "data.root is empty" in refusal(config_lib.load(config, {"data.root": ""}))


def test_files_that_are_missing(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "ade20k")
    source = sources.open_source(config, "train")
    (tmp_path / "images/training/a.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*/images/training/a\.jpg: No such file"):
        source[0]
    for number in range(7):
        (tmp_path / f"images/training/x{number}.jpg").write_bytes(JPEG)
    assert "7 images (x0.jpg, x1.jpg, x2.jpg, ...) in " in refusal(config)
    shutil.rmtree(tmp_path / "images/training")
    (tmp_path / "images/training").mkdir()
    assert " holds no *.jpg (" in refusal(config)


def test_custom_data(tmp_path: pathlib.Path) -> None:
    config = write(tmp_path, "custom")
    found = sources.find_data_set(config)
    assert found.classes == ("sky", "sea", "sand")
    assert found.palette == ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    unnamed = config_lib.load(config, {"data.class_names": ()})
    assert f"write them to {tmp_path / 'classes.txt'}" in refusal(unnamed)
    (tmp_path / "classes.txt").write_text("\n")
    assert "classes.txt holds none: write them there" in refusal(unnamed)
    for where, words in (
        (config, "it is a file; the layout must be images/"),
        (unnamed, "is a file: give --config."),
    ):
        file = config_lib.load(where, {"data.root": str(tmp_path / "classes.txt")})
        assert words in refusal(file)
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nrock\n")
    assert "custom has 4 classes, the config's model 3: --config.model.num_classes=4" in refusal(unnamed)
    assert len(sources.find_data_set(config_lib.load(unnamed, {"model.num_classes": 4})).classes) == 4
    (tmp_path / "images/train").rename(tmp_path / "images/training")
    (tmp_path / "annotations/train").rename(tmp_path / "annotations/training")
    assert len(sources.open_source(config, "train")) == 2
    (tmp_path / "images/train").mkdir()
    assert "images/train and images/training are both in " in refusal(config)


@pytest.mark.parametrize(("images", "labels", "pairing"), [
    (["a.jpg", "b.BMP", "c.webp", "s/d.Tiff"], ["a.PNG", "b.png", "c.Png", "s/d.png"], ""),
    (["a.jpg", "ab.png"], ["a_mask.png", "ab_mask.png"], "labels have their images' names and _mask.png"),
    (["Zoe\u0308.jpg"], ["Zo\u00eb.png"], ""),
    (["a.jpg", "b.png"], ["a.jpg.png", "b.png.png"], "labels have their images' whole names: a.jpg.png"),
])  # fmt: skip
def test_names_of_labels(tmp_path: pathlib.Path, images: list[str], labels: list[str], pairing: str) -> None:
    for folder, paths in (("images", images), ("annotations", labels)):
        for path in paths:
            (tmp_path / folder / "train" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "train" / path).write_bytes(PNG)
        (tmp_path / folder / "train/loop").symlink_to(tmp_path / folder / "train")
    source = sources.open_folder("custom", CATALOG["camvid"].layout, str(tmp_path), "train")
    assert source.images == tuple(f"images/train/{path}" for path in images)
    assert source.labels == tuple(f"annotations/train/{path}" for path in labels)
    assert source.pairing == pairing


@pytest.mark.parametrize(("images", "labels", "words"), [
    (["a.jpg", "a.webp"], ["a.png"], "a.jpg and a.webp in "),
    (["a.jpg"], ["a.PNG", "a.png"], "a.PNG and a.png in "),
    (["p1.jpg"], ["p10.png"], "annotations/train, which has p10.png ("),
    (["a.jpg", "b.jpg"], ["a_m.png", "b_n.png"], "2 images (a.jpg, b.jpg) in "),
    (["a.heic"], ["a.png"], "or *.tiff, but a.heic ("),
    (["a.jpg"], ["a_m.png", "a_n.png"], "two labels, of their images' names and _m.png, and of their images'"),
    (["a.jpg"], ["a.jpg.png", "a_n.png"], "two labels, of their images' whole names: a.jpg.png, and of"),
])  # fmt: skip
def test_names_that_do_not_fit(tmp_path: pathlib.Path, images: list[str], labels: list[str], words: str) -> None:
    config = write(tmp_path, "custom")
    for folder, paths in (("images", images), ("annotations", labels)):
        shutil.rmtree(tmp_path / folder / "train")
        (tmp_path / folder / "train").mkdir()
        for path in paths:
            (tmp_path / folder / "train" / path).write_bytes(PNG)
    line = refusal(config)
    assert words in line
    assert len(line.replace(str(tmp_path), "data/streets")) <= 300


@pytest.mark.parametrize(("text", "words"), [
    ("sky\nsea\nsky\n", ": line 3 repeats 'sky' of 1: give each class another name"),
    ("# streets\nsky\nsea\nsand\n", ": line 1 is a comment, '# streets': expected one class name per line"),
    ("classes:\nsky\nsea\n", ": line 1 is a heading, 'classes:': expected"),
    ("Name\nsky\nsea\n", ": line 1 is a heading, 'Name': expected"),
    ("sky\nsea, sand\nrock\n", ": line 2 is several values, 'sea, sand': expected"),
    ("1 sky\n2 sea\n3 sand\n", ": line 1 is a number and a name, '1 sky': expected"),
])  # fmt: skip
def test_lists_of_classes_that_are_refused(tmp_path: pathlib.Path, text: str, words: str) -> None:
    config = config_lib.load(write(tmp_path, "custom"), {"data.class_names": ()})
    (tmp_path / "classes.txt").write_text(text)
    assert refusal(config).startswith(f"{tmp_path / 'classes.txt'}{words}")
    (tmp_path / "classes.txt").write_text("3d model\n2 wheeler\nsky: blue\n")
    assert sources.find_data_set(config).classes == ("3d model", "2 wheeler", "sky: blue")


def test_wrong_settings() -> None:
    config = config_lib.shapes()
    assert "--config.model.num_classes=19" in refusal(config_lib.load(config, {"data.dataset": "cityscapes"}))
    assert "configs/topformer_t_shapes.py" in refusal(config_lib.load(config, {"data.source": "folder"}))
    with pytest.raises(ValueError, match="none of"):
        sources.open_source(config, "test")


def test_every_data_set_of_the_settings_can_be_prepared() -> None:
    assert {*RELEASES, "shapes", "custom"} == set(DATASETS)


@pytest.mark.parametrize("dataset", ["ade20k", "context59", "custom"])
def test_records_hold_the_files(tmp_path: pathlib.Path, dataset: str, capsys: pytest.CaptureFixture) -> None:
    config = write(tmp_path / "files", dataset)
    if dataset == "custom":
        config.data.class_names = ()
        (tmp_path / "files/classes.txt").write_text("sky\nsea\nsand\n")
    label = tmp_path / "files" / paths(dataset)[1]
    deep = cv2.imencode(".png", PIXELS.astype(np.uint16) * 1000)[1].tobytes()
    label.write_bytes(deep)  # 16 bits stay 16 bits
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
    with pytest.raises(UserError, match="is there already, from other files or an earlier version"):
        packing.build(dataset, config.data.root, str(output))


def test_records_that_are_not_there(tmp_path: pathlib.Path) -> None:
    overrides = {"data.source": "array_record", "data.root": str(tmp_path)}
    line = refusal(config_lib.load(config_lib.ade20k("tiny"), overrides))
    assert "python -m topformer_jax.prepare ade20k --source DIR --output DIR --format array_record" in line
    assert "bash scripts/quickstart.sh" in line
    (tmp_path / "dataset_info.json").write_text("{}")
    assert "features.json: No such file" in refusal(config_lib.load(config_lib.ade20k("tiny"), overrides))


def test_shapes_depend_only_on_split_and_index() -> None:
    drawn, again = (
        [shapes.draw(split, index, 64) for split in sources.SPLITS for index in range(4)] for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    assert all(image.shape[:2] == label.shape for image, label in drawn)
    assert len({image.tobytes() for image, _ in drawn}) == len(drawn)
    source = sources.open_source(config_lib.shapes(), "validation")
    assert len(source) == 64
    np.testing.assert_array_equal(source[5].image, shapes.draw("validation", 5, 160)[0])


def test_drawn_scenes_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = shapes.ShapesSource("train", 10, 48)
    assert source[3].image is source[3].image
    assert not np.asarray(source[3].image).flags.writeable
    assert len(pickle.dumps(source)) < 200
    assert pickle.loads(pickle.dumps(source)) == source
    monkeypatch.setattr(shapes, "MAX_CACHED_BYTES", 3 * 4 * 48**2)
    for index in range(10):
        np.testing.assert_array_equal(source[index].label, shapes.draw("train", index, 48)[1])
    assert len(source._scenes) == 3
