"""Measures speed, each thing beside its peer in the same run.

  python -m topformer_jax.benchmark train-step --peer torch --config configs/topformer_b_ade.py --config.batch_size=16
  python -m topformer_jax.benchmark inference --peer torch --json inference.json --chart inference.png
  python -m topformer_jax.benchmark tpu --config configs/topformer_b_ade.py --config.model.dtype=bfloat16

train-step  the whole training step of one device, at the config's batch and crop
inference   pictures to logits, and to labels of full size
evaluate    files to the confusion matrix, and whether the peer finds the same mIoU
input       files to training crops, on one core and over workers, beside the official pipeline
train       training steps fed from files, beside the step by itself: the share of time that waits for data
loss        cross-entropy of upsampled logits and its gradient, beside the plain formulation
depthwise   the shifted depthwise convolution beside the library's
compile     seconds to the first step, with an empty and a filled cache, dispatch of a step, import of each command
tpu         what the programs ask of a chip, compiled for TPU slices that are not there
            (pip install -e ".[tpu-compile]")

Programs are warmed up, then run in turn; a ratio is the median over neighbouring runs. Without --config it is
TopFormer-T for ADE20K. --peer torch needs pip install -e ".[convert]"; each of its variants runs in a process of
its own.
"""

import argparse
import os
import pathlib
import tempfile

from ml_collections import ConfigDict

from topformer_jax import cli
from topformer_jax import config as config_lib
from topformer_jax.benchmark import (
    depthwise,
    evaluation,
    feeding,
    inference,
    loading,
    loss,
    measure,
    peer,
    samples,
    startup,
    tpu,
    training,
)
from topformer_jax.benchmark.measure import Options
from topformer_jax.benchmark.report import Report
from topformer_jax.data import sources
from topformer_jax.errors import UserError

PEERED = ("train-step", "inference", "evaluate", "input", "loss")
WHATS = (*PEERED, "train", "depthwise", "compile", "tpu")


def report(args: argparse.Namespace, config: ConfigDict | None) -> Report:
    """Measures what is asked for."""
    if args.peer and args.what not in PEERED:
        raise UserError(f"benchmark {args.what} has no peer in PyTorch: {', '.join(PEERED)} have one")
    options = Options(args.repeats, args.peer == "torch", tuple(args.variants))
    settings = config_lib.ade20k("tiny") if config is None else config
    match args.what:
        case "train-step":
            return training.train_step(settings, options)
        case "inference":
            return inference.inference(settings, options, args.batch or 1, args.size or 512)
        case "evaluate":
            return _evaluate(args, config, options)
        case "input":
            workers = args.workers or [count for count in (1, 2, 4, 8, 16) if count <= measure.cores()]
            return loading.loading(settings, options, args.images or 32, workers)
        case "train":
            workers = args.workers or [measure.cores()]
            return feeding.train(settings, options, args.images or 32, workers)
        case "loss":
            return loss.loss(settings, options, args.batch or 4, args.size or 512)
        case "depthwise":
            return depthwise.depthwise(options, args.batch or 4, args.size or 128, args.channels)
        case "compile":
            return startup.startup(settings, options)
    if config is None:
        raise UserError("benchmark tpu needs --config FILE: the recipe whose step to compile")
    return tpu.tpu(config, args.slices, args.batches, evaluation=args.evaluation, plain=args.plain)


def _evaluate(args: argparse.Namespace, config: ConfigDict | None, options: Options) -> Report:
    """On the config's validation split, or on generated files."""
    if config is not None and not args.generated:
        source = sources.open_source(config, "validation")
        chosen = samples.First(source, args.images) if args.images else source
        return evaluation.evaluate(config, options, chosen, args.checkpoint)
    settings = config_lib.ade20k("tiny") if config is None else config
    with tempfile.TemporaryDirectory(prefix="topformer_jax.") as folder:
        generated = samples.write(pathlib.Path(folder), args.images or 32, settings)
        return evaluation.evaluate(settings, options, generated, args.checkpoint)


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__, config_required=False)
    parser.prog = "python -m topformer_jax.benchmark"
    parser.add_argument("what", choices=WHATS, help="what to measure")
    parser.add_argument("--peer", choices=["torch"], help="measure PyTorch beside it")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of PyTorch: {', '.join(peer.WORDS)}, or several joined by +",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default 7)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything")
    parser.add_argument("--chart", type=pathlib.Path, metavar="FILE.png", help="draw the medians")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batch", type=int, help="images of inference (1), loss (4), depthwise (4)")
    sizes.add_argument(
        "--size", type=int, help="pixels, height and width, of inference and loss (512), depthwise (128)"
    )
    sizes.add_argument("--channels", type=int, default=96, help="of depthwise (96)")
    sizes.add_argument(
        "--images", type=int, help="of evaluate (all; 32 generated ones), of input and train (32)"
    )
    sizes.add_argument(
        "--generated", action="store_true", help="of evaluate: generated files in place of the config's data"
    )
    sizes.add_argument(
        "--workers", type=int, nargs="+", help="of input (1, 2, 4, ... up to the cores), of train (as many)"
    )
    sizes.add_argument("--checkpoint", type=pathlib.Path, metavar="PATH", help="of evaluate (random weights)")
    sizes.add_argument("--slices", nargs="+", default=["v5e:2x4", "v5e:16x16", "v4:2x2x2"], help="of tpu")
    sizes.add_argument("--batches", nargs="+", type=int, default=[32, 256, 2048], help="of tpu, images")
    sizes.add_argument(
        "--evaluation", action="store_true", help="of tpu: compile an evaluation's programs too"
    )
    sizes.add_argument(
        "--plain",
        action="store_true",
        help="of tpu: beside it the step with the loss as it is written down",
    )
    args, config = parser.parse()
    if any(count is not None and count < 1 for count in (args.repeats, args.batch, args.size, args.images)):
        raise UserError("--repeats, --batch, --size and --images are 1 or more")
    # A process that measures shares a GPU with PyTorch and with processes of its own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = report(args, config)
    print(found.text())
    if args.json:
        found.write_json(args.json)
    if args.chart:
        found.write_chart(args.chart)


if __name__ == "__main__":
    cli.run(main)
