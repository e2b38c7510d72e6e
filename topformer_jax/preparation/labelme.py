"""labelme, and what writes files like it: X-AnyLabeling."""

import base64
import binascii
import io
import posixpath
import unicodedata
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.codecs import JPEG, PNG, decode_image, read_label_values
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive, Member
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.preparation.writer import Convert
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

IGNORED, BACKGROUND = (
    "__ignore__",
    "_background_",
)  # labelme's names of what is void, and of what nothing covers
_LISTS = ("classes.txt", "labels.txt")  # files that may give the order of the classes
_LINE_WIDTH, _POINT_RADIUS = 10, 5  # pixels, as labelme's shape_to_mask
_POLYGONS = ("polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral")
_THIN = ("line", "linestrip", "point")

Length = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Shape(msgspec.Struct):
    """A shape of labelme or X-AnyLabeling."""

    points: list[tuple[float, float]]
    label: str | int | float | None = None
    shape_type: str | None = None
    mask: str | None = None  # a PNG in base64


class Drawing(msgspec.Struct, omit_defaults=True):
    """A file of labelme."""

    shapes: list[Shape]
    imagePath: str | None = None
    imageData: str | None = None
    imageWidth: Length | None = None
    imageHeight: Length | None = None


def read(source: Archive, background: str) -> Annotations:
    """Finds the files of labelme and their pictures; without a background it draws all, until one is not covered.

    classes.txt or labels.txt, in the source or beside it, gives the order of the classes.

    Raises:
        UserError: a file is wrong, has no picture, or is not fully labelled though no background is known.
    """
    found = Annotations(source)
    places: dict[str, str] = {}  # the first file of each label
    spelled: set[str] = set()  # labels that are called otherwise
    thin = empty = 0
    pictures = [*filter(own.is_picture, source.members)]
    index, renamed = own.index_ends(pictures), 0
    for path in pictures:
        index[own.stem_of(path)].append(path)
    drawn = []
    for name, drawing in found.read_json(Drawing, "shapes"):
        where = source[name].where
        empty += not drawing.shapes
        for number, shape in enumerate(drawing.shapes):
            label = _name(shape, f"{where}: shape {number}")
            places.setdefault(label, where)
            if label != shape.label:
                spelled.add(f"{label} (written {shape.label!r})")
            thin += shape.shape_type in _THIN
        picture, extract = _find_picture(source, index, name, drawing)
        stated = own.split_path(drawing.imagePath or "")[-1:]
        renamed += bool(stated) and not extract and stated != picture.split("/")[-1:]
        drawing.imageData = None
        drawn.append((name, picture, extract, msgspec.json.encode(drawing)))
    if not drawn:
        raise UserError(f"{source.path} holds no .json of labelme, with shapes ({own.describe(source)})")
    found.classes, table = _list_classes(found, places, background)
    is_covered = "" not in table
    for name, picture, extract, data in drawn:
        image, where = source[name if extract else picture], source[name].where
        convert = partial(draw_shapes, table, image, extract)
        if is_covered:
            _require_full_cover(table, image, extract, data, where)
        split = own.split_of_folders(name)
        found.pairs.append(Pair(picture, image, data, convert, split, where, extract))
    table.setdefault("", IGNORE_LABEL)
    if spelled:
        found.notes.append(f"labels by other names: {files.shorten(', '.join(sorted(spelled)[:5]), 200)}")
    if empty:
        found.notes.append(f"files without a shape, all background: {empty}")
    if thin:
        found.notes.append(
            f"lines and points: {thin}, drawn as labelme does: {_LINE_WIDTH} pixels wide, of radius {_POINT_RADIUS}"
        )
    if renamed:
        found.notes.append(
            f"files whose imagePath is not there, with the picture of their own name: {renamed}"
        )
    return found


def _name(shape: Shape, where: str) -> str:
    """A shape's label as the name of a class: numbers as text, blanks like one."""
    label = "" if shape.label is None else " ".join(str(shape.label).split())
    if not label:
        raise UserError(f"{where} has a blank label: give it a name")
    return label


def _list_classes(
    found: Annotations, places: Mapping[str, str], background: str
) -> tuple[list[str], dict[str, int]]:
    """The classes, and the label of each name; that of "" is for what no shape covers, where it is known."""
    source = found.source
    names, where = found.read_classes(*_LISTS)
    beside = source.path.parent / _LISTS[1]
    if not where and beside.is_file() and set(places) <= set(lines := files.read_lines(beside)):
        where, names = str(beside), lines
    names = names if where else sorted(places)
    if where:
        found.notes.append(f"the order of the classes is that of {where}")
    names = [" ".join(name.split()) for name in names]
    strange = [label for label in places if label not in {*names, IGNORED, BACKGROUND}]
    if strange:
        raise UserError(
            f"{places[strange[0]]}: {files.shorten(strange[0])} is not in {where.rpartition('/')[2]}: "
            "add it there, or rename it here"
        )
    names = [name for name in names if name != IGNORED]
    if BACKGROUND in places and BACKGROUND not in names:
        names.append(BACKGROUND)
    if not where:  # labelme's own tools give the background label 0
        names.sort(key=lambda name: name != BACKGROUND)
    where = where or str(source.path)
    classes, numbers, empty = own.number_classes(dict(enumerate(names)), background, where, (BACKGROUND,))
    table = {name: numbers[place] for place, name in enumerate(names)} | {IGNORED: IGNORE_LABEL}
    return classes, table if empty is None else {"": empty, BACKGROUND: empty} | table


def _require_full_cover(
    table: Mapping[str, int], image: Member, extract: Convert | None, data: bytes, name: str
) -> None:
    """Raises a UserError for a picture that its shapes do not cover."""
    probe = dict.fromkeys(table, 0) | {"": 1}
    if uncovered := float(np.mean(read_label_values(draw_shapes(probe, image, extract, data, name), name))):
        raise UserError(
            f"{name}: no shape covers {uncovered:.2%} of the picture: give the rest a class by --background "
            f"NAME, or leave it out of training and scores by --background {own.VOID}"
        )


def _find_picture(
    source: Archive, index: Mapping[str, list[str]], name: str, drawing: Drawing
) -> tuple[str, Convert | None]:
    """The path of a file's picture, and what takes it out of the file where it is in there.

    Where `imagePath` says, beside the file, inside of it, beside it with its own name, or the only one of that name
    below the source; in this order.
    """
    where = source[name].where
    stated = unicodedata.normalize("NFC", drawing.imagePath or "").replace("\\", "/")
    folder, stem = posixpath.dirname(name), name[: -len(".json")]
    file = stated.rpartition("/")[2]
    beside = [posixpath.normpath(posixpath.join(folder, path)) for path in (stated, file) if file]
    for path in beside:
        if path in source.members and own.is_picture(path):
            return path, None
    if drawing.imageData:
        start = _decode64(drawing.imageData[:16], where)
        suffix = ".jpg" if start.startswith(JPEG) else ".png" if start.startswith(PNG) else ".bmp"
        return stem + suffix, extract_picture
    if len(own_name := index.get(stem, [])) == 1:
        return own_name[0], None
    split = own.split_of_folders(name)
    others = index.get(file, [])
    others = [path for path in others if own.split_of_folders(path) == split] or others
    if len(others) == 1:
        return others[0], None
    if file and not own.is_picture(file):
        raise UserError(
            f"{where} is of {files.shorten(file, 80)}, which is no picture that is read: save it as .jpg or .png"
        )
    why = (
        f"there {len(others)} times: give its folder"
        if others
        else "not below --source: put it beside the file"
    )
    raise UserError(f"{where} is of {files.shorten(stated, 80) or 'no picture'}, which is {why}")


def extract_picture(data: bytes, name: str) -> bytes:
    """The picture inside a file of labelme."""
    return _decode64(files.read_json(data, Drawing, name).imageData or "", name)


def _decode64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} holds no picture or mask in base64 ({error})") from None


def draw_shapes(
    table: Mapping[str, int], image: Member, extract: Convert | None, data: bytes, name: str
) -> bytes:
    """Draws the shapes of a labelme file in their order, as labelme's shapes_to_label does.

    The label of "" in `table` is for the pixels that no shape covers; `extract` takes the picture out of `image`.

    Raises:
        UserError: a shape covers no area, or lies outside of the picture; or the picture has another size.
    """
    drawing = files.read_json(data, Drawing, name)
    if extract:
        height, width, _ = decode_image(extract(image.read(), name), f"the picture in {name}").shape
    else:
        height, width = labels.read_size(image)
    size = height, width
    if drawing.imageHeight and drawing.imageWidth:
        labels.check_stated_size((drawing.imageHeight, drawing.imageWidth), size, image.where, name)
    canvas = Image.new("L", size[::-1], table[""])
    for number, shape in enumerate(drawing.shapes):
        where = f"{name}: shape {number}"
        label = table[_name(shape, where)]
        kind = shape.shape_type or "polygon"
        if shape.points:
            labels.check_points(shape.points, size, where)
        is_drawn = (
            _draw_mask(canvas, shape, label, where)
            if kind == "mask"
            else _draw_outline(ImageDraw.Draw(canvas), kind, shape.points, label)
        )
        if not is_drawn:
            raise UserError(
                f"{where} is a {files.shorten(kind, 40)} of {len(shape.points)} points, which is not drawn: expected "
                "a polygon of 3 or more points, a rectangle or circle of 2, a mask of its box, a line or a point"
            )
    return labels.encode(np.asarray(canvas))


def _draw_outline(
    draw: ImageDraw.ImageDraw, kind: str, points: list[tuple[float, float]], label: int
) -> bool:
    """Draws a shape as labelme's shape_to_mask does; False if it covers no area."""
    if kind in _POLYGONS and len(points) > 2:
        draw.polygon(points, fill=label, outline=label)
    elif kind == "rectangle" and len(points) == 2:
        (x, y), (other_x, other_y) = points
        corners = (min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y))
        draw.rectangle(corners, fill=label, outline=label)
    elif (kind == "circle" and len(points) == 2) or (kind == "point" and len(points) == 1):
        x, y = points[0]
        edge_x, edge_y = points[-1]
        radius = ((x - edge_x) ** 2 + (y - edge_y) ** 2) ** 0.5 if kind == "circle" else _POINT_RADIUS
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=label, outline=label)
    elif (kind == "line" and len(points) == 2) or (kind == "linestrip" and len(points) > 1):
        joint = "curve" if kind == "linestrip" else None
        draw.line(points, fill=label, width=_LINE_WIDTH, joint=joint)
    else:
        return False
    return True


def _draw_mask(canvas: Image.Image, shape: Shape, label: int, where: str) -> bool:
    """Draws a mask from its upper left corner on; False if it has no corners or no pixel."""
    if len(shape.points) != 2 or not shape.mask:
        return False
    data = _decode64(shape.mask, where)
    try:
        with Image.open(io.BytesIO(data)) as file:
            inside = np.array(file)
    except Exception:  # a damaged file raises OSError, SyntaxError, ValueError and others
        raise UserError(f"{where} holds a mask that is no picture") from None
    sides = np.diff(np.array(shape.points), axis=0)[0, ::-1] + 1
    if inside.ndim != 2 or not inside.any() or (abs(sides - inside.shape) > 1).any():
        return False
    corner = tuple(round(value) for value in shape.points[0])
    canvas.paste(label, (corner[0], corner[1]), Image.fromarray((inside > 0).astype(np.uint8) * 255))
    return True
