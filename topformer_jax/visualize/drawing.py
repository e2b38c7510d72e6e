"""Images for people: labels in colour, overlays with a legend, grids of images, and their files.

Images are RGB, uint8 `[h, w, 3]`. Labels are uint8 `[h, w]`; a label that is not a class (void is 255) is black.
"""

import io
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.catalog import DataSet
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import legend
from topformer_jax.visualize.legend import BLACK, WHITE, Canvas, Colour

Format = Literal["jpeg", "png"]

CORRECT, WRONG = (70, 84, 76), (255, 86, 28)  # they differ in lightness too, for colour-blind readers
SMALL = 400  # pixels: an image whose longer side is below is enlarged before it gets a legend
GAP = 4  # pixels between the images of a grid
MAX_JPEG_SIDE = 65500  # pixels
FORMATS: dict[str, Format] = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}


def colorize(labels: Labels, palette: Sequence[Colour]) -> Image:
    """Draws labels as an image: each pixel in the colour of its class, void in black.

    Args:
        labels: uint8 `[h, w]`.
        palette: red, green, blue (0 to 255) of each class, in label order.

    Returns:
        uint8 `[h, w, 3]`, RGB.

    >>> import numpy as np
    >>> labels = np.array([[0, 1, 255]], np.uint8)
    >>> colorize(labels, palette=[(120, 120, 120), (180, 0, 60)]).tolist()
    [[[120, 120, 120], [180, 0, 60], [0, 0, 0]]]
    """
    return _colour_table(palette)[labels]


def error_map(label: Labels, prediction: Labels) -> Image:
    """Draws where a prediction is wrong: wrong pixels orange, correct ones a dim green, void black.

    Args:
        label: uint8 `[h, w]`, the annotation.
        prediction: uint8 `[h, w]`.

    Returns:
        uint8 `[h, w, 3]`, RGB.
    """
    colours = np.array([CORRECT, WRONG, BLACK], np.uint8)
    return colours[np.where(label == IGNORE_LABEL, 2, label != prediction)]


def blend(image: Image, labels: Labels, palette: Sequence[Colour], *, opacity: float = 0.5) -> Image:
    """Lays the colours of labels over an image of the same size.

    Args:
        image: uint8 `[h, w, 3]`, RGB.
        labels: uint8 `[h, w]`.
        palette: red, green, blue of each class, in label order.
        opacity: of the labels, from 0 (only the image is visible) to 1 (only the labels are).

    Returns:
        uint8 `[h, w, 3]`, RGB: `(1 - opacity) * image + opacity * colorize(labels, palette)`, rounded.

    Raises:
        UserError: the opacity is not between 0 and 1.

    >>> import numpy as np
    >>> image, labels = np.full((1, 1, 3), 200, np.uint8), np.zeros((1, 1), np.uint8)
    >>> blend(image, labels, [(0, 100, 200)], opacity=0.25).tolist()
    [[[150, 175, 200]]]
    """
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity is {opacity}, expected a number from 0 to 1")
    return cv2.addWeighted(image, 1 - opacity, colorize(labels, palette), opacity, 0)


def overlay(image: Image, labels: Labels, data_set: DataSet, *, opacity: float = 0.5) -> Canvas:
    """`blend` with a legend: the classes in the labels and their shares of the pixels.

    The legend is below the image, or to the right of a tall one; its font grows with the image. An image whose
    longer side is below 400 pixels is enlarged by a whole factor first, so that the legend does not dwarf it.

    Args:
        image: uint8 `[h, w, 3]`, RGB.
        labels: uint8 `[h, w]`.
        data_set: names and colours of the classes.
        opacity: of the labels, from 0 to 1.

    Returns:
        uint8 `[height, width, 3]`, RGB, larger than the image by the legend.

    Raises:
        UserError: the opacity is not between 0 and 1.

    >>> import numpy as np
    >>> from topformer_jax.data.catalog import CATALOG
    >>> image, labels = np.zeros((480, 640, 3), np.uint8), np.zeros((480, 640), np.uint8)
    >>> overlay(image, labels, CATALOG["ade20k"]).shape  # one class: a legend of one line, 49 pixels high
    (529, 640, 3)
    """
    canvas = blend(image, labels, data_set.palette, opacity=opacity)
    factor = max(1, SMALL // max(labels.shape))
    canvas = canvas.repeat(factor, 0).repeat(factor, 1)
    height, width, _ = canvas.shape
    font_size = legend.legend_font_size(height, width)
    if height > 1.2 * width:
        table = legend.draw_legend(labels, data_set, height=height, font_size=font_size)
        return legend.paste([(0, 0, canvas), (0, width, table)])
    table = legend.draw_legend(labels, data_set, width=width, font_size=font_size)
    return legend.paste([(0, 0, canvas), (height, 0, table)])


def image_grid(
    rows: Sequence[Sequence[Canvas]],
    captions: Sequence[str] | None = None,
    height: int = 192,
    *,
    titles: Sequence[str] | None = None,
) -> Canvas:
    """Lays out rows of images side by side with white gaps.

    Args:
        rows: images of any size, uint8 `[_, _, 3]`, scaled to `height`, or to a width of four times that.
        captions: a line of text above each row.
        height: of a row, in pixels.
        titles: a line of text above each column.

    Returns:
        uint8 `[_, _, 3]`, RGB.

    Raises:
        ValueError: there are no images, or the number of captions (titles) is not that of rows (columns).
    """
    scaled = [[_fit_into(image, height, 4 * height) for image in row] for row in rows]
    widths = [
        max(row[column].shape[1] for row in scaled if column < len(row))
        for column in range(max(map(len, scaled), default=0))
    ]
    lefts = [sum(widths[:column]) + GAP * column for column in range(len(widths))]
    if not widths:
        raise ValueError("a grid needs an image")
    font_size = min(max(height // 14, 11), 40)
    pieces: list[tuple[int, int, Canvas]] = []
    top = 0
    if titles is not None:
        for title, left, width in zip(titles, lefts, widths, strict=True):
            pieces.append((0, left, legend.draw_line(title, font_size, width)))
        top = 2 * font_size
    for row, caption in zip(scaled, [None] * len(rows) if captions is None else captions, strict=True):
        if caption is not None:
            pieces.append((top, 0, legend.draw_line(caption, font_size, lefts[-1] + widths[-1])))
            top += 2 * font_size
        pieces += [(top, left, image) for left, image in zip(lefts, row, strict=False)]
        top += height + GAP
    return legend.paste(pieces, background=WHITE)


def encode_image(image: Image, format: Format = "jpeg") -> bytes:
    """Encodes an image, uint8 `[h, w, 3]`, as the bytes of a JPEG (quality 90) or PNG file."""
    return _encode(PIL.Image.fromarray(image), format)


def write_image(path: files.Path, image: Image) -> None:
    """Writes an image, uint8 `[h, w, 3]`, as JPEG or PNG by the file's suffix; creates missing folders.

    Raises:
        UserError: the suffix is not .jpg, .jpeg or .png, the image is too large for JPEG, or writing fails.
    """
    format = FORMATS.get(path.suffix.lower())
    if format is None:
        raise UserError(f"cannot write {path}: an image's name ends in {', '.join(FORMATS)}")
    if format == "jpeg" and max(image.shape) > MAX_JPEG_SIDE:
        raise UserError(
            f"cannot write {path}: a JPEG has at most {MAX_JPEG_SIDE} pixels a side; name it .png"
        )
    files.write_file(path, encode_image(image, format))


def write_labels(path: files.Path, labels: Labels, palette: Sequence[Colour]) -> None:
    """Writes labels, uint8 `[h, w]`, as a palette PNG: its values are the labels, viewers show class colours.

    Raises:
        UserError: the file's suffix is not .png, or writing fails.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: labels go into a .png file, which is lossless")
    image = PIL.Image.fromarray(labels)
    image.putpalette(_colour_table(palette).tobytes())
    files.write_file(path, _encode(image, "png"))


def _encode(image: PIL.Image.Image, format: Format) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **({"quality": 90} if format == "jpeg" else {}))
    return data.getvalue()


def _colour_table(palette: Sequence[Colour]) -> UInt8[np.ndarray, "256 3"]:
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours


def _fit_into(image: Image, height: int, width: int) -> Canvas:
    """Scales an image into a box, keeping its aspect ratio."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    # INTER_AREA averages when it shrinks and repeats whole pixels when it enlarges.
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
