"""How long do exported files take beside the model in JAX, beside PyTorch and beside PyTorch's own ONNX export?

  python -m benchmarks.exported --peer torch --config configs/topformer_t_ade.py
  python -m benchmarks.exported --config configs/topformer_t_imagenet.py --size 224

One image at a time, uint8 pixels to logits and to labels of its size, or to a classifier's scores; each call is
waited for. The weights are random without `--checkpoint`. An .onnx file of labels leaves out classes that are nowhere
the label: with trained weights, on a photograph (`--image`), most of them. Each file runs in its runtime and in a
process of its own, as PyTorch does, on all cores.
"""

import argparse
import contextlib
import pathlib
from typing import Any

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import inference, peers, samples, timing
from benchmarks.timing import OURS, Program
from topformer_jax import checkpoints, models
from topformer_jax.data.codecs import decode_image
from topformer_jax.exporters import exported, network
from topformer_jax.runtime import cli, files
from topformer_jax.runtime.errors import UserError
from topformer_jax.version import __version__

SUFFIXES = (".onnx", ".tflite")
# What a file of each name computes: the output and its stride.
OUTPUTS = {
    "logits": ("logits", 1),
    "labels": ("labels", 1),
    "half-labels": ("labels", 2),
    "scores": ("scores", 1),
}
# What PyTorch is asked; nobody there makes labels of half the size.
QUESTIONS = {"logits": "logits", "labels": "labels", "scores": "logits"}


def make_model(config: ConfigDict, checkpoint: str | None) -> models.Segmenter | models.Classifier:
    """A model with a checkpoint's weights, or with the config's fresh ones."""
    model = checkpoints.load_model(config, checkpoint) if checkpoint else models.build(config)
    model.eval()
    return model


def write_file(
    config: ConfigDict,
    output: str,
    size: tuple[int, int],
    suffix: str,
    *,
    target: str = "cpu",
    stride: int = 1,
    checkpoint: str | None = None,
) -> bytes:
    """An exported file with the config's fresh weights, or with a checkpoint's."""
    model = make_model(network.export_config(config), checkpoint)
    description = {
        "output": output,
        "stride": stride,
        "size": size,
        "target": target,
        "precision": "float32",
        "classes": [f"class {number}" for number in range(config.model.num_classes)],
        "palette": [[number, 0, 0] for number in range(config.model.num_classes)],
        "config": config.to_dict(),
        "versions": {"topformer_jax": __version__},
    }
    module = exported.import_format(pathlib.Path(f"file{suffix}"))
    return bytes(module.write(network.make_function(model, output, stride), description))


def make_function(model: models.Segmenter | models.Classifier, name: str, image: np.ndarray) -> Program:
    """The function that a file computes, compiled by XLA, for an image that is on the device."""
    function = jax.jit(network.make_function(model, *OUTPUTS[name]))
    placed = jax.device_put(image)
    return timing.start(f"{OURS}, {name}", lambda: function(placed), function, placed)


def our_programs(
    model: models.Segmenter | models.Classifier, image: np.ndarray, names: list[str]
) -> dict[str, Program]:
    """Our programs by output: those of `predict` where it has one."""
    programs = inference.our_programs(model, image) if isinstance(model, models.Segmenter) else {}
    return {name: programs.get(name) or make_function(model, name, image) for name in names}


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, size=(512, "pixels of a side"))
    peers.add_flags(parser)
    text = "(default: logits and labels, or a classifier's scores)"
    parser.add_argument("--outputs", nargs="+", choices=list(OUTPUTS), help=text)
    parser.add_argument(
        "--suffixes", nargs="+", choices=SUFFIXES, default=SUFFIXES, help="of the files to time"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="trained weights (default: fresh ones)")
    parser.add_argument(
        "--image", type=pathlib.Path, metavar="FILE", help="a photograph, resized (default: noise)"
    )
    args, config = timing.parse(parser)
    size = (args.size, args.size)
    classifies = config.task == "classification"
    if not classifies:
        config = inference.whole_image(config, args.size)
    names = args.outputs or (["scores"] if classifies else ["logits", "labels"])
    if classifies != ("scores" in names) or (classifies and len(names) > 1):
        raise UserError(f"--outputs {' '.join(names)}: a classifier gives scores, a segmenter the others")
    model = make_model(config, args.checkpoint)
    weights = samples.torch_weights(models.state_dict(model))
    image = samples.images(1, size)
    if args.image:
        with files.report_errors("read", args.image):
            data = args.image.read_bytes()
        image = cv2.resize(decode_image(data, str(args.image)), size)[None]
    once = argparse.Namespace(peer="torch", variants=["eager"])  # a file has no variants
    rows, notes = [], []
    for name, ours in our_programs(model, image, names).items():
        with contextlib.ExitStack() as stack:

            def start(arguments: argparse.Namespace, asked: str, *inputs: Any) -> dict[str, Program]:
                return stack.enter_context(peers.start(arguments, asked, config, *inputs))

            programs, (output, stride) = {OURS: ours}, OUTPUTS[name]
            for suffix in args.suffixes:
                file = write_file(config, output, size, suffix, stride=stride, checkpoint=args.checkpoint)
                (programs[f"our {suffix}"],) = start(once, "exported_file", suffix, file, image).values()
                notes.append(f"{name}{suffix}: {len(file) / 1e6:.2f} MB")
            if args.peer and name in QUESTIONS:
                programs |= start(args, QUESTIONS[name], weights, image)
                own = start(once, f"onnx_{QUESTIONS[name]}", weights, image)
                programs |= dict(zip(["torch's ONNX"], own.values(), strict=True))
            rows += timing.compare(f"to {name}", programs, args.repeats, images=1)
    title = f"exported: {timing.describe(config)}, 1 x {args.size} x {args.size}"
    timing.report(title, rows, args, notes)


if __name__ == "__main__":
    cli.run(main)
