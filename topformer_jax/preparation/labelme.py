"""JSON files of labelme, and of X-AnyLabeling, which writes files like them."""

import base64
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.codecs import JPEG, PNG, decode_image, read_label_values
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive, Member, hold
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.preparation.writer import Convert
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

IGNORED = "__ignore__"  # labelme's name of void
BACKGROUND = "_background_"  # labelme's name of what nothing covers
_LINE_WIDTH, _POINT_RADIUS = 10, 5  # pixels, as labelme's shape_to_mask
_THIN = ("line", "linestrip", "point")
_POLYGONS = ("polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral")

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
    """Finds the files of labelme and their pictures. Without a background, shapes must cover every picture.

    classes.txt or labels.txt in the source, or labels.txt beside it, gives the order of the classes.
    """
    annotations = Annotations(source)
    places: dict[str, str] = {}  # the first file of each label
    spelled: set[str] = set()  # labels that are written in another way than their class
    empty = renamed = thin = 0
    pictures = [*filter(own.is_picture, source.members)]
    index, by_stem = own.index_ends(source.members), defaultdict[str, list[str]](list)
    for path in pictures:
        by_stem[own.stem_of(path)].append(path)
    drawn = []
    for name, drawing in annotations.read_json(Drawing, "shapes"):
        where = source[name].where
        empty += not drawing.shapes
        for number, shape in enumerate(drawing.shapes):
            label = _name(shape, f"{where}: shape {number}")
            places.setdefault(label, where)
            thin += shape.shape_type in _THIN
            if label != shape.label:
                spelled.add(f"{label} (as {shape.label!r})")
        picture, extract = _find_picture(source, index, by_stem, name, drawing)
        stated = own.split_path(drawing.imagePath or "")[-1:]
        renamed += bool(stated) and not extract and stated != picture.split("/")[-1:]
        drawing.imageData = None
        drawn.append((name, picture, extract, hold(where, msgspec.json.encode(drawing))))
    if not drawn:
        raise UserError(f"{source.path} holds no .json of labelme, with shapes ({own.describe(source)})")
    annotations.classes, table, is_covered = _list_classes(annotations, places, background)
    for name, picture, extract, content in drawn:
        image = source[name if extract else picture]
        if is_covered:
            _require_full_cover(table, image, extract, content)
        convert = partial(draw_shapes, table, image, extract)
        annotations.pairs.append(Pair(picture, image, content, convert, own.split_of_folders(name), extract))
    widths = f"{_LINE_WIDTH} pixels wide, of radius {_POINT_RADIUS}"
    notes = {
        f"labels written differently: {files.shorten(', '.join(sorted(spelled)[:5]), 200)}": spelled,
        f"lines and points: {thin}, drawn as labelme does: {widths}": thin,
        f"files without a shape, all background: {empty}": empty,
        f"files whose imagePath is not there, with the picture of their own name: {renamed}": renamed,
    }
    annotations.notes += [note for note, is_needed in notes.items() if is_needed]
    return annotations


def _name(shape: Shape, where: str) -> str:
    """Returns a shape's label as the name of a class: numbers as text, white space as one blank."""
    label = "" if shape.label is None else " ".join(str(shape.label).split())
    if not label:
        raise UserError(f"{where} has a blank label: give it a name")
    return label


def _list_classes(
    annotations: Annotations, places: Mapping[str, str], background: str
) -> tuple[list[str], dict[str, int], bool]:
    """Returns the classes, the label of each name, and whether shapes must cover every pixel.

    The label of "" is for the pixels that no shape covers.
    """
    lines, where = annotations.read_classes("classes.txt", "labels.txt")
    beside = annotations.source.path.absolute().parent / "labels.txt"  # as in labelme's examples
    if not where and beside.is_file():
        listed = files.read_lines(beside)
        if {*places} <= {" ".join(line.split()) for line in listed} | {IGNORED, BACKGROUND}:
            lines, where = listed, str(beside)
    names = [" ".join(line.split()) for line in lines] if where else sorted(places)
    if where:
        annotations.notes.append(f"the order of the classes is that of {where}")
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
    where = where or str(annotations.source.path)
    is_covered = not background and BACKGROUND not in map(str.lower, names)
    classes, numbers, empty = own.number_classes(
        dict(enumerate(names)), own.VOID if is_covered else background, where, (BACKGROUND,)
    )
    table = {name: numbers[place] for place, name in enumerate(names)}
    return classes, {"": empty, BACKGROUND: empty} | table | {IGNORED: IGNORE_LABEL}, is_covered


def _require_full_cover(table: Mapping[str, int], image: Member, extract: Convert | None, content: Member) -> None:
    probe = dict.fromkeys(table, 0) | {"": 1}
    drawn = draw_shapes(probe, image, extract, content.read(), content.where)
    if uncovered := float(read_label_values(drawn, content.where).mean()):
        raise UserError(
            f"{content.where}: no shape covers {uncovered:.2%} of the picture: give the rest a class by --background "
            f"NAME, or leave it out of training and scores by --background {own.VOID}"
        )


def _find_picture(
    source: Archive,
    index: Mapping[str, list[str]],
    by_stem: Mapping[str, list[str]],
    name: str,
    drawing: Drawing,
) -> tuple[str, Convert | None]:
    """Returns the path of a file's picture; and what takes the picture out of the file, if it is inside.

    The path in `imagePath` comes first, then this name beside the file, the picture inside the file, the picture with
    the file's own name, the only picture of that name below the source.
    """
    where = source[name].where
    stated = unicodedata.normalize("NFC", drawing.imagePath or "").replace("\\", "/")
    folder, stem = posixpath.dirname(name), name[: -len(".json")]
    for text in filter(None, (stated, stated.rpartition("/")[2])):
        path = posixpath.normpath(posixpath.join(folder, text))
        if path in source.members and own.is_picture(path):
            return path, None
    if drawing.imageData:
        start = _decode64(drawing.imageData[:16], where)
        suffix = ".jpg" if start.startswith(JPEG) else ".png" if start.startswith(PNG) else ".bmp"
        return stem + suffix, extract_picture
    if len(own_name := by_stem.get(stem, [])) == 1:
        return own_name[0], None
    return own.find_picture(index, stated, name, own.split_of_folders(name), where), None


def extract_picture(data: bytes, name: str) -> bytes:
    """Takes the picture out of a file of labelme."""
    return _decode64(files.read_json(data, Drawing, name).imageData or "", name)


def _decode64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise UserError(f"{where} holds no picture or mask in base64 ({error})") from None


def draw_shapes(table: Mapping[str, int], image: Member, extract: Convert | None, data: bytes, name: str) -> bytes:
    """Draws the shapes in a labelme file's `data` in their order, as labelme's shapes_to_label does.

    `table` has the label of each name; that of "" is for the pixels that no shape covers. `extract` takes the picture
    out of the file `image`. Raises UserError if a shape covers no area or lies outside of the picture, or the picture
    has another size.
    """
    drawing = files.read_json(data, Drawing, name)
    stated = (drawing.imageHeight, drawing.imageWidth)
    size = (stated[0], stated[1]) if stated[0] and stated[1] else None
    if extract:
        height, width, _ = decode_image(extract(image.read(), name), f"the picture in {name}").shape
        labels.check_size(size, (height, width), "the picture in it", name)
    else:
        height, width = labels.read_size(image, size, name)
    canvas = Image.new("L", (width, height), table[""])
    for number, shape in enumerate(drawing.shapes):
        where = f"{name}: shape {number}"
        label = table[_name(shape, where)]
        kind = shape.shape_type or "polygon"
        if shape.points:
            labels.check_points(shape.points, (height, width), where)
        if kind == "mask":
            is_drawn = _draw_mask(canvas, shape, label, where)
        else:
            is_drawn = _draw_outline(ImageDraw.Draw(canvas), kind, shape.points, label)
        if not is_drawn:
            raise UserError(
                f"{where} is a {files.shorten(kind, 40)} of {len(shape.points)} points, which is not drawn: expected "
                "a polygon of 3 or more points, a rectangle or circle of 2, a mask of its box, a line or a point"
            )
    return labels.encode(np.asarray(canvas))


def _draw_outline(draw: ImageDraw.ImageDraw, kind: str, points: list[tuple[float, float]], label: int) -> bool:
    """Draws a shape as labelme's shape_to_mask does; returns False if it covers no area."""
    if kind in _POLYGONS and len(points) > 2:
        draw.polygon(points, fill=label, outline=label)
    elif kind == "rectangle" and len(points) == 2:
        (left, right), (top, bottom) = map(sorted, zip(*points, strict=True))
        draw.rectangle((left, top, right, bottom), fill=label, outline=label)
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
    """Draws a mask from its upper left corner on; returns False if it has no corners or no pixel."""
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
    x, y = (round(value) for value in shape.points[0])
    canvas.paste(label, (x, y), Image.fromarray((inside > 0).astype(np.uint8) * 255))
    return True
