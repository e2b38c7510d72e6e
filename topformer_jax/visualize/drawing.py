"""Images for people: labels in colour, overlays with a legend, grids of images, and their files.

Images are RGB, uint8 `[h, w, 3]`. Labels are uint8 `[h, w]`; a label that is not a class (void is 255) is black.
"""

import functools
import io
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import UInt8
from PIL.ImageFont import FreeTypeFont, truetype

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.catalog import Colour, DataSet
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["jpeg", "png"]
Canvas = UInt8[np.ndarray, "_ _ 3"]  # RGB; "_": its size is independent of the other arguments' sizes

# Different in lightness, for colour-blind readers.
CORRECT, WRONG, BLACK = (70, 84, 76), (255, 86, 28), (0, 0, 0)
BACKGROUND, TEXT, OUTLINE = (250, 250, 250), (24, 24, 24), (128, 128, 128)
SMALL = 400  # pixels: an image whose longer side is below is enlarged before it gets a legend
FONT_SIZES = 13, 96  # pixels: the smallest and the largest font of a legend
LONGEST_NAME = 40  # characters of a class in a legend
GAP = 4  # pixels between the images of a grid
MAX_JPEG_SIDE = 65500  # pixels
FORMATS: dict[str, Format] = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}


def colorize(labels: Labels, palette: Sequence[Colour]) -> Image:
    """Draws labels as an image: each pixel in the colour of its class, void in black.

    >>> import numpy as np
    >>> labels = np.array([[0, 1, 255]], np.uint8)
    >>> colorize(labels, palette=[(120, 120, 120), (180, 0, 60)]).tolist()
    [[[120, 120, 120], [180, 0, 60], [0, 0, 0]]]
    """
    return _colour_table(palette)[labels]


def error_map(label: Labels, prediction: Labels) -> Image:
    """Draws where a prediction is wrong: wrong pixels orange, correct ones a dim green, void black."""
    colours = np.array([CORRECT, WRONG, BLACK], np.uint8)
    return colours[np.where(label == IGNORE_LABEL, 2, label != prediction)]


def blend(image: Image, labels: Labels, palette: Sequence[Colour], *, opacity: float = 0.5) -> Image:
    """Lays the colours of labels over an image: `(1 - opacity) * image + opacity * colorize(labels, palette)`,
    rounded.

    Raises UserError if the opacity is not between 0 and 1.

    >>> import numpy as np
    >>> image, labels = np.full((1, 1, 3), 200, np.uint8), np.zeros((1, 1), np.uint8)
    >>> blend(image, labels, [(0, 100, 200)], opacity=0.25).tolist()
    [[[150, 175, 200]]]
    """
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity is {opacity}, expected a number from 0 to 1")
    return cv2.addWeighted(image, 1 - opacity, colorize(labels, palette), opacity, 0)


def overlay(image: Image, labels: Labels, data_set: DataSet, *, opacity: float = 0.5) -> Canvas:
    """`blend` with a legend below: the classes in the labels and their shares of the pixels.

    The font grows with the image. A small image is enlarged by a whole factor first.

    >>> import numpy as np
    >>> from topformer_jax.data.catalog import CATALOG
    >>> image, labels = np.zeros((480, 640, 3), np.uint8), np.zeros((480, 640), np.uint8)
    >>> overlay(image, labels, CATALOG["ade20k"]).shape  # one class: a legend of one line, 49 pixels high
    (529, 640, 3)
    """
    factor = max(1, SMALL // max(labels.shape))
    blended = blend(image, labels, data_set.palette, opacity=opacity).repeat(factor, 0).repeat(factor, 1)
    height, width, _ = blended.shape
    size = round(min(max(math.sqrt(height * width) / 40, FONT_SIZES[0]), FONT_SIZES[1]))
    font, line = load_font(size), round(1.5 * size)
    shares = class_shares(labels, data_set)
    texts = [f"{files.shorten(name, LONGEST_NAME)}  {format_share(share)}" for name, _, share in shares]
    pitch = line + math.ceil(max(map(font.getlength, texts))) + size
    rows = math.ceil(len(texts) / max(1, (width - size) // pitch))
    canvas = PIL.Image.new("RGB", (max(width, size + pitch), height + rows * line + 2 * size), BACKGROUND)
    canvas.paste(PIL.Image.fromarray(blended))
    draw = PIL.ImageDraw.Draw(canvas)
    for number, (text, (_, colour, _)) in enumerate(zip(texts, shares, strict=True)):
        left = size + number // rows * pitch
        middle = height + size + number % rows * line + line // 2
        draw.rectangle((left, middle - size // 2, left + size, middle + size // 2), colour, OUTLINE)
        draw.text((left + line, middle), text, TEXT, font, "lm")
    return np.asarray(canvas)


def class_shares(labels: Labels, data_set: DataSet) -> list[tuple[str, Colour, float]]:
    """Name, colour and share of the pixels of each class in `labels`, the largest first and void last."""
    counts = np.bincount(labels.ravel(), minlength=256)
    classes = len(data_set.classes)
    present = [int(label) for label in np.argsort(-counts[:classes], kind="stable") if counts[label]]
    shares = [(data_set.classes[i], data_set.palette[i], counts[i] / labels.size) for i in present]
    void = counts[classes:].sum() / labels.size
    return [*shares, ("void", BLACK, void)] if void else shares


def format_share(share: float) -> str:
    """A share as a percentage of one digit; what would round to zero is `<0.1%`."""
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def image_grid(
    rows: Sequence[Sequence[Canvas]], titles: Sequence[str], captions: Sequence[str] = (), height: int = 192
) -> Canvas:
    """Lays out rows of images, each `height` pixels high, side by side with white gaps.

    An image is at most four times as wide as high. `titles` stand above the columns, `captions` above the rows.
    """
    scaled = [[_fit_into(image, height, 4 * height) for image in row] for row in rows]
    widths = [max(image.width for image in column) for column in zip(*scaled, strict=True)]
    size = min(max(height // 14, 11), 40)
    line, font = 2 * size, load_font(size)
    pitch = (line if captions else 0) + height + GAP
    size_of_all = sum(widths) + GAP * (len(widths) - 1), line + pitch * len(rows) - GAP
    canvas = PIL.Image.new("RGB", size_of_all, "white")
    draw = PIL.ImageDraw.Draw(canvas)
    lefts = [sum(widths[:column]) + GAP * column for column in range(len(widths))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, size), title, TEXT, font, "lm")
    for number, row in enumerate(scaled):
        bottom = line + pitch * (number + 1) - GAP
        for left, image in zip(lefts, row, strict=True):
            canvas.paste(image, (left, bottom - height))
        if captions:
            draw.text((0, bottom - height - size), captions[number], TEXT, font, "lm")
    return np.asarray(canvas)


def _fit_into(image: Image, height: int, width: int) -> PIL.Image.Image:
    scale = min(height / image.shape[0], width / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    # BOX averages when it shrinks and repeats whole pixels when it enlarges.
    return PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BOX)


def encode(image: PIL.Image.Image, format: Format) -> bytes:
    """Encodes an image as the bytes of a JPEG (quality 90) or PNG file."""
    data = io.BytesIO()
    image.save(data, format, **({"quality": 90} if format == "jpeg" else {}))
    return data.getvalue()


def encode_figure(figure: "Figure") -> bytes:
    """Encodes a figure of matplotlib as the bytes of a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def write_image(path: files.Path, image: Image) -> None:
    """Writes an image as JPEG or PNG by the file's suffix; creates missing folders.

    Raises UserError if the suffix is another one, the image is too large for JPEG, or writing fails.
    """
    format = FORMATS.get(path.suffix.lower())
    if format is None:
        raise UserError(f"cannot write {path}: an image's name ends in {', '.join(FORMATS)}")
    if format == "jpeg" and max(image.shape) > MAX_JPEG_SIDE:
        raise UserError(f"cannot write {path}: a JPEG has at most {MAX_JPEG_SIDE} pixels a side; name it .png")
    files.write_file(path, encode(PIL.Image.fromarray(image), format))


def write_labels(path: files.Path, labels: Labels, palette: Sequence[Colour]) -> None:
    """Writes labels as a palette PNG: its values are the labels, viewers show class colours.

    Raises UserError if the file's suffix is not .png, or writing fails.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: labels go into a .png file, which is lossless")
    image = PIL.Image.fromarray(labels)
    image.putpalette(_colour_table(palette).tobytes())
    files.write_file(path, encode(image, "png"))


def _colour_table(palette: Sequence[Colour]) -> UInt8[np.ndarray, "256 3"]:
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours


@functools.cache
def load_font(size: int) -> FreeTypeFont:
    """A font of `size` pixels with accents, Greek and Cyrillic: matplotlib ships it on every platform."""
    import matplotlib  # takes a tenth of a second

    return truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
