"""Measures speed, each thing beside its peer in the same run.

  python -m topformer_jax.benchmark depthwise

depthwise: the shifted depthwise convolution beside the library's, forward and forward + backward, on this
machine's default device.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from topformer_jax import cli
from topformer_jax.ops.depthwise import depthwise_conv


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
    return f"depthwise {batch}x{size}x{size}x{channels} float32, {_machine()}\n{_table(rows)}"


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


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__, config_required=False)
    parser.add_argument("what", choices=["depthwise"], help="what to measure")
    parser.add_argument("--batch", type=int, default=4, help="images (default 4)")
    parser.add_argument("--size", type=int, default=128, help="pixels, height and width (default 128)")
    parser.add_argument("--channels", type=int, default=96, help="(default 96)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default 7)")
    args, _ = parser.parse()
    print(depthwise(args.batch, args.size, args.channels, args.repeats))


if __name__ == "__main__":
    cli.run(main)
