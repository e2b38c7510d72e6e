"""train-step: the whole training step of one device, on a batch that lies on the device already."""

import jax
import numpy as np
from ml_collections import ConfigDict

from topformer_jax import models, sharding, step
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import OURS, Options
from topformer_jax.benchmark.peer import Peers
from topformer_jax.benchmark.report import Report

RUN = 0.2  # seconds of steps that follow each other without waiting, as in training


def train_step(config: ConfigDict, options: Options) -> Report:
    """The step of `step.create` at the config's batch and crop, beside PyTorch's."""
    peers = Peers(config, options)
    mesh = sharding.make_mesh(config, jax.local_devices()[:1])
    batch = samples.batch(config)
    model = models.build(config)
    # The step donates the arrays that it starts from.
    tensors = {name: np.array(value) for name, value in models.state_dict(model).items()}
    state, train = step.create(config, mesh, model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))

    def call() -> object:
        nonlocal state
        state, metrics = train(state, placed)
        return metrics

    program = measure.ready(OURS, call)
    programs = {OURS: measure.with_costs(program, train, shapes, placed)}
    notes = ["Ours flips and distorts the images too; the peer's host has done it, and normalised them."]
    with peers:
        programs |= peers.make("train_step", tensors, batch)
        seconds = measure.sequential(programs, options.repeats, at_least=RUN)
    machine = measure.machine()
    count, crop = config.batch_size, tuple(config.data.crop_size)
    # The backward pass has two products for each one of the forward pass.
    operations = 3 * 2 * count * measure.multiply_adds(config, crop)
    case = f"{count} x {crop[0]} x {crop[1]}"
    rows = measure.rows(case, programs, seconds, images=count, operations=operations, machine=machine)
    return Report(f"train-step: {measure.described(config)}", machine.facts(), rows, notes + peers.notes)
