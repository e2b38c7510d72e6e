"""How long does a training step take?

  python -m benchmarks.train_step --peer torch --config configs/topformer_t_ade.py --config.batch_size=4
  python -m benchmarks.train_step --peer torch --config configs/topformer_t_imagenet.py --config.batch_size=16

The step of one device at the config's batch and crop, on a batch that is on the device already, as in training one
step after the other. Ours augments the images too; PyTorch's come augmented and normalised. For a classifier ours
also averages its weights, as the recipe says.
"""

import argparse
import concurrent.futures
import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks import runner, samples
from benchmarks.runner import OURS, Program, Report, Row
from topformer_jax import models
from topformer_jax.runtime import cli, sharding
from topformer_jax.training import step

RUN = 0.2  # seconds of steps that follow each other without waiting


class OurStep:
    """Our compiled step with its state; each call makes a step.

    Attributes:
        config: the settings.
        weights: of the start, as PyTorch has them.
        program: to time, on one batch.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        mesh = sharding.make_train_mesh(config, jax.local_devices()[:1])
        model = models.build(config)
        self.weights = samples.torch_weights(models.state_dict(model))  # copies: the step donates the model's
        self._state, jitted = step.init_training(config, mesh, model)
        self._sharding = sharding.batch_sharding(mesh)
        self._step: Any = None

        def compile_and_call() -> Any:
            if self._step is None:
                self._step = jitted.lower(self._state, placed).compile()  # type: ignore[attr-defined]
            return self(placed)

        placed = jax.device_put(samples.batch(config), self._sharding)
        self.program: Program = runner.start(f"{OURS}, {config.name}", compile_and_call, lambda: self._step)

    def __call__(self, batch: Any) -> Any:
        """The metrics of a step on a batch, on the device or the host."""
        self._state, metrics = self._step(self._state, jax.device_put(batch, self._sharding))
        return metrics


def compare_steps(args: argparse.Namespace, config: ConfigDict) -> tuple[OurStep, list[Row]]:
    """Our step, and its rows beside PyTorch's; for a GPU both compile at the same time."""
    batch, weights = samples.batch(config), samples.torch_weights(models.state_dict(models.build(config)))
    case = " x ".join(map(str, (config.batch_size, *config.data.crop_size)))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        starting = pool.submit(OurStep, config)
        if jax.default_backend() == "cpu":  # both would share the cores that they measure
            starting.result()
        with runner.start_peers(args, "train_step", config, weights, batch) as peers:
            ours = starting.result()
            programs = {OURS: ours.program} | peers
            rows = runner.compare(case, programs, args.repeats, images=config.batch_size, at_least=RUN)
    return ours, rows


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """Our step beside PyTorch's."""
    return Report(f"train_step: {runner.describe(config)}", compare_steps(args, config)[1])


main = functools.partial(runner.run, __doc__, measure, peers=True)
if __name__ == "__main__":
    cli.run(main)
