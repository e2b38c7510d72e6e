"""How long does it take from an image to its logits, and to labels of its size?

  python -m benchmarks.inference --peer torch --config configs/topformer_b_ade.py
  python -m benchmarks.inference --peer torch --exported --checkpoint TopFormer-T.pth --image street.jpg

One image at a time; each call is waited for. Ours are the programs that evaluation runs, for an image on the device;
"auto" is what prediction runs by default, for an image on the host. `--exported` adds exported files and PyTorch's
own ONNX export: each runs in its runtime and in a process of its own, on all cores. The weights are random without
`--checkpoint`. On a CPU, a class that is no pixel's label costs little; with trained weights, most classes of a
photograph (`--image`) are such.
"""

import argparse
import contextlib
import functools
import pathlib
from typing import Any

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import runner, samples
from benchmarks.runner import OURS, Program, Report
from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.data.codecs import decode_image
from topformer_jax.exporters import exported, network
from topformer_jax.inference import Predictor, compile_inference, make_global_batch
from topformer_jax.inference.plan import plan_shapes, prepare_input
from topformer_jax.runtime import cli, files, sharding
from topformer_jax.version import __version__


def our_programs(model: models.Segmenter, image: np.ndarray) -> dict[str, Program]:
    """Our programs to "logits" and to "labels", for an image that is on the device."""
    mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
    compiled = compile_inference(model, mesh)
    tensors = jax.device_put(models.state_dict(model), sharding.replicated(mesh))
    evaluation = model.config.evaluation
    shapes = plan_shapes([(image.shape[0], image.shape[1])], evaluation)
    inputs = prepare_input(image, None, evaluation, shapes, dtype=compiled.dtype.name)
    batch = make_global_batch([inputs], compiled.batch_sharding)
    network = (tensors, batch.views[0])

    def label() -> jax.Array:
        views = compiled.compute_views(tensors, shapes, batch)
        predictions, _ = compiled.predict_and_count(views, batch.tiles, batch.labels)
        return predictions

    program: Any = compiled.network(shapes, 0)
    count: Any = compiled.predict_and_count
    logits = runner.start(f"{OURS}, logits", lambda: program(*network), lambda: program.lower(*network).compile())
    after = compiled.compute_views(tensors, shapes, batch), batch.tiles, batch.labels
    labels = runner.start(f"{OURS}, labels", label, lambda: count.lower(*after).compile())
    peak = max(logits, labels, key=lambda program: program.memory_bytes or 0)  # one runs after the other
    memory = (peak.memory_bytes, peak.temporary_bytes)
    return {"logits": logits, "labels": Program(labels.run, labels.first_seconds, *memory)}


def write_file(
    config: ConfigDict,
    output: str,
    size: tuple[int, int],
    suffix: str,
    *,
    checkpoint: str | None = None,
    target: str = "cpu",
    stride: int = 1,
) -> bytes:
    """An exported file with the config's fresh weights, or with a checkpoint's."""
    model = checkpoints.load_segmenter(config_lib.load(config, {"model.dtype": "float32"}), checkpoint)
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


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """Our programs, our files, PyTorch and its file, to logits and to labels."""
    size = (args.size, args.size)
    # Images are evaluated whole and unresized.
    settings = {"scale": size, "size_divisor": 1, "img_ratios": (1.0,), "flip": False, "mode": "whole"}
    config = config_lib.load(config, {f"evaluation.{key}": value for key, value in settings.items()})
    model = checkpoints.load_segmenter(config, args.checkpoint)
    weights = samples.torch_weights(models.state_dict(model))
    image = samples.images(1, size)
    if args.image:
        image = cv2.resize(decode_image(files.read_bytes(args.image), str(args.image)), size)[None]
    auto = Predictor(model, [size])
    by_default = {"logits": lambda: auto.network and auto.network(image), "labels": lambda: auto(image[0])}
    once = argparse.Namespace(peer="torch", variants=["eager"])  # a file has no variants
    rows, notes = [], []
    for output, ours in our_programs(model, image[0]).items():
        programs: dict[str, Program] = {OURS: ours}
        if auto.network is not None:
            programs["auto"] = runner.start(f"auto, {output}", by_default[output])
        with contextlib.ExitStack() as stack:
            for suffix in (".onnx", ".tflite") if args.exported else ():
                file = write_file(config, output, size, suffix, checkpoint=args.checkpoint)
                peers = runner.start_peers(once, "exported_file", config, suffix, file, image)
                (programs[f"our {suffix}"],) = stack.enter_context(peers).values()
                notes.append(f"{output}{suffix}: {len(file) / 1e6:.2f} MB")
            programs |= stack.enter_context(runner.start_peers(args, output, config, weights, image))
            if args.peer and args.exported:
                peers = runner.start_peers(once, f"onnx_{output}", config, weights, image)
                (programs["torch's ONNX"],) = stack.enter_context(peers).values()
            rows += runner.compare(f"to {output}", programs, args.repeats, images=1)
    return Report(f"inference: {runner.describe(config)}, {args.size} x {args.size}", rows, notes)


flags: dict[str, dict[str, Any]] = {
    "exported": {"action": "store_true", "help": "exported files too"},
    "checkpoint": {"metavar": "PATH", "help": "trained weights (default: fresh ones)"},
    "image": {"type": pathlib.Path, "metavar": "FILE", "help": "a photograph, resized (default: noise)"},
}
main = functools.partial(runner.run, __doc__, measure, peers=True, flags=flags, size=(512, "pixels of a side"))
if __name__ == "__main__":
    cli.run(main)
