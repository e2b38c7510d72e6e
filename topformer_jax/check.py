"""Looks through a data set before a training: what it holds, what is wrong with it, and whether training would start.

  python -m topformer_jax.check --config configs/topformer_b_ade.py --config.data.root=DIR --output DIR

Reads every image and label once. Prints sizes, counts and classes of both splits, then problems and warnings, a line
each. Exit status: 0 if training would start, 1 if it would not or would learn nonsense, 2 if nothing can be checked.
--output gets this report as report.txt and report.json, and a histogram of the classes as classes.png.
"""

from topformer_jax import cli, files


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
from typing import Any

import numpy as np

from topformer_jax import logs
from topformer_jax.data import rules
from topformer_jax.data.inspection import Inspection, SplitFacts, inspect
from topformer_jax.errors import UserError
from topformer_jax.visualize import histogram

HEADINGS: dict[rules.Level, str] = {"problem": "PROBLEMS", "warning": "WARNINGS", "note": "NOTES"}


def format_report(inspection: Inspection, findings: list[rules.Finding]) -> str:
    """The report for a terminal: tables of the splits and of the classes, the findings, and the verdict."""
    data = inspection.config.data
    parts = [
        f"{data.dataset} ({data.source}) in {data.root or 'memory'}: {len(inspection.data_set.classes)} classes, "
        f"data.reduce_zero_label={str(data.reduce_zero_label).lower()}",
        cli.table(_split_rows(inspection)),
        cli.table(_class_rows(inspection)),
    ]
    for level, heading in HEADINGS.items():
        lines = [f"  {finding.rule}: {finding.text}" for finding in findings if finding.level == level]
        parts += ["\n".join([heading, *lines])] if lines else []
    problems = count_problems(findings)
    plural = "" if problems == 1 else "s"
    verdict = f"training would not start: {problems} problem{plural}" if problems else "training would start"
    return "\n\n".join([*parts, verdict]) + "\n"


def count_problems(findings: list[rules.Finding]) -> int:
    """How many findings keep a training from starting, or from learning."""
    return sum(finding.level == "problem" for finding in findings)


def _split_rows(inspection: Inspection) -> list[list[str]]:
    splits = list(inspection.splits.values())
    rows = [["", *(split.name for split in splits)]]
    rows.append(["examples", *(_format_count(split) for split in splits)])
    for axis, side in ((1, "width"), (0, "height")):
        rows.append([f"{side}: smallest / median / largest", *(_format_sides(s, axis) for s in splits)])
    rows.append(["distinct sizes", *(f"{len(split.sizes):,}" for split in splits)])
    rows.append(["labels read", *(f"{split.labels:,}" for split in splits)])
    for kind in sorted(set().union(*(split.kinds for split in splits))):
        rows.append([f"  {kind}", *(f"{split.kinds[kind]:,}" for split in splits)])
    rows.append(["values", *(_format_values(split) for split in splits)])
    rows.append(
        ["void pixels", *(_format_share(inspection.void_pixels(s.name), int(s.pixels.sum())) for s in splits)]
    )
    return rows


def _class_rows(inspection: Inspection) -> list[list[str]]:
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


def _format_count(split: SplitFacts) -> str:
    if split.refusal:
        return "cannot be opened"
    if split.examples < split.available:
        return f"first {split.examples:,} of {split.available:,}"
    return f"{split.examples:,}"


def _format_sides(split: SplitFacts, axis: int) -> str:
    sides = np.sort(np.repeat([size[axis] for size in split.sizes], list(split.sizes.values())))
    return f"{sides[0]} / {sides[len(sides) // 2]} / {sides[-1]}" if len(sides) else "-"


def _format_values(split: SplitFacts) -> str:
    """The range of the stored values, 255 apart."""
    values = np.flatnonzero(split.pixels)
    below = values[values < 255]
    parts = [f"{below[0]}-{below[-1]}"] if len(below) else []
    parts += ["255"] if split.pixels[255] else []
    parts += [f"up to {split.largest}"] if split.largest > 255 else []
    return ", ".join(parts) or "-"


def _format_share(count: int, total: int) -> str:
    return f"{count / total:.3%}" if count else "-"


def as_json(inspection: Inspection, findings: list[rules.Finding]) -> str:
    """The report for scripts."""
    data = inspection.config.data
    report = {
        "config": inspection.config.name,
        "dataset": data.dataset,
        "source": data.source,
        "root": data.root,
        "reduce_zero_label": data.reduce_zero_label,
        "splits": {name: _split_json(inspection, split) for name, split in inspection.splits.items()},
        "findings": [finding._asdict() for finding in findings],
        "would_start": not count_problems(findings),
    }
    return json.dumps(report, indent=1) + "\n"


def _split_json(inspection: Inspection, split: SplitFacts) -> dict[str, Any]:
    pixels, labels = inspection.class_pixels(split.name), inspection.class_labels(split.name)
    return {
        "available": split.available,
        "examples": split.examples,
        "labels": split.labels,
        "label_files": dict(sorted(split.kinds.items())),
        "sizes": [
            {"height": height, "width": width, "images": count}
            for (height, width), count in sorted(split.sizes.items())
        ],
        "values": {int(value): int(split.pixels[value]) for value in np.flatnonzero(split.pixels[:256])},
        "largest_value": split.largest,
        "void_pixels": inspection.void_pixels(split.name),
        "classes": [
            {"name": name, "pixels": int(pixels[label]), "labels": int(labels[label])}
            for label, name in enumerate(inspection.data_set.classes)
        ],
    }


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: expected 1 or more")
    if config.task != "segmentation":
        raise UserError(f"{config.name} has task={config.task}: this command knows segmentation alone")
    output = args.output or files.as_path("runs") / config.name / "check"
    inspection = inspect(config, limit=args.limit, make_progress=logs.Progress)
    findings = rules.find(inspection)
    report = format_report(inspection, findings)
    files.write_file(output / "report.txt", report)
    files.write_file(output / "report.json", as_json(inspection, findings))
    pixels = {name: inspection.class_pixels(name) for name in inspection.splits}
    histogram.write_histogram(output / "classes.png", inspection.data_set, pixels)
    print(f"wrote {output}/report.txt, report.json and classes.png\n\n{report}", end="")
    if count_problems(findings):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
