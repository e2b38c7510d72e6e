"""Makes a data set's folder from the official downloads or from your own annotations, and packs folders.

  python -m topformer_jax.prepare ade20k --source downloads --output data/ade/ADEChallengeData2016
  python -m topformer_jax.prepare custom --from labelme --background other --source drawn --output data/streets
  python -m topformer_jax.prepare ade20k --source data/ade/ADEChallengeData2016 --output data/records \\
      --format array_record

Archives are read without unpacking them; pictures stay byte for byte. The same command resumes an interrupted one,
and after a finished one it checks that everything is there. --format array_record packs a folder that this command
has made, and --output may then be a bucket (gs://...); from downloads it makes that folder first, below --output.
"""

import argparse

from topformer_jax.config import settings
from topformer_jax.runtime import cli

DATASETS = tuple(name for name in settings.DATASETS if name != "shapes")
KINDS = ("labelme", "coco", "colours", "cvat", "yolo", "roboflow-masks", "voc")


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("dataset", choices=DATASETS, metavar="DATASET", help=", ".join(DATASETS))
    add("--source", metavar="DIR", required=True, help="the folder of downloads or annotations")
    add("--output", metavar="DIR", required=True, help="the folder to make, as for data.root")
    add("--format", choices=("folder", "array_record"), default="folder", help="default: folder")
    add("--from", dest="kind", choices=KINDS, help="for custom: the format of your annotations")
    text = "for custom: share of the pictures for validation if no folder, list or file names them (default 0.1)"
    add("--validation", type=float, default=0.1, metavar="SHARE", help=text)
    text = "for custom: class of the pixels that no annotation covers; void: leave them out"
    add("--background", default="", metavar="NAME", help=text)
    add("--verify", action="store_true", help="also compare checksums of existing files")
    add("--shard", metavar="I/N", default="1/1", help="pack the I-th of N parts: N processes share the work")
    return parser


cli.answer_help(__name__, make_parser)

import pathlib
from functools import partial

from etils import epath

from topformer_jax.data import records, sources
from topformer_jax.data.catalog import SPLITS, find_layout
from topformer_jax.preparation import coco, labelme, masks, own, releases, writer, yolo
from topformer_jax.preparation.archives import fingerprint
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

READERS: dict[str, own.Reader] = {
    "labelme": labelme.read,
    "coco": coco.read,
    "colours": partial(masks.read_colours, own.CLASSES, "masks"),
    "cvat": partial(masks.read_colours, "labelmap.txt", "segmentationclass"),
    "yolo": yolo.read,
    "roboflow-masks": masks.read_roboflow,
    "voc": masks.read_voc,
}


def prepare(args: argparse.Namespace) -> None:
    """Runs the command; raises UserError if a flag, a download or the output is wrong."""
    part = _parse_part(args.shard)
    if not 0 < args.validation < 1:
        raise UserError(f"--validation is {args.validation}: expected a share between 0 and 1")
    if args.kind and args.dataset != "custom":
        raise UserError(f"--from {args.kind} is for your own data: prepare custom, not {args.dataset}")
    is_packed = args.format == "array_record"
    if not args.kind and releases.has_layout(args.dataset, args.source):
        if not is_packed:
            _check_folder(args.dataset, args.source)
            way_out = f"use it with --config.data.root={args.source}"
            raise UserError(f"{args.source} has the layout of {args.dataset} already: {way_out}")
        _pack(args.dataset, args.source, args.output, part)
        return
    if part != (1, 1) or files.is_in_bucket(args.output):
        raise UserError(
            f"--shard {args.shard}, --output {args.output}: only a folder that this command has made is packed in "
            "parts or into a bucket: make it first"
        )
    source, output = (pathlib.Path(path).expanduser() for path in (args.source, args.output))
    if args.kind and output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies in --source {source}, and would be read as a part of it")
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--source {source} lies in --output {output}, where files are made: name another")
    folder = output / args.dataset / "files" if is_packed else output
    _make_folder(args, source, folder)
    print(f"{folder} is complete; use it with --config.data.root={folder}")
    if is_packed:
        _pack(args.dataset, str(folder), args.output, part)
        print(f"note: {folder} stays: the packed files do not need it")


def _make_folder(args: argparse.Namespace, source: pathlib.Path, output: pathlib.Path) -> None:
    found = _find_own(source, args) if args.dataset == "custom" else releases.find(args.dataset, source)
    splits = writer.write(found.tasks, output, found.origin, verify=args.verify)
    for name, split in splits.items():
        published = found.published.get(name, split["images"])
        note = "" if published == split["images"] else f" (published are {published:,})"
        print(
            f"{name}: {split['images']:,} images{note}, {split['labels']:,} labels, {split['bytes'] / 1e6:,.0f} MB, "
            f"sha256 {split['sha256']}"
        )
    _check_folder(args.dataset, str(output))


def _check_folder(dataset: str, folder: str) -> None:
    if layout := find_layout(dataset):
        for split in SPLITS:
            sources.open_folder(dataset, layout, folder, split)


def _parse_part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {text} is not I/N: for 4 processes, 1/4 to 4/4")
    return int(index), int(count)


def _find_own(source: pathlib.Path, args: argparse.Namespace) -> releases.Found:
    """Finds a user's annotations, and prints what goes where."""
    if not args.kind:
        raise UserError(
            f"name the format of the annotations in {source} by --from {', '.join(READERS)}; masks of class numbers "
            "need none: put them into annotations/train and /val, and the pictures into images/train and /val"
        )
    annotations = READERS[args.kind](own.open_source(source), " ".join(args.background.split()))
    tasks, table = own.divide(annotations, args.validation)
    print(cli.table(table))
    print(*(files.shorten(f"note: {note}", cli.LONGEST_LINE) for note in annotations.notes), sep="\n")
    origin = {
        "dataset": "custom",
        "options": {"from": args.kind, "validation": args.validation, "background": args.background},
        "classes": annotations.classes,
        "archives": {source.name: fingerprint(source, of_content=True)},
    }
    return releases.Found(tasks, origin, {})


def _pack(dataset: str, source: str, output: str, part: tuple[int, int]) -> None:
    # It imports tensorflow-datasets, which takes half a second.
    from topformer_jax.preparation import packing

    folder = packing.build(dataset, source, output, part)
    if not (folder / records.INFO).exists():
        return
    size = sum(file.stat().length for file in epath.Path(folder).iterdir())
    print(f"{folder} is complete ({size / 1e6:.0f} MB): train and validation; use it with any config of {dataset}:")
    print(f"  --config.data.source=array_record --config.data.root={output}")


def main() -> None:
    """Runs the command."""
    prepare(make_parser().parse_args())


if __name__ == "__main__":
    cli.run(main)
