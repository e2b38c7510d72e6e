"""AdamW or RMSprop, and the learning rate: mmcv's poly, or timm's step and cosine, after a linear warm-up."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

HEAD_PREFIX = "decode_head."
RMS_DECAY, MOMENTUM = 0.9, 0.9  # of RMSprop: the mean squared gradient and the updates


def learning_rate(step: ArrayLike, schedule: ConfigDict) -> Float[Array, ""]:
    """The backbone's learning rate at a step (counted from 0), by `schedule.policy`.

        poly(i) = (lr - min_lr) * ((steps - i) / steps) ** power + min_lr
        cosine(i) = (lr - min_lr) * (1 + cos(pi * i / steps)) / 2 + min_lr
        step(i) = lr * decay_rate ** floor(i / decay_steps)
        warm-up, i < w: start * (1 - (1 - i / w) * (1 - ratio))

    `start` is poly(i) in mmcv's poly, and lr in the other two, which are timm's schedulers (`CosineLRScheduler`,
    `StepLRScheduler`, without prefix). timm's step changes at the first epoch after the time, here it is exact.

    The computation subtracts integers only, since float32 would lose digits: the warm-up's factor is
    `(i + ratio * (w - i)) / w`.

    Args:
        step: an integer, on the host or on a device.
        schedule: `config.schedule`.

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
        remaining = jnp.maximum(schedule.steps - step, 0).astype(dtype) / schedule.steps
        share = (
            remaining**schedule.power
            if schedule.policy == "poly"
            else (1 - jnp.cos(jnp.pi * remaining)) / 2  # the angle is pi minus the formula's
        )
        rate = (schedule.lr - schedule.min_lr) * share
        rate = rate + schedule.min_lr
    warmup = schedule.warmup_steps
    if warmup == 0:
        return rate
    done, rest = step.astype(dtype), jnp.maximum(warmup - step, 0).astype(dtype)
    start = rate if schedule.policy == "poly" else jnp.asarray(schedule.lr, dtype)
    return jnp.where(step < warmup, start * ((done + schedule.warmup_ratio * rest) / warmup), rate)


def scaled_learning_rate(step: ArrayLike, config: ConfigDict) -> Float[Array, ""]:
    """`learning_rate`, times `batch_size / schedule.base_batch_size` where that is not 0 (Goyal et al. 2017).

    >>> from topformer_jax import config
    >>> changes = {"batch_size": 64, "schedule.base_batch_size": 16}
    >>> f"{scaled_learning_rate(80_000, config.load(config.ade20k('tiny'), changes)):.1e}"
    '6.0e-04'
    """
    rate, base = learning_rate(step, config.schedule), config.schedule.base_batch_size
    return rate * (config.batch_size / base) if base else rate


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The rule `optimizer.name` for parameters by official name.

    `adamw` has PyTorch's form: the decay is decoupled, times the learning rate. `rmsprop_tf` has TensorFlow's, as
    timm's `RMSpropTF`: g + weight_decay * p is divided by sqrt(mean square + eps), whose mean square starts at 1, and
    the learning rate is applied before the momentum, so that old updates keep the rate of their step.

    The learning rate of the head (`decode_head.*`), and with it AdamW's weight decay, is multiplied by
    `head_lr_mult`. Every parameter decays: the official config exempts names with `norm` in them, but BatchNorm is
    called `bn` there. `no_decay_norm` exempts BatchNorm's scales and biases and other biases, as timm does.
    `clip_norm` > 0 clips the gradient's global norm.

    Args:
        config: all settings; `config.optimizer` and `config.schedule` are read.

    Returns:
        A transformation of dictionaries: gradients and parameters by name, as `models.state_dict` returns them.
    """
    settings = config.optimizer

    def scale_head(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        multiplier = settings.head_lr_mult
        return {
            name: update * multiplier if name.startswith(HEAD_PREFIX) else update
            for name, update in updates.items()
        }

    def decay_mask(params: optax.Params) -> dict[str, bool]:
        return {
            name: not (settings.no_decay_norm and (".bn." in name or name.endswith(".bias")))
            for name in params
        }

    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm > 0 else optax.identity()
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decay_mask)
    head = optax.stateless(scale_head)
    rate = optax.scale_by_learning_rate(lambda step: scaled_learning_rate(step, config))
    if settings.name == "rmsprop_tf":
        rms = optax.scale_by_rms(RMS_DECAY, settings.eps, initial_scale=1.0)
        return optax.chain(clip, decay, rms, head, rate, optax.trace(MOMENTUM))
    adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)
    return optax.chain(clip, adam, decay, head, rate)
