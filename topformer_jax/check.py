"""Looks through a data set before a training: what it holds, what is wrong with it, and whether training would start.

  python -m topformer_jax.check --config configs/topformer_b_ade.py --config.data.root=DIR --output DIR
  python -m topformer_jax.check --config configs/topformer_b_imagenet.py --config.data.root=DIR --output DIR

Reads every image and label once. Prints sizes, counts and classes of both splits, then problems and warnings, a line
each. Exit status: 0 if training would start, 1 if it would not or would learn nonsense, 2 if nothing can be checked.
--output gets this report as report.txt and report.json, and as classes.png how often each class occurs.
"""

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--output", type=files.as_path, metavar="DIR", help="default: runs/<config name>/check"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="read the first N examples of each split (default: all)"
    )
    return parser


cli.answer_help(__name__, make_parser)

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from topformer_jax.inspection import (
    class_rules,
    classes as class_inspection,
    histogram,
    label_rules,
    labels as label_inspection,
)
from topformer_jax.inspection.classes import ClassInspection, ClassSplit
from topformer_jax.inspection.facts import Inspection, SplitFacts
from topformer_jax.inspection.labels import LabelInspection, LabelSplit
from topformer_jax.inspection.rules import Finding, Level
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError

HEADINGS: dict[Level, str] = {"problem": "PROBLEMS", "warning": "WARNINGS", "note": "NOTES"}
SMALLEST_CLASSES = 10  # which the table of a classifier's classes shows if there are more than MAX_NAMED
Rows = list[list[str]]


def format_report(inspection: Inspection, findings: list[Finding]) -> str:
    """The report for a terminal: tables of the splits and of the classes, the findings, and the verdict."""
    data, (_, _, split_rows, class_rows, *_) = inspection.config.data, TASKS[inspection.config.task]
    settings = [f", data.{name}={json.dumps(value)}" for name, value in _list_settings(inspection).items()]
    parts = [
        f"{data.dataset} ({data.source}) in {data.root or 'memory'}: {len(inspection.data_set.classes)} classes"
        + "".join(settings),
        cli.table(_split_rows(inspection) + split_rows(inspection)),
    ]
    classes = class_rows(inspection)
    parts += [cli.table(classes)] if classes else []
    for level, heading in HEADINGS.items():
        lines = [f"  {finding.rule}: {finding.text}" for finding in findings if finding.level == level]
        parts += ["\n".join([heading, *lines])] if lines else []
    problems = count_problems(findings)
    plural = "" if problems == 1 else "s"
    verdict = f"training would not start: {problems} problem{plural}" if problems else "training would start"
    return "\n\n".join([*parts, verdict]) + "\n"


def as_json(inspection: Inspection, findings: list[Finding]) -> str:
    """The report for scripts."""
    data, split_json = inspection.config.data, TASKS[inspection.config.task][4]
    report = {
        "config": inspection.config.name,
        "dataset": data.dataset,
        "source": data.source,
        "root": data.root,
        **_list_settings(inspection),
        "splits": {
            name: _split_json(split) | split_json(inspection, split)
            for name, split in inspection.splits.items()
        },
        "findings": [finding._asdict() for finding in findings],
        "would_start": not count_problems(findings),
    }
    return json.dumps(report, indent=1) + "\n"


def count_problems(findings: list[Finding]) -> int:
    """How many findings keep a training from starting, or from learning."""
    return sum(finding.level == "problem" for finding in findings)


# Of every task


def _list_settings(inspection: Inspection) -> dict[str, Any]:
    """The settings of the data that decide what labels mean."""
    names = ("reduce_zero_label",) if inspection.config.task == "segmentation" else ()
    return {name: inspection.config.data[name] for name in names}


def _split_rows(inspection: Inspection) -> Rows:
    splits = list(inspection.splits.values())
    rows = [["", *(split.name for split in splits)]]
    rows.append(["examples", *(_format_count(split) for split in splits)])
    for axis, side in ((1, "width"), (0, "height")):
        rows.append([f"{side}: smallest / median / largest", *(_format_sides(s, axis) for s in splits)])
    rows.append(["distinct sizes", *(f"{len(split.sizes):,}" for split in splits)])
    return rows


def _format_count(split: SplitFacts) -> str:
    if split.refusal:
        return "cannot be opened"
    if not split.is_whole:
        return f"first {split.examples:,} of {split.available:,}"
    return f"{split.examples:,}"


def _format_sides(split: SplitFacts, axis: int) -> str:
    return _format_range(np.repeat([size[axis] for size in split.sizes], list(split.sizes.values())))


def _format_range(numbers: np.ndarray) -> str:
    """Smallest, median and largest one."""
    ordered = np.sort(numbers)
    return f"{ordered[0]} / {ordered[len(ordered) // 2]} / {ordered[-1]}" if len(ordered) else "-"


def _split_json(split: SplitFacts) -> dict[str, Any]:
    return {
        "available": split.available,
        "examples": split.examples,
        "sizes": [
            {"height": height, "width": width, "images": count}
            for (height, width), count in sorted(split.sizes.items())
        ],
    }


# Of segmentation


def _label_rows(inspection: LabelInspection) -> Rows:
    splits = list(inspection.splits.values())
    rows = [["labels read", *(f"{split.labels:,}" for split in splits)]]
    for kind in sorted(set().union(*(split.kinds for split in splits))):
        rows.append([f"  {kind}", *(f"{split.kinds[kind].count:,}" for split in splits)])
    rows.append(["values", *(_format_values(split) for split in splits)])
    rows.append(
        ["void pixels", *(_format_share(inspection.void_pixels(s.name), int(s.pixels.sum())) for s in splits)]
    )
    return rows


def _class_pixel_rows(inspection: LabelInspection) -> Rows:
    """For each class and split the share of the labelled pixels, and how many labels hold the class."""
    rows = [["class", *(text for name in inspection.splits for text in (name, "labels"))]]
    columns: list[list[str]] = []
    for name in inspection.splits:
        pixels, labels = inspection.class_pixels(name), inspection.class_labels(name)
        columns.append([_format_share(count, sum(pixels.tolist())) for count in pixels.tolist()])
        columns.append([f"{count:,}" for count in labels])
    for label, cells in enumerate(zip(*columns, strict=True)):
        rows.append([f"{label:3} {inspection.data_set.classes[label]}", *cells])
    return rows


def _format_values(split: LabelSplit) -> str:
    """The range of the stored values, 255 apart."""
    values = np.flatnonzero(split.pixels)
    below = values[values < 255]
    parts = [f"{below[0]}-{below[-1]}"] if len(below) else []
    parts += ["255"] if split.pixels[255] else []
    parts += [f"up to {split.largest}"] if split.largest > 255 else []
    return ", ".join(parts) or "-"


def _format_share(count: int, total: int) -> str:
    return f"{count / total:.3%}" if count else "-"


def _label_json(inspection: LabelInspection, split: LabelSplit) -> dict[str, Any]:
    pixels, labels = inspection.class_pixels(split.name), inspection.class_labels(split.name)
    return {
        "labels": split.labels,
        "label_files": {kind: names.count for kind, names in sorted(split.kinds.items())},
        "values": {int(value): int(split.pixels[value]) for value in np.flatnonzero(split.pixels[:256])},
        "largest_value": split.largest,
        "void_pixels": inspection.void_pixels(split.name),
        "classes": [
            {"name": name, "pixels": int(pixels[label]), "labels": int(labels[label])}
            for label, name in enumerate(inspection.data_set.classes)
        ],
    }


def _draw_labels(path: files.Path, inspection: LabelInspection) -> None:
    pixels = {name: inspection.class_pixels(name) for name in inspection.splits}
    histogram.draw_pixel_shares(path, inspection.data_set, pixels)


# Of classification


def _class_rows(inspection: ClassInspection) -> Rows:
    counts = (split.class_images if split.examples else np.zeros(0) for split in inspection.splits.values())
    return [["images per class: smallest / median / largest", *map(_format_range, counts)]]


def _class_image_rows(inspection: ClassInspection) -> Rows:
    """For each class, or the smallest in train, how many images it has; nothing where train was read in part."""
    splits, names = list(inspection.splits.values()), inspection.data_set.classes
    train = inspection.splits["train"]
    if not train.is_whole:
        return []
    heading, shown = "class", np.arange(len(names))
    if len(names) > histogram.MAX_NAMED:
        heading = f"the {SMALLEST_CLASSES} smallest classes"
        shown = np.argsort(train.class_images, kind="stable")[:SMALLEST_CLASSES]
    rows = [[heading, *(split.name for split in splits)]]
    for label in shown.tolist():
        rows.append([f"{label:3} {names[label]}", *(f"{split.class_images[label]:,}" for split in splits)])
    return rows


def _class_json(inspection: ClassInspection, split: ClassSplit) -> dict[str, Any]:
    pairs = zip(inspection.data_set.classes, split.class_images.tolist(), strict=True)
    return {"classes": [{"name": name, "images": images} for name, images in pairs]}


def _draw_classes(path: files.Path, inspection: ClassInspection) -> None:
    images = {name: split.class_images for name, split in inspection.splits.items()}
    histogram.draw_image_counts(path, inspection.data_set, images)


# For each task: how its data are inspected, its rules, its rows of the two tables, its JSON and its picture.
TASKS: dict[str, tuple[Callable[..., Any], ...]] = {
    "segmentation": (
        *(label_inspection.inspect, label_rules.find),
        *(_label_rows, _class_pixel_rows, _label_json, _draw_labels),
    ),
    "classification": (
        *(class_inspection.inspect, class_rules.find),
        *(_class_rows, _class_image_rows, _class_json, _draw_classes),
    ),
}


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: expected 1 or more")
    inspect, find, *_, draw = TASKS[config.task]
    output = args.output or files.as_path("runs") / config.name / "check"
    inspection = inspect(config, limit=args.limit, make_progress=logs.Progress)
    findings = find(inspection)
    report = format_report(inspection, findings)
    files.write_file(output / "report.txt", report)
    files.write_file(output / "report.json", as_json(inspection, findings))
    draw(output / "classes.png", inspection)
    print(f"wrote {output}/report.txt, report.json and classes.png\n\n{report}", end="")
    if count_problems(findings):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
