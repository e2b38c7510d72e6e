"""loss: the cross-entropy of upsampled logits with its gradient, as written here, plainly, and in PyTorch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import OURS, Options, Program
from topformer_jax.benchmark.peer import Peers
from topformer_jax.benchmark.report import Report
from topformer_jax.ops import loss as loss_ops
from topformer_jax.ops.tiled import cells


def loss(config: ConfigDict, options: Options, count: int, size: int) -> Report:
    """`count` labels of `size` x `size` pixels, from logits an eighth as large."""
    peers = Peers(config, options)
    classes = config.model.num_classes
    shape = (count, cells(size), cells(size), classes)
    logits = np.random.default_rng(0).standard_normal(shape, np.float32)
    labels = samples.labels(count, (size, size), classes)
    programs = {OURS: _program(OURS, loss_ops.upsampled_cross_entropy, logits, labels, config)}
    if plain := getattr(loss_ops, "plain_cross_entropy", None):
        programs["plain"] = _program("plain", plain, logits, labels, config)
    with peers:
        programs |= peers.make("loss", logits, labels)
        seconds = measure.sequential(programs, options.repeats)
    case = f"{' x '.join(map(str, shape))} to {size} x {size}"
    machine = measure.machine()
    rows = measure.rows(case, programs, seconds, images=count, machine=machine)
    return Report("loss: forward + backward, float32", machine.facts(), rows, peers.notes)


def _program(
    name: str,
    function: Callable[..., loss_ops.LossSums],
    logits: np.ndarray,
    labels: np.ndarray,
    config: ConfigDict,
) -> Program:
    def mean(logits: Array, labels: Array) -> Array:
        sums = function(logits, labels.astype(jnp.int32), precision=config.model.precision)
        return sums.loss / labels.size

    program = jax.jit(jax.value_and_grad(mean))
    arguments = jax.device_put((logits, labels), jax.local_devices()[0])
    return measure.with_costs(measure.ready(name, lambda: program(*arguments)), program, *arguments)
