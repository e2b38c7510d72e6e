"""Converts annotations to labels: PNG files of one channel that holds class indices, 255 for void.

A plan sets a converter's first arguments by functools.partial. The last two are a file's bytes and its name in
errors.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from topformer_jax.data.batch import IGNORE_LABEL, Labels
from topformer_jax.data.catalog import Colour
from topformer_jax.data.codecs import PNG, decode_image, read_image_size, read_label_size, read_label_values
from topformer_jax.data.transforms import Size
from topformer_jax.preparation.archives import Member
from topformer_jax.preparation.writer import Convert
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError


def encode(labels: Labels) -> bytes:
    """Encodes class indices as a PNG file."""
    return cv2.imencode(".png", labels)[1].tobytes()


# Masks


def map_values(table: Mapping[int, int], data: bytes, name: str) -> bytes:
    """Replaces the values of a PNG of one channel by a table; raises UserError for a value that it lacks."""
    return encode(_look_up(table, read_label_values(data, name), name))


def map_matrix(keys: Sequence[str], table: Mapping[int, int], data: bytes, name: str) -> bytes:
    """Does as `map_values` with the matrix at these keys of a MATLAB file (version 5)."""
    found = np.asarray(read_mat(keys, data, name))
    is_whole = found.dtype.kind in "ui" or (found.dtype.kind == "f" and (np.rint(found) == found).all())
    if found.ndim != 2 or not is_whole or np.abs(found).max() > 1 << 16:
        shape = " x ".join(map(str, found.shape))
        raise UserError(f"{name} holds {found.dtype} of {shape}: expected a matrix of class numbers")
    return encode(_look_up(table, found, name))


def read_mat(keys: Sequence[str], data: bytes, name: str) -> Any:
    """Returns the value at these keys of a MATLAB file; raises UserError if it is damaged or not there."""
    from scipy.io import loadmat

    try:
        found: Any = loadmat(io.BytesIO(data), simplify_cells=True)
        for key in keys:
            found = found[key]
    except Exception as error:  # of many types
        why = files.shorten(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"{name} holds no {'.'.join(keys)} of MATLAB ({why}): fetch it again") from None
    return found


def map_colours(colours: Mapping[Colour, int], data: bytes, name: str, *, void_share: float = 0.0) -> bytes:
    """Converts a mask that shows each class in its colour; up to `void_share` of other pixels become void.

    Raises UserError if more of them have other colours, or pixels are transparent.
    """
    pixels = decode_image(data, name).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    _require_opaque(data, name)
    known = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in colours.items())
    keys, values = (np.array(column) for column in zip(*known, strict=True))
    places = np.minimum(np.searchsorted(keys, pixels), len(keys) - 1)
    strange = keys[places] != pixels
    if strange.mean() > void_share:
        found, counts = np.unique(pixels[strange], return_counts=True)
        shown = ", ".join(f"({key >> 16}, {key >> 8 & 255}, {key & 255})" for key in found[np.argsort(-counts)][:3])
        raise UserError(
            f"{name}: {strange.mean():.2%} of the pixels have colours that no class has, such as {shown}: masks are "
            "lossless images in the colours of the classes"
        )
    return encode(np.where(strange, IGNORE_LABEL, values[places]).astype(np.uint8))


def _require_opaque(data: bytes, name: str) -> None:
    """Raises UserError for a mask with transparent pixels, whose colours are not seen."""
    # A PNG without an alpha channel (a bit of its colour type) or a tRNS chunk is not decoded once more.
    if data.startswith(PNG) and not data[25] & 4 and b"tRNS" not in data:
        return
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim < 3 or pixels.shape[2] < 4:
        return
    if clear := float((pixels[..., 3] < (255 if pixels.dtype == np.uint8 else 65535)).mean()):
        raise UserError(f"{name}: {clear:.2%} of the pixels are transparent: save it without")


def map_segments(segments: Mapping[int, int], background: int, data: bytes, name: str) -> bytes:
    """Converts a COCO panoptic mask, whose colours are ids: red + 256 green + 65536 blue, 0 without a segment.

    Raises UserError if an id is of no segment, or the mask has none of them.
    """
    ids = decode_image(data, name).astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    if segments and not np.isin(ids, [*segments]).any():
        raise UserError(f"{name} holds none of its {len(segments)} segments: is it of another picture?")
    return encode(_look_up({0: background, **segments}, ids, name))


def _look_up(table: Mapping[int, int], values: np.ndarray, name: str) -> Labels:
    is_small = values.dtype.kind == "u" and values.dtype.itemsize <= 2
    found = np.flatnonzero(np.bincount(values.ravel())) if is_small else np.unique(values)
    strange = [value for value in found.tolist() if value not in table]
    if strange:
        shown = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
        raise UserError(f"{name} holds {shown}, which stands for no class: is it another version?")
    return np.array([table[value] for value in found.tolist()], np.uint8)[np.searchsorted(found, values)]


# Pictures and their sizes


def convert_mask(convert: Convert, image: Member, data: bytes, name: str) -> bytes:
    """Converts a mask; raises UserError if it has another size than its picture."""
    label = convert(data, name)
    read_size(image, read_label_size(label, name), name)
    return label


def read_size(image: Member, stated: Size | None, name: str) -> Size:
    """Returns the size of a picture as it is decoded; raises UserError if the file `name` states another one."""
    is_plain = image.path and image.name.lower().endswith((".jpg", ".jpeg", ".png"))
    size = read_image_size(image.path) if is_plain else None
    height, width = size or decode_image(image.read(), image.where).shape[:2]
    check_size(stated, (height, width), image.where, name)
    return height, width


def check_size(stated: Size | None, size: Size, picture: str, name: str) -> None:
    """Raises UserError if a picture has another size than its annotation states."""
    if stated and stated != size:
        turned = " (the sides the other way round, as by an EXIF orientation)" if stated == size[::-1] else ""
        raise UserError(
            f"{name} is of {stated[1]} x {stated[0]} pixels, but {picture} has {size[1]} x {size[0]}{turned}: give "
            "both one size"
        )


# Polygons and run lengths


@dataclasses.dataclass(frozen=True)
class Region:
    """An annotated part of a picture: polygons (x, y, x, y, ...), or COCO's "counts" of its runs."""

    label: int
    polygons: Sequence[Sequence[float]] = ()
    runs: str | Sequence[int] = ()
    size: Size | None = None  # of the picture that runs are of


def box_region(label: int, x: float, y: float, width: float, height: float) -> Region:
    """A box as a region."""
    return Region(label, [[x, y, x + width, y, x + width, y + height, x, y + height]])


def draw_regions(background: int, size: Size, regions: Iterable[Region], name: str, *, by_area: bool = True) -> bytes:
    """Draws regions as pycocotools fills polygons: those of larger areas first, or in their order.

    Raises UserError if a region lies outside of the picture, or runs are of another number of pixels.
    """
    height, width = size
    drawn = []
    for region in regions:
        runs = region.runs
        check_size(region.size, size, "its picture", f"a mask in {name}")
        for polygon in region.polygons:
            if len(polygon) % 2:
                raise UserError(f"{name} has a polygon of {len(polygon)} numbers: expected x, y, x, y, ...")
            check_points(list(zip(polygon[::2], polygon[1::2], strict=True)), size, name)
        if region.polygons:
            from pycocotools import mask as masks

            # Four numbers would be a box for pycocotools: readers leave such out.
            parts = masks.frPyObjects([list(polygon) for polygon in region.polygons], height, width)
            runs = masks.merge(parts)["counts"].decode()
        # pycocotools 2.0.11 gives unset memory for runs that are too short.
        runs = decode_runs(runs) if isinstance(runs, str) else runs
        if sum(runs) != height * width or min(runs, default=0) < 0:
            raise UserError(
                f"{name}: the runs of a mask are of {sum(runs)} pixels, and its picture has {height * width}"
            )
        drawn.append((region.label, runs))
    if by_area:
        drawn.sort(key=lambda row: -sum(row[1][1::2]))  # of equal areas the later one is on top
    labels = np.full((width, height), background, np.uint8)  # runs go down the columns
    for label, runs in drawn:
        labels.ravel()[np.repeat(np.arange(len(runs)) % 2 == 1, runs)] = label
    return encode(np.ascontiguousarray(labels.T))


def require_pycocotools() -> None:
    """Raises UserError if the package that fills polygons is not installed."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise UserError(
            "pycocotools, which fills polygons, is not installed: pip install 'topformer_jax[annotations]' "
            "(from a clone: pip install -e '.[annotations]')"
        ) from None


def check_points(points: Sequence[tuple[float, float]], size: Size, name: str) -> None:
    """Raises UserError for a shape that lies outside of its picture, or reaches far out of it."""
    columns, rows = zip(*points, strict=True)
    for values, length in ((columns, size[1]), (rows, size[0])):
        is_outside = max(values) < 0 or min(values) > length
        if is_outside or min(values) < -length or max(values) > 2 * length:
            raise UserError(
                f"{name}: a shape from ({min(columns):g}, {min(rows):g}) to ({max(columns):g}, {max(rows):g}) lies "
                f"outside of its picture of {size[1]} x {size[0]} pixels"
            )


def decode_runs(text: str) -> list[int]:
    """Decodes COCO's compressed run lengths: pixels outside, inside, outside, ..., column after column.

    5 bits per character (from "0" on), low ones first; bit 5 says that more follow; from the fourth run on the
    difference to the run before the last (cocoapi, maskApi.c).

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
