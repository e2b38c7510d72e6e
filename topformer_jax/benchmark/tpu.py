"""tpu: what the programs ask of a chip, compiled for TPU slices that are not there."""

import math
import os
import re
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
from topformer_jax import inference, models, sharding, views
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.report import Report, Row
from topformer_jax.errors import UserError
from topformer_jax.ops.tiled import View
from topformer_jax.step import prepare


def tpu(
    config: ConfigDict, slices: Sequence[str], batches: Sequence[int], *, evaluation: bool = False
) -> Report:
    """The training step for each slice and global batch, and the programs of an evaluation for each slice.

    The numbers are of one chip: the memory for a program's arguments and for what lies between, what it
    computes, reads and writes (each loop taken once), and what it sends to the others.

    Raises:
        UserError: the TPU compiler is not installed, or there is no such slice.
    """
    rows: list[Row] = []
    notes = []
    for name in slices:
        devices = _devices(name)
        for batch in batches:
            case = f"{name}, batch {batch}"
            if batch % len(devices):
                notes.append(f"{case}: less than an image a chip, or not the same for all")
                continue
            settings = config_lib.load(config, {"batch_size": batch})
            started = time.perf_counter()
            program = _compiled_step(settings, sharding.make_mesh(settings, devices))
            rows.append(_row(case, "train-step", program, time.perf_counter() - started))
        if evaluation:
            rows += _evaluation(config, name, Mesh(np.array(devices), ("data",)))
    return Report(
        f"tpu: {measure.described(config)}, crops {tuple(config.data.crop)}, a chip", {}, rows, notes
    )


def _devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice, to compile for."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask about itself
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu-compile]'") from None
    try:
        return get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"there is no TPU slice {name}: {str(error).splitlines()[0]}") from None


def _row(case: str, name: str, program: Any, seconds: float) -> Row:
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return {
        "case": case,
        "program": name,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "operations": cost["flops"],
        "accessed_bytes": cost["bytes accessed"],
        "sent_bytes": _collective_bytes(program.as_text()),
        "compile_seconds": seconds,
    }


def _compiled_step(config: ConfigDict, mesh: Mesh) -> Any:
    """The training step, compiled ahead of time for the mesh's devices."""
    state, layout, step = prepare(config, mesh)
    place = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
        for name, values in samples.batch(config).items()
    }
    return step.lower(_shapes(state, layout), batch).compile()


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
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=every), models.values(model)
    )
    flip = jax.ShapeDtypeStruct((), jnp.bool_, sharding=every)
    totals = jax.ShapeDtypeStruct((mesh.size, 2, programs.classes**2), jnp.int32, sharding=over)
    logits = [jax.eval_shape(programs.logits, values, image, flip) for image in batch.images]
    logits = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over) for x in logits]
    repeated = [each for each in logits for _ in views.flips(config.evaluation)]
    seen = [View(*one) for one in zip(repeated, batch.rows, batch.columns, strict=True)]
    height, width = samples.SIZE
    case = f"{name}, {height} x {width} a chip"
    rows = []
    for program, jitted, arguments in (
        ("evaluation, logits", programs.logits, (values, batch.images[0], flip)),
        ("evaluation, count", programs.count, (seen, batch.grid, batch.labels, totals)),
    ):
        started = time.perf_counter()
        compiled = jitted.lower(*arguments).compile()
        rows.append(_row(case, program, compiled, time.perf_counter() - started))
    return rows


def _collective_bytes(text: str) -> int:
    """Bytes of the results of all collectives in a compiled program."""
    sizes = {
        "f64": 8,
        "s64": 8,
        "f32": 4,
        "s32": 4,
        "u32": 4,
        "bf16": 2,
        "f16": 2,
        "u8": 1,
        "s8": 1,
        "pred": 1,
    }
    collective = re.compile(
        r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    )
    total = 0
    for result in collective.findall(text):
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            total += sizes.get(kind, 0) * math.prod(int(extent) for extent in shape.split(",") if extent)
    return total
