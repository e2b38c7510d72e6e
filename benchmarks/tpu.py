"""What do the training step and the evaluation ask of a TPU chip? Compiled for slices that are not here.

  python -m benchmarks.tpu --config configs/topformer_b_ade.py --config.model.dtype=bfloat16 --evaluation

Figures of one chip: memory for a program's arguments and for its temporary arrays; its operations; the bytes that it
reads and writes in its memory at most (`traffic.memory_bytes`); the bytes that collectives move between the chips. It
needs the TPU compiler: pip install -e '.[tpu-compile]'.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.topologies import get_topology_desc
from ml_collections import ConfigDict

from benchmarks import runner, samples, traffic
from benchmarks.runner import Report, Row
from topformer_jax import config as config_lib, models
from topformer_jax.inference import compile_inference
from topformer_jax.inference.plan import plan_shapes, prepare_input
from topformer_jax.runtime import cli, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import step

IMAGES_PER_CHIP = 8  # of an evaluation: evaluation.per_device_batch_size off a CPU
# By kind of chip: its memory's bytes a second, and bfloat16 operations a second.
CHIPS = {
    "v4": (1228e9, 275e12),
    "v5e": (819e9, 197e12),
    "v5p": (2765e9, 459e12),
    "v6e": (1640e9, 918e12),
}


def slice_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice such as v5e:2x4, or of several as in v5e:16x16*2, to compile for.

    Raises:
        UserError: the TPU compiler is not installed, or there is no such slice.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask about itself
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu-compile]'") from None
    # A chip of two cores is one device, as on a pod.
    chip = {"chip_config_name": "megacore"} if name.startswith(("v4:", "v5p:")) else {}
    topology, _, count = name.partition("*")
    several = {"num_slices": int(count)} if count.isdecimal() else {}
    try:
        return get_topology_desc(platform="tpu", topology_name=topology, **several, **chip).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"there is no TPU slice {name}: {str(error).splitlines()[0]}") from None


def compile_row(slices: str, name: str, images: float, jitted: Any, *arguments: Any) -> Row:
    """Compiles a program for the devices on which its arguments lie; the row of its figures.

    The images a second of a chip are those that its memory and its arithmetic allow, whichever takes longer.
    """
    start = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    print(f"{slices}, {name}: compiled in {seconds:.0f} s", file=sys.stderr, flush=True)
    memory, text = program.memory_analysis(), program.as_text()
    moved, operations = traffic.memory_bytes(text), program.cost_analysis()["flops"]
    bytes_a_second, operations_a_second = CHIPS[slices.partition(":")[0]]
    return {
        "case": slices,
        "program": name,
        "images_per_second": images / max(moved / bytes_a_second, operations / operations_a_second),
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "operations": operations,
        "moved_bytes": moved,
        "collective_bytes": traffic.sent_bytes(text),
        "compile_seconds": seconds,
    }


def step_row(slices: str, config: ConfigDict, devices: Sequence[jax.Device]) -> Row:
    """The training step."""
    mesh = sharding.make_train_mesh(config, devices)
    model = models.build(config)
    state = step.init_state(config, model)
    layout = sharding.state_sharding(state, mesh)
    train_step = step.build_train_step(config, model, mesh, layout)
    batch = {name: abstract(x, sharding.batch_sharding(mesh)) for name, x in samples.batch(config).items()}
    images = config.batch_size / len(devices)
    name = f"train step, batch {config.batch_size}"
    return compile_row(slices, name, images, train_step, jax.tree.map(abstract, state, layout), batch)


def evaluation_row(slices: str, config: ConfigDict, devices: Sequence[jax.Device]) -> Row:
    """The network in an evaluation of images of `samples.SIZE`, `IMAGES_PER_CHIP` a chip."""
    mesh = sharding.make_inference_mesh(devices)
    model = models.build_segmenter(config)
    programs = compile_inference(model, mesh)
    shapes = plan_shapes([samples.SIZE], config.evaluation)
    image = np.zeros((*samples.SIZE, 3), np.uint8)
    inputs = prepare_input(image, None, config.evaluation, shapes, dtype=programs.dtype.name)
    rows = IMAGES_PER_CHIP * mesh.size
    view = jax.tree.map(lambda x: abstract(x, programs.batch_sharding, rows), inputs.views[0])
    tensors = jax.tree.map(lambda x: abstract(x, sharding.replicated(mesh)), models.state_dict(model))
    network = programs.network(shapes, 0)
    return compile_row(slices, "evaluation, logits", IMAGES_PER_CHIP, network, tensors, view)


def abstract(array: Any, sharding: jax.sharding.Sharding, *leading: int) -> jax.ShapeDtypeStruct:
    """Shape, dtype and layout of an array, with further leading axes."""
    return jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype, sharding=sharding)


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """The programs of every slice and batch."""
    rows: list[Row] = []
    notes: list[str] = []
    for name in args.slices:
        devices = slice_devices(name)
        for batch in args.batches:
            if batch % len(devices):
                notes.append(f"{name}: skipped, {len(devices)} chips cannot share {batch} images evenly")
                continue
            rows.append(step_row(name, config_lib.load(config, {"batch_size": batch}), devices))
        if args.evaluation:
            rows.append(evaluation_row(name, config, devices))
    title = f"tpu: {runner.describe(config)}, crops {tuple(config.data.crop_size)}, a chip"
    return Report(title, rows, notes)


flags: dict[str, dict[str, Any]] = {
    "slices": {"nargs": "+", "default": ["v5e:2x4", "v5e:16x16", "v4:2x2x2"]},
    "batches": {"nargs": "+", "type": runner.positive, "default": [32, 256, 2048], "help": "images"},
    "evaluation": {"action": "store_true", "help": "an evaluation's network too"},
}
main = functools.partial(runner.run, __doc__, measure, flags=flags)
if __name__ == "__main__":
    cli.run(main)
