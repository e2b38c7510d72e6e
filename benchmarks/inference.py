"""How long does it take from an image on the device to its logits, and to labels of its size?

  python -m benchmarks.inference --peer torch --config configs/topformer_t_ade.py

Each call is waited for. Ours are the programs that evaluation and prediction run.
"""

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import peers, samples, timing
from benchmarks.timing import OURS, Program
from topformer_jax import config as config_lib, models
from topformer_jax.inference import compile_inference, make_global_batch
from topformer_jax.inference.inputs import prepare_input
from topformer_jax.inference.plan import plan_shapes
from topformer_jax.runtime import cli, sharding


def whole_image(config: ConfigDict, size: int) -> ConfigDict:
    """The config, evaluating images of `size` x `size` pixels whole and unresized."""
    settings = {
        "scale": (4 * size, size),
        "size_divisor": 1,
        "img_ratios": (1.0,),
        "flip": False,
        "mode": "whole",
    }
    return config_lib.load(config, {f"evaluation.{key}": value for key, value in settings.items()})


def our_programs(model: models.Segmenter, images: np.ndarray) -> dict[str, Program]:
    """Our programs to "logits" and to "labels", for images that are on the device."""
    mesh = sharding.make_inference_mesh(jax.local_devices()[:1])
    compiled = compile_inference(model, mesh)
    tensors = jax.device_put(models.state_dict(model), sharding.replicated(mesh))
    evaluation, dtype = model.config.evaluation, compiled.dtype.name
    shapes = plan_shapes([image.shape[:2] for image in images], evaluation)
    inputs = {
        row: prepare_input(image, None, evaluation, shapes, dtype=dtype) for row, image in enumerate(images)
    }
    batch = make_global_batch(inputs, len(inputs), compiled.batch_sharding)
    network = (tensors, batch.views[0])

    def label() -> jax.Array:
        views = compiled.compute_views(tensors, shapes, batch)
        predictions, _ = compiled.predict_and_count(views, batch.label)
        return predictions

    program = compiled.network(shapes, 0)
    logits = timing.start(f"{OURS}, logits", lambda: program(*network), program, *network)
    after = compiled.compute_views(tensors, shapes, batch), batch.label
    labels = timing.start(f"{OURS}, labels", label, compiled.predict_and_count, *after)
    peak = max(logits, labels, key=lambda program: program.memory_bytes or 0)  # one runs after the other
    memory = (peak.memory_bytes, peak.temporary_bytes)
    return {"logits": logits, "labels": Program(labels.run, labels.first_seconds, *memory)}


def main() -> None:
    """The command."""
    sizes = {"batch": (1, "images at once"), "size": (512, "pixels of a side")}
    parser = timing.make_parser(__doc__, **sizes)
    peers.add_flags(parser)
    args, config = timing.parse(parser)
    config = whole_image(config, args.size)
    model = models.build_segmenter(config)
    weights = samples.torch_weights(models.state_dict(model))
    images = samples.images(args.batch, (args.size, args.size))
    rows = []
    for question, program in our_programs(model, images).items():
        with peers.start(args, question, config, weights, images) as torch_programs:
            programs = {OURS: program} | torch_programs
            rows += timing.compare(f"to {question}", programs, args.repeats, images=args.batch)
    title = f"inference: {timing.describe(config)}, {args.batch} x {args.size} x {args.size}"
    timing.report(title, rows, args)


if __name__ == "__main__":
    cli.run(main)
