"""An evaluation as one HTML file: scores, classes, confusions, best and worst images; it needs no other file."""

import base64
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int64

from topformer_jax import files, metrics, pictures
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import DataSet
from topformer_jax.pictures import Labels, Picture

SIZE = 480, 720  # pixels: how wide and how high an embedded picture is at most
FLAT = 60_000  # bytes: a colorize map that takes more as PNG is embedded as JPEG
NAMED = 64  # classes: an axis with more of them has numbers instead of names
NUMBERED = 24  # classes: a matrix with more of them has no numbers in its cells
SHADES = 20  # of a cell's colour
CONFUSIONS = 20  # in their table

Confusion = Int64[np.ndarray, "classes classes"]


class ReportExample(NamedTuple):
    """An example for a report, with the scores of this image alone (shares of 1, nan where there are none)."""

    name: str
    accuracy: float  # of its pixels
    miou: float
    image: Picture
    label: Labels
    prediction: Labels


def write_report(
    path: pathlib.Path,
    *,
    title: str,
    facts: Mapping[str, str],
    data_set: DataSet,
    confusion: Confusion,
    best: Sequence[ReportExample],
    worst: Sequence[ReportExample],
) -> None:
    """Writes the report, and the folders above it.

    Args:
        path: of the HTML file.
        title: the heading.
        facts: what else stands in the summary: how many images, which checkpoint, ...
        data_set: the names and colours of the classes.
        confusion: pixels, a row a label, a column a prediction.
        best: the examples to show, best first.
        worst: likewise, worst first.

    Raises:
        UserError: the file cannot be written.
    """
    scores = metrics.scores(confusion)
    sections = {
        "Classes": _classes(scores, confusion, data_set),
        "Confusions": _matrix(confusion, data_set) + _confusions(confusion, data_set),
        "Worst images": "".join(_example(shown, data_set) for shown in worst),
        "Best images": "".join(_example(shown, data_set) for shown in best),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{name[:4]}">{name}</a> ' for name in sections)
    body = "".join(
        f'<section id="{name[:4]}"><h2>{name}</h2>{text}</section>' for name, text in sections.items()
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser itself sees to it that nothing is fetched and no script runs.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_summary(scores, facts)}<nav>{links}</nav>{body}</body></html>\n"
    )
    files.write(path, page)


def _summary(scores: metrics.Scores, facts: Mapping[str, str]) -> str:
    means = [
        ("mIoU", scores.miou, "mean over classes of intersection over union"),
        ("mAcc", scores.macc, "mean over classes of their pixels' accuracy"),
        ("aAcc", scores.aacc, "share of all labelled pixels that are right"),
    ]
    cards = "".join(
        f'<div class="card"><b>{name}</b><strong>{_percent(value, 2)}</strong><small>{meaning}</small></div>'
        for name, value, meaning in means
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'<div class="cards">{cards}</div><table class="facts">{rows}</table>'


def _classes(scores: metrics.Scores, confusion: Confusion, data_set: DataSet) -> str:
    """A row a class, the best IoU first; those that are nowhere are named below."""
    shares = confusion.sum(1) / max(confusion.sum(), 1)
    rows = [
        f'<tr><td class="dim">{label}</td><td class="name">{_named(data_set, label)}</td>'
        f"{_bar(scores.iou[label])}<td>{_percent(scores.iou[label])}</td>"
        f"<td>{_percent(scores.accuracy[label])}</td><td>{_percent(shares[label], 2)}</td></tr>"
        for label in np.argsort(-scores.iou, kind="stable").tolist()
        if np.isfinite(scores.iou[label])
    ]
    absent = [
        f"<li>{_named(data_set, label)}</li>"
        for label in range(len(confusion))
        if np.isnan(scores.iou[label])
    ]
    table = (
        '<table class="values"><thead><tr><th>Label</th><th class="name">Class</th><th class="bar"></th>'
        "<th>IoU</th><th>Accuracy</th><th>Pixels</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    if not absent:
        return table
    note = f"<p>Absent, in no label and no prediction, and left out of the means ({len(absent)}):</p>"
    return f'{table if rows else ""}{note}<ul class="legend">{"".join(absent)}</ul>'


def _matrix(confusion: Confusion, data_set: DataSet) -> str:
    """The confusion matrix of the classes that are there as an SVG drawing, each row a share of its label."""
    there = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    if not len(there):
        return "<p>No pixel has a label.</p>"
    count = len(there)
    shares = confusion[np.ix_(there, there)] / np.maximum(confusion[there].sum(1, keepdims=True), 1)
    cell = min(max(900 / count, 5), 44)
    size = min(13.0, 0.85 * cell) if count <= NAMED else 12
    names = (
        [_short(data_set.classes[label]) for label in there] if count <= NAMED else [str(x) for x in there]
    )
    margin = 0.63 * size * max(map(len, names)) + 10
    marked = [place for place, label in enumerate(there) if count <= NAMED or label % 10 == 0]
    texts = []
    for place in marked:
        middle, text = margin + (place + 0.5) * cell, escape(names[place])
        texts.append(
            f'<text x="{margin - 5:.0f}" y="{middle:.1f}" dy=".35em" text-anchor="end">{text}</text>'
        )
        turned = f"translate({middle:.1f} {margin - 5:.0f}) rotate(-90)"
        texts.append(f'<text transform="{turned}" dy=".35em">{text}</text>')
    if count <= NUMBERED:
        texts += [
            f'<text class="share" x="{margin + (x + 0.5) * cell:.1f}" y="{margin + (y + 0.5) * cell:.1f}" '
            f'dy=".35em" text-anchor="middle" font-size="{cell * 0.36:.1f}">{100 * shares[y, x]:.0f}</text>'
            for y, x in np.argwhere(shares >= 0.005)
        ]
    total = margin + count * cell + 2
    lines = "".join(f"M0 {x}h{count}M{x} 0v{count}" for x in [*marked, count])
    return (
        "<p>A row is a label, a column what its pixels were taken for, in percent of the label's pixels: "
        '<span class="right">right</span>, <span class="wrong">wrong</span>; the stronger the colour, the more.'
        f"{' The numbers are the labels in the table above.' if count > NAMED else ''}</p>"
        f'<div class="matrix"><svg viewBox="0 0 {total:.0f} {total:.0f}" style="--size:{total:.0f}px" '
        f'font-size="{size:.1f}" role="img" aria-label="confusion matrix">'
        f'<g transform="translate({margin:.1f} {margin:.1f}) scale({cell:.3f})">{_cells(shares)}'
        f'<path class="lines" d="{lines}"/></g>{"".join(texts)}</svg></div>'
    )


def _cells(shares: np.ndarray) -> str:
    """The coloured squares of a matrix. A path a shade: thousands of them stay a small file."""
    shades = np.ceil(np.sqrt(shares) * SHADES).astype(int)  # the root shows what is rare
    shades[shares < 0.001] = 0
    own = np.eye(len(shares), dtype=bool)
    paths = []
    for name, mask in (("right", own), ("wrong", ~own)):
        for shade in range(1, SHADES + 1):
            squares = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere((shades == shade) & mask))
            if squares:
                paths.append(f'<path class="{name}" fill-opacity="{shade / SHADES:g}" d="{squares}"/>')
    return "".join(paths)


def _confusions(confusion: Confusion, data_set: DataSet) -> str:
    """The confusions with the most pixels."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(place), len(wrong)) for place in order if wrong.flat[place]]
    if not pairs:
        return "<p>No pixel was taken for another class.</p>"
    rows = []
    for label, taken in pairs:
        pixels, own = wrong[label, taken], confusion[label].sum()
        rows.append(
            f'<tr><td class="name">{_named(data_set, label)}</td><td class="name">{_named(data_set, taken)}</td>'
            f"{_bar(pixels / own)}<td>{_percent(pixels / own)}</td>"
            f"<td>{_percent(pixels / confusion.sum(), 2)}</td></tr>"
        )
    return (
        '<h3>The most frequent</h3><table class="values"><thead><tr>'
        '<th class="name">Label</th><th class="name">taken for</th>'
        '<th class="bar"></th><th>of the label</th><th>of all pixels</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _example(shown: ReportExample, data_set: DataSet) -> str:
    """Image, label, prediction and errors side by side, and the classes in them, the largest first."""
    panels: list[tuple[str, Picture, pictures.Format]] = [
        ("image", shown.image, "jpeg"),
        ("label", pictures.colorize(shown.label, data_set.palette), "png"),
        ("prediction", pictures.colorize(shown.prediction, data_set.palette), "png"),
        ("errors", pictures.errors(shown.label, shown.prediction), "png"),
    ]
    images = "".join(
        f"<div>{_image(picture, f'{name} of {shown.name}', format)}<small>{name}</small></div>"
        for name, picture, format in panels
    )
    counts = np.bincount(
        np.concatenate([shown.label.ravel(), shown.prediction.ravel()]), minlength=IGNORE_LABEL + 1
    )
    classes = [
        x for x in np.argsort(-counts, kind="stable").tolist() if counts[x] and x < len(data_set.classes)
    ]
    entries = [_named(data_set, label) for label in classes]
    if (shown.label >= len(data_set.classes)).any():
        entries.append(_swatch("void", (0, 0, 0)))
    return (
        f"<figure><figcaption><b>{escape(shown.name)}</b> {_percent(float(shown.accuracy))} of its pixels right, "
        f'mIoU {_percent(float(shown.miou))}</figcaption><div class="panels">{images}</div>'
        f'<ul class="legend">{"".join(f"<li>{entry}</li>" for entry in entries)}</ul></figure>'
    )


def _image(picture: Picture, name: str, format: pictures.Format) -> str:
    """A picture within the page, reduced to what is looked at."""
    scale = min(1.0, SIZE[0] / picture.shape[1], SIZE[1] / picture.shape[0])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    data = pictures.encoded(small, format)
    if format == "png" and len(data) > FLAT:
        format, data = "jpeg", pictures.encoded(small)
    text = base64.b64encode(data).decode()
    look = ' class="tiny"' if size[0] < SIZE[0] // 2 else ""
    return (
        f'<img{look} width="{size[0]}" height="{size[1]}" alt="{escape(name)}" '
        f'src="data:image/{format};base64,{text}">'
    )


def _named(data_set: DataSet, label: int) -> str:
    return _swatch(data_set.classes[label], data_set.palette[label])


def _swatch(name: str, colour: tuple[int, int, int]) -> str:
    return f'<span class="class"><i style="background:#{bytes(colour).hex()}"></i>{escape(name)}</span>'


def _bar(share: float) -> str:
    return f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>'


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}" if np.isfinite(share) else "&ndash;"


def _short(name: str, letters: int = 18) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --dim: #5d6873; --paper: #fff; --line: #dde2e7; --soft: #f1f3f6;
  --bar: #3674c9; --right: #17865a; --wrong: #e0491f; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #98a3ae; --paper: #14181c; --line: #333b43; --soft: #1f252b; --bar: #5b95e5;
    --right: #2fb884; --wrong: #ff7a4d; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; padding: 16px 20px 48px; max-width: 1120px; overflow-wrap: anywhere;
  font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 26px; line-height: 1.2; } h2 { font-size: 20px; margin: 36px 0 8px; } h3 { font-size: 16px; }
h1, h2, h3, p { break-after: avoid; break-inside: avoid; }
small, figcaption, .dim, th { color: var(--dim); } figcaption b { color: var(--ink); }
a { color: var(--bar); margin-right: 12px; }
.cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin-bottom: 16px; }
.card { padding: 12px 16px; border-radius: 8px; background: var(--soft); break-inside: avoid; }
.card strong { display: block; font-size: 30px; line-height: 1.2; white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } thead { overflow-wrap: normal; }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; font-weight: normal; }
.facts { margin-bottom: 16px; } .facts th { overflow-wrap: normal; }
.values { width: 100%; }
.values td, .values th { border-bottom: 1px solid var(--line); text-align: right; vertical-align: middle;
  white-space: nowrap; }
.values .name { text-align: left; white-space: normal; min-width: 11em; }
.values td.bar { width: 40%; background: linear-gradient(var(--soft) 0 0) center/100% 12px no-repeat content-box; }
.bar i { display: block; height: 12px; min-width: 1px; background: var(--bar); }
tr, figure { break-inside: avoid; }
.class { display: inline-flex; gap: 7px; }
.class i { flex: none; width: 13px; height: 13px; margin-top: 4px; border: 1px solid #8888; border-radius: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0; padding: 0; list-style: none; }
.matrix { overflow-x: auto; } svg { display: block; fill: var(--ink); }
svg { width: 100%; max-width: var(--size); min-width: min(640px, var(--size)); }
svg path { shape-rendering: crispEdges; } path.right { fill: var(--right); } path.wrong { fill: var(--wrong); }
.lines { stroke: var(--ink); stroke-opacity: .18; stroke-width: 1; vector-effect: non-scaling-stroke; fill: none; }
p span { font-weight: 600; } span.right { color: var(--right); } span.wrong { color: var(--wrong); }
figure { margin: 0 0 28px; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin-top: 6px; }
img { display: block; width: 100%; height: auto; max-height: 480px; object-fit: contain; object-position: 0 0; }
.tiny { image-rendering: pixelated; }
@media screen and (max-width: 640px) {
  body { padding: 4px 12px; } .panels { grid-template-columns: 1fr 1fr; } .card { padding: 8px; }
  .card strong { font-size: 20px; } .card small { display: none; } th, td { padding-right: 6px; }
  .values { font-size: 12px; } .values th { white-space: normal; } .values .name { min-width: 8.5em; }
  .values td.bar { width: 16%; } }
@page { size: A4; margin: 14mm; }
@media print {
  :root { color-scheme: light; } body { padding: 0; font-size: 9.5pt; max-width: none; } nav { display: none; }
  h1 { margin-top: 0; } .values td { padding-top: 1px; padding-bottom: 1px; }
  svg { min-width: 0; } .matrix { overflow: visible; break-inside: avoid; } }
"""
