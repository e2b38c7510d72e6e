"""Statistics for the BatchNorms of a checkpoint whose convolutions include them, as files for inference have them.

Such a layer computes `x + bias`: training would normalise it with the batch's statistics, and so change the network
at the first step. With the statistics of its own activations, the same function is a BatchNorm as after a training.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from topformer_jax import config as config_lib, models
from topformer_jax.data.batch import Batch
from topformer_jax.models.layers import BatchNorm
from topformer_jax.runtime import processes, sharding
from topformer_jax.training.run import Run, open_batches
from topformer_jax.training.step import Tensors, TrainState, augment_batch

PARTS = ("weight", "bias", "running_mean", "running_var")  # of a BatchNorm
PICTURES = 200  # of the training split, at most, but whole batches


def find_folded(tensors: Mapping[str, Any]) -> list[str]:
    """The names of the BatchNorms that are folded: mean 0, variance 1 or 1 - eps, and a bias that is not 0.

    An untrained BatchNorm has a bias of 0, and a trained one has no mean of exactly 0 in every channel.

    >>> from topformer_jax import config
    >>> tensors = models.state_dict(models.build(config.ade20k("tiny")))
    >>> find_folded(tensors)
    []
    >>> find_folded(tensors | {"decode_head.linear_fuse.bn.bias": np.ones(128)})
    ['decode_head.linear_fuse.bn']
    """
    found = []
    for name in (name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")):
        mean, variance, bias = (tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "bias"))
        is_unit = np.all(np.abs(np.asarray(variance) - 1) <= 2 * BatchNorm.eps)
        found += [name] if is_unit and np.any(bias) and not np.any(mean) else []
    return found


def restore_statistics(run: Run, state: TrainState) -> TrainState:
    """Gives the folded BatchNorms of a state at step 0 the statistics of the first training pictures.

    They are the mean and the variance of each layer's input, in inference mode, over the augmented crops of the first
    steps; all processes compute them together. Factor and bias then change so that the layer computes the same.
    Layers of `optimizer.freeze` stay as they are: they never normalise with a batch's statistics.

    Raises:
        UserError: a picture cannot be read.
    """
    tensors = state.params | state.stats
    names = [name for name in find_folded(models.state_dict(run.model)) if f"{name}.weight" in state.params]
    if not names:
        return state
    few = config_lib.load(run.config, {"data.num_workers": 0})  # a few batches are not worth new processes
    steps = -(-min(PICTURES, len(run.train_source)) // few.batch_size)
    measure = jax.jit(
        functools.partial(_measure, config=few, graphdef=nnx.graphdef(run.model), names=names),
        out_shardings=sharding.replicated(run.mesh),
    )
    batches = open_batches(dataclasses.replace(run, config=few), 0)
    with contextlib.closing(batches):
        moments = [jax.device_get(measure(tensors, next(batches))) for _ in range(steps)]
    changed: dict[str, np.ndarray] = {}
    for name in names:
        layer = {part: sharding.to_host(tensors[f"{name}.{part}"]).astype(np.float64) for part in PARTS}
        layer = _with_statistics(layer, np.array([each[name] for each in moments], np.float64))
        changed |= {f"{name}.{part}": values for part, values in layer.items()}

    def replace(arrays: Tensors) -> Tensors:
        new = {name: changed[name].astype(arrays[name].dtype) for name in arrays.keys() & changed.keys()}
        return arrays | jax.device_put(new, {name: arrays[name].sharding for name in new})

    processes.say(
        f"{run.config.init_from}: {len(names)} BatchNorms are folded into the weights; their statistics are "
        f"estimated from {steps * few.batch_size} training crops, and the network computes the same as before"
    )
    return dataclasses.replace(
        state, params=replace(state.params), stats=replace(state.stats), average=replace(state.average)
    )


def _measure(
    tensors: Tensors, batch: Batch, *, config: ConfigDict, graphdef: nnx.GraphDef, names: Sequence[str]
) -> dict[str, tuple[Array, Array]]:
    """Mean and variance of each named BatchNorm's input, in a network in inference mode."""
    model = models.merge_state_dict(graphdef, tensors)
    model.eval()
    moments: dict[str, tuple[Array, Array]] = {}

    def observe(x: Array, *, name: str, norm: BatchNorm) -> Array:
        flat = x.astype(norm.policy.accum_dtype).reshape(-1, x.shape[-1])
        moments[name] = flat.mean(0), flat.var(0)
        return norm(x)

    modules: list[Any] = list(nnx.iter_modules(model))
    for path, module in modules:
        name = ".".join(map(str, (*path, "bn")))
        if name in names:
            module.bn = functools.partial(observe, name=name, norm=module.bn)
    model(augment_batch(batch, config)[0])
    return moments


def _with_statistics(
    layer: Mapping[str, np.ndarray], moments: Float[np.ndarray, "batches 2 c"]
) -> dict[str, np.ndarray]:
    """The same layer with the mean and the variance of batches of equal sizes, in float64."""
    scale = layer["weight"] / np.sqrt(layer["running_var"] + BatchNorm.eps)
    shift = layer["bias"] - layer["running_mean"] * scale
    means, variances = moments[:, 0], moments[:, 1]
    mean, variance = means.mean(0), variances.mean(0) + means.var(0)
    weight = scale * np.sqrt(variance + BatchNorm.eps)
    return dict(zip(PARTS, (weight, shift + mean * scale, mean, variance), strict=True))
