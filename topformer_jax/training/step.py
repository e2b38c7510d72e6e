"""The training step: the state, the optimizer, and a pure function from a state and a batch to the next state."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32
from ml_collections import ConfigDict

from topformer_jax import checkpoints, models
from topformer_jax.data.augment import augment
from topformer_jax.data.batch import IGNORE_LABEL, Batch
from topformer_jax.data.classification.augment import MixedClasses, augment_classes
from topformer_jax.models.layers import BatchNorm
from topformer_jax.ops import at_least_float32
from topformer_jax.ops.loss import (
    LossSums,
    PixelLoss,
    channel_divergence,
    class_cross_entropy,
    upsampled_cross_entropy,
)
from topformer_jax.ops.overlap import upsampled_dice, upsampled_jaccard, upsampled_lovasz
from topformer_jax.runtime import sharding
from topformer_jax.runtime.errors import UserError

Tensors = dict[str, Array]
# Folded into the seed's key, so that dropout draws other numbers than the augmentation with the same seed.
DROPOUT_STREAM = 0x64726F70
ACCURACY = {"segmentation": "pixel_accuracy", "classification": "accuracy"}  # its name among the metrics
HEAD_PREFIX = "decode_head."
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")  # of a BatchNorm, beside parameters
RMS_DECAY, MOMENTUM = 0.9, 0.9  # of RMSprop: the mean squared gradient and the updates


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes. Tensors are stored by official name.

    Attributes:
        step: int32 scalar, steps made so far; with the config it determines the data position and all random draws.
        params: parameters that are trained, `{name: array}`.
        stats: BatchNorm statistics and the parameters of `optimizer.freeze`, `{name: array}`.
        optimizer: optax's state.
        average: moving averages of params and stats if `config.ema_decay` is on, else `{}`.
    """

    step: Any
    params: Any
    stats: Any
    optimizer: Any
    average: Any


# The structure of a state with a sharding for each array.
StateSharding: TypeAlias = TrainState
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


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
    device: `loss` (the mean cross-entropy plus the other losses that are on), `pixel_accuracy` (of the labelled
    pixels of the augmented crops; in classification `accuracy`, of the augmented images), `learning_rate` (the
    backbone's), `gradient_norm` (before clipping). The step donates its state: use the one that it returns.

    Args:
        config: the settings.
        mesh: the devices; all of them if None.
        model: whose weights to start from; fresh ones from `config.seed` if None.
        teacher: to distil from, with the classes of `model`; None: without distillation.

    Raises:
        UserError: the mesh does not divide the batch, `loss.class_weight` is a name, or the length is in epochs.
    """
    if config.schedule.epochs:
        raise UserError(
            f"schedule.epochs is {config.schedule.epochs}: give the config that "
            "config.resolve_schedule(config, len(source)) returns"
        )
    if isinstance(config.loss.class_weight, str):
        raise UserError(
            f"loss.class_weight={config.loss.class_weight}: a step needs numbers, as training.class_weight makes them"
        )
    mesh = sharding.make_train_mesh(config) if mesh is None else mesh
    model = models.build(config) if model is None else model
    state = init_state(config, model)
    layout = lay_out(state, mesh)
    train_step = build_train_step(config, model, mesh, layout, teacher=teacher)
    state = jax.device_put(state, layout)
    if teacher is None:
        return state, train_step
    tensors = jax.device_put(models.state_dict(teacher), sharding.replicated(mesh))
    return state, lambda state, batch: train_step(state, batch, tensors)


def lay_out(state: TrainState, mesh: Mesh) -> StateSharding:
    """Returns a sharding for each array of a state; statistics and frozen weights lie on every device."""
    layout: StateSharding = jax.tree.map(lambda array: sharding.array_sharding(array, mesh), state)
    # Statistics are small, and frozen weights would be gathered at each step.
    layout.stats = dict.fromkeys(state.stats, sharding.replicated(mesh))
    return layout


def init_state(config: ConfigDict, model: nnx.Module) -> TrainState:
    """The state at step 0 from a model's weights, on the default device."""
    params, stats = models.state_dict(model, nnx.Param), models.state_dict(model, nnx.BatchStat)
    for name in frozen_names(config, params):
        stats[name] = params.pop(name)
    # Under jit: by itself optax compiles one program for each shape of its zeros, which takes 2 s.
    optimizer_state = jax.jit(build_optimizer(config).init)(params)
    average = jax.tree.map(jnp.copy, params | stats) if config.ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer_state, average)


def frozen_names(config: ConfigDict, names: Iterable[str]) -> set[str]:
    """The names of a model's tensors that `optimizer.freeze` and `model.bn_frozen` keep as they are.

    >>> from topformer_jax import config
    >>> names = "backbone.tpm.stem.0.c.weight", "decode_head.linear_fuse.bn.running_mean", "decode_head.conv_seg.bias"
    >>> settings = config.load(config.ade20k("tiny"), {"optimizer.freeze": "backbone", "model.bn_frozen": True})
    >>> sorted(frozen_names(settings, names))
    ['backbone.tpm.stem.0.c.weight', 'decode_head.linear_fuse.bn.running_mean']
    """
    names, part = set(names), config.optimizer.freeze
    frozen = set() if part == "none" else names - checkpoints.fresh_names(names, part)
    return frozen | {name for name in names if config.model.bn_frozen and name.endswith(STATISTICS)}


def build_train_step(
    config: ConfigDict,
    model: nnx.Module,
    mesh: Mesh,
    layout: StateSharding,
    teacher: nnx.Module | None = None,
) -> Any:
    """The jitted step of a model, whose weights it does not use; switches the model to training mode.

    With a teacher, its tensors by name are a third argument of the step.
    """
    model.train()
    frozen = frozen_names(config, layout.params | layout.stats)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.use_running_average = ".".join(map(str, (*path, "running_mean"))) in frozen
    in_shardings: tuple[Any, ...] = (layout, sharding.batch_sharding(mesh))
    if teacher is not None:
        teacher.eval()
        in_shardings += (sharding.replicated(mesh),)
    teacher_graph = None if teacher is None else nnx.graphdef(teacher)
    return jax.jit(
        _Step(config, layout, nnx.graphdef(model), teacher_graph).apply,
        in_shardings=in_shardings,
        out_shardings=(layout, sharding.replicated(mesh)),
        donate_argnums=0,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One step: augment, forward, backward, update. Its methods are pure."""

    config: ConfigDict
    layout: StateSharding
    graph: nnx.GraphDef
    teacher_graph: nnx.GraphDef | None

    def apply(
        self, state: TrainState, batch: Batch, teacher: Tensors | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """The next state and the metrics; see `init_training`."""
        config = self.config
        gradients, stats, sums = self.accumulate_gradients(state, batch, teacher)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its step count
            updates, optimizer_state = build_optimizer(config).update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        tensors = params | stats
        decay = average_decay(state.step, config)
        frozen = frozen_names(config, tensors)  # whose averages would move by rounding
        average = {
            name: tensors[name] if name in frozen else _move_average(old, tensors[name], decay)
            for name, old in state.average.items()
        }
        metrics = {
            "loss": sums.loss,
            ACCURACY[config.task]: sums.correct / jnp.maximum(sums.valid, 1),
            "learning_rate": scaled_learning_rate(state.step, config),
            "gradient_norm": optax.tree.norm(gradients),
        }
        return TrainState(state.step + 1, params, stats, optimizer_state, average), metrics

    def accumulate_gradients(
        self, state: TrainState, batch: Batch, teacher: Tensors | None
    ) -> tuple[Tensors, Tensors, LossSums]:
        """Gradients by parameter name, BatchNorm statistics after the batch, and its mean loss and counts.

        Parameters that are divided over devices are gathered once, at the start, and their gradients are divided
        again as soon as they exist. XLA alone would also divide feature maps by channels, and move them for it.
        """
        config, layout, count = self.config, self.layout, self.config.grad_accum_steps
        # Interleaved, so that each device's share of a micro-batch consists of the device's own examples.
        micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))
        divisor: Any = batch["label"].size
        if config.task == "segmentation" and config.ignore_void_in_mean:
            divisor = jnp.maximum(jnp.sum(batch["label"] != IGNORE_LABEL), 1)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROPOUT_STREAM), state.step)
        whole = jax.lax.with_sharding_constraint(state.params, sharding.replicated(layout.step.mesh))

        def compute_loss(params: Tensors, stats: Tensors, micro_batch: Batch, key: Array) -> tuple[Array, Any]:
            sums, others, stats = self.forward(params | stats, micro_batch, key, teacher)
            loss = sums.loss / jnp.asarray(divisor, sums.loss.dtype) + others / count
            return loss, (stats, sums._replace(loss=loss))

        def add_micro_batch(carry: Any, inputs: Any) -> tuple[Any, None]:
            stats, gradients, total = carry
            micro_batch, key = inputs
            grads, (new, sums) = jax.grad(compute_loss, has_aux=True)(whole, stats, micro_batch, key)
            grads = jax.lax.with_sharding_constraint(grads, layout.params)
            added = jax.tree.map(jnp.add, gradients, grads), jax.tree.map(jnp.add, total, sums)
            return (stats | new, *added), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        counter = jnp.zeros((), jnp.sum(jnp.zeros(0, bool)).dtype)  # int32, or int64 in 64-bit mode
        loss = jnp.zeros((), at_least_float32(models.DTYPES[config.model.dtype]))
        carry: Any = (state.stats, zeros, LossSums(loss, counter, counter))
        inputs = (micro_batches, jax.random.split(key, count))
        if count == 1:
            carry, _ = add_micro_batch(carry, jax.tree.map(lambda x: x[0], inputs))
        else:
            carry, _ = jax.lax.scan(add_micro_batch, carry, inputs)
        stats, gradients, total = carry
        return gradients, stats, total

    def forward(
        self, tensors: Tensors, batch: Batch, key: Array, teacher: Tensors | None
    ) -> tuple[LossSums, ArrayLike, Tensors]:
        """The sums of the pixels' losses, the mean of the other losses over the images, and the next statistics."""
        config = self.config
        model = models.merge_state_dict(self.graph, tensors)
        images, labels = augment_batch(batch, config)
        logits = model(images, rngs=nnx.Rngs(dropout=key))
        stats = models.state_dict(model, nnx.BatchStat)
        if isinstance(labels, MixedClasses):
            return class_cross_entropy(logits, *labels, smoothing=config.loss.label_smoothing), 0.0, stats
        goal = None
        if self.teacher_graph is not None and teacher is not None:
            goal = jax.lax.stop_gradient(models.merge_state_dict(self.teacher_graph, teacher)(images))
        pixel_loss = PixelLoss(
            tuple(config.loss.class_weight),
            config.loss.label_smoothing,
            config.loss.ohem_threshold,
            config.distillation.weight,
            config.distillation.temperature,
        )
        options: Any = {"precision": config.model.precision, "devices": self.layout.step.mesh.size}
        pixel_goal = goal if config.distillation.weight else None
        sums = upsampled_cross_entropy(logits, labels, pixel_goal, pixel_loss=pixel_loss, **options)
        return sums, _sum_image_losses(config, logits, labels, goal, options), stats


def augment_batch(
    batch: Batch, config: ConfigDict
) -> tuple[Float[Array, "n h w 3"], Int32[Array, "n h w"] | MixedClasses]:
    """The augmented images of a batch, in at least float32, with their label maps or a classifier's labels."""
    dtype = at_least_float32(models.DTYPES[config.model.dtype])
    if config.task == "classification":
        return augment_classes(batch, config, dtype)
    flip, photometric = config.data.flip_prob, config.data.photometric_distortion
    return augment(batch, config.seed, flip=flip, photometric=photometric, dtype=dtype)


def _sum_image_losses(
    config: ConfigDict, logits: Array, labels: Array, teacher: Array | None, options: dict[str, Any]
) -> ArrayLike:
    """The weighted means over the images of the losses that are computed image by image; 0 without any."""
    loss, distillation = config.loss, config.distillation
    terms: list[tuple[float, Callable[[], Array]]] = [
        (loss.dice_weight, lambda: upsampled_dice(logits, labels, **options)),
        (loss.jaccard_weight, lambda: upsampled_jaccard(logits, labels, **options)),
        (loss.lovasz_weight, lambda: upsampled_lovasz(logits, labels, precision=options["precision"])),
    ]
    if teacher is not None:
        heat = distillation.channel_temperature
        terms += [
            (distillation.jaccard_weight, lambda: upsampled_jaccard(logits, labels, teacher, **options)),
            (distillation.channel_weight, lambda: channel_divergence(logits, teacher, temperature=heat)),
        ]
    return sum((weight * jnp.mean(compute()) for weight, compute in terms if weight), start=0.0)


def average_decay(step: Array, config: ConfigDict) -> float | Array:
    """The decay of the moving averages at a step, counted from 0: `ema_decay`, or with `ema_warmup` less at first.

    As in TensorFlow's `ExponentialMovingAverage(num_updates=step)`.

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
    decay = decay.astype(old.dtype) if isinstance(decay, Array) else decay
    return decay * old + (1 - decay) * new


def learning_rate(step: ArrayLike, schedule: ConfigDict) -> Float[Array, ""]:
    """The backbone's learning rate at a step (counted from 0), by `schedule.policy`.

        poly(i) = (lr - min_lr) * ((steps - i) / steps) ** power + min_lr
        cosine(i) = (lr - min_lr) * (1 + cos(pi * i / steps)) / 2 + min_lr
        step(i) = lr * decay_rate ** floor(i / decay_steps)
        warm-up, i < w: start * (1 - (1 - i / w) * (1 - ratio))

    `start` is poly(i) if the policy is poly, as in mmcv, and lr otherwise, as in timm's `CosineLRScheduler` and
    `StepLRScheduler` (without prefix). timm's step changes at the first epoch after the time, here it is exact.

    >>> from topformer_jax import config
    >>> schedule = config.ade20k("tiny").schedule
    >>> [f"{learning_rate(step, schedule):.1e}" for step in (0, 750, 80_000, 160_000)]
    ['3.0e-10', '1.5e-04', '1.5e-04', '0.0e+00']
    """
    dtype = jnp.zeros(()).dtype  # float32, or float64 with x64 enabled
    step = jnp.asarray(step)
    if schedule.policy == "step":
        decays = (step // schedule.decay_steps).astype(dtype)
        rate = schedule.lr * jnp.asarray(schedule.decay_rate, dtype) ** decays
    else:
        # Only integers are subtracted: float32 would lose digits.
        remaining = jnp.maximum(schedule.steps - step, 0).astype(dtype) / schedule.steps
        cosine = (1 - jnp.cos(jnp.pi * remaining)) / 2  # the angle is pi minus the formula's
        share = remaining**schedule.power if schedule.policy == "poly" else cosine
        rate = (schedule.lr - schedule.min_lr) * share + schedule.min_lr
    warmup = schedule.warmup_steps
    if warmup == 0:
        return rate
    done, rest = step.astype(dtype), jnp.maximum(warmup - step, 0).astype(dtype)
    start = rate if schedule.policy == "poly" else jnp.asarray(schedule.lr, dtype)
    return jnp.where(step < warmup, start * ((done + schedule.warmup_ratio * rest) / warmup), rate)


def scaled_learning_rate(step: ArrayLike, config: ConfigDict) -> Float[Array, ""]:
    """`learning_rate`, times `batch_size / schedule.base_batch_size` if that is not 0 (Goyal et al. 2017).

    >>> from topformer_jax import config
    >>> changes = {"batch_size": 64, "schedule.base_batch_size": 16}
    >>> f"{scaled_learning_rate(80_000, config.load(config.ade20k('tiny'), changes)):.1e}"
    '6.0e-04'
    """
    rate, base = learning_rate(step, config.schedule), config.schedule.base_batch_size
    return rate * (config.batch_size / base) if base else rate


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The rule `optimizer.name` for dictionaries of gradients and parameters by official name.

    `adamw` has PyTorch's form: the decay is decoupled, times the learning rate. `rmsprop_tf` is timm's `RMSpropTF`:
    g + weight_decay * p is divided by sqrt(mean square + eps), whose mean square starts at 1, and the learning rate
    comes before the momentum.

    `head_lr_mult` multiplies the head's learning rate, and AdamW's weight decay with it. Every parameter decays: the
    official config exempts names with `norm` in them, but BatchNorm is called `bn` there. `no_decay_norm` exempts
    BatchNorm and biases, as timm does. `clip_norm` > 0 clips the gradient's global norm.
    """
    settings = config.optimizer

    def scale_head(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        head = {name: x * settings.head_lr_mult for name, x in updates.items() if name.startswith(HEAD_PREFIX)}
        return {**updates, **head}

    def decay_mask(params: optax.Params) -> dict[str, bool]:
        exempt = {name for name in params if ".bn." in name or name.endswith(".bias")}
        return {name: not (settings.no_decay_norm and name in exempt) for name in params}

    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm > 0 else optax.identity()
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decay_mask)
    head = optax.stateless(scale_head)
    rate = optax.scale_by_learning_rate(lambda step: scaled_learning_rate(step, config))
    if settings.name == "rmsprop_tf":
        rms = optax.scale_by_rms(RMS_DECAY, settings.eps, initial_scale=1.0)
        return optax.chain(clip, decay, rms, head, rate, optax.trace(MOMENTUM))
    adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)
    return optax.chain(clip, adam, decay, head, rate)
