"""The training step: a state, and a pure function from it and a batch to the next one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from topformer_jax import models, sharding
from topformer_jax.data.augment import augment
from topformer_jax.data.batch import IGNORE_LABEL, Batch
from topformer_jax.errors import UserError
from topformer_jax.ops import at_least_float32
from topformer_jax.ops.loss import LossSums, upsampled_cross_entropy
from topformer_jax.optimizer import learning_rate, optimizer

Tensors = dict[str, Array]
# Keeps dropout's draws apart from the augmentation's, which start from the same seed.
DROPOUT = 0x64726F70


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step changes. Tensors are kept by their official names.

    `step` (int32, a scalar) is how many steps were made; with the config it fixes the data position and all
    random draws. `params`, `stats` and `average` are tensors by name; `average` holds the averaged parameters and
    statistics where `config.ema_decay` is on, and is empty elsewhere. `optimizer` is optax's state. The fields are
    of any type because a tree of shapes or of layouts is a `TrainState` too.
    """

    step: Any
    params: Any
    stats: Any
    optimizer: Any
    average: Any


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
LossFunction = Callable[..., LossSums]


def create(
    config: ConfigDict, mesh: Mesh | None = None, model: nnx.Module | None = None
) -> tuple[TrainState, TrainStep]:
    """The state at step 0 of a config, laid out on the mesh, and its compiled step.

        state, train_step = create(config)
        state, metrics = train_step(state, batch)

    A batch holds `image` uint8 `[n, h, w, 3]`, `label` uint8 `[n, h, w]`, and for the augmentation's draws
    `size` int32 `[n, 2]`, `index` and `epoch` int32 `[n]`, as `data.loader` makes them; numpy arrays will
    do. Metrics are scalars on the device. The state that goes in is donated: use the one that comes out.

    Args:
        config: the settings; `batch_size` images must come in every batch.
        mesh: the devices; all of them where None.
        model: whose weights to start from; fresh ones from `config.seed` where None.
    """
    mesh = sharding.make_mesh(config) if mesh is None else mesh
    state, layout, compiled = prepare(config, mesh, model)
    return jax.device_put(state, layout), compiled


def prepare(
    config: ConfigDict,
    mesh: Mesh,
    model: nnx.Module | None = None,
    *,
    loss_function: LossFunction = upsampled_cross_entropy,
) -> tuple[TrainState, TrainState, Any]:
    """`create` before anything lies on the mesh: the state, its layout, and the step under `jax.jit`.

    `loss_function` takes the arguments of `upsampled_cross_entropy`.
    """
    if config.task != "segmentation":
        raise UserError(f"training knows the task segmentation; {config.name} asks for {config.task}")
    model = models.build(config) if model is None else model
    model.train()
    graphdef, *_ = nnx.split(model)
    params, stats = models.state_dict(model, nnx.Param), models.state_dict(model, nnx.BatchStat)
    transform = optimizer(config)
    average = jax.tree.map(jnp.copy, params | stats) if config.ema_decay else {}
    # Under jit: by itself optax compiles a program for the zeros of each shape, 2 s in all.
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, jax.jit(transform.init)(params), average)
    layout = sharding.state_sharding(state, mesh)
    step = functools.partial(
        train_step,
        config=config,
        graphdef=graphdef,
        transform=transform,
        loss_function=functools.partial(loss_function, devices=mesh.size),
    )
    compiled = jax.jit(
        step,
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(layout, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return state, layout, compiled


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: ConfigDict,
    graphdef: nnx.GraphDef,
    transform: optax.GradientTransformation,
    loss_function: LossFunction,
) -> tuple[TrainState, dict[str, Array]]:
    """One step: augment, forward, backward, update. Pure; see `create` for the batch."""
    count = config.grad_accum_steps
    # Interleaved, so that every device's share of a micro-batch is of its own examples.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    wide = at_least_float32(models.DTYPES[config.model.dtype])
    pixels = batch["label"].size
    divisor = (
        pixels if not config.ignore_void_in_mean else jnp.maximum(jnp.sum(batch["label"] != IGNORE_LABEL), 1)
    )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROPOUT), state.step)

    def loss_of(params: Tensors, stats: Tensors, micro_batch: Batch, key: Array) -> tuple[Array, Any]:
        images, labels = augment(
            micro_batch,
            config.seed,
            flip=config.data.flip_prob,
            photometric=config.data.photometric_distortion,
            dtype=wide,
        )
        model = models.merge_state_dict(graphdef, params | stats)
        logits = model(images, rngs=nnx.Rngs(dropout=key))
        sums = loss_function(logits, labels, precision=config.model.precision)
        loss = sums.loss / jnp.asarray(divisor, sums.loss.dtype)
        return loss, (models.state_dict(model, nnx.BatchStat), loss, sums.correct, sums.valid)

    def accumulate(carry: Any, inputs: Any) -> tuple[Any, None]:
        stats, gradient, sums = carry
        micro_batch, key = inputs
        grads, (stats, *more) = jax.grad(loss_of, has_aux=True)(state.params, stats, micro_batch, key)
        return (stats, jax.tree.map(jnp.add, gradient, grads), jax.tree.map(jnp.add, sums, more)), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    counter = jnp.zeros((), jnp.sum(jnp.zeros(0, bool)).dtype)
    start = (state.stats, zeros, [jnp.zeros((), wide), counter, counter])
    keys = jax.random.split(key, count)
    if count == 1:
        (stats, gradient, sums), _ = accumulate(start, jax.tree.map(lambda x: x[0], (micro_batches, keys)))
    else:
        (stats, gradient, sums), _ = jax.lax.scan(accumulate, start, (micro_batches, keys))
    loss, correct, valid = sums

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its step count
        updates, optimizer_state = transform.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    new = params | stats
    average = {name: _averaged(old, new[name], config.ema_decay) for name, old in state.average.items()}
    metrics = {
        "loss": loss,
        "pixel_accuracy": correct / jnp.maximum(valid, 1),
        "learning_rate": learning_rate(state.step, config.schedule),
        "gradient_norm": optax.tree.norm(gradient),
    }
    return TrainState(state.step + 1, params, stats, optimizer_state, average), metrics


def _averaged(old: Array, new: Array, decay: float) -> Array:
    """The exponential moving average; counters are taken as they are."""
    return decay * old + (1 - decay) * new if jnp.issubdtype(old.dtype, jnp.floating) else new
