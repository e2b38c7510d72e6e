"""Measures speed, each thing beside its peer in the same run.

  python -m topformer_jax.benchmark depthwise
  python -m topformer_jax.benchmark tpu --config configs/topformer_b_ade.py --config.model.dtype=bfloat16

depthwise: the shifted depthwise convolution beside the library's, forward and forward + backward, on this
machine's default device.
tpu: the whole training step, compiled for TPU slices that are not there (pip install -e ".[tpu-compile]"):
what a chip's memory has to hold, what it computes, reads and writes, and sends to the others.
"""

import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh
from ml_collections import ConfigDict

from topformer_jax import cli, sharding
from topformer_jax import config as config_lib
from topformer_jax.errors import UserError
from topformer_jax.ops.depthwise import depthwise_conv
from topformer_jax.step import prepare


def measure(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each program, by name: one warm-up, then all of them in turn, `repeats` times.

    In turn, because these machines' speed drifts: what is compared is measured side by side.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def depthwise(batch: int, size: int, channels: int, repeats: int) -> str:
    """A table of milliseconds (median and range) and ratios for kernels 3, 5 and strides 1, 2."""
    rows = [("case", "library ms", "shifted ms", "ratio")]
    for kernel in (3, 5):
        for stride in (1, 2):
            shape = (batch, size, size, channels)
            images = jax.random.normal(jax.random.key(0), shape)
            weight = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, channels))
            for backward in (False, True):
                programs = {
                    method: _depthwise_program(method, images, weight, stride, backward)
                    for method in ("library", "shifted")
                }
                seconds = measure(programs, repeats)
                medians = {method: statistics.median(times) for method, times in seconds.items()}
                rows.append(
                    (
                        f"k{kernel} s{stride} {'forward + backward' if backward else 'forward'}",
                        _milliseconds(seconds["library"]),
                        _milliseconds(seconds["shifted"]),
                        f"{medians['library'] / medians['shifted']:.1f}x",
                    )
                )
    return f"depthwise {batch}x{size}x{size}x{channels} float32, {_machine()}\n{cli.table(rows)}"


def tpu(config: ConfigDict, topologies: Sequence[str], batches: Sequence[int]) -> str:
    """A table of what a training step asks of one chip, for each slice and global batch."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask about itself
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu-compile]'") from None
    rows: list[tuple[str, ...]] = [
        (
            "slice, global batch",
            "arguments MB",
            "temporary MB",
            "GFLOP",
            "accessed GB",
            "sent MB",
            "compile s",
        )
    ]
    for name in topologies:
        try:
            devices = get_topology_desc(platform="tpu", topology_name=name).devices
        except (RuntimeError, ValueError) as error:
            raise UserError(f"there is no TPU slice {name}: {str(error).splitlines()[0]}") from None
        for batch in batches:
            settings = config_lib.load(config, {"batch_size": batch})
            if batch % len(devices):
                rows.append((f"{name}, {batch}", *["-"] * 6))
                continue
            started = time.perf_counter()
            program = _compiled_step(settings, sharding.make_mesh(settings, devices))
            seconds = time.perf_counter() - started
            memory, cost = program.memory_analysis(), program.cost_analysis()
            rows.append(
                (
                    f"{name}, {batch}",
                    f"{memory.argument_size_in_bytes / 1e6:.0f}",
                    f"{memory.temp_size_in_bytes / 1e6:.0f}",
                    f"{cost['flops'] / 1e9:.0f}",
                    f"{cost['bytes accessed'] / 1e9:.2f}",
                    f"{_collective_bytes(program.as_text()) / 1e6:.1f}",
                    f"{seconds:.0f}",
                )
            )
    head = (
        f"{config.name} {config.model.dtype}, crops {config.data.crop}, a chip; -: less than an image a chip"
    )
    return f"{head}\n{cli.table(rows)}"


def _compiled_step(config: ConfigDict, mesh: Mesh) -> Any:
    """The training step, compiled ahead of time for the mesh's devices."""
    state, layout, step = prepare(config, mesh)
    arguments = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, layout
    )
    n, (h, w) = config.batch_size, config.data.crop
    shapes = {
        "image": ((n, h, w, 3), jnp.uint8),
        "label": ((n, h, w), jnp.uint8),
        "size": ((n, 2), jnp.int32),
        "index": ((n,), jnp.int32),
        "epoch": ((n,), jnp.int32),
    }
    place = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(*spec, sharding=place) for name, spec in shapes.items()}
    return step.lower(arguments, batch).compile()


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


def _depthwise_program(
    method: str, images: jax.Array, weight: jax.Array, stride: int, backward: bool
) -> Callable[[], Any]:
    def forward(images: jax.Array, weight: jax.Array) -> jax.Array:
        return depthwise_conv(images, weight, stride, method=method)

    def both(images: jax.Array, weight: jax.Array) -> Any:
        out, pullback = jax.vjp(forward, images, weight)
        return out, pullback(jnp.ones_like(out))

    program = jax.jit(both if backward else forward)
    return lambda: program(images, weight)


def _milliseconds(seconds: Sequence[float]) -> str:
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def _machine() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}), jax {jax.__version__}, median (range)"


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__, config_required=False)
    parser.add_argument("what", choices=["depthwise", "tpu"], help="what to measure")
    parser.add_argument("--batch", type=int, default=4, help="images (default 4)")
    parser.add_argument("--size", type=int, default=128, help="pixels, height and width (default 128)")
    parser.add_argument("--channels", type=int, default=96, help="(default 96)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default 7)")
    parser.add_argument("--slices", nargs="+", default=["v5e:2x4", "v5e:16x16", "v4:2x2x2"], help="of tpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256, 2048], help="of tpu, images")
    args, config = parser.parse()
    if args.what == "depthwise":
        print(depthwise(args.batch, args.size, args.channels, args.repeats))
    elif config is None:
        raise UserError("benchmark tpu needs --config FILE: the recipe whose step to compile")
    else:
        print(tpu(config, args.slices, args.batches))


if __name__ == "__main__":
    cli.run(main)
