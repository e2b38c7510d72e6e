"""Makes a data set's folder, or array_record files, of the official downloads or of one's own annotations.

  python -m topformer_jax.prepare ade20k --source downloads --output data/ade/ADEChallengeData2016
  python -m topformer_jax.prepare custom --from labelme --source drawn --output data/streets
  python -m topformer_jax.prepare ade20k --source data/ade/ADEChallengeData2016 --output data/records \\
      --format array_record

Archives are read as they are, without unpacking them; pictures stay byte for byte. An interrupted command goes on
where it stopped, and a finished one that is started again checks that everything is there. --source may be a folder
that has the layout already: array_record files are packed of it, and --output may then be a bucket (gs://...).
"""

import argparse

from topformer_jax.config import settings
from topformer_jax.runtime import cli

DATASETS = tuple(name for name in settings.DATASETS if name != "shapes")
KINDS = ("labelme", "coco", "colours", "cvat", "yolo", "roboflow-masks", "voc")


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("dataset", choices=DATASETS, metavar="DATASET", help=", ".join(DATASETS))
    parser.add_argument("--source", metavar="DIR", required=True, help="the folder with the downloads")
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to make, as for data.root")
    parser.add_argument(
        "--format", choices=("folder", "array_record"), default="folder", help="default: folder"
    )
    parser.add_argument(
        "--from",
        dest="kind",
        choices=KINDS,
        help="of custom: what annotated the pictures",
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of custom: pictures to score on, where no folder, list or file says it (default 0.1)",
    )
    parser.add_argument(
        "--background",
        default="",
        metavar="NAME",
        help="of custom: class of what no annotation covers; void: it is no class",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core); 0: this one alone"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare checksums too, of what is there already"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        default="1/1",
        help="of N processes that pack a folder, this is the I-th, from 1",
    )
    return parser


cli.answer_help(__name__, make_parser)

import pathlib
import shutil
from typing import Any

from etils import epath

from topformer_jax.data import records, sources
from topformer_jax.data.catalog import SPLITS
from topformer_jax.data.loader import count_cores
from topformer_jax.preparation import downloads, writer
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError


def prepare(args: argparse.Namespace) -> None:
    """Does what the flags say.

    Raises:
        UserError: a flag, a download or the output is wrong.
    """
    part = _parse_part(args.shard)
    workers = count_cores() if args.workers is None else args.workers
    if workers < 0 or not 0 < args.validation < 1:
        raise UserError(
            f"--workers is {workers}, --validation {args.validation}: expected 0 or more, and a share between 0 and 1"
        )
    if args.kind and args.dataset != "custom":
        raise UserError(f"--from {args.kind} is for your own data: prepare custom, not {args.dataset}")
    source, output = (pathlib.Path(path).expanduser() for path in (args.source, args.output))
    if args.kind and output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--output {output} lies in --source {source}, and would be read as a part of it")
    if not args.kind and downloads.has_layout(args.dataset, args.source):
        if args.format == "folder":
            _check_folder(args.dataset, args.source)
            raise UserError(
                f"{source} has the layout of {args.dataset} already: use it with --config.data.root={source}"
            )
        _pack(args.dataset, args.source, args.output, part)
        return
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"--source {source} lies in --output {output}, where files are made and deleted: name another"
        )
    if part != (1, 1) or files.is_in_bucket(args.output):
        raise UserError(
            f"--shard {args.shard} and --output {args.output}: a folder that has the layout is packed by several "
            "processes or into a bucket; make that folder of the downloads first"
        )
    options = (
        {"from": args.kind, "validation": args.validation, "background": args.background} if args.kind else {}
    )
    found = downloads.find(args.dataset, source, options)
    if found.table:
        print(cli.table(found.table))
        print(*(files.shorten(f"note: {note}", cli.LONGEST_LINE) for note in found.notes), sep="\n")
    if args.format == "folder":
        _make_folder(found, output, workers, args.verify)
        print(f"{output} is complete; use it with --config.data.root={output}")
        return
    folder, packed = output / args.dataset / "files", output / args.dataset / records.VERSION
    if writer.is_made_of(packed, found.origin):
        _print_complete(args.dataset, packed, args.output)
    else:
        made = _make_folder(found, folder, workers, args.verify)
        if count := made.get("test", {}).get("images"):
            print(f"note: {count} pictures of test are not packed: records hold train and validation")
        _pack(args.dataset, str(folder), args.output, part)
        for name in (writer.LISTING, writer.MANIFEST):
            files.write_file(packed / name, (folder / name).read_bytes())
    writer.remove(folder, found.origin)


def _make_folder(
    found: downloads.Found, output: pathlib.Path, workers: int, verify: bool
) -> dict[str, dict[str, Any]]:
    """Makes a data set's folder, prints what is in each split, and checks that each picture has its label."""
    total = sum(size for size, *_ in found.origin["archives"].values())
    free = shutil.disk_usage(
        next(path for path in (output, *output.absolute().parents) if path.exists())
    ).free
    if free < total and not output.exists():
        print(f"note: the downloads have {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free for {output}")
    splits = writer.write(found.plan, output, found.origin, workers=workers, verify=verify)
    for name, split in splits.items():
        published = found.published.get(name, split["images"])
        note = "" if published == split["images"] else f" (published are {published:,})"
        print(
            f"{name}: {split['images']:,} images{note}, {split['labels']:,} labels, {split['bytes'] / 1e6:,.0f} MB, "
            f"sha256 {split['sha256']}"
        )
    _check_folder(found.dataset, str(output))
    return splits


def _check_folder(dataset: str, folder: str) -> None:
    """Raises a UserError where a folder is incomplete: a picture without a label, say."""
    if layout := downloads.find_layout(dataset):
        for split in SPLITS:
            sources.open_folder(dataset, layout, folder, split)


def _pack(dataset: str, source: str, output: str, part: tuple[int, int]) -> None:
    """Packs a folder, or a part of its shards, and prints what is there."""
    from topformer_jax.preparation import (
        packing,  # imports tensorflow-datasets, which the other processes need not
    )

    folder, missing = packing.build(dataset, source, output, part)
    if missing:
        print(f"wrote --shard {part[0]}/{part[1]} of {folder}; still missing: --shard {missing}")
    else:
        _print_complete(dataset, folder, output)


def _print_complete(dataset: str, folder: files.Path, output: str) -> None:
    size = sum(file.stat().length for file in epath.Path(folder).iterdir())
    print(f"{folder} is complete ({size / 1e6:.0f} MB); use it with any config of {dataset}:")
    print(f"  --config.data.source=array_record --config.data.root={output}")


def _parse_part(text: str) -> tuple[int, int]:
    """(I, N) of the flag's value "I/N"."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {text} is not I/N: for 4 processes, 1/4 to 4/4")
    return int(index), int(count)


def main() -> None:
    """The command."""
    prepare(make_parser().parse_args())


if __name__ == "__main__":
    cli.run(main)
