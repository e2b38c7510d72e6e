"""How long do exported files take beside the model in JAX, beside PyTorch and beside PyTorch's own ONNX export?

  python -m benchmarks.exported --peer torch --config configs/topformer_t_ade.py

One image at a time, uint8 pixels to logits and to labels of its size, each call waited for. The weights are random.
Each file runs in its runtime and in a process of its own, as PyTorch does, on all cores.
"""

import argparse
import contextlib
import pathlib
from typing import Any

from ml_collections import ConfigDict

from benchmarks import inference, peers, samples, timing
from benchmarks.timing import OURS, Program
from topformer_jax import cli, models
from topformer_jax.exporters import exported, network
from topformer_jax.version import __version__

SUFFIXES = (".onnx", ".tflite")


def write_file(
    config: ConfigDict,
    output: str,
    size: tuple[int, int],
    suffix: str,
    *,
    target: str = "cpu",
    stride: int = 1,
) -> bytes:
    """An exported file with the config's fresh weights."""
    model = models.build_segmenter(network.export_config(config))
    model.eval()
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


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, size=(512, "pixels of a side"))
    peers.add_flags(parser)
    args, config = timing.parse(parser)
    size = (args.size, args.size)
    config = inference.whole_image(config, args.size)
    model = models.build_segmenter(config)
    weights = samples.torch_weights(models.state_dict(model))
    image = samples.images(1, size)
    once = argparse.Namespace(peer="torch", variants=["eager"])  # a file has no variants
    rows = []
    for question, ours in inference.our_programs(model, image).items():
        with contextlib.ExitStack() as stack:

            def start(arguments: argparse.Namespace, asked: str, *inputs: Any) -> dict[str, Program]:
                return stack.enter_context(peers.start(arguments, asked, config, *inputs))

            programs = {OURS: ours}
            for suffix in SUFFIXES:
                data = write_file(config, question, size, suffix)
                (programs[f"our {suffix}"],) = start(once, "exported_file", suffix, data, image).values()
            programs |= start(args, question, weights, image)
            if args.peer:
                own = start(once, f"onnx_{question}", weights, image)
                programs |= dict(zip(["torch's ONNX"], own.values(), strict=True))
            rows += timing.compare(f"to {question}", programs, args.repeats, images=1)
    timing.report(f"exported: {timing.describe(config)}, 1 x {args.size} x {args.size}", rows, args)


if __name__ == "__main__":
    cli.run(main)
