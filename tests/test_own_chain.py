"""A new user's own pictures, of each source format, from `prepare` to `export` by the documented commands."""

import pathlib
from typing import Any

import cv2
import numpy as np
import pytest

from tests.commands import TINY
from tests.miniatures import png
from tests.test_export import command
from tests.test_prepare_formats import palette_png
from tests.test_prepare_own import labelme, shape, write
from topformer_jax import check, cli, evaluate, export, predict, prepare, train

SIDE = 72
NAMES = {"train": "abcd", "val": "ef"}
BACK = ("--background", "street")


def square(number: int) -> tuple[int, int, int, int]:
    """Where the car of a picture is: left, top, right, bottom."""
    return 10 + 4 * number, 12, 46 + 4 * number, 60


def draw(number: int) -> tuple[bytes, np.ndarray]:
    """A picture of a car, and its label."""
    left, top, right, bottom = square(number)
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[top:bottom, left:right] = 1
    noise = np.random.default_rng(number).integers(0, 80, (SIDE, SIDE, 3), np.uint8)
    return cv2.imencode(".jpg", noise + 150 * values[..., None])[1].tobytes(), values


def corners(number: int) -> list[list[int]]:
    left, top, right, bottom = square(number)
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def coco(numbers: range, names: str, panoptic: bool) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for number in numbers:
        outline = {"category_id": 1, "segmentation": [np.ravel(corners(number)).tolist()]}
        segments = {
            "file_name": f"{names[number - numbers[0]]}.png",
            "segments_info": [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}],
        }
        rows.append({"id": number, "image_id": number, **(segments if panoptic else outline)})
    images = [
        {"id": n, "file_name": f"{names[n - numbers[0]]}.jpg", "width": SIDE, "height": SIDE} for n in numbers
    ]
    categories = [{"id": 1, "name": "car"}] + [{"id": 2, "name": "street"}] * panoptic
    return {"images": images, "annotations": rows, "categories": categories}


def make(kind: str) -> dict[str, Any]:
    """The files of six pictures, in the layout of a format."""
    files: dict[str, Any] = {}
    number = 0
    for split, names in NAMES.items():
        numbers = range(number, number + len(names))
        for number, name in zip(numbers, names, strict=True):
            image, values = draw(number)
            colours = png(np.where(values[..., None] > 0, np.uint8([128, 0, 0]), np.uint8(0)))
            outline = " ".join(str(v / SIDE) for v in np.ravel(corners(number)))
            files |= {
                "labelme": {
                    f"{split}/{name}.jpg": image,
                    f"{split}/{name}.json": labelme(
                        f"{name}.jpg", shape("car", corners(number)), size=(SIDE, SIDE)
                    ),
                },
                "coco": {f"images/{name}.jpg": image},
                "panoptic": {
                    f"images/{name}.jpg": image,
                    f"panoptic_{split}/{name}.png": png(np.stack([2 - values, 0 * values, 0 * values], -1)),
                },
                "cvat": {f"JPEGImages/{name}.jpg": image, f"SegmentationClass/{name}.png": colours},
                "yolo": {f"images/{split}/{name}.jpg": image, f"labels/{split}/{name}.txt": f"0 {outline}\n"},
                "roboflow-masks": {f"{split}/{name}.jpg": image, f"{split}/{name}_mask.png": png(values)},
                "voc": {
                    f"JPEGImages/{name}.jpg": image,
                    f"SegmentationClass/{name}.png": palette_png(values, (0, 0, 0), (128, 0, 0)),
                },
                "grey": {f"images/{split}/{name}.jpg": image, f"annotations/{split}/{name}.png": png(values)},
            }[kind]
        files |= {
            "coco": {f"instances_{split}.json": coco(numbers, names, False)},
            "panoptic": {f"panoptic_{split}.json": coco(numbers, names, True)},
            "roboflow-masks": {f"{split}/_classes.csv": "Pixel Value, Class\n0, street\n1, car\n"},
            "cvat": {f"ImageSets/Segmentation/{split}.txt": "\n".join(names)},
            "voc": {f"ImageSets/Segmentation/{split}.txt": "\n".join(names)},
        }.get(kind, {})
        number += 1
    return files | {
        "cvat": {"labelmap.txt": "# label:color_rgb:parts:actions\nstreet:0,0,0::\ncar:128,0,0::\n"},
        "yolo": {"data.yaml": "train: images/train\nval: images/val\nnames: [car]\n"},
        "voc": {"class_names.txt": "street\ncar\n"},
        "grey": {"classes.txt": "street\ncar\n"},
    }.get(kind, {})


FORMATS = {
    "labelme": ("labelme", BACK),
    "coco": ("coco", BACK),
    "panoptic": ("coco", ()),
    "cvat": ("cvat", ()),
    "yolo": ("yolo", BACK),
    "roboflow-masks": ("roboflow-masks", ()),
    "voc": ("voc", ()),
    "grey": ("", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_from_annotations_to_an_exported_model(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checks of shapes refuse what JAX puts into the types' places to describe programs that are kept.
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    data, (source, flags) = write(tmp_path / "drawn", make(kind)), FORMATS[kind]
    if source:
        words = [
            "custom",
            "--from",
            source,
            "--source",
            data,
            "--output",
            tmp_path / "set",
            "--workers",
            "0",
            *flags,
        ]
        said = command(prepare.main, *words)
        assert "train (by" in said
        data = tmp_path / "set"
    order = (data / "classes.txt").read_text().split()
    for number, name in enumerate("abcdef"):
        (path,) = data.glob(f"annotations/*/{name}.png")
        found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED if kind == "grey" else cv2.IMREAD_GRAYSCALE)
        wrong = (found == order.index("car")) != (draw(number)[1] > 0)
        assert not wrong[:, : 46 + 4 * number].any() or kind == "labelme"
        assert wrong.mean() < 0.03  # labelme's outline belongs to the shape
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
