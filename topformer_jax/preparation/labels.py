"""What annotations become: PNG files of one channel that holds class indices, 255 for void.

Each function takes a file's bytes and its name; a plan gives the settings before them by functools.partial.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.codecs import decode_image, read_label_values
from topformer_jax.errors import UserError

Labels = UInt8[np.ndarray, "h w"]
Colour = tuple[int, int, int]  # red, green, blue


def encode(labels: Labels) -> bytes:
    """The PNG file of class indices."""
    return cv2.imencode(".png", labels)[1].tobytes()


def map_values(table: Mapping[int, int], data: bytes, name: str) -> bytes:
    """Replaces the values of a label file.

    Args:
        table: class index of each value that may occur.
        data: a PNG of one channel.
        name: of the file.

    Raises:
        UserError: another value occurs, or the file is damaged.
    """
    return encode(_look_up(table, read_label_values(data, name), name))


def map_matrix(key: str, table: Mapping[int, int], data: bytes, name: str) -> bytes:
    """As `map_values`, of the matrix `key` in a MATLAB file (version 5)."""
    with expect_fields(name):
        values = np.asarray(read_mat(data, name)[key])
    return encode(_look_up(table, values, name))


def read_boundaries_benchmark(data: bytes, name: str) -> bytes:
    """The classes of a file of the Semantic Boundaries Dataset: GTcls.Segmentation, VOC's 0 to 20."""
    with expect_fields(name):
        values = read_mat(data, name)["GTcls"][0, 0]["Segmentation"].astype(np.uint8)
    return encode(values)


def read_mat(data: bytes, name: str) -> dict[str, Any]:
    """The variables of a MATLAB file.

    Raises:
        UserError: it is damaged.
    """
    from scipy.io import loadmat

    try:
        return dict(loadmat(io.BytesIO(data)))
    except Exception as error:  # of many types
        raise UserError(
            f"{name} cannot be read as a MATLAB file ({error}): download its archive again"
        ) from None


def map_colours(colours: Mapping[Colour, int], others: int | None, data: bytes, name: str) -> bytes:
    """The class indices of a mask that shows each class in its colour.

    Args:
        colours: class index of each colour.
        others: class index of pixels of other colours, if they are few (1 %); None: there may be none.
        data: an image file.
        name: of the file.

    Raises:
        UserError: pixels have other colours.
    """
    pixels = decode_image(data, name).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    known = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in colours.items())
    keys, values = (np.array(column) for column in zip(*known, strict=True))
    places = np.minimum(np.searchsorted(keys, pixels), len(keys) - 1)
    strange = keys[places] != pixels
    if strange.mean() > (0 if others is None else 0.01):
        found, counts = np.unique(pixels[strange], return_counts=True)
        shown = ", ".join(
            f"({key >> 16}, {key >> 8 & 255}, {key & 255})" for key in found[np.argsort(-counts)][:3]
        )
        raise UserError(
            f"{name}: {strange.mean():.2%} of the pixels have colours that no class has, such as {shown}: masks are "
            "lossless images in the colours of the classes"
        )
    return encode(np.where(strange, others or 0, values[places]).astype(np.uint8))


def draw_cityscapes(classes: Mapping[str, int], data: bytes, name: str) -> bytes:
    """Draws the polygons of a Cityscapes file, later ones over earlier ones, as json2labelImg of cityscapesScripts.

    Args:
        classes: label of each name, negative where it is not drawn; "cargroup" is "car".
        data: a *_polygons.json.
        name: of the file.

    Raises:
        UserError: a name is unknown, or the file is damaged.
    """
    content = read_json(data, name)
    with expect_fields(name):
        canvas = Image.new("L", (content["imgWidth"], content["imgHeight"]), IGNORE_LABEL)
        for shape in content["objects"]:
            if shape.get("deleted"):
                continue
            label = classes.get(shape["label"], classes.get(shape["label"].removesuffix("group")))
            if label is None:
                raise UserError(
                    f"{name}: {shape['label']} is no class of Cityscapes: download its archive again"
                )
            if label >= 0:
                ImageDraw.Draw(canvas).polygon([tuple(point) for point in shape["polygon"]], fill=label)
    return encode(np.asarray(canvas))


def draw_labelme(
    classes: Mapping[str, int], background: int, size: tuple[int, int], data: bytes, name: str
) -> bytes:
    """Draws the shapes of a labelme file in their order, as labelme does (its outline belongs to a shape).

    Args:
        classes: label of each name.
        background: label of the pixels that no shape covers.
        size: (height, width) of the image.
        data: a labelme .json.
        name: of the file.

    Raises:
        UserError: a shape is neither polygon, rectangle nor circle, or has no class.
    """
    canvas = Image.new("L", (size[1], size[0]), background)
    with expect_fields(name):
        for shape in read_json(data, name)["shapes"]:
            label = classes.get(shape["label"])
            if label is None:
                raise UserError(
                    f"{name}: {shape['label']} is not in classes.txt: add it there, or rename it here"
                )
            points = [(float(x), float(y)) for x, y in shape["points"]]
            if not _draw_shape(ImageDraw.Draw(canvas), shape.get("shape_type") or "polygon", points, label):
                raise UserError(
                    f"{name}: a {shape['shape_type']} of {len(points)} points covers no area: draw {shape['label']} "
                    "as a polygon of 3 or more points, a rectangle or a circle"
                )
    return encode(np.asarray(canvas))


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, points: list[tuple[float, float]], label: int) -> bool:
    """Draws a shape of labelme; False if it covers no area."""
    if kind == "polygon" and len(points) > 2:
        draw.polygon(points, fill=label, outline=label)
    elif kind == "rectangle" and len(points) == 2:
        (x, y), (other_x, other_y) = points
        corners = (min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y))
        draw.rectangle(corners, fill=label, outline=label)
    elif kind == "circle" and len(points) == 2:
        (x, y), (edge_x, edge_y) = points
        radius = ((x - edge_x) ** 2 + (y - edge_y) ** 2) ** 0.5
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=label, outline=label)
    else:
        return False
    return True


def map_segments(segments: Mapping[int, int], background: int, data: bytes, name: str) -> bytes:
    """The class indices of a COCO panoptic mask, whose colours are ids: red + 256 green + 65536 blue.

    Args:
        segments: label of each id.
        background: label of the pixels without a segment (id 0).
        data: a PNG.
        name: of the file.

    Raises:
        UserError: an id is of no segment.
    """
    ids = decode_image(data, name).astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    return encode(_look_up({0: background, **segments}, ids, name))


def draw_runs(
    size: tuple[int, int], annotations: Sequence[tuple[int, str | list[int]]], data: bytes, name: str
) -> bytes:
    """Draws masks that are stored as run lengths, later ones over earlier ones; 0 where there is none.

    Args:
        size: (height, width).
        annotations: label and COCO's "counts" of each.
        data: unused: the annotations are of one file for all images.
        name: of the image.

    Raises:
        UserError: the runs are not of this size.
    """
    labels = np.zeros(size[0] * size[1], np.uint8)
    for label, counts in annotations:
        runs = decode_runs(counts) if isinstance(counts, str) else counts
        if sum(runs) != labels.size:
            raise UserError(
                f"{name}: a mask has {sum(runs)} pixels, its image {labels.size}: download it again"
            )
        labels[np.repeat(np.arange(len(runs)) % 2 == 1, runs)] = label
    return encode(np.ascontiguousarray(labels.reshape(size[1], size[0]).T))


def decode_runs(text: str) -> list[int]:
    """Run lengths of a mask, column after column: pixels outside, inside, outside, ...

    COCO's compressed form: 5 bits a character (from "0" on), low ones first, bit 5 says that more follow; from the
    fourth run on the difference to the run before the last (cocoapi, maskApi.c).

    >>> decode_runs("01l00")
    [0, 1, 28, 1]
    """
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def read_json(data: bytes, name: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        UserError: it is damaged, or no object.
    """
    try:
        content = json.loads(data)
        if isinstance(content, dict):
            return content
        why = "it holds no object"
    except ValueError as error:
        why = str(error)
    raise UserError(f"{name} is not the JSON file that was expected ({why})")


@contextlib.contextmanager
def expect_fields(name: str) -> Iterator[None]:
    """Turns what a missing or strange field of a file raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(
            f"{name} has not the fields that were expected ({type(error).__name__}: {error}): is it of another tool?"
        ) from None


def _look_up(table: Mapping[int, int], values: np.ndarray, name: str) -> Labels:
    if values.size and values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        found = np.flatnonzero(np.bincount(values.ravel()))
    else:
        found = np.unique(values)
    strange = [int(value) for value in found if int(value) not in table]
    if strange:
        shown = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
        raise UserError(
            f"{name} holds {shown}, which stands for no class: is it of another data set or version?"
        )
    labels = np.array([table[int(value)] for value in found], np.uint8)
    return labels[np.searchsorted(found, values)]
