"""How often each class occurs, as a picture: a bar a class, a panel a split."""

import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

from topformer_jax import files
from topformer_jax.data.catalog import DataSet


def write_histogram(
    path: files.Path, data_set: DataSet, pixels: Mapping[str, Int64[np.ndarray, " classes"]]
) -> None:
    """Draws each class's share of the labelled pixels on a logarithmic axis, in the class's colour, as a PNG file.

    Args:
        path: of the file; missing folders are created.
        data_set: names and colours of the classes.
        pixels: int64 `[classes]` by the name of the split.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(data_set.classes)
    figure = Figure(figsize=(11, 1.5 + 0.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    colours = np.array(data_set.palette) / 255
    panels = figure.subplots(1, len(pixels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (split, counts) in zip(panels, pixels.items(), strict=True):
        shares = 100 * counts / max(counts.sum(), 1)
        axes.barh(np.arange(count), shares, color=colours, edgecolor="grey", linewidth=0.5)
        axes.set_xscale("log")
        axes.set_xlim(1e-4, 100)
        axes.set_yticks(np.arange(count), [f"{name} {label}" for label, name in enumerate(data_set.classes)])
        axes.set_ylim(count - 0.5, -0.5)  # the first class on top
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(split)
        axes.set_xlabel("percent of the labelled pixels")
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    files.write_file(path, image.getvalue())
