"""Text on images: the legend of an overlay, and single lines of text."""

import bisect
import functools
import importlib.util
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import UInt8
from PIL.ImageFont import FreeTypeFont, truetype

from topformer_jax.data.batch import Labels
from topformer_jax.data.catalog import DataSet

Canvas = UInt8[np.ndarray, "_ _ 3"]  # RGB; "_": its size is independent of the other arguments' sizes
Colour = tuple[int, int, int]

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
BACKGROUND, TEXT, OUTLINE = (250, 250, 250), (24, 24, 24), (128, 128, 128)
FONT_SIZES = 13, 96  # pixels: the smallest and the largest font of a legend
MAX_COLUMNS = 6  # a wider legend is hard to read as one table


def draw_legend(
    labels: Labels, data_set: DataSet, *, width: int | None = None, height: int | None = None, font_size: int
) -> Canvas:
    """A table of the classes in `labels`: a colour swatch, the name and the share of the pixels.

    Args:
        labels: uint8 `[h, w]`.
        data_set: names and colours of the classes.
        width: in pixels, to fill with as many columns as fit; the result is wider if one column is.
        height: in pixels, to fill from top to bottom; give this or `width`.
        font_size: in pixels.
    """
    font = load_font(font_size)
    entries = class_shares(labels, data_set)
    texts = [(truncate_text(name, font, 12 * font_size), format_share(share)) for name, _, share in entries]
    line, margin, gap = round(1.5 * font_size), font_size, 2 * font_size
    name_width, share_width = (
        math.ceil(max(map(font.getlength, column))) for column in zip(*texts, strict=True)
    )
    pitch = line + name_width + font_size + share_width + gap
    if height is not None:
        rows = max(1, (height - 2 * margin) // line)
    else:
        fitting = ((width or 0) - 2 * margin + gap) // pitch
        rows = math.ceil(len(entries) / min(max(fitting, 1), MAX_COLUMNS))
    columns = math.ceil(len(entries) / rows)
    extent = columns * pitch - gap + 2 * margin, min(rows, len(entries)) * line + 2 * margin
    canvas = PIL.Image.new("RGB", (max(extent[0], width or 0), max(extent[1], height or 0)), BACKGROUND)
    draw = PIL.ImageDraw.Draw(canvas)
    for number, ((_, colour, _), (name, share)) in enumerate(zip(entries, texts, strict=True)):
        left, middle = margin + number // rows * pitch, margin + number % rows * line + line // 2
        swatch = (left, middle - font_size // 2, left + font_size, middle + font_size // 2)
        draw.rectangle(swatch, colour, OUTLINE, max(1, font_size // 16))
        draw.text((left + line, middle), name, TEXT, font, "lm")
        draw.text((left + pitch - gap, middle), share, TEXT, font, "rm")
    return np.asarray(canvas)


def legend_font_size(height: int, width: int) -> int:
    """The font size, in pixels, of the legend of an image of `height` x `width` pixels."""
    smallest, largest = FONT_SIZES
    return round(min(max(math.sqrt(height * width) / 40, smallest), largest))


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


def draw_line(text: str, font_size: int, width: int) -> Canvas:
    """One line of text on white, twice the font size high and `width` pixels wide; longer text is truncated."""
    font = load_font(font_size)
    canvas = PIL.Image.new("RGB", (width, 2 * font_size), WHITE)
    PIL.ImageDraw.Draw(canvas).text((0, font_size), truncate_text(text, font, width), TEXT, font, "lm")
    return np.asarray(canvas)


def truncate_text(text: str, font: FreeTypeFont, width: int) -> str:
    """The text on one line of at most `width` pixels; an ellipsis replaces what does not fit."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    length = bisect.bisect(
        range(1, len(text)), width, key=lambda end: math.ceil(font.getlength(text[:end] + "…"))
    )
    return text[:length].rstrip() + "…"


def paste(pieces: Sequence[tuple[int, int, Canvas]], background: Colour = BACKGROUND) -> Canvas:
    """Images on one canvas, each at its (top, left) in pixels."""
    height = max(top + piece.shape[0] for top, _, piece in pieces)
    width = max(left + piece.shape[1] for _, left, piece in pieces)
    canvas = np.full((height, width, 3), background, np.uint8)
    for top, left, piece in pieces:
        canvas[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return canvas


@functools.cache
def load_font(size: int) -> FreeTypeFont:
    """A font of `size` pixels with accents, Greek and Cyrillic: matplotlib ships it on every platform."""
    font = ("fonts", "ttf", "DejaVuSans.ttf")
    package = importlib.util.find_spec("matplotlib")  # found, not imported: that takes a quarter of a second
    path = pathlib.Path((package and package.origin) or "").parent.joinpath("mpl-data", *font)
    if not path.exists():  # some systems keep its data elsewhere
        import matplotlib

        path = pathlib.Path(matplotlib.get_data_path(), *font)
    return truetype(str(path), size)
