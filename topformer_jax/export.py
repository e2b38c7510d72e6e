"""Exports a checkpoint for other runtimes; runs the file and compares it with the model before it gets its name.

  python -m topformer_jax.export --config configs/topformer_t_ade.py --checkpoint T.pth --output t.onnx --size any
  python -m topformer_jax.export --config configs/topformer_t_ade.py --checkpoint T.pth --output t.tflite --logits

The suffix of OUTPUT sets the format: .onnx (onnxruntime, browsers), .tflite (LiteRT, phones), .stablehlo (jax.export:
CPUs, GPUs and TPUs). A file takes images, uint8 [n, h, w, 3], RGB, and returns labels, uint8 [n, h, w]; the file of a
classifier returns scores [n, classes]. It holds its classes, colours, config and origin.
"""

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="the file or checkpoint folder to export")
    add("--output", type=files.as_path, required=True, metavar="FILE", help="the file to write")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--logits", action="store_true", help="return float32 [n, h/8, w/8, classes]")
    output.add_argument("--probabilities", action="store_true", help="return float32 [n, h, w, classes]")
    add(
        "--scale-labels",
        metavar="1/N",
        default="1",
        help="return labels or probabilities at 1/2, 1/4 or 1/8 of height and width",
    )
    add("--size", metavar="HxW", help="size of the images, or any (default: data.crop_size)")
    add(
        "--target",
        choices=["cpu", "web"],
        default="cpu",
        help="for .onnx: a web file is correct on WebGPU, and slower on CPUs",
    )
    add(
        "--precision",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="for .tflite: float16 halves the file; int8 quarters it (with --logits, or a classifier)",
    )
    add(
        "--keep-float",
        nargs="+",
        default=[],
        metavar="PART",
        help="for int8: parts that keep float32: pixels, stem, layer1, ..., tpm, trans, SIM, decode_head",
    )
    add(
        "--images",
        metavar="DIR",
        help="pictures: every second one sets the ranges of int8, the others compare the file with the model",
    )
    return parser


cli.answer_help(__name__, make_parser)

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import cv2
import jax
from ml_collections import ConfigDict

from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.data import sources
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.batch import Image
from topformer_jax.data.catalog import IMAGE_SUFFIXES
from topformer_jax.data.codecs import decode_image
from topformer_jax.exporters import exported, network, verification
from topformer_jax.runtime.errors import UserError
from topformer_jax.version import __version__

SCALES = {"1": 1, "1/2": 2, "1/4": 4, "1/8": 8}
MOST_PICTURES = 200  # of --images that are read: more of them find the same ranges


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of a file: its output, size, target and precision.

    Attributes:
        output: "labels", "logits" or "probabilities"; for a classifier "labels", although its file has "scores".
        stride: of labels and probabilities.
        size: (height, width) of the images; None for any.
        target: of ONNX files, "cpu" or "web".
        precision: of LiteRT files: "float32"; "float16", of the weights; "int8", of all, for logits and scores.
        keep_float: names of the model's parts that stay float32 in a file of int8.
    """

    output: str = "labels"
    stride: int = 1
    size: tuple[int, int] | None = None
    target: str = "cpu"
    precision: str = "float32"
    keep_float: tuple[str, ...] = ()


def export_model(
    config: ConfigDict, checkpoint: str, output: files.Path, choices: Choices, pictures: Sequence[Image] = ()
) -> str:
    """Writes a file in the format of `output`'s suffix, and returns the result of its comparison with the model.

    Every second one of the pictures, of any size, gives int8 its ranges; the file is compared on the others too.

    Raises:
        UserError: the choices contradict each other, the checkpoint does not fit, the file cannot be written, or it
            differs from the model.
    """
    module = exported.import_format(output)
    _check_choices(config, output, choices, len(pictures))
    beside = None if module.HOLDS_DESCRIPTION else exported.description_path(output)
    for path in (output, beside):
        if path is not None:
            files.refuse_existing(path)
    model = checkpoints.load_model(config_lib.load(config, {"model.dtype": "float32"}), checkpoint)
    own_size = choices.size == tuple(config.data.crop_size)  # the config's, if the user gave no other one
    checkpoints.check_label_rules(model, config)
    checkpoints.print_differences(model, config, also=("data.crop_size",) if own_size else ())
    description = dataclasses.asdict(choices) | {
        "output": "scores" if isinstance(model, models.Classifier) else choices.output,
        "stride": 8 if choices.output == "logits" else choices.stride,
        **describe_model(config, checkpoint, model),
    }
    if choices.size is not None:
        size = choices.size[::-1]
        pictures = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures]
    data, result = _make_file(str(output), module, model, description, pictures)
    with contextlib.ExitStack() as stack:
        if beside is not None:
            stack.enter_context(files.unfinished(beside))
            files.write_file(beside, json.dumps(description, indent=1) + "\n")
        files.write_file(output, data)
    return f"{result}\nwrote {output}: {len(data) / 1e6:.1f} MB"


def _make_file(
    name: str,
    module: ModuleType,
    model: models.Segmenter | models.Classifier,
    description: Mapping[str, Any],
    pictures: Sequence[Image],
) -> tuple[bytes, str]:
    """The content of a file of a format's module, and the result of its comparison with the model."""

    def write(description: Mapping[str, Any]) -> bytes:
        output, stride = description["output"], description["stride"]
        function = network.make_function(model, output, stride, by_rows=module.BY_ROWS)
        return bytes(module.write(function, description))

    def open_data(data: bytes, description: Mapping[str, Any]) -> exported.Exported:
        return exported.open_bytes(name, data, module, None if module.HOLDS_DESCRIPTION else description)

    def make_logits() -> exported.Exported:
        logits = in_float32 | {"output": "logits", "stride": 8}
        return open_data(write(logits), logits)

    in_float32 = {**description, "precision": "float32"}
    others = pictures[1::2] or pictures
    data = write(in_float32)
    result = verification.verify(open_data(data, in_float32), model, others, make_logits)
    if (precision := description["precision"]) != "float32":
        float_data, data = data, module.lower_precision(data, description, pictures[::2])
        images = others[:8] or list(verification.draw_images(description["size"]))
        share, layer = module.compare_layers(data, float_data, images)
        verification.check_layer(share, layer, precision)
        result = verification.verify(open_data(data, description), model, others)
    return data, result


def _check_choices(config: ConfigDict, output: files.Path, choices: Choices, num_pictures: int) -> None:
    """Raises a UserError if a choice does not go with the format, the model or another choice."""
    suffix, precision, target = output.suffix.lower(), choices.precision, choices.target
    is_int8, is_logits = precision == "int8", choices.output == "logits"
    is_classifier, is_scaled = config.task == "classification", choices.stride != 1
    if precision != "float32" and suffix != ".tflite":
        raise UserError(f"--precision {precision} is only for .tflite files; the output is {output}")
    if target != "cpu" and suffix != ".onnx":
        raise UserError(f"--target {target} is only for .onnx files; the output is {output}")
    if is_classifier and (choices.output != "labels" or is_scaled):
        raise UserError(f"{config.name} is a classifier, whose file returns scores: leave out the flags for labels")
    if is_logits and is_scaled:
        raise UserError("--scale-labels is for labels and probabilities: logits have an eighth of the size")
    if choices.keep_float and not is_int8:
        raise UserError("--keep-float is for --precision int8")
    if is_int8 and not is_logits and not is_classifier:
        raise UserError("--precision int8 is for --logits: with the labels inside, a tenth of them would change")
    if is_int8 and num_pictures < 2:
        raise UserError("--precision int8 needs --images DIR: pictures like those that it will see, 30 or more")


def read_pictures(folder: files.Path) -> list[Image]:
    """The pictures in a folder and the folders below it, except hidden files; at most 200, spread over all of them.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    with files.report_errors("read", folder):
        found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted(path for path in found if not path.name.startswith("."))
    if not paths:
        raise UserError(f"--images {folder} holds no picture: looked for {', '.join(IMAGE_SUFFIXES)}")
    spread = paths[:: -(-len(paths) // MOST_PICTURES)]
    return [decode_image(files.read_bytes(path), str(path)) for path in spread]


def describe_model(
    config: ConfigDict, checkpoint: str, model: models.Segmenter | models.Classifier
) -> dict[str, Any]:
    """The origin of a file's weights, and the meaning of its numbers."""
    names: dict[str, Any] = {}
    if isinstance(model, models.Segmenter):
        data_set = sources.find_data_set(config, model.classes, model.palette)
        names = {"classes": list(data_set.classes), "palette": [list(colour) for colour in data_set.palette]}
    elif model.classes:
        names = {"classes": list(model.classes)}
    digest = verification.checksum(models.state_dict(model))
    return names | {
        "mean": MEAN.tolist(),
        "std": STD.tolist(),
        # Paths of this machine do not leave it.
        "config": config_lib.hide_paths(json.loads(config.to_json())),
        "checkpoint": {"name": pathlib.PurePath(checkpoint).name, "sha256": digest},
        "versions": {"topformer_jax": __version__, "jax": jax.__version__},
    }


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    if args.output.suffix.lower() not in exported.FORMATS:
        raise UserError(
            f"--output is {args.output}: expected a name that ends in {', '.join(exported.FORMATS)}; "
            "topformer_jax.convert writes only the weights"
        )
    kind = "logits" if args.logits else "probabilities" if args.probabilities else "labels"
    if args.scale_labels not in SCALES:
        raise UserError(f"--scale-labels is {args.scale_labels}: expected one of {', '.join(SCALES)}")
    size: tuple[int, int] | None = tuple(config.data.crop_size)
    if args.size:
        size = None if args.size == "any" else cli.size("--size", args.size)
    stride, keep_float = SCALES[args.scale_labels], tuple(args.keep_float)
    choices = Choices(kind, stride, size, args.target, args.precision, keep_float)
    pictures = read_pictures(files.as_path(args.images)) if args.images else ()
    print(export_model(config, args.checkpoint, args.output, choices, pictures))


if __name__ == "__main__":
    cli.run(main)
