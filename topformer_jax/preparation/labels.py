"""What annotations become: PNG files of one channel that holds class indices, 255 for void.

Each function takes a file's bytes and its name; a plan gives the settings before them by functools.partial.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import cv2
import msgspec
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.codecs import PNG, decode_image, read_image_size, read_label_size, read_label_values
from topformer_jax.preparation.archives import IN_FOLDER, Member
from topformer_jax.preparation.writer import Convert
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

Labels = UInt8[np.ndarray, "h w"]
Size = tuple[int, int]  # height, width
Colour = tuple[int, int, int]  # red, green, blue


class _Outline(msgspec.Struct):
    """A polygon of Cityscapes."""

    label: str
    polygon: Annotated[list[tuple[float, float]], msgspec.Meta(min_length=2)]
    deleted: int | bool = 0


class _Scene(msgspec.Struct):
    """A *_polygons.json of Cityscapes."""

    imgWidth: Annotated[int, msgspec.Meta(ge=1, le=1 << 15)]
    imgHeight: Annotated[int, msgspec.Meta(ge=1, le=1 << 15)]
    objects: list[_Outline]


def encode(labels: Labels) -> bytes:
    """The PNG file of class indices."""
    return cv2.imencode(".png", labels)[1].tobytes()


def map_values(table: Mapping[int, int], data: bytes, name: str) -> bytes:
    """Replaces the values of a PNG of one channel by a table of all that may occur; a UserError for another one."""
    return encode(_look_up(table, read_label_values(data, name), name))


def map_matrix(key: str, table: Mapping[int, int], data: bytes, name: str) -> bytes:
    """As `map_values`, of the matrix `key` in a MATLAB file (version 5)."""
    with expect_fields(name):
        values = read_mat(data, name)[key]
    return encode(_look_up(table, _take_matrix(values, name), name))


def read_boundaries_benchmark(data: bytes, name: str) -> bytes:
    """The classes of a file of the Semantic Boundaries Dataset: GTcls.Segmentation, VOC's 0 to 20."""
    with expect_fields(name):
        values = read_mat(data, name)["GTcls"][0, 0]["Segmentation"]
    return encode(_look_up({label: label for label in range(21)}, _take_matrix(values, name), name))


def _take_matrix(values: Any, name: str) -> np.ndarray:
    """A variable of a MATLAB file as a matrix of class numbers; a UserError if it is none of whole numbers."""
    found = np.asarray(values)
    is_whole = found.dtype.kind in "ui" or (found.dtype.kind == "f" and (np.rint(found) == found).all())
    if found.ndim != 2 or found.size < 2 or not is_whole or np.abs(found).max() > 1 << 16:
        shape = " x ".join(map(str, found.shape))
        raise UserError(
            f"{name} holds {found.dtype} of {shape}: expected a matrix of class numbers, one a pixel"
        )
    return found


def read_mat(data: bytes, name: str) -> dict[str, Any]:
    """The variables of a MATLAB file; a UserError if it is damaged."""
    from scipy.io import loadmat

    try:
        return dict(loadmat(io.BytesIO(data)))
    except Exception as error:  # of many types
        raise UserError(
            f"{name} cannot be read as a MATLAB file ({files.shorten(error, 120)}): fetch its archive again"
        ) from None


def map_colours(colours: Mapping[Colour, int], others: int | None, data: bytes, name: str) -> bytes:
    """The class indices of a mask that shows each class in its colour.

    Raises:
        UserError: pixels have other colours; up to 1 % of them may, where `others` gives these a class.
    """
    pixels = decode_image(data, name).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    _require_opaque(data, name)
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


def _require_opaque(data: bytes, name: str) -> None:
    """Raises a UserError for a mask with transparent pixels, whose colours are not seen."""
    # A PNG without an alpha channel (a bit of its colour type) or a tRNS chunk is not decoded once more.
    if data.startswith(PNG) and not data[25] & 4 and b"tRNS" not in data:
        return
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim < 3 or pixels.shape[2] < 4:
        return
    if clear := float((pixels[..., 3] < (255 if pixels.dtype == np.uint8 else 65535)).mean()):
        raise UserError(
            f"{name}: {clear:.2%} of the pixels are transparent: save the mask without transparency"
        )


def draw_cityscapes(classes: Mapping[str, int], data: bytes, name: str) -> bytes:
    """Draws the polygons of a Cityscapes file, later ones over earlier ones, as json2labelImg of cityscapesScripts.

    `classes` has a negative label for what is not drawn; "cargroup" is "car".
    """
    content = files.read_json(data, _Scene, name)
    canvas = Image.new("L", (content.imgWidth, content.imgHeight), IGNORE_LABEL)
    for shape in content.objects:
        if shape.deleted:
            continue
        label = classes.get(shape.label, classes.get(shape.label.removesuffix("group")))
        if label is None:
            raise UserError(
                f"{name}: {files.shorten(shape.label, 80)} is no class of Cityscapes: fetch its archive again"
            )
        check_points(shape.polygon, (content.imgHeight, content.imgWidth), name)
        if label >= 0:
            ImageDraw.Draw(canvas).polygon(shape.polygon, fill=label)
    return encode(np.asarray(canvas))


def map_segments(segments: Mapping[int, int], background: int, data: bytes, name: str) -> bytes:
    """The class indices of a COCO panoptic mask, whose colours are ids: red + 256 green + 65536 blue.

    Pixels without a segment have id 0.

    Raises:
        UserError: an id is of no segment, or the mask has none of them.
    """
    ids = decode_image(data, name).astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    if segments and not np.isin(ids, [*segments]).any():
        raise UserError(
            f"{name} holds none of its {len(segments)} segments: is it the mask of another picture?"
        )
    return encode(_look_up({0: background, **segments}, ids, name))


def draw_runs(
    size: tuple[int, int], annotations: Sequence[tuple[int, str | list[int]]], data: bytes, name: str
) -> bytes:
    """Draws masks that are stored as run lengths, later ones over earlier ones; 0 where there is none.

    `annotations` are pairs of a label and COCO's "counts"; `data` is unused: they are of one file for all images.
    """
    labels = np.zeros(size, np.uint8)
    for label, counts in annotations:
        labels[_fill_runs(_read_runs(counts, size, name), size)] = label
    return encode(labels)


@dataclasses.dataclass(frozen=True)
class Region:
    """An annotated part of a picture: polygons (x, y, x, y, ...), or COCO's "counts" of its runs."""

    label: int
    polygons: tuple[tuple[float, ...], ...] = ()
    runs: str | Sequence[int] = ()
    size: Size | None = None  # of the runs


def take_polygons(polygons: Iterable[Sequence[float]], name: str) -> tuple[tuple[float, ...], ...]:
    """The polygons of 3 or more points; a UserError for an odd number of coordinates."""
    found = []
    for polygon in polygons:
        if len(polygon) % 2:
            raise UserError(f"{name} has a polygon of {len(polygon)} numbers: expected x, y, x, y, ...")
        if len(polygon) > 4:
            found.append(tuple(polygon))
    return tuple(found)


def box_region(label: int, x: float, y: float, width: float, height: float) -> Region:
    """A box as a region."""
    return Region(label, ((x, y, x + width, y, x + width, y + height, x, y + height),))


def draw_regions(
    background: int, stated: Size | None, image: Member, regions: Sequence[Region], name: str
) -> bytes:
    """Draws the regions of a picture in the order of their areas, largest first, as pycocotools fills polygons.

    Of equal areas the later one is on top.

    Raises:
        UserError: the picture has another size than the annotation states, or a region lies outside of it.
    """
    from pycocotools import mask as masks

    height, width = size = read_size(image)
    check_stated_size(stated, size, image.where, name)
    drawn = []
    for region in regions:
        runs = region.runs
        check_stated_size(region.size, size, image.where, f"a mask in {name}")
        for polygon in region.polygons:
            check_points(list(zip(polygon[::2], polygon[1::2], strict=True)), size, name)
        if region.polygons:
            # Four numbers would be a box for pycocotools: readers leave such out.
            parts = masks.frPyObjects([list(polygon) for polygon in region.polygons], height, width)
            runs = masks.merge(parts)["counts"].decode()
        drawn.append((region.label, _read_runs(runs, size, name)))
    labels = np.full(size, background, np.uint8)
    for label, lengths in sorted(drawn, key=lambda row: -sum(row[1][1::2])):
        labels[_fill_runs(lengths, size)] = label
    return encode(labels)


def require_pycocotools() -> None:
    """Raises a UserError where what fills polygons is not installed."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise UserError(
            "what fills polygons is not installed: pip install 'topformer_jax[annotations]' "
            "(from a clone: pip install -e '.[annotations]')"
        ) from None


def _read_runs(counts: str | Sequence[int], size: Size, name: str) -> Sequence[int]:
    """COCO's run lengths of a mask of this size alone: pycocotools 2.0.11 gives unset memory for too short ones."""
    runs = decode_runs(counts) if isinstance(counts, str) else counts
    if sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
        raise UserError(
            f"{name}: the runs of a mask are of {sum(runs)} pixels, and its picture has {size[0] * size[1]}"
        )
    return runs


def _fill_runs(runs: Sequence[int], size: Size) -> Bool[np.ndarray, "h w"]:
    """The pixels inside of runs."""
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(inside.reshape(size[1], size[0]).T)


def read_size(image: Member) -> Size:
    """(height, width) of a picture as it is decoded."""
    is_plain = image.offset == IN_FOLDER and image.name.lower().endswith((".jpg", ".jpeg", ".png"))
    size = read_image_size(image.path) if is_plain else None
    if size is None:
        height, width, _ = decode_image(image.read(), image.where).shape
        return height, width
    return size


def convert_mask(convert: Convert, image: Member, data: bytes, name: str) -> bytes:
    """Converts a mask; a UserError if it has another size than its picture."""
    label = convert(data, name)
    check_stated_size(read_label_size(label, name), read_size(image), image.where, name)
    return label


def check_stated_size(stated: Size | None, size: Size, picture: str, name: str) -> None:
    """Raises a UserError where a picture has another (height, width) than its annotation states, if it states one."""
    if stated and stated != size:
        turned = " (the sides the other way round, as by an EXIF orientation)" if stated == size[::-1] else ""
        raise UserError(
            f"{name} is of {stated[1]} x {stated[0]} pixels, but {picture} has {size[1]} x {size[0]}{turned}: give "
            "both one size"
        )


def check_points(points: Sequence[tuple[float, float]], size: Size, name: str) -> None:
    """Raises a UserError for a shape that lies outside of its picture, or reaches far out of it."""
    columns, rows = zip(*points, strict=True)
    for values, length in ((columns, size[1]), (rows, size[0])):
        is_outside = max(values) < 0 or min(values) > length
        if is_outside or min(values) < -length or max(values) > 2 * length:
            raise UserError(
                f"{name}: a shape from ({min(columns):g}, {min(rows):g}) to ({max(columns):g}, {max(rows):g}) lies "
                f"outside of its picture of {size[1]} x {size[0]} pixels"
            )


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
