"""Converts checkpoints between .pth files, .safetensors files and checkpoint folders, without loss.

  python -m topformer_jax.convert --config configs/topformer_b_ade.py --checkpoint FILE.pth --output DIR
  python -m topformer_jax.convert --checkpoint DIR --output FILE.pth (or FILE.safetensors)
  python -m topformer_jax.convert --config configs/topformer_b_ade.py --summary

The first command reads an official (mmcv or timm) file into a folder that every command reads. The second writes a
file that the official code loads. Tensors must fit the model exactly, or an error names those that do not.
--init-from-classifier and --new-head are the only exceptions; the command lists what stays random. A checkpoint
keeps its settings.
"""

from topformer_jax.runtime import cli


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__, config_required=False)
    parser.add_argument("--checkpoint", metavar="PATH", help="the file or checkpoint folder to read")
    parser.add_argument("--output", metavar="PATH", help="the FILE.pth, FILE.safetensors or folder to write")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--init-from-classifier",
        action="store_true",
        help="read the backbone from an ImageNet checkpoint; injections and head stay random",
    )
    start.add_argument(
        "--new-head",
        action="store_true",
        help="start with a random last layer, for another number of classes",
    )
    parser.add_argument("--summary", action="store_true", help="print parameters and multiply-adds and stop")
    text = "size of the image for --summary, in pixels (default: data.crop_size)"
    parser.add_argument("--size", metavar="HxW", help=text)
    return parser


cli.answer_help(__name__, make_parser)

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.checkpoints import torch_format
from topformer_jax.checkpoints.load import FILE_FORMATS, check_finite, find_format
from topformer_jax.checkpoints.origin import complete_config, read_names, set_origin
from topformer_jax.data import sources
from topformer_jax.data.catalog import DataSet
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError
from topformer_jax.version import __version__


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    if args.summary:
        if config is None:
            raise UserError("--summary needs --config FILE")
        size = cli.size("--size", args.size) if args.size else tuple(config.data.crop_size)
        print(f"TopFormer {config.model.variant}, {config.model.num_classes} classes, {size[0]} x {size[1]}")
        print(cli.table(models.summary(config, size)))
        return
    if not args.checkpoint or not args.output:
        raise UserError("convert needs --checkpoint PATH and --output PATH (or --config FILE --summary)")
    suffix = files.as_path(args.output).suffix
    is_file = suffix.lower() in FILE_FORMATS
    if not is_file and suffix[1:2].isalpha():  # `.5` can be the version of a folder
        raise UserError(
            f"--output is {args.output}: expected FILE.pth, FILE.pt, FILE.safetensors, or a folder without a suffix; "
            "topformer_jax.export writes the files for other runtimes"
        )
    source = files.as_path(args.checkpoint)
    part = "backbone" if args.init_from_classifier else "all_but_classes" if args.new_head else "all"
    if config is None:
        file_format = find_format(source)
        may_hold_config = part == "all" and file_format is not torch_format
        tensors, metadata = file_format.read(source) if may_hold_config else ({}, {})
        if "config" not in metadata:
            raise UserError(f"reading {source} needs --config FILE: the model that its tensors must fit")
        check_finite(tensors, str(source))
        settings = complete_config(metadata)
        named = None if settings is None else read_names(metadata, settings, source)
    else:
        model = models.build(config)
        tensors, found = checkpoints.read_checkpoint(source, model, part)
        print(checkpoints.describe_origin(model, part, source))
        # If a part is fresh, iteration, classes and settings are those of another model.
        found = found if part == "all" else {}
        set_origin(model, found, source)
        checkpoints.print_differences(model, config, also=("data.reduce_zero_label",), are_kept=True)
        own = found["config"] if model.checkpoint_config is not None else config.to_dict()
        metadata = {"config": own, "meta": found.get("meta", {})}
        settings, named = config, DataSet(model.classes, model.palette)
    metadata = metadata | {"meta": _make_meta(metadata, settings, named)}
    if is_file:
        # A file may be published: it names no folders of this machine.
        meta = {"epoch": 0, "iter": 0, "topformer_jax": __version__} | metadata["meta"]
        metadata = metadata | {"config": config_lib.hide_paths(metadata["config"]), "meta": meta}
        if "CLASSES" not in meta and metadata["config"].get("task") == "segmentation":
            print(
                f"{args.output} names no classes, which the official code asks for: convert again with --config and "
                "--config.data.root=DIR, the folder of the data set and its classes.txt"
            )
    checkpoints.write_checkpoint(args.output, tensors, metadata)
    print(f"wrote {args.output}: {len(tensors)} tensors")


def _make_meta(metadata: Mapping[str, Any], config: ConfigDict | None, named: DataSet | None) -> dict[str, Any]:
    """A checkpoint's `meta` with `CLASSES` and `PALETTE`: its own, or else those of its data set, if known.

    Without a config it is unchanged, since nothing tells which names are right.
    """
    meta = dict(metadata.get("meta", {}))
    if config is None:
        return meta
    if not (named and named.classes):
        try:
            named = sources.find_data_set(config)
        except UserError:  # its folder is not here
            named = DataSet((), ())
    names = {"CLASSES": list(named.classes), "PALETTE": [list(colour) for colour in named.palette]}
    rest = {key: value for key, value in meta.items() if key not in names}
    return rest | {key: value for key, value in names.items() if value}


if __name__ == "__main__":
    cli.run(main)
