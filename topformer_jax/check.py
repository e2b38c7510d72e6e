"""Checks a data set before a training: what it holds, what is wrong with it, and whether training would start.

  python -m topformer_jax.check --config configs/topformer_b_ade.py --config.data.root=DIR --output DIR
  python -m topformer_jax.check --config configs/topformer_b_imagenet.py --config.data.root=DIR --output DIR

Reads every image and label once. Prints sizes, counts and classes of both splits, then one line per problem and
warning. The exit status is 0 if training would start, 1 if it would not or would learn nonsense, and 2 if nothing can
be checked. --output gets this report as report.txt and report.json, and classes.png: how often each class occurs.
"""

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--output", type=files.as_path, metavar="DIR", help="default: runs/<config name>/check")
    add("--limit", type=int, metavar="N", help="read the first N examples of each split (default: all)")
    return parser


cli.answer_help(__name__, make_parser)

import collections
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from topformer_jax.config.settings import WEIGHTINGS
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.class_balance import weigh_classes
from topformer_jax.inspection import contents as contents_lib, rules
from topformer_jax.inspection.contents import Contents, SplitContents
from topformer_jax.inspection.rules import Finding
from topformer_jax.runtime import logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.visualize import drawing

HEADINGS = {"problem": "PROBLEMS", "warning": "WARNINGS", "note": "NOTES"}
MAX_NAMED = 200  # classes of a classifier: beyond, the table shows the smallest ones, and the picture a curve
SMALLEST_CLASSES = 10  # in such a table
Report = dict[str, Any]


def make_report(contents: Contents, findings: Sequence[Finding]) -> Report:
    """The content of report.json."""
    data = contents.config.data
    settings = {} if contents.is_classification else {"reduce_zero_label": data.reduce_zero_label}
    return {
        "config": contents.config.name,
        "dataset": data.dataset,
        "source": data.source,
        "root": data.root,
        **settings,
        "splits": {name: _describe_split(contents, split) for name, split in contents.splits.items()},
        "findings": [finding._asdict() for finding in findings],
        "would_start": all(finding.level != "problem" for finding in findings),
    }


def _describe_split(contents: Contents, split: SplitContents) -> Report:
    sizes = collections.Counter(example.size for example in split.examples if example.size)
    described: Report = {
        "available": split.available,
        "examples": len(split.examples),
        "sizes": [{"height": h, "width": w, "images": count} for (h, w), count in sorted(sizes.items())],
    }
    names, pixels = contents.data_set.classes, contents.per_class(split.pixels).tolist()
    if contents.is_classification:
        rows = zip(names, pixels, strict=True)
        return described | {"classes": [{"name": name, "images": count} for name, count in rows]}
    labels = contents.per_class(split.label_counts).tolist()
    if split.name == "train" and split.is_whole and sum(pixels):
        table = np.array([contents.per_class(collections.Counter(label.pixels)) for label in split.labels])
        described["class_weight"] = {name: weigh_classes(name, table).tolist() for name in WEIGHTINGS}
    return described | {
        "labels": len(split.labels),
        "label_files": dict(sorted(collections.Counter(label.kind for label in split.labels).items())),
        "values": {value: split.pixels[value] for value in sorted(split.pixels) if value <= IGNORE_LABEL},
        "largest_value": max((label.largest for label in split.labels), default=0),
        "void_pixels": sum(split.pixels[value] for value in contents.void),
        "classes": [
            {"name": name, "pixels": count, "labels": holders}
            for name, count, holders in zip(names, pixels, labels, strict=True)
        ],
    }


def format_report(report: Report) -> str:
    """The report for a terminal: tables of the splits and of the classes, the findings, and the verdict."""
    splits = report["splits"]
    title = f"{report['dataset']} ({report['source']}) in {report['root'] or 'memory'}"
    title += f": {len(splits['train']['classes'])} classes"
    if "reduce_zero_label" in report:
        title += f", data.reduce_zero_label={json.dumps(report['reduce_zero_label'])}"
    parts = [title, cli.table(_split_rows(splits))]
    if class_rows := _class_rows(splits):
        parts.append(cli.table(class_rows))
    for level, heading in HEADINGS.items():
        lines = [f"  {each['rule']}: {each['text']}" for each in report["findings"] if each["level"] == level]
        parts += ["\n".join([heading, *lines])] if lines else []
    problems = sum(each["level"] == "problem" for each in report["findings"])
    end = f" not start: {problems} problem{'' if problems == 1 else 's'}" if problems else " start"
    parts.append(f"training would{end}")
    return "\n\n".join(parts) + "\n"


def _split_rows(splits: Report) -> list[list[str]]:
    rows: dict[str, list[str]] = collections.defaultdict(list)
    kinds = sorted({kind for split in splits.values() for kind in split.get("label_files", ())})
    for split in splits.values():
        part = "" if split["examples"] == split["available"] else f"first {split['examples']:,} of "
        rows["examples"].append(f"{part}{split['available']:,}")
        for side in ("width", "height"):
            sides = [size[side] for size in split["sizes"] for _ in range(size["images"])]
            rows[f"{side}: smallest / median / largest"].append(_format_range(sides))
        rows["distinct sizes"].append(f"{len(split['sizes']):,}")
        if "labels" not in split:
            images = [row["images"] for row in split["classes"]] if split["examples"] else []
            rows["images per class: smallest / median / largest"].append(_format_range(images))
            continue
        rows["labels read"].append(f"{split['labels']:,}")
        for kind in kinds:
            rows[f"  {kind}"].append(f"{split['label_files'].get(kind, 0):,}")
        rows["values"].append(_format_values(split))
        rows["void pixels"].append(_format_share(split["void_pixels"], sum(split["values"].values())))
    return [["", *splits], *([name, *cells] for name, cells in rows.items())]


def _format_range(numbers: Sequence[int]) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]} / {ordered[len(ordered) // 2]} / {ordered[-1]}" if ordered else "-"


def _format_values(split: Report) -> str:
    """The range of the stored values, with 255 apart."""
    below = [value for value in split["values"] if value < IGNORE_LABEL]
    parts = [f"{below[0]}-{below[-1]}"] if below else []
    parts += ["255"] if IGNORE_LABEL in split["values"] else []
    parts += [f"up to {split['largest_value']}"] if split["largest_value"] > IGNORE_LABEL else []
    return ", ".join(parts) or "-"


def _format_share(count: int, total: int) -> str:
    return f"{count / total:.3%}" if count else "-"


def _class_rows(splits: Report) -> list[list[str]]:
    """Pixels, labels and weights of each class, or images; of a large classifier only the smallest classes."""
    train = splits["train"]
    names = [row["name"] for row in train["classes"]]
    shown, heading = list(range(len(names))), "class"
    if "labels" not in train:
        if train["examples"] < train["available"]:  # the first examples are of the first classes
            return []
        if len(names) > MAX_NAMED:
            shown.sort(key=lambda label: train["classes"][label]["images"])
            shown, heading = shown[:SMALLEST_CLASSES], f"the {SMALLEST_CLASSES} smallest classes"
    columns = [[heading, *(f"{label:3} {names[label]}" for label in shown)]]
    for name, split in splits.items():
        rows = [split["classes"][label] for label in shown]
        if "labels" in split:
            total = sum(row["pixels"] for row in split["classes"])
            columns.append([name, *(_format_share(row["pixels"], total) for row in rows)])
            columns.append(["labels", *(f"{row['labels']:,}" for row in rows)])
        else:
            columns.append([name, *(f"{row['images']:,}" for row in rows)])
    for name, weights in train.get("class_weight", {}).items():
        columns.append([name, *(f"{weights[label]:.3g}" for label in shown)])
    return [list(row) for row in zip(*columns, strict=True)]


def draw_classes(contents: Contents) -> bytes:
    """Draws each class's share of the labelled pixels, or its number of images, as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    names = [f"{name} {label}" for label, name in enumerate(contents.data_set.classes)]
    is_named = not contents.is_classification or len(names) <= MAX_NAMED
    figure = Figure(figsize=(11, 1.5 + 0.2 * len(names) if is_named else 4.5), layout="constrained")
    panels = figure.subplots(1, len(contents.splits), sharey=is_named, squeeze=False)[0]
    for axes, split in zip(panels, contents.splits.values(), strict=True):
        counts, unit = contents.per_class(split.pixels), "images"
        if not contents.is_classification:
            counts, unit = 100 * counts / max(counts.sum(), 1), "percent of the labelled pixels"
            axes.set_xscale("log")
            axes.set_xlim(1e-4, 100)
        axes.set_title(split.name)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if is_named:
            colours = np.array(contents.data_set.palette) / 255 if contents.data_set.palette else None
            axes.barh(range(len(names)), counts, color=colours, edgecolor="grey", linewidth=0.5)
            axes.set_yticks(range(len(names)), names, parse_math=False, fontsize=8)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlabel(unit)
        else:
            axes.stairs(np.sort(counts)[::-1], fill=True)
            axes.set_xlabel("classes, largest first")
            axes.set_ylabel(unit)
    return drawing.encode_figure(figure)


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: expected 1 or more")
    output = args.output or files.as_path("runs") / config.name / "check"
    contents = contents_lib.read_contents(config, limit=args.limit, make_progress=logs.Progress)
    report = make_report(contents, rules.find(contents))
    text = format_report(report)
    files.write_file(output / "report.txt", text)
    files.write_file(output / "report.json", json.dumps(report, indent=1) + "\n")
    files.write_file(output / "classes.png", draw_classes(contents))
    print(f"wrote {output}/report.txt, report.json and classes.png\n\n{text}", end="")
    if not report["would_start"]:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
