"""inference: from pictures on the device to logits, and to labels of full size."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax import inference as inference_lib
from topformer_jax import models, views
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import OURS, Options, Program
from topformer_jax.benchmark.peer import Peers
from topformer_jax.benchmark.report import Report


def inference(config: ConfigDict, options: Options, count: int, size: int) -> Report:
    """`count` pictures of `size` x `size` pixels at once, each call waited for, beside PyTorch's."""
    whole = {
        "scale": (4 * size, size),
        "size_divisor": 1,
        "img_ratios": (1.0,),
        "flip": False,
        "mode": "whole",
    }
    config = config_lib.load(config, {f"evaluation.{key}": value for key, value in whole.items()})
    peers = Peers(config, options)
    model = models.build_segmenter(config)
    tensors = {name: np.asarray(value) for name, value in models.state_dict(model).items()}
    pictures = samples.pictures(count, (size, size))
    cases: dict[str, dict[str, Program]] = {
        name: {OURS: program} for name, program in _ours(model, config, pictures).items()
    }
    machine = measure.machine()
    operations = 2 * count * measure.multiply_adds(config, (size, size))
    rows = []
    with peers:
        for case, programs in cases.items():
            programs |= peers.make(case, tensors, pictures)
        for case, programs in cases.items():
            seconds = measure.sequential(programs, options.repeats)
            rows += measure.rows(
                f"to {case}", programs, seconds, images=count, operations=operations, machine=machine
            )
    title = f"inference: {measure.described(config)}, {count} x {size} x {size}"
    return Report(title, machine.facts(), rows, peers.notes)


def _ours(model: models.Segmenter, config: ConfigDict, pictures: np.ndarray) -> dict[str, Program]:
    """The programs that evaluation and prediction run, on pictures that are on the device."""
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    programs = inference_lib.programs(model, config.evaluation, mesh)
    values = jax.device_put(models.state_dict(model), NamedSharding(mesh, P()))
    prepared = [
        views.prepare(picture, None, config.evaluation, dtype=programs.dtype.name) for picture in pictures
    ]
    batch = inference_lib.stack(dict(enumerate(prepared)), programs, len(prepared))
    totals = programs.totals()
    flip = np.bool_(False)

    def labels() -> jax.Array:
        nonlocal totals
        found, _, totals = programs.count(programs.views(values, batch), batch.grid, batch.labels, totals)
        return found

    logits = measure.ready(f"{OURS}, logits", lambda: programs.logits(values, batch.images[0], flip))
    logits = measure.with_costs(logits, programs.logits, values, batch.images[0], flip)
    whole = measure.ready(f"{OURS}, labels", labels)
    seen = programs.views(values, batch)
    count = measure.with_costs(whole, programs.count, seen, batch.grid, batch.labels, totals)
    most = max([logits, count], key=lambda program: program.memory or 0)  # one runs after the other
    return {
        "logits": logits,
        "labels": dataclasses.replace(whole, memory=most.memory, temporary=most.temporary),
    }
