"""depthwise: the shifted depthwise convolution beside the library's."""

from typing import Any

import jax
import jax.numpy as jnp

from topformer_jax.benchmark import measure
from topformer_jax.benchmark.measure import Options, Program
from topformer_jax.benchmark.report import Report
from topformer_jax.ops.depthwise import depthwise_conv

METHODS = ("shifted", "library")


def depthwise(options: Options, count: int, size: int, channels: int) -> Report:
    """Kernels 3 and 5, strides 1 and 2, forward and forward + backward."""
    rows = []
    images = jax.random.normal(jax.random.key(0), (count, size, size, channels))
    for kernel in (3, 5):
        weight = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, channels))
        for stride in (1, 2):
            for backward in (False, True):
                case = f"k{kernel} s{stride} {'forward + backward' if backward else 'forward'}"
                programs = {
                    method: _program(f"{case}, {method}", method, images, weight, stride, backward)
                    for method in METHODS
                }
                seconds = measure.sequential(programs, options.repeats)
                rows += measure.rows(case, programs, seconds, images=count)
    title = f"depthwise: {count} x {size} x {size} x {channels}, float32"
    return Report(title, measure.machine().facts(), rows)


def _program(
    name: str, method: str, images: jax.Array, weight: jax.Array, stride: int, backward: bool
) -> Program:
    def forward(images: jax.Array, weight: jax.Array) -> jax.Array:
        return depthwise_conv(images, weight, stride, method=method)

    def both(images: jax.Array, weight: jax.Array) -> Any:
        out, pullback = jax.vjp(forward, images, weight)
        return out, pullback(jnp.ones_like(out))

    program = jax.jit(both if backward else forward)
    timed = measure.ready(name, lambda: program(images, weight))
    return measure.with_costs(timed, program, images, weight)
