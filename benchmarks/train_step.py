"""How long does a training step take?

  python -m benchmarks.train_step --peer torch --config configs/topformer_t_ade.py --config.batch_size=4
  python -m benchmarks.train_step --peer torch --config configs/topformer_t_imagenet.py --config.batch_size=16

The step of one device at the config's batch and crop, on a batch that is on the device already, as in training one
step after the other. Ours augments the images too; PyTorch's come augmented and normalised. For a classifier ours
also averages its weights, as the recipe says.
"""

import argparse
import functools

import jax
from ml_collections import ConfigDict

from benchmarks import runner, samples
from benchmarks.runner import OURS, Report
from topformer_jax import models
from topformer_jax.runtime import cli, sharding
from topformer_jax.training import step

RUN = 0.2  # seconds of steps that follow each other without waiting


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """Our step beside PyTorch's."""
    mesh = sharding.make_train_mesh(config, jax.local_devices()[:1])
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

    case = " x ".join(map(str, (config.batch_size, *config.data.crop_size)))
    programs = {OURS: runner.start(OURS, call, train_step, shapes, placed)}
    with runner.start_peers(args, "train_step", config, weights, batch) as peers:
        count = config.batch_size
        rows = runner.compare(case, programs | peers, args.repeats, images=count, at_least=RUN)
    return Report(f"train_step: {runner.describe(config)}", rows)


main = functools.partial(runner.run, __doc__, measure, peers=True)
if __name__ == "__main__":
    cli.run(main)
