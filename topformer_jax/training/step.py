"""The training step: the state, and a pure function from it and a batch to the next state."""

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

from topformer_jax import models
from topformer_jax.data.augment import augment
from topformer_jax.data.batch import IGNORE_LABEL, Batch
from topformer_jax.data.classification.augment import augment_classes
from topformer_jax.ops import at_least_float32
from topformer_jax.ops.loss import (
    LossSums,
    PixelLoss,
    class_cross_entropy,
    upsampled_cross_entropy,
    upsampled_dice,
)
from topformer_jax.runtime import sharding
from topformer_jax.training.optimizer import build_optimizer, scaled_learning_rate

Tensors = dict[str, Array]
# Folded into the seed's key, so that dropout draws other numbers than the augmentation of the same seed.
DROPOUT_STREAM = 0x64726F70
ACCURACY = {"segmentation": "pixel_accuracy", "classification": "accuracy"}  # its name among the metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes. Tensors are stored by official name.

    Fields are of any type because trees of shapes and of shardings are `TrainState`s too.

    Attributes:
        step: int32 scalar, steps made so far; with the config it determines the data position and all random draws.
        params: parameters, `{name: array}`.
        stats: BatchNorm statistics, `{name: array}`.
        optimizer: optax's state.
        average: moving averages of params and stats where `config.ema_decay` is on, else `{}`.
    """

    step: Any
    params: Any
    stats: Any
    optimizer: Any
    average: Any


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
CrossEntropy = Callable[..., LossSums]
LossFunction = Callable[..., tuple[LossSums, Array]]


def init_training(
    config: ConfigDict,
    mesh: Mesh | None = None,
    model: nnx.Module | None = None,
    teacher: nnx.Module | None = None,
) -> tuple[TrainState, TrainStep]:
    """The state at step 0, laid out on the mesh, and the compiled training step.

        state, train_step = init_training(config)
        state, metrics = train_step(state, batch)

    `batch` is a `data.batch.Batch` of `config.batch_size` examples, numpy or JAX arrays. `metrics` are scalars on the
    device: `loss` (what is minimized: the mean cross-entropy, plus distillation and Dice where they are on),
    `pixel_accuracy` (of the labelled pixels of the augmented crops; in classification `accuracy`, of the augmented
    images), `learning_rate` (the backbone's), `gradient_norm` (before clipping). The state that goes in is donated:
    use the one that comes out.

    Args:
        config: the settings.
        mesh: the devices; all of them if None.
        model: whose weights to start from; fresh ones from `config.seed` if None.
        teacher: to distil from, with the classes of `model`; None: without distillation.

    Raises:
        UserError: the mesh does not divide the batch.
    """
    mesh = sharding.make_train_mesh(config) if mesh is None else mesh
    model = models.build(config) if model is None else model
    state = init_state(config, model)
    layout = sharding.state_sharding(state, mesh)
    train_step = build_train_step(config, model, mesh, layout, teacher=teacher)
    if teacher is not None:
        tensors = jax.device_put(models.state_dict(teacher), sharding.replicated(mesh))
        return jax.device_put(state, layout), lambda state, batch: train_step(state, batch, tensors)
    return jax.device_put(state, layout), train_step


def init_state(config: ConfigDict, model: nnx.Module) -> TrainState:
    """The state at step 0 from a model's weights, on the default device."""
    params, stats = models.state_dict(model, nnx.Param), models.state_dict(model, nnx.BatchStat)
    # Under jit: by itself optax compiles one program per shape of its zeros, which takes 2 s.
    optimizer_state = jax.jit(build_optimizer(config).init)(params)
    average = jax.tree.map(jnp.copy, params | stats) if config.ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer_state, average)


def build_train_step(
    config: ConfigDict,
    model: nnx.Module,
    mesh: Mesh,
    layout: TrainState,
    cross_entropy: CrossEntropy = upsampled_cross_entropy,
    teacher: nnx.Module | None = None,
) -> Any:
    """The `TrainStep` of a model as a function with jit's `lower`; the model is switched to training mode.

    With a teacher, its tensors by name are a third argument of the step.

    Args:
        config: the settings.
        model: the network; its weights are not used.
        mesh: the devices.
        layout: the sharding of every array of the state, see `sharding.state_sharding`.
        cross_entropy: of segmentation; takes the arguments of `upsampled_cross_entropy`.
        teacher: the network to distil from; its weights are not used.
    """
    model.train()
    graphdef, *_ = nnx.split(model)
    teacher_graphdef = None
    in_shardings: Any = (layout, sharding.batch_sharding(mesh))
    if teacher is not None:
        teacher.eval()
        teacher_graphdef = nnx.graphdef(teacher)
        in_shardings += (sharding.replicated(mesh),)
    step = functools.partial(
        _apply_step,
        config=config,
        graphdefs=(graphdef, teacher_graphdef),
        loss_function=functools.partial(
            _sum_losses, config=config, cross_entropy=cross_entropy, devices=mesh.size
        ),
        layout=layout,
    )
    return jax.jit(
        step,
        in_shardings=in_shardings,
        out_shardings=(layout, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _apply_step(
    state: TrainState,
    batch: Batch,
    teacher_tensors: Tensors | None = None,
    *,
    config: ConfigDict,
    graphdefs: tuple[nnx.GraphDef, nnx.GraphDef | None],
    loss_function: LossFunction,
    layout: TrainState,
) -> tuple[TrainState, dict[str, Array]]:
    """One step: augment, forward, backward, update. Pure; see `init_training` for the batch and the metrics.

    `graphdefs` are the network's and the teacher's.
    """
    optimizer = build_optimizer(config)
    graphdef, teacher_graphdef = graphdefs
    if teacher_graphdef is not None and teacher_tensors is not None:
        loss_function = functools.partial(
            loss_function, teacher=models.merge_state_dict(teacher_graphdef, teacher_tensors)
        )
    gradients, stats, (loss, correct, valid) = _accumulate_gradients(
        state, batch, config, graphdef, loss_function, layout
    )
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its step count
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    tensors = params | stats
    decay = average_decay(state.step, config)
    average = {name: _move_average(old, tensors[name], decay) for name, old in state.average.items()}
    metrics = {
        "loss": loss,
        ACCURACY[config.task]: correct / jnp.maximum(valid, 1),
        "learning_rate": scaled_learning_rate(state.step, config),
        "gradient_norm": optax.tree.norm(gradients),
    }
    return TrainState(state.step + 1, params, stats, optimizer_state, average), metrics


def _accumulate_gradients(
    state: TrainState,
    batch: Batch,
    config: ConfigDict,
    graphdef: nnx.GraphDef,
    loss_function: LossFunction,
    layout: TrainState,
) -> tuple[Tensors, Tensors, list[Array]]:
    """Gradients and loss of a batch, summed over its micro-batches, and the BatchNorm statistics after it.

    Parameters that are divided over devices are gathered once, at the start, and their gradients divided again as
    soon as they are there. Left to itself XLA would divide feature maps by channels too, and move them for it.

    Returns:
        The gradients by parameter name, the statistics by name, and [loss, correct pixels, labelled pixels].
    """
    count = config.grad_accum_steps
    # Interleaved, so that each device's share of a micro-batch consists of the device's own examples.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    accum_dtype = at_least_float32(models.DTYPES[config.model.dtype])
    pixels = batch["label"].size
    valid_pixels = jnp.sum(batch["label"] != IGNORE_LABEL)
    has_void = config.task == "segmentation"
    divisor = jnp.maximum(valid_pixels, 1) if has_void and config.ignore_void_in_mean else pixels
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROPOUT_STREAM), state.step)

    whole = jax.lax.with_sharding_constraint(state.params, sharding.replicated(layout.step.mesh))

    def compute_loss(params: Tensors, stats: Tensors, micro_batch: Batch, key: Array) -> tuple[Array, tuple]:
        model = models.merge_state_dict(graphdef, params | stats)
        rngs = nnx.Rngs(dropout=key)
        if config.task == "classification":
            images, classes = augment_classes(micro_batch, config, accum_dtype)
            smoothing = config.loss.label_smoothing
            sums = class_cross_entropy(model(images, rngs=rngs), *classes, smoothing=smoothing)
            dice = jnp.zeros_like(sums.loss)
        else:
            images, labels = augment(
                micro_batch,
                config.seed,
                flip=config.data.flip_prob,
                photometric=config.data.photometric_distortion,
                dtype=accum_dtype,
            )
            sums, dice = loss_function(model(images, rngs=rngs), labels, images)
        loss = sums.loss / jnp.asarray(divisor, sums.loss.dtype) + dice / len(batch["label"])
        return loss, (models.state_dict(model, nnx.BatchStat), loss, sums.correct, sums.valid)

    def add_micro_batch(carry: Any, inputs: Any) -> tuple[Any, None]:
        stats, gradients, sums = carry
        micro_batch, key = inputs
        grads, (stats, *terms) = jax.grad(compute_loss, has_aux=True)(whole, stats, micro_batch, key)
        grads = jax.lax.with_sharding_constraint(grads, layout.params)
        return (stats, jax.tree.map(jnp.add, gradients, grads), jax.tree.map(jnp.add, sums, terms)), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    counter = jnp.zeros((), jnp.sum(jnp.zeros(0, bool)).dtype)  # int32, or int64 in 64-bit mode
    init = (state.stats, zeros, [jnp.zeros((), accum_dtype), counter, counter])
    inputs = (micro_batches, jax.random.split(key, count))
    if count == 1:
        (stats, gradients, sums), _ = add_micro_batch(init, jax.tree.map(lambda x: x[0], inputs))
    else:
        (stats, gradients, sums), _ = jax.lax.scan(add_micro_batch, init, inputs)
    return gradients, stats, sums


def _sum_losses(
    logits: Array,
    labels: Array,
    images: Array,
    teacher: Callable[[Array], Array] | None = None,
    *,
    config: ConfigDict,
    cross_entropy: CrossEntropy,
    devices: int,
) -> tuple[LossSums, Array]:
    """The sums over the pixels of a batch, and the sum of the weighted Dice losses of its images."""
    pixel_loss = PixelLoss(
        tuple(config.loss.class_weight),
        config.loss.label_smoothing,
        config.loss.ohem_threshold,
        config.distillation.weight,
        config.distillation.temperature,
    )
    teacher_logits = None if teacher is None else jax.lax.stop_gradient(teacher(images))
    options: Any = {"precision": config.model.precision, "devices": devices}
    sums = cross_entropy(logits, labels, teacher_logits, pixel_loss=pixel_loss, **options)
    weight = config.loss.dice_weight
    dice = (
        weight * jnp.sum(upsampled_dice(logits, labels, **options)) if weight else jnp.zeros((), logits.dtype)
    )
    return sums, dice


def average_decay(step: Array, config: ConfigDict) -> float | Array:
    """The decay of the moving averages at a step, counted from 0: `ema_decay`, or with `ema_warmup` less at first.

    As in TensorFlow's `ExponentialMovingAverage(num_updates=step)`, they reach back over a ninth of the steps then.

    >>> from topformer_jax import config
    >>> settings = config.load(config.camvid("tiny"), {"ema_decay": 0.99, "ema_warmup": True})
    >>> [f"{average_decay(jnp.asarray(step), settings):.2f}" for step in (0, 90, 890, 10_000)]
    ['0.10', '0.91', '0.99', '0.99']
    """
    if not config.ema_warmup:
        return config.ema_decay
    step = step.astype(jnp.result_type(float))
    return jnp.minimum((1 + step) / (10 + step), config.ema_decay)


def _move_average(old: Array, new: Array, decay: float | Array) -> Array:
    """The exponential moving average; integers (counters) take the new value."""
    if not jnp.issubdtype(old.dtype, jnp.floating):
        return new
    if isinstance(decay, Array):
        decay = decay.astype(old.dtype)
    return decay * old + (1 - decay) * new
