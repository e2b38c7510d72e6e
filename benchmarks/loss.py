"""How long does the cross-entropy of upsampled logits take with its gradient, and how much memory?

  python -m benchmarks.loss --peer torch

Ours (ops/loss.py), the same formula written plainly in JAX, and PyTorch's; float32.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from benchmarks import runner, samples
from benchmarks.runner import OURS, Program, Report
from tests.reference.loss import plain_cross_entropy
from topformer_jax.ops import loss as loss_ops
from topformer_jax.runtime import cli


def our_program(
    name: str, function: Callable[..., loss_ops.LossSums], config: ConfigDict, *arguments: np.ndarray
) -> Program:
    """Mean loss and gradient of logits and labels, by a function of sums."""

    def mean(logits: Array, labels: Array) -> Array:
        sums = function(logits, labels.astype(jnp.int32), precision=config.model.precision)
        return sums.loss / labels.size

    jitted = jax.jit(jax.value_and_grad(mean))
    placed = jax.device_put(arguments, jax.local_devices()[0])
    return runner.start(name, lambda: jitted(*placed), lambda: jitted.lower(*placed).compile())


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """Our loss, the plain one and PyTorch's."""
    classes, side = config.model.num_classes, -(-args.size // 8)
    logits = np.random.default_rng(0).standard_normal((args.batch, side, side, classes), np.float32)
    labels = samples.labels(args.batch, (args.size, args.size), classes)
    programs = {
        OURS: our_program(OURS, loss_ops.upsampled_cross_entropy, config, logits, labels),
        "plain": our_program("plain", plain_cross_entropy, config, logits, labels),
    }
    case = f"{' x '.join(map(str, logits.shape))} to {args.size} x {args.size}"
    with runner.start_peers(args, "loss", config, logits, labels) as peers:
        rows = runner.compare(case, programs | peers, args.repeats, images=args.batch)
    return Report("loss: forward and backward, float32", rows)


sizes = {"batch": (4, "images"), "size": (512, "pixels of a side")}
main = functools.partial(runner.run, __doc__, measure, peers=True, **sizes)  # type: ignore[arg-type]
if __name__ == "__main__":
    cli.run(main)
