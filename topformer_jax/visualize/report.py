"""An evaluation as one HTML file: scores, classes, confusions, best and worst images.

The page (`report.html.j2`) needs no other file and no network; this module computes the numbers and images in it.
"""

import base64
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jinja2
import numpy as np
import PIL.Image
from jaxtyping import Int64

from topformer_jax.data.batch import Image, Labels
from topformer_jax.data.catalog import DataSet
from topformer_jax.inference import metrics
from topformer_jax.runtime import files
from topformer_jax.visualize import drawing

MAX_IMAGE_SIZE = 480, 720  # pixels: width and height of an embedded image, at most
MAX_NAMED = 60  # classes: beyond, only every n-th one has its name beside the matrix
MAX_NUMBERED = 24  # classes: beyond, the cells of the matrix show no numbers
MAX_CONFUSIONS = 20  # rows of the table of confusions
LONGEST_NAME = 18  # characters of a class beside the matrix

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

    `facts` are rows of the summary: number of images, checkpoint, ... The confusion matrix counts pixels, with one
    row per label and one column per prediction. `best` and `worst` are the examples to show, in this order.
    """
    scores = metrics.compute_scores(confusion)
    order = np.argsort(-scores.iou, kind="stable").tolist()
    labelled = confusion.sum(1)
    text = pathlib.Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Template(text, autoescape=True, undefined=jinja2.StrictUndefined)
    page = template.render(
        title=title,
        facts=facts,
        data_set=data_set,
        scores=scores,
        present=[label for label in order if np.isfinite(scores.iou[label])],
        absent=np.flatnonzero(np.isnan(scores.iou)).tolist(),
        pixels=labelled / max(labelled.sum(), 1),
        matrix=_draw_matrix(confusion, data_set),
        confusions=_find_confusions(confusion),
        galleries=[
            (heading, [(example, *_show_example(example, data_set)) for example in examples])
            for heading, examples in (("Worst", worst), ("Best", best))
            if examples
        ],
    )
    files.write_file(path, page)


def _find_confusions(confusion: Confusion) -> list[tuple[int, int, float, float]]:
    """The label, the wrong prediction and their shares of the label's and of all pixels, most frequent first."""
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = [divmod(int(place), len(wrong)) for place in order if wrong.flat[place]]
    return [(*pair, wrong[pair] / confusion[pair[0]].sum(), wrong[pair] / confusion.sum()) for pair in pairs]


def _draw_matrix(confusion: Confusion, data_set: DataSet) -> str | None:
    """The matrix of the classes that occur, each row in shares of its label's pixels; None if none occurs."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    present = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    if not len(present):
        return None
    count = len(present)
    shares = confusion[np.ix_(present, present)] / np.maximum(confusion[present].sum(1), 1)[:, None]
    figure = Figure(figsize=(min(3 + 0.3 * count, 12),) * 2, layout="constrained")
    axes = figure.subplots()
    is_right = np.eye(count, dtype=bool)
    for hidden, colours in ((is_right, "Oranges"), (~is_right, "Greens")):
        # The square root makes rare confusions visible; black numbers need colours below the darkest.
        axes.imshow(np.ma.array(shares, mask=hidden), colours, norm=PowerNorm(0.5, 0, 2))
    places = range(0, count, -(-count // MAX_NAMED))
    names = [files.shorten(data_set.classes[present[place]], LONGEST_NAME) for place in places]
    axes.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.xaxis.tick_top()
    for row, column in np.argwhere(shares >= 0.005) if count <= MAX_NUMBERED else ():
        axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=8)
    return _as_uri(drawing.encode_figure(figure), "png")


def _show_example(example: ReportExample, data_set: DataSet) -> tuple[dict[str, str], list]:
    """Image, label, prediction and error map by name, and the classes in them, the largest first."""
    panels: dict[str, tuple[Image, drawing.Format]] = {
        "image": (example.image, "jpeg"),
        "label": (drawing.colorize(example.label, data_set.palette), "png"),
        "prediction": (drawing.colorize(example.prediction, data_set.palette), "png"),
        "errors": (drawing.error_map(example.label, example.prediction), "png"),
    }
    sources = {}
    for name, (image, format) in panels.items():
        picture = PIL.Image.fromarray(image)
        picture.thumbnail(MAX_IMAGE_SIZE, PIL.Image.Resampling.BOX)
        sources[name] = _as_uri(drawing.encode(picture, format), format)
    labels = np.concatenate([example.label.ravel(), example.prediction.ravel()])
    return sources, drawing.class_shares(labels[None], data_set)


def _as_uri(image: bytes, format: drawing.Format) -> str:
    return f"data:image/{format};base64,{base64.b64encode(image).decode()}"
