"""How long does a training step take?

  python -m benchmarks.train_step --peer torch --config configs/topformer_t_ade.py --config.batch_size=4
  python -m benchmarks.train_step --peer torch --config configs/topformer_t_imagenet.py --config.batch_size=16

The step of one device at the config's batch and crop, on a batch that is on the device already, as in training one
step after the other. Ours augments the images too; PyTorch's come augmented and normalised. Of a
classifier ours averages its weights too, as the recipe says.
"""

import argparse

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import peers, samples, timing
from benchmarks.timing import OURS, Row
from topformer_jax import models
from topformer_jax.runtime import cli, sharding
from topformer_jax.training import step

RUN = 0.2  # seconds of steps that follow each other without waiting


def compare_steps(config: ConfigDict, args: argparse.Namespace, mesh: Mesh) -> list[Row]:
    """Our step beside PyTorch's."""
    batch = samples.batch(config)
    model = models.build(config)
    weights = samples.torch_weights(models.state_dict(model))  # copies: the step donates the model's arrays
    state, train_step = step.init_training(config, mesh, model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))

    def call() -> object:
        nonlocal state
        state, metrics = train_step(state, placed)
        return metrics

    programs = {OURS: timing.start(OURS, call, train_step, shapes, placed)}
    with peers.start(args, "train_step", config, weights, batch) as torch_programs:
        return timing.compare(
            f"{config.batch_size} x {' x '.join(map(str, config.data.crop_size))}",
            programs | torch_programs,
            args.repeats,
            images=config.batch_size,
            at_least=RUN,
        )


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__)
    peers.add_flags(parser)
    args, config = timing.parse(parser)
    rows = compare_steps(config, args, sharding.make_train_mesh(config, jax.local_devices()[:1]))
    timing.report(f"train_step: {timing.describe(config)}", rows, args)


if __name__ == "__main__":
    cli.run(main)
