"""Is the shifted depthwise convolution (ops/depthwise.py) faster here than the library's?

python -m benchmarks.depthwise
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from topformer_jax import cli
from topformer_jax.ops.depthwise import depthwise_conv

METHODS = ("shifted", "library")


def backward(images: jax.Array, weight: jax.Array, stride: int, method: str) -> Any:
    """The convolution with its gradients."""
    out, pullback = jax.vjp(lambda x, w: depthwise_conv(x, w, stride, method=method), images, weight)
    return out, pullback(jnp.ones_like(out))


def main() -> None:
    """The command."""
    sizes = {"batch": (4, "images"), "size": (128, "pixels of a side"), "channels": (96, "of an image")}
    args, _ = timing.parse(timing.make_parser(__doc__, **sizes))
    shape = (args.batch, args.size, args.size, args.channels)
    images = jax.random.normal(jax.random.key(0), shape)
    rows = []
    for kernel, stride, function in itertools.product((3, 5), (1, 2), (depthwise_conv, backward)):
        case = f"k{kernel} s{stride} {'forward' if function is depthwise_conv else 'forward + backward'}"
        weight = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, args.channels))
        programs = {}
        for method in METHODS:
            jitted = jax.jit(functools.partial(function, stride=stride, method=method))
            call = functools.partial(jitted, images, weight)
            programs[method] = timing.start(f"{case}, {method}", call, jitted, images, weight)
        rows += timing.compare(case, programs, args.repeats, images=args.batch)
    timing.report(f"depthwise: {' x '.join(map(str, shape))}, float32", rows, args)


if __name__ == "__main__":
    cli.run(main)
