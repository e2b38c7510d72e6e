"""A new user's own pictures, of each source format, from `prepare` to `export` by the documented commands."""

import pathlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.commands import TINY
from tests.miniatures import png
from tests.test_export import command
from tests.test_prepare_formats import palette_png
from tests.test_prepare_own import labelme, shape, write
from topformer_jax import check, evaluate, export, predict, prepare, train
from topformer_jax.runtime import cli

SIDE = 72
SPLITS = {"train": "abcd", "val": "ef"}
# Of each format: --from, where a picture is and where its label is.
FORMATS = {
    "labelme": ("labelme", "{split}/{name}.jpg", "{split}/{name}.json"),
    "coco": ("coco", "images/{name}.jpg", ""),
    "panoptic": ("coco", "images/{name}.jpg", "panoptic_{split}/{name}.png"),
    "cvat": ("cvat", "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
    "yolo": ("yolo", "images/{split}/{name}.jpg", "labels/{split}/{name}.txt"),
    "roboflow": ("roboflow-masks", "{split}/{name}.jpg", "{split}/{name}_mask.png"),
    "voc": ("voc", "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
    "grey": ("", "images/{split}/{name}.jpg", "annotations/{split}/{name}.png"),
}


def corners(name: str) -> list[list[int]]:
    """Where the car of a picture is."""
    left = 10 + 4 * ord(name) % 6
    return [[left, 12], [left + 36, 12], [left + 36, 60], [left, 60]]


def draw(name: str) -> tuple[bytes, np.ndarray]:
    """A picture of a car, and its label."""
    (left, top), _, (right, bottom), _ = corners(name)
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[top:bottom, left:right] = 1
    noise = np.random.default_rng(ord(name)).integers(0, 80, (SIDE, SIDE, 3), np.uint8)
    return cv2.imencode(".jpg", noise + 150 * values[..., None])[1].tobytes(), values


def annotate(kind: str, name: str) -> Any:
    """The label of a picture, as a format has it."""
    values, outline = draw(name)[1], corners(name)
    match kind:
        case "labelme":
            return labelme(f"{name}.jpg", shape("car", outline), size=(SIDE, SIDE))
        case "panoptic":
            return png(np.stack([2 - values, 0 * values, 0 * values], -1))
        case "cvat":
            return png(np.where(values[..., None] > 0, [128, 0, 0], 0))
        case "yolo":
            return "0 " + " ".join(str(value / SIDE) for value in np.ravel(outline))
        case "voc":
            return palette_png(values, (0, 0, 0), (128, 0, 0))
    return png(values)


def coco(names: str, *segments: int) -> dict[str, Any]:
    """A file of instances, or of panoptic segments."""
    images = [{"id": name, "file_name": f"{name}.jpg", "width": SIDE, "height": SIDE} for name in names]
    rows: list[dict[str, Any]] = [{"image_id": name, "category_id": 1} for name in names]
    for row, name in zip(rows, names, strict=True):
        parts = [{"id": number, "category_id": number} for number in segments]
        masks = {"file_name": f"{name}.png", "segments_info": parts}
        row |= masks if segments else {"segmentation": [np.ravel(corners(name)).tolist()]}
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "street"}]
    return {"images": images, "annotations": rows, "categories": categories[: len(segments) or 1]}


def make(kind: str) -> dict[str, Any]:
    """The files of six pictures, in the layout of a format."""
    files: dict[str, Any] = {
        "cvat": {"labelmap.txt": "# label:color_rgb:parts:actions\nstreet:0,0,0::\ncar:128,0,0::\n"},
        "yolo": {"data.yaml": "train: images/train\nval: images/val\nnames: [car]\n"},
        "voc": {"class_names.txt": "street\ncar\n"},
        "grey": {"classes.txt": "street\ncar\n"},
    }.get(kind, {})
    for split, names in SPLITS.items():
        for name in names:
            image, label = (text.format(split=split, name=name) for text in FORMATS[kind][1:])
            files |= {image: draw(name)[0]} | ({label: annotate(kind, name)} if label else {})
        listing = {f"ImageSets/Segmentation/{split}.txt": "\n".join(names)}
        others: dict[str, dict[str, Any]] = {
            "coco": {f"instances_{split}.json": coco(names)},
            "panoptic": {f"panoptic_{split}.json": coco(names, 1, 2)},
            "roboflow": {f"{split}/_classes.csv": "Pixel Value, Class\n0, street\n1, car\n"},
            "cvat": listing,
            "voc": listing,
        }
        files |= others.get(kind, {})
    return files


def words_of(kind: str, source: pathlib.Path, output: pathlib.Path) -> list[object]:
    """What follows `prepare`."""
    words = ["custom", "--source", source, "--output", output, "--from", FORMATS[kind][0], "--workers", "0"]
    return [*words, *(("--background", "street") if kind in ("labelme", "coco", "yolo") else ())]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_from_annotations_to_an_exported_model(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checks of shapes refuse what JAX puts into the types' places to describe programs that are kept.
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None, raising=False)
    data = write(tmp_path / "drawn", make(kind))
    if FORMATS[kind][0]:
        assert "train (by" in command(prepare.main, *words_of(kind, data, tmp_path / "set"))
        data = tmp_path / "set"
    order = (data / "classes.txt").read_text().split()
    for name in "abcdef":
        (path,) = data.glob(f"annotations/*/{name}.png")
        found = np.array(Image.open(path)) == order.index("car")
        outline = cv2.dilate(draw(name)[1], np.ones((3, 3), np.uint8)) if kind == "labelme" else draw(name)[1]
        wrong = found != (draw(name)[1] > 0)
        assert not wrong[outline == draw(name)[1]].any()  # labelme's outline belongs to the shape
    changes = TINY | {
        "batch_size": 8,
        "schedule.steps": 20,
        "data.source": "folder",
        "data.dataset": "custom",
        "data.root": data,
    }
    changes |= {"model.num_classes": 2, "checkpoint_every": 20, "evaluate_every": 20, "log_every": 10}
    config = [
        "--config",
        "topformer_t_shapes",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    assert command(check.main, *config, "--output", tmp_path / "check").endswith("training would start\n")
    command(train.main, *config, "--workdir", tmp_path / "run")
    weights = [*config, "--checkpoint", tmp_path / "run"]
    assert "mIoU" in command(evaluate.main, *weights)
    said = command(predict.main, *weights, "--output", tmp_path / "out", data / "images/val")
    assert "wrote 2 overlays and masks into" in said
    assert "wrote" in command(
        export.main, *weights, "--output", tmp_path / "m.stablehlo", "--size", "64x64", "--logits"
    )
