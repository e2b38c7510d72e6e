"""An evaluation as one HTML file: scores, classes, confusions, best and worst images.

The page (`report.html.j2`) needs no other file and no network; this module computes the numbers and images in it.
"""

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import jinja2
import numpy as np
from jaxtyping import Float, Int64

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels
from topformer_jax.data.catalog import DataSet
from topformer_jax.inference import metrics
from topformer_jax.runtime import files
from topformer_jax.visualize import drawing
from topformer_jax.visualize.legend import Colour

MAX_IMAGE_SIZE = 480, 720  # pixels: width and height of an embedded image, at most
MAX_PNG_BYTES = 60_000  # a colour map that takes more as PNG is embedded as JPEG
MAX_NAMED = 64  # classes: beyond, the axes of the matrix show label numbers instead of names
MAX_NUMBERED = 24  # classes: beyond, the cells of the matrix show no numbers
RIGHT, WRONG = (23, 134, 90), (224, 73, 31)  # red, green, blue
MAX_CONFUSIONS = 20  # rows of the table of confusions

Confusion = Int64[np.ndarray, "classes classes"]


class ReportExample(NamedTuple):
    """An example for a report with its own scores, as shares of 1; nan where it has no labelled pixel."""

    name: str
    accuracy: float  # of its pixels
    miou: float
    image: Image
    label: Labels
    prediction: Labels


def write_report(
    path: files.Path,
    *,
    title: str,
    facts: Mapping[str, str],
    data_set: DataSet,
    confusion: Confusion,
    best: Sequence[ReportExample],
    worst: Sequence[ReportExample],
) -> None:
    """Writes the report; creates missing folders.

    Args:
        path: of the HTML file.
        title: the heading.
        facts: rows of the summary: number of images, checkpoint, ...
        data_set: names and colours of the classes.
        confusion: int64 `[classes, classes]`, pixels; a row a label, a column a prediction.
        best: the examples to show, best first.
        worst: likewise, worst first.

    Raises:
        UserError: writing fails.
    """
    scores = metrics.compute_scores(confusion)
    galleries = [
        (heading, [_example_figure(example, data_set) for example in examples])
        for heading, examples in (("Worst", worst), ("Best", best))
        if examples
    ]
    absent = np.flatnonzero(np.isnan(scores.iou)).tolist()
    page = _template().render(
        title=title,
        facts=facts,
        scores=scores,
        present=_class_rows(scores, confusion, data_set),
        absent=[_class_entry(data_set, label) for label in absent],
        matrix=_draw_matrix(confusion, data_set),
        numbered_axes=np.count_nonzero(confusion.sum(0) + confusion.sum(1)) > MAX_NAMED,
        confusions=_confusion_rows(confusion, data_set),
        galleries=galleries,
    )
    files.write_file(path, page)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topformer_jax", "visualize"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2")


def _class_rows(scores: metrics.Scores, confusion: Confusion, data_set: DataSet) -> list[dict[str, Any]]:
    """The classes that occur in a label or a prediction, highest IoU first."""
    shares = confusion.sum(1) / max(confusion.sum(), 1)
    return [
        {
            "label": label,
            "entry": _class_entry(data_set, label),
            "iou": scores.iou[label],
            "accuracy": scores.accuracy[label],
            "pixels": shares[label],
        }
        for label in np.argsort(-scores.iou, kind="stable").tolist()
        if np.isfinite(scores.iou[label])
    ]


def _confusion_rows(confusion: Confusion, data_set: DataSet) -> list[dict[str, Any]]:
    """The pairs of label and wrong prediction with the most pixels, largest first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = [divmod(int(place), len(wrong)) for place in order if wrong.flat[place]]
    return [
        {
            "label": _class_entry(data_set, label),
            "prediction": _class_entry(data_set, prediction),
            "of_label": wrong[label, prediction] / confusion[label].sum(),
            "of_all": wrong[label, prediction] / confusion.sum(),
        }
        for label, prediction in pairs
    ]


def _draw_matrix(confusion: Confusion, data_set: DataSet) -> str | None:
    """The matrix of the classes that occur as the data URI of a PNG file; None if none occurs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    present = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    if not len(present):
        return None
    count = len(present)
    shares, colours = _colour_matrix(confusion[np.ix_(present, present)], confusion[present].sum(1))
    named = count <= MAX_NAMED
    figure = Figure(figsize=(min(3 + 0.3 * count, 12),) * 2, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(colours, interpolation="nearest")
    places = np.flatnonzero(named | (present % 10 == 0))
    names = [_shorten(data_set.classes[label]) if named else str(label) for label in present[places]]
    axes.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.xaxis.tick_top()
    if count <= MAX_NUMBERED:
        for row, column in np.argwhere(shares >= 0.005):
            text = f"{100 * shares[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    return f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"


def _colour_matrix(
    confusion: Confusion, labelled: Int64[np.ndarray, " classes"]
) -> tuple[Float[np.ndarray, "classes classes"], Float[np.ndarray, "classes classes 3"]]:
    """Each row as shares of its label's pixels, and its colours: green right, orange wrong, stronger for more."""
    shares = confusion / np.maximum(labelled, 1)[:, None]
    tint = np.where(np.eye(len(shares), dtype=bool)[..., None], RIGHT, WRONG) / 255
    # The square root makes rare confusions visible.
    return shares, 1 - np.sqrt(shares)[..., None] * (1 - tint)


def _example_figure(example: ReportExample, data_set: DataSet) -> dict[str, Any]:
    """Image, label, prediction and error map, and the classes in them, the largest first."""
    panels: list[tuple[str, Image, drawing.Format]] = [
        ("image", example.image, "jpeg"),
        ("label", drawing.colorize(example.label, data_set.palette), "png"),
        ("prediction", drawing.colorize(example.prediction, data_set.palette), "png"),
        ("errors", drawing.error_map(example.label, example.prediction), "png"),
    ]
    labels = np.concatenate([example.label.ravel(), example.prediction.ravel()])
    counts = np.bincount(labels, minlength=IGNORE_LABEL + 1)
    order = np.argsort(-counts, kind="stable").tolist()
    present = [label for label in order if counts[label] and label < len(data_set.classes)]
    classes = [_class_entry(data_set, label) for label in present]
    if (example.label >= len(data_set.classes)).any():
        classes.append(_entry("void", (0, 0, 0)))
    return {
        "name": example.name,
        "accuracy": float(example.accuracy),
        "miou": float(example.miou),
        "panels": [{"name": name, **_embed_image(image, format)} for name, image, format in panels],
        "classes": classes,
    }


def _embed_image(image: Image, format: drawing.Format) -> dict[str, Any]:
    """An image as a data URI, reduced to the size it is looked at."""
    max_width, max_height = MAX_IMAGE_SIZE
    scale = min(1.0, max_width / image.shape[1], max_height / image.shape[0])
    width, height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    data = drawing.encode_image(small, format)
    if format == "png" and len(data) > MAX_PNG_BYTES:
        format, data = "jpeg", drawing.encode_image(small)
    return {
        "width": width,
        "height": height,
        "tiny": width < max_width // 2,
        "source": f"data:image/{format};base64,{base64.b64encode(data).decode()}",
    }


def _class_entry(data_set: DataSet, label: int) -> dict[str, str]:
    return _entry(data_set.classes[label], data_set.palette[label])


def _entry(name: str, colour: Colour) -> dict[str, str]:
    return {"name": name, "colour": f"#{bytes(colour).hex()}"}


def _shorten(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
