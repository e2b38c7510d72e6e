"""What a person looks at: colorize labels, overlays with a legend, grids of pictures, and their files.

Pictures are RGB, uint8; labels are uint8, and a label that is no class (void is 255) is black.
"""

import bisect
import functools
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from topformer_jax import files
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import DataSet
from topformer_jax.errors import UserError

Picture = UInt8[np.ndarray, "h w 3"]
Canvas = UInt8[np.ndarray, "_ _ 3"]  # a picture of its own size, whatever those beside it have
Labels = UInt8[np.ndarray, "h w"]
Colour = tuple[int, int, int]
Format = Literal["jpeg", "png"]

RIGHT, WRONG = (70, 84, 76), (255, 86, 28)  # they differ in lightness too, for those who don't see the hue
PAPER, INK, OUTLINE = (250, 250, 250), (24, 24, 24), (128, 128, 128)
SMALL = 400  # pixels: a picture that stays below is enlarged before it gets a legend
LETTERS = 13, 96  # pixels: the limits of a legend's font
COLUMNS = 6  # of a legend, at most: more of them are not read as one table
GAP = 4  # pixels between the pictures of a grid
JPEG_SIDE = 65500  # pixels, at most
FORMATS: dict[str, Format] = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}


def colorize(labels: Labels, palette: Sequence[Colour]) -> Picture:
    """Labels as a picture: every pixel in its class's colour."""
    return _colours(palette)[labels]


def errors(label: Labels, prediction: Labels) -> Picture:
    """Where a prediction is wrong: orange; right pixels are a dim green, void is black."""
    colours = np.array([RIGHT, WRONG, (0, 0, 0)], np.uint8)
    return colours[np.where(label == IGNORE_LABEL, 2, label != prediction)]


def blend(image: Picture, labels: Labels, palette: Sequence[Colour], *, opacity: float = 0.5) -> Picture:
    """A picture under its colorize labels, pixel by pixel.

    Raises:
        UserError: the opacity is not between 0 (none of the labels to be seen) and 1 (nothing of the image).
    """
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity is {opacity}, expected a number from 0 to 1")
    return cv2.addWeighted(image, 1 - opacity, colorize(labels, palette), opacity, 0)


def overlay(image: Picture, labels: Labels, data_set: DataSet, *, opacity: float = 0.5) -> Canvas:
    """`blend`, with a legend: the classes that are there and their shares of the pixels.

    The legend is under the picture, or to the right of a tall one, in letters that grow with the picture. A picture
    of less than 400 pixels is enlarged by a whole factor first, so that the legend does not dwarf it.

    Raises:
        UserError: the opacity is not between 0 and 1.
    """
    canvas = blend(image, labels, data_set.palette, opacity=opacity)
    factor = max(1, SMALL // max(labels.shape))
    canvas = canvas.repeat(factor, 0).repeat(factor, 1)
    height, width, _ = canvas.shape
    size = round(min(max(math.sqrt(height * width) / 40, LETTERS[0]), LETTERS[1]))
    if height > 1.2 * width:
        legend = _legend(labels, data_set, size, height=height)
        return _paste([(0, 0, canvas), (0, width, legend)])
    return _paste([(0, 0, canvas), (height, 0, _legend(labels, data_set, size, width=width))])


def grid(
    rows: Sequence[Sequence[Canvas]],
    captions: Sequence[str] | None = None,
    height: int = 192,
    *,
    titles: Sequence[str] | None = None,
) -> Canvas:
    """Rows of pictures, side by side with white gaps.

    Args:
        rows: of pictures of any size; they are scaled to one height, or to four times that in width.
        captions: a line of text above each row.
        height: of a row, in pixels.
        titles: a line of text above each column.

    Raises:
        ValueError: there is no picture, or not one caption a row or one title a column.
    """
    scaled = [[_fitted(picture, height, 4 * height) for picture in row] for row in rows]
    widths = [
        max(row[place].shape[1] for row in scaled if place < len(row))
        for place in range(max(map(len, scaled), default=0))
    ]
    lefts = [sum(widths[:place]) + GAP * place for place in range(len(widths))]
    if not widths:
        raise ValueError("a grid needs a picture")
    size = min(max(height // 14, 11), 40)
    pieces: list[tuple[int, int, Canvas]] = []
    top = 0
    if titles is not None:
        for title, left, width in zip(titles, lefts, widths, strict=True):
            pieces.append((0, left, _line(title, size, width)))
        top = 2 * size
    for row, caption in zip(scaled, [None] * len(rows) if captions is None else captions, strict=True):
        if caption is not None:
            pieces.append((top, 0, _line(caption, size, lefts[-1] + widths[-1])))
            top += 2 * size
        pieces += [(top, left, picture) for left, picture in zip(lefts, row, strict=False)]
        top += height + GAP
    return _paste(pieces, paper=(255, 255, 255))


def encoded(picture: Picture, format: Format = "jpeg") -> bytes:
    """A picture as the bytes of a JPEG or PNG file."""
    return _bytes(Image.fromarray(picture), format)


def write(path: pathlib.Path, picture: Picture) -> None:
    """Writes a picture, as JPEG or PNG by the file's suffix, and the folders above it.

    Raises:
        UserError: the suffix is another one, or the file cannot be written.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"cannot write {path}: a picture's name ends in {', '.join(FORMATS)}")
    if kind == "jpeg" and max(picture.shape) > JPEG_SIDE:
        raise UserError(f"cannot write {path}: no JPEG has more than {JPEG_SIDE} pixels a side; name it .png")
    files.write(path, encoded(picture, kind))


def write_indexed(path: pathlib.Path, labels: Labels, palette: Sequence[Colour]) -> None:
    """Writes labels as a PNG of one channel, the labels themselves, that a viewer shows in the classes' colours.

    Raises:
        UserError: the file's suffix is not .png, or it cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: labels go into a .png file, which keeps their values")
    image = Image.fromarray(labels)
    image.putpalette(_colours(palette).tobytes())
    files.write(path, _bytes(image, "png"))


def _bytes(image: Image.Image, format: Format) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **({"quality": 90} if format == "jpeg" else {}))
    return data.getvalue()


def _colours(palette: Sequence[Colour]) -> UInt8[np.ndarray, "256 3"]:
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours


def _fitted(picture: Picture, height: int, width: int) -> Canvas:
    """A picture scaled into a box."""
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(
        picture, size, interpolation=cv2.INTER_AREA
    )  # which keeps pixels square when it enlarges


def _paste(pieces: Sequence[tuple[int, int, Canvas]], paper: Colour = PAPER) -> Canvas:
    """Pictures on one sheet, each at its (top, left)."""
    height = max(top + piece.shape[0] for top, _, piece in pieces)
    width = max(left + piece.shape[1] for _, left, piece in pieces)
    sheet = np.full((height, width, 3), paper, np.uint8)
    for top, left, piece in pieces:
        sheet[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return sheet


def _legend(
    labels: Labels, data_set: DataSet, size: int, *, width: int | None = None, height: int | None = None
) -> Canvas:
    """The classes by their share of the pixels, in as many columns as a width allows or a height asks for."""
    font = _font(size)
    entries = _shares(labels, data_set)
    texts = [(_cut(name, font, 12 * size), _percent(share)) for name, _, share in entries]
    line, margin = round(1.5 * size), size
    name_width, share_width = (
        math.ceil(max(map(font.getlength, column))) for column in zip(*texts, strict=True)
    )
    pitch = line + name_width + size + share_width + 2 * size
    if height is not None:
        rows = max(1, (height - 2 * margin) // line)
    else:
        fitting = ((width or 0) - 2 * margin + 2 * size) // pitch
        rows = math.ceil(len(entries) / min(max(fitting, 1), COLUMNS))
    columns = math.ceil(len(entries) / rows)
    extent = columns * pitch - 2 * size + 2 * margin, min(rows, len(entries)) * line + 2 * margin
    sheet = Image.new("RGB", (max(extent[0], width or 0), max(extent[1], height or 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, ((_, colour, _), (name, share)) in enumerate(zip(entries, texts, strict=True)):
        left, middle = margin + number // rows * pitch, margin + number % rows * line + line // 2
        swatch = (left, middle - size // 2, left + size, middle + size // 2)
        draw.rectangle(swatch, colour, OUTLINE, max(1, size // 16))
        draw.text((left + line, middle), name, INK, font, "lm")
        draw.text((left + pitch - 2 * size, middle), share, INK, font, "rm")
    return np.asarray(sheet)


def _shares(labels: Labels, data_set: DataSet) -> list[tuple[str, Colour, float]]:
    """Name, colour and share of the pixels of each class that is there, the largest first and void last."""
    counts = np.bincount(labels.ravel(), minlength=256)
    classes = len(data_set.classes)
    found = [int(label) for label in np.argsort(-counts[:classes], kind="stable") if counts[label]]
    shares = [(data_set.classes[i], data_set.palette[i], counts[i] / labels.size) for i in found]
    void = counts[classes:].sum() / labels.size
    return [*shares, ("void", (0, 0, 0), void)] if void else shares


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _line(text: str, size: int, width: int) -> Canvas:
    """A line of text, twice the font's size high."""
    font = _font(size)
    sheet = Image.new("RGB", (width, 2 * size), (255, 255, 255))
    ImageDraw.Draw(sheet).text((0, size), _cut(text, font, width), INK, font, "lm")
    return np.asarray(sheet)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, with an ellipsis in place of what goes beyond a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    kept = bisect.bisect(
        range(1, len(text)), width, key=lambda end: math.ceil(font.getlength(text[:end] + "…"))
    )
    return text[:kept].rstrip() + "…"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Matplotlib brings a font with accents, Greek and Cyrillic wherever it runs.
    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)
