"""How long do exported files take beside the model in JAX, beside PyTorch and beside PyTorch's own ONNX export?

  python -m benchmarks.exported --peer torch --config configs/topformer_t_ade.py

One image at a time, uint8 pixels to logits and to labels of its size, each call waited for. Files have random weights
and run in their own runtimes in this process, on all of its cores; PyTorch and its file in processes of their own.
"""

import functools

import numpy as np
from ml_collections import ConfigDict

from benchmarks import inference, peers, samples, timing
from benchmarks.timing import OURS, Program
from topformer_jax import cli, models
from topformer_jax.exporters import exported, litert_file, network, onnx_file
from topformer_jax.version import __version__

FORMATS = {"onnx": onnx_file, "tflite": litert_file}


def file_programs(config: ConfigDict, output: str, image: np.ndarray) -> dict[str, Program]:
    """Exported files of each format, open, that have run once."""
    model = models.build_segmenter(network.export_config(config))
    model.eval()
    size = image.shape[1:3]
    programs = {}
    for name, module in FORMATS.items():
        description = {
            "output": output,
            "stride": 1,
            "size": size,
            "target": "cpu",
            "precision": "float32",
            "versions": {"topformer_jax": __version__},
        }
        data = module.write(network.make_function(model, output), description)
        file = exported.open_bytes(name, data, module)
        programs[f"our .{name}"] = timing.start(f".{name}, {output}", functools.partial(file, image))
    return programs


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__, size=(512, "pixels of a side"))
    peers.add_flags(parser)
    args, config = timing.parse(parser)
    config = inference.whole_image(config, args.size)
    model = models.build_segmenter(config)
    weights = samples.torch_weights(models.state_dict(model))
    image = samples.images(1, (args.size, args.size))
    rows = []
    for question, ours in inference.our_programs(model, image).items():
        files = file_programs(config, question, image)
        with (
            peers.start(args, question, config, weights, image) as torch_programs,
            peers.start(args, f"onnx_{question}", config, weights, image) as torch_files,
        ):
            own = {name.replace("torch", "torch's ONNX"): program for name, program in torch_files.items()}
            programs = {OURS: ours} | files | torch_programs | own
            rows += timing.compare(f"to {question}", programs, args.repeats, images=1)
    timing.report(f"exported: {timing.describe(config)}, 1 x {args.size} x {args.size}", rows, args)


if __name__ == "__main__":
    cli.run(main)
