"""What do the training step and the evaluation ask of a TPU chip? Compiled for slices that are not here.

  python -m benchmarks.tpu --config configs/topformer_b_ade.py --config.model.dtype=bfloat16 --plain --evaluation

Figures of one chip: memory for a program's arguments and for its temporary arrays; what it computes; what it reads
and writes in its memory at most (`traffic.memory_bytes`) and by XLA's own count, which takes loops once; what
collectives move between the chips, and how much of that is neither gradients nor sums. It needs the TPU compiler:
pip install -e '.[tpu-compile]'.
"""

import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from ml_collections import ConfigDict

from benchmarks import samples, timing, traffic
from benchmarks.timing import Row
from tests.reference.loss import plain_cross_entropy
from topformer_jax import config as config_lib, models
from topformer_jax.inference import compile_inference
from topformer_jax.inference.inputs import prepare_input, view_flips
from topformer_jax.inference.plan import ProgramShapes, plan_evaluation, plan_shapes
from topformer_jax.ops.loss import upsampled_cross_entropy
from topformer_jax.ops.tiled import ViewLogits
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


def compile_row(case: str, name: str, jitted: Any, *arguments: Any) -> Row:
    """Compiles a program for the devices on which its arguments lie; the row of its figures."""
    start = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    print(f"{case}, {name}: compiled in {seconds:.0f} s", file=sys.stderr, flush=True)
    memory, cost, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
    return {
        "case": case,
        "program": name,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "operations": cost["flops"],
        "accessed_bytes": cost["bytes accessed"],
        "moved_bytes": traffic.memory_bytes(text),
        "collective_bytes": traffic.sent_bytes(text),
        "compile_seconds": seconds,
    }


def step_row(case: str, config: ConfigDict, devices: Sequence[jax.Device], *, plain: bool) -> Row:
    """The training step, with our loss or with the plain one."""
    mesh = sharding.make_train_mesh(config, devices)
    cross_entropy = plain_cross_entropy if plain else upsampled_cross_entropy
    model = models.build(config)
    state = step.init_state(config, model)
    layout = sharding.state_sharding(state, mesh)
    train_step = step.build_train_step(config, model, mesh, layout, cross_entropy)
    arguments = (
        jax.tree.map(abstract, state, layout),
        {name: abstract(x, sharding.batch_sharding(mesh)) for name, x in samples.batch(config).items()},
    )
    row = compile_row(case, "plain train step" if plain else "train step", train_step, *arguments)
    row["other_bytes"] = row["collective_bytes"] - summed_bytes(state, config)
    return row


def summed_bytes(state: step.TrainState, config: ConfigDict) -> int:
    """Bytes that the chips of a step with whole parameters must add up: the least that collectives can send.

    Gradients, in the dtype that the layer computes in; of each BatchNorm mean and variance, and in the backward pass
    the sum that both depend on; the loss and the counts of correct and of labelled pixels.
    """
    itemsize = jnp.dtype(models.DTYPES[config.model.dtype]).itemsize
    wide = max(itemsize, 4)  # BatchNorm and logits
    total = 3 * wide
    for name, value in state.params.items():
        is_wide = ".bn." in name or name.startswith("decode_head.conv_seg.")
        total += value.size * (wide if is_wide else itemsize)
    channels = sum(value.size for name, value in state.stats.items() if name.endswith(".running_mean"))
    return total + 3 * wide * channels


def evaluation_plans(config: ConfigDict, devices: int) -> dict[str, ProgramShapes]:
    """The shapes of evaluations by name: of images of one size, of the same masked, of many sizes."""
    one = plan_shapes([samples.SIZE], config.evaluation)
    many = samples.data_set_sizes("ade20k", 2000)
    planned = plan_evaluation(many, config.evaluation, devices=devices, rows_per_device=IMAGES_PER_CHIP)
    return {
        "one size": one,
        "one size, masked": one._replace(masked=True),
        f"{len(set(many))} sizes": planned.shapes,
    }


def evaluation_rows(
    case: str, config: ConfigDict, devices: Sequence[jax.Device], shapes: ProgramShapes
) -> list[Row]:
    """The two programs of an evaluation, `IMAGES_PER_CHIP` images of `samples.SIZE` a chip."""
    mesh = sharding.make_inference_mesh(devices)
    model = models.build_segmenter(config)
    programs = compile_inference(model, mesh)
    divided, replicated = programs.batch_sharding, sharding.replicated(mesh)
    image = np.zeros((*samples.SIZE, 3), np.uint8)
    inputs = prepare_input(image, None, config.evaluation, shapes, dtype=programs.dtype.name)
    batch = jax.tree.map(lambda x: abstract(x, divided, IMAGES_PER_CHIP * mesh.size), inputs)
    tensors = jax.tree.map(lambda x: abstract(x, replicated), models.state_dict(model))
    flips = len(view_flips(config.evaluation))
    views = []
    for number, view in enumerate(batch.views):
        logits: Any = jax.eval_shape(programs.network(shapes, number // flips), tensors, view)
        logits = abstract(logits, divided)
        views.append(ViewLogits(logits, view.counts, view.rows, view.columns))
    network = programs.network(shapes, 0)
    return [
        compile_row(case, "evaluation, logits", network, tensors, batch.views[0]),
        compile_row(case, "evaluation, count", programs.predict_and_count, views, batch.label),
    ]


def add_bound(slices: str, images: float, row: Row) -> Row:
    """Adds the images a second of a chip that its memory and its arithmetic allow, whichever takes longer."""
    bytes_a_second, operations_a_second = CHIPS[slices.partition(":")[0]]
    seconds = max(row["moved_bytes"] / bytes_a_second, row["operations"] / operations_a_second)
    return row | {"images_per_second": images / seconds}


def abstract(array: Any, sharding: jax.sharding.Sharding, *leading: int) -> jax.ShapeDtypeStruct:
    """Shape, dtype and layout of an array, with further leading axes."""
    return jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype, sharding=sharding)


def main() -> None:
    """The command."""
    parser = timing.make_parser(__doc__)
    parser.add_argument("--slices", nargs="+", default=["v5e:2x4", "v5e:16x16", "v4:2x2x2"])
    parser.add_argument("--batches", nargs="+", type=timing.positive, default=[32, 256, 2048], help="images")
    parser.add_argument("--evaluation", action="store_true", help="an evaluation's programs too")
    parser.add_argument("--plain", action="store_true", help="the step with the plainly written loss too")
    args, config = timing.parse(parser)
    rows: list[Row] = []
    notes: list[str] = []
    for name in args.slices:
        devices = slice_devices(name)
        for batch in args.batches:
            case = f"{name}, batch {batch}"
            if batch % len(devices):
                notes.append(f"{case}: skipped, {len(devices)} chips cannot share the images evenly")
                continue
            settings = config_lib.load(config, {"batch_size": batch})
            for plain in (False, True) if args.plain else (False,):
                try:
                    row = step_row(case, settings, devices, plain=plain)
                    rows.append(add_bound(name, batch / len(devices), row))
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    used = re.search(r"Used \S+ of \S+ hbm", str(error))
                    form = "plain train step" if plain else "train step"
                    notes.append(f"{case}, {form}: out of memory ({used[0] if used else 'of a chip'})")
        if args.evaluation:
            for plan, shapes in evaluation_plans(config, len(devices)).items():
                found = evaluation_rows(f"{name}, {plan}", config, devices, shapes)
                rows += [add_bound(name, IMAGES_PER_CHIP, row) for row in found]
    title = f"tpu: {timing.describe(config)}, crops {tuple(config.data.crop_size)}, a chip"
    timing.report(title, rows, args, notes)


if __name__ == "__main__":
    cli.run(main)
