"""Annotations of each format that `prepare custom --from` reads: single files, and whole data sets of one scene."""

import base64
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from tests.miniatures import HEIGHT, WIDTH, png

SQUARE = [[2, 1], [5, 1], [5, 4], [2, 4]]
BACK = ("--background", "nothing")
SIDE = 72
SPLITS = {"train": "abcd", "val": "ef"}
# Of each format: flags, the path of a picture, the path of its label.
FORMATS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "labelme": (("labelme", "--background", "street"), "{split}/{name}.jpg", "{split}/{name}.json"),
    "coco": (("coco", "--background", "street"), "images/{name}.jpg", ""),
    "coco of Roboflow": (("coco", "--background", "street"), "{split}/{name}.jpg", ""),
    "panoptic": (("coco",), "images/{name}.jpg", "panoptic_{split}/{name}.png"),
    "Mapillary": (("coco",), "{split}/images/{name}.jpg", "{split}/v2.0/panoptic/{name}.png"),
    "yolo": (("yolo", "--background", "street"), "images/{split}/{name}.jpg", "labels/{split}/{name}.txt"),
    "colours": (("colours",), "images/{split}/{name}.jpg", "masks/{split}/{name}.png"),
    "cvat": (("cvat",), "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
    "roboflow-masks": (("roboflow-masks",), "{split}/{name}.jpg", "{split}/{name}_mask.png"),
    "voc": (("voc",), "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
}


def write(root: pathlib.Path, files: dict[str, Any]) -> pathlib.Path:
    """Writes files: bytes as they are, text, or anything else as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def shape(label: Any, points: Sequence[Sequence[Any]], kind: str = "polygon", **fields: Any) -> dict[str, Any]:
    """A shape of labelme."""
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | fields


def labelme(
    image: str | None,
    *shapes: dict[str, Any],
    data: bytes | None = None,
    size: tuple[int | None, int | None] = (HEIGHT, WIDTH),
) -> dict[str, Any]:
    """A file of labelme; `data` is the picture inside of it."""
    inside = base64.b64encode(data).decode() if data else None
    described = {"imagePath": image, "imageData": inside, "imageHeight": size[0], "imageWidth": size[1]}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes} | described


def palette_png(values: np.ndarray, *colours: tuple[int, int, int]) -> bytes:
    """A PNG with a palette."""
    image, file = Image.fromarray(values.astype(np.uint8), "P"), io.BytesIO()
    image.putpalette([value for colour in colours for value in colour])
    image.save(file, "PNG")
    return file.getvalue()


def corners(name: str) -> list[list[int]]:
    """The corners of the car in a picture."""
    left = 10 + 4 * ord(name) % 6
    return [[left, 12], [left + 36, 12], [left + 36, 60], [left, 60]]


def draw(name: str) -> tuple[bytes, np.ndarray]:
    """A picture of a car in a street, and its label: 0 is street, 1 is car."""
    (left, top), _, (right, bottom), _ = corners(name)
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[top:bottom, left:right] = 1
    noise = np.random.default_rng(ord(name)).integers(0, 80, (SIDE, SIDE, 3), np.uint8)
    return cv2.imencode(".jpg", noise + 150 * values[..., None])[1].tobytes(), values


def annotate(kind: str, name: str) -> Any:
    """The label of a picture in a format."""
    values, outline = draw(name)[1], corners(name)
    match kind:
        case "labelme":  # the outline belongs to its shapes
            inner = np.subtract(outline, [[0, 0], [1, 0], [1, 1], [0, 1]]).tolist()
            return labelme(f"{name}.jpg", shape("car", inner), size=(SIDE, SIDE))
        case "panoptic" | "Mapillary":
            return png(np.stack([2 - values, 0 * values, 0 * values], -1))
        case "cvat" | "colours":
            return png(np.where(values[..., None] > 0, [128, 0, 0], 0))
        case "roboflow-masks":
            return png(2 * values)  # values may have gaps
        case "yolo":
            return "0 " + " ".join(str(value / SIDE) for value in np.ravel(outline))
        case "voc":
            return palette_png(values, (0, 0, 0), (128, 0, 0))
    return png(values)


def coco(names: str, *segments: int, group: str = "") -> dict[str, Any]:
    """A file of instances, or of panoptic segments; `group` names the others as Roboflow does."""
    images = [{"id": name, "file_name": f"{name}.jpg", "width": SIDE, "height": SIDE} for name in names]
    rows: list[dict[str, Any]] = [{"image_id": name, "category_id": 1} for name in names]
    for row, name in zip(rows, names, strict=True):
        parts = [{"id": number, "category_id": number} for number in segments]
        masks = {"file_name": f"{name}.png", "segments_info": parts}
        row |= masks if segments else {"segmentation": [np.ravel(corners(name)).tolist()]}
    categories: list[dict[str, Any]] = [{"id": 1, "name": "car"}]
    if segments:
        categories.append({"id": 2, "name": "street"})
    if group:
        categories[0]["supercategory"] = group
        categories.append({"id": 0, "name": group, "supercategory": "none"})
    return {"images": images, "annotations": rows, "categories": categories}


def make(kind: str) -> dict[str, Any]:
    """The files of a data set of six pictures in a format."""
    files: dict[str, Any] = {
        "cvat": {"labelmap.txt": "# label:color_rgb:parts:actions\nstreet:0,0,0::\ncar:128,0,0::\n"},
        "colours": {"classes.txt": "street 0 0 0\ncar 128 0 0\n"},
        "yolo": {"data.yaml": "path: ../sets/x\ntrain: images/train\nval: images/val\ntest:\nnames: [car]\n"},
        "voc": {"class_names.txt": "street\ncar\n"},
    }.get(kind, {})
    for split, names in SPLITS.items():
        for name in names:
            image, label = (text.format(split=split, name=name) for text in FORMATS[kind][1:])
            files |= {image: draw(name)[0]} | ({label: annotate(kind, name)} if label else {})
        listing = {f"ImageSets/Segmentation/{split}.txt": "\n".join(names)}
        others: dict[str, dict[str, Any]] = {
            "coco": {f"instances_{split}.json": coco(names)},
            "coco of Roboflow": {f"{split}/_annotations.coco.json": coco(names, group="car")},
            "panoptic": {f"panoptic_{split}.json": coco(names, 1, 2)},
            "Mapillary": {f"{split}/v2.0/panoptic/panoptic_2020.json": coco(names, 1, 2)},
            "roboflow-masks": {f"{split}/_classes.csv": "Pixel Value, Class\n0, street\n2, car\n"},
            "cvat": listing,
            "voc": listing,
        }
        files |= others.get(kind, {})
    return files
