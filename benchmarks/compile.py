"""What do the training step and the evaluation ask of a TPU or GPU? Compiled for devices that are not here.

  python -m benchmarks.compile --slices v5e:2x4 v5e:16x16*2 --config.model.dtype=bfloat16
  python -m benchmarks.compile --slices h200:1 h100:2x8 --images 32 128 --programs step evaluation loss

Slices are TPUs by their topology, or GPUs by their number (hosts x GPUs of each). Figures of one device: memory for a
program's arguments and for its temporary arrays; its operations; the bytes that it reads and writes in its memory at
most (`traffic.memory_bytes`); the kernels that it starts; the collectives and the bytes that they move between the
devices. The GPU's compiler cannot try out its kernels, so there they are those that it takes untried.

It needs the compiler: pip install -e '.[tpu-compile]' or '.[gpu-compile]'.
"""

import argparse
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from ml_collections import ConfigDict

from benchmarks import runner, samples, traffic
from benchmarks.runner import Report, Row
from topformer_jax import config as config_lib, models
from topformer_jax.inference import compile_inference
from topformer_jax.inference.plan import plan_shapes, prepare_input
from topformer_jax.ops.loss import upsampled_cross_entropy
from topformer_jax.runtime import cli, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import step


class Kind(NamedTuple):
    """A kind of device: its memory's bytes a second, bfloat16 operations a second; of a GPU its memory's bytes."""

    bandwidth: float
    operations: float
    memory: int = 0


KINDS = {
    "v4": Kind(1228e9, 275e12),
    "v5e": Kind(819e9, 197e12),
    "v5p": Kind(2765e9, 459e12),
    "v6e": Kind(1640e9, 918e12),
    "h100": Kind(3352e9, 989e12, 84_929_347_584),
    "h200": Kind(4800e9, 989e12, 150_754_820_096),
}
EVALUATED = {"tpu": 8, "gpu": 64}  # images of an evaluation on each device
# What XLA asks a Hopper GPU for, as a text proto.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory} cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}
"""


def slice_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice such as v5e:2x4, of several as in v5e:16x16*2, or GPUs such as h200:2x8, to compile for.

    Raises:
        UserError: the compiler is not installed, or there is no such slice.
    """
    kind, _, shape = name.partition(":")
    if kind not in KINDS:
        raise UserError(f"there is no kind of device {kind}: expected one of {', '.join(KINDS)}")
    on_gpu = KINDS[kind].memory > 0
    plugin, extra = ("jax_plugins.xla_cuda12", "gpu-compile") if on_gpu else ("libtpu", "tpu-compile")
    try:
        installed = importlib.util.find_spec(plugin)
    except ModuleNotFoundError:
        installed = None
    if not installed:
        raise UserError(f"compiling for {name} needs its compiler: pip install -e '.[{extra}]'")
    options: dict[str, Any]
    if on_gpu:
        # No GPU is here to be found or checked.
        os.environ.update(CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
        hosts, _, count = shape.rpartition("x")
        config = HOPPER.format(name=kind.upper(), **KINDS[kind]._asdict())
        options = {"platform": "cuda", "topology": f"1x{hosts or 1}x{count}", "target_config": config}
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask about itself
        topology, _, slices = name.partition("*")
        options = {"platform": "tpu", "topology_name": topology}
        if slices.isdecimal():
            options["num_slices"] = int(slices)
        if kind in ("v4", "v5p"):  # a chip of two cores is one device, as on a pod
            options["chip_config_name"] = "megacore"
    try:
        return get_topology_desc(**options).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"there is no slice {name}: {str(error).splitlines()[0]}") from None


def compile_row(slices: str, name: str, images: int, jitted: Any, *arguments: Any, rounds: int = 1) -> Row:
    """Compiles a program for the devices on which its arguments lie; the row of its figures.

    The images a second of a device are those that its memory and its arithmetic allow, whichever takes longer.

    Args:
        slices: the devices' name.
        name: the program's.
        images: of a device.
        jitted: the program.
        arguments: of the program, abstract.
        rounds: how often a loop runs whose length depends on its data.
    """
    start = time.process_time()  # of all threads: other work on the machine does not count
    lowered, kind = jitted.lower(*arguments), KINDS[slices.partition(":")[0]]
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError:
        if not kind.memory:
            raise
        # Untried, Triton's products find no tile sizes for some shapes; those of cuBLAS need none.
        program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    seconds = time.process_time() - start
    print(f"{slices}, {name}: compiled in {seconds:.0f} s", file=sys.stderr, flush=True)
    memory, text = program.memory_analysis(), program.as_text()
    moved = traffic.memory_bytes(text, rounds)
    operations = (program.cost_analysis() or {}).get("flops")  # none of a GPU
    return {
        "case": slices,
        "program": name,
        "images_per_second": images / max(moved / kind.bandwidth, (operations or 0) / kind.operations),
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "operations": operations,
        "moved_bytes": moved,
        "moved_of_image": moved / images,
        "kernels": traffic.kernels(text, rounds) if kind.memory else None,
        "collectives": traffic.collectives(text),
        "collective_bytes": traffic.sent_bytes(text),
        "compile_seconds": seconds,
    }


def step_program(config: ConfigDict, devices: Sequence[jax.Device], images: int) -> tuple[Any, Any, Any]:
    """The training step with so many images on each device, not yet compiled, and its arguments, abstract.

    It is the program of `train` on these devices, which finds it in JAX's persistent cache.
    """
    config = config_lib.load(config, {"batch_size": images * len(devices)})
    mesh = sharding.make_train_mesh(config, devices)
    model = models.build(config)
    state = step.init_state(config, model)
    layout = step.lay_out(state, mesh)
    train_step = step.build_train_step(config, model, mesh, layout)
    batch = samples.batch(config, 1)
    shapes = {name: abstract(x[0], sharding.batch_sharding(mesh), config.batch_size) for name, x in batch.items()}
    return train_step, jax.tree.map(abstract, state, layout), shapes


def evaluation_rows(slices: str, config: ConfigDict, devices: Sequence[jax.Device]) -> list[Row]:
    """The programs of an evaluation of images of ADE20K's sizes: the network on every canvas, and the counts.

    Traffic and counts are those of an image of `samples.SIZE` on the canvas that moves most.
    """
    mesh = sharding.make_inference_mesh(devices)
    model = models.build_segmenter(config)
    programs = compile_inference(model, mesh)
    shapes = plan_shapes([samples.SIZE, *samples.ade20k_sizes(2000)], config.evaluation)
    image = np.zeros((*samples.SIZE, 3), np.uint8)
    inputs = prepare_input(image, None, config.evaluation, shapes, dtype=programs.dtype.name)
    platform = devices[0].platform
    images = EVALUATED[platform]
    place = functools.partial(abstract, sharding=programs.batch_sharding)
    batch = jax.tree.map(lambda x: place(x, leading=images * mesh.size), inputs)
    view = batch.views[0]
    tensors = jax.tree.map(lambda x: abstract(x, sharding.replicated(mesh)), models.state_dict(model))
    network = programs.network(shapes, 0)
    logits: Any = place(jax.eval_shape(network, tensors, view))
    after = [view.with_logits(logits)], batch.tiles, batch.labels
    name = f"evaluation, {images} images"
    down, across = inputs.tiles.tolist()
    rounds = down if platform == "gpu" else down * across
    return [
        compile_row(slices, f"{name}: logits", images, network, tensors, view),
        compile_row(slices, f"{name}: counts", images, programs.predict_and_count, *after, rounds=rounds),
    ]


def loss_row(slices: str, config: ConfigDict, devices: Sequence[jax.Device], images: int) -> Row:
    """The loss of so many images on each device, with its gradient."""
    layout = sharding.batch_sharding(sharding.make_inference_mesh(devices))
    height, width = config.data.crop_size
    n = images * len(devices)
    shapes = (n, -(-height // 8), -(-width // 8), config.model.num_classes), (n, height, width)
    arguments = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
        for shape, dtype in zip(shapes, (jnp.float32, jnp.int32), strict=True)
    )

    def total(logits: Any, labels: Any) -> Any:
        return upsampled_cross_entropy(logits, labels, devices=len(devices)).loss

    return compile_row(slices, f"loss, {images} images", images, jax.jit(jax.value_and_grad(total)), *arguments)


def abstract(array: Any, sharding: jax.sharding.Sharding, leading: int = 0) -> jax.ShapeDtypeStruct:
    """Shape, dtype and layout of an array, with a further leading axis if that is not 0."""
    shape = (leading, *array.shape) if leading else array.shape
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """The programs of every slice and number of images."""
    rows: list[Row] = []
    for name in args.slices:
        devices = slice_devices(name)
        for images in args.images:
            if "step" in args.programs:
                program = step_program(config, devices, images)
                rows.append(compile_row(name, f"train step, {images} images", images, *program))
            if "loss" in args.programs:
                rows.append(loss_row(name, config, devices, images))
        if "evaluation" in args.programs:
            rows += evaluation_rows(name, config, devices)
    crop = tuple(config.data.crop_size)
    return Report(f"compile: {runner.describe(config)}, crops {crop}, one device", rows)


flags: dict[str, dict[str, Any]] = {
    "slices": {"nargs": "+", "default": ["v5e:2x4"], "help": "the devices (default v5e:2x4)"},
    "images": {"nargs": "+", "type": runner.positive, "default": [4], "help": "of a device (default 4)"},
    "programs": {"nargs": "+", "choices": ["step", "evaluation", "loss"], "default": ["step"]},
}
main = functools.partial(runner.run, __doc__, measure, flags=flags)
if __name__ == "__main__":
    cli.run(main)
