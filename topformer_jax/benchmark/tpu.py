"""tpu: what the programs ask of a chip, compiled for TPU slices that are not there."""

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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax import inference, models, sharding, step, views
from topformer_jax.benchmark import measure, samples, traffic
from topformer_jax.benchmark.report import Report, Row
from topformer_jax.errors import UserError
from topformer_jax.ops.loss import plain_cross_entropy, upsampled_cross_entropy
from topformer_jax.ops.tiled import ViewLogits


def tpu(
    config: ConfigDict,
    slices: Sequence[str],
    batches: Sequence[int],
    *,
    evaluation: bool = False,
    plain: bool = False,
) -> Report:
    """The training step for each slice and global batch, and the programs of an evaluation for each slice.

    The numbers are of one chip: the memory for a program's arguments and for what lies between, what it
    computes, what it reads and writes there (`moved_bytes`, see `traffic.memory_bytes`; `accessed_bytes` is XLA's
    own count), and what it sends to the others. `memory_seconds` is how long its memory takes to move that. With
    `plain`, the step stands a second time with the loss as it is written down.

    Raises:
        UserError: the TPU compiler is not installed, or there is no such slice.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for name in slices:
        devices = _devices(name)
        for batch in batches:
            case = f"{name}, batch {batch}"
            if batch % len(devices):
                notes.append(f"{case}: less than an image a chip, or not the same for all")
                continue
            settings = config_lib.load(config, {"batch_size": batch})
            _add_step(rows, notes, case, settings, devices)
            if plain:
                _add_step(rows, notes, case, settings, devices, plain=True)
        if evaluation:
            rows += _evaluation(config, name, Mesh(np.array(devices), ("data",)))
    title = f"tpu: {measure.described(config)}, crops {tuple(config.data.crop_size)}, a chip"
    return Report(title, {}, rows, notes)


def _add_step(
    rows: list[Row],
    notes: list[str],
    case: str,
    config: ConfigDict,
    devices: Sequence[jax.Device],
    *,
    plain: bool = False,
) -> None:
    """Compiles a training step; adds a row, or a note where a chip's memory does not hold it."""
    form = "plain train-step" if plain else "train-step"
    loss_function = plain_cross_entropy if plain else upsampled_cross_entropy
    started = time.perf_counter()
    try:
        program = _compiled_step(config, sharding.make_mesh(config, devices), loss_function)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"Used \S+ of \S+ hbm", str(error))
        notes.append(f"{case}, {form}: a chip's memory does not hold it{f' ({needed[0]})' if needed else ''}")
        return
    seconds = time.perf_counter() - started
    rows.append(_row(case, form, program, seconds, devices[0].device_kind))
    print(f"{case}, {form}: compiled in {seconds:.0f} s", file=sys.stderr, flush=True)


def _devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice, to compile for."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask about itself
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu-compile]'") from None
    # A chip of two cores is one device, as on a pod.
    pairs = {"chip_config_name": "megacore"} if name.startswith(("v4:", "v5p:")) else {}
    try:
        return get_topology_desc(platform="tpu", topology_name=name, **pairs).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"there is no TPU slice {name}: {str(error).splitlines()[0]}") from None


def _row(case: str, name: str, program: Any, seconds: float, kind: str) -> Row:
    memory, cost, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
    moved = traffic.memory_bytes(text)
    peaks = measure.peaks(kind)
    return {
        "case": case,
        "program": name,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "operations": cost["flops"],
        "accessed_bytes": cost["bytes accessed"],
        "moved_bytes": moved,
        "sent_bytes": traffic.sent_bytes(text),
        "memory_seconds": moved / peaks[1] if peaks else None,
        "compile_seconds": seconds,
    }


def _compiled_step(
    config: ConfigDict, mesh: Mesh, loss_function: step.LossFunction = upsampled_cross_entropy
) -> Any:
    """The training step, compiled ahead of time for the mesh's devices."""
    state, layout, train_step = step.prepare(config, mesh, loss_function=loss_function)
    place = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
        for name, values in samples.batch(config).items()
    }
    return train_step.lower(_shapes(state, layout), batch).compile()


def _shapes(tree: Any, layout: Any) -> Any:
    """Shapes of arrays that lie as the layout says."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, layout)


def _evaluation(config: ConfigDict, name: str, mesh: Mesh) -> list[Row]:
    """The two programs of an evaluation, a picture of `samples.SIZE` a device."""
    model = models.build_segmenter(config)
    programs = inference.programs(model, config.evaluation, mesh)
    over, every = programs.over_devices, NamedSharding(mesh, P())
    picture = np.zeros((*samples.SIZE, 3), np.uint8)
    prepared = views.prepare(picture, None, config.evaluation, dtype=programs.dtype.name)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((mesh.size, *x.shape), x.dtype, sharding=over), prepared
    )
    values = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=every), models.state_dict(model)
    )
    flip = jax.ShapeDtypeStruct((), jnp.bool_, sharding=every)
    totals = jax.ShapeDtypeStruct((mesh.size, 2, programs.classes**2), jnp.int32, sharding=over)
    logits = [jax.eval_shape(programs.logits, values, image, flip) for image in batch.images]
    logits = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over) for x in logits]
    repeated = [each for each in logits for _ in views.flips(config.evaluation)]
    seen = [ViewLogits(*one) for one in zip(repeated, batch.rows, batch.columns, strict=True)]
    height, width = samples.SIZE
    case, kind = f"{name}, {height} x {width} a chip", mesh.devices.flat[0].device_kind
    rows = []
    for program, jitted, arguments in (
        ("evaluation, logits", programs.logits, (values, batch.images[0], flip)),
        ("evaluation, count", programs.count, (seen, batch.grid, batch.labels, totals)),
    ):
        started = time.perf_counter()
        compiled = jitted.lower(*arguments).compile()
        rows.append(_row(case, program, compiled, time.perf_counter() - started, kind))
    return rows
