"""How often each class occurs, as a picture: a panel a split."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from topformer_jax.data.catalog import DataSet
from topformer_jax.runtime import files

MAX_NAMED = 50  # classes of a classifier: more are a curve without names
Counts = Mapping[str, Int64[np.ndarray, " classes"]]  # by the name of the split


def draw_pixel_shares(path: files.Path, data_set: DataSet, pixels: Counts) -> None:
    """Draws each class's share of the labelled pixels on a logarithmic axis, in the class's colour, as a PNG file.

    Args:
        path: of the file; missing folders are created.
        data_set: names and colours of the classes.
        pixels: of each class.

    Raises:
        UserError: the file cannot be written.
    """
    figure, panels = _make_panels(pixels, height=1.5 + 0.2 * len(data_set.classes), sharex=True, sharey=True)
    colours = np.array(data_set.palette) / 255
    for axes, counts in zip(panels, pixels.values(), strict=True):
        shares = 100 * counts / max(counts.sum(), 1)
        _draw_bars(axes, data_set.classes, shares, color=colours, edgecolor="grey", linewidth=0.5)
        axes.set_xscale("log")
        axes.set_xlim(1e-4, 100)
        axes.set_xlabel("percent of the labelled pixels")
    _write(path, figure)


def draw_image_counts(path: files.Path, data_set: DataSet, images: Counts) -> None:
    """Draws how many images each class has as a PNG file: a bar a class, or of many classes a curve, largest first.

    Args:
        path: of the file; missing folders are created.
        data_set: names of the classes.
        images: of each class.

    Raises:
        UserError: the file cannot be written.
    """
    count = len(data_set.classes)
    named = count <= MAX_NAMED
    figure, panels = _make_panels(images, height=1.5 + 0.2 * count if named else 4.5, sharey=named)
    for axes, counts in zip(panels, images.values(), strict=True):
        most = max(int(counts.max()), 1) * 1.05
        if named:
            _draw_bars(axes, data_set.classes, counts)
            axes.set_xlim(0, most)
            axes.set_xlabel("images")
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.stairs(np.sort(counts)[::-1], np.arange(count + 1) + 0.5, fill=True, alpha=0.5)
            axes.set_xlim(0.5, count + 0.5)
            axes.set_ylim(0, most)
            axes.grid(alpha=0.3)
            axes.set_xlabel("classes, largest first")
            axes.set_ylabel("images")
            axes.yaxis.get_major_locator().set_params(integer=True)
    _write(path, figure)


def _make_panels(
    splits: Counts, *, height: float, sharex: bool = False, sharey: bool = False
) -> tuple[Any, Sequence[Any]]:
    """A figure, and the axes of each split side by side, of one scale where it is shared."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(splits), sharex=sharex, sharey=sharey, squeeze=False)[0]
    for axes, split in zip(panels, splits, strict=True):
        axes.set_title(split)
    return figure, list(panels)


def _draw_bars(axes: Any, names: Sequence[str], values: np.ndarray, **style: Any) -> None:
    """A bar a class, the first class on top."""
    places = np.arange(len(names))
    axes.barh(places, values, **style)
    axes.set_yticks(places, [f"{name} {label}" for label, name in enumerate(names)], parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def _write(path: files.Path, figure: Any) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    files.write_file(path, image.getvalue())
