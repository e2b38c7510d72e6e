"""AdamW with mmcv's poly learning rate: linear warm-up, a faster head, weight decay on every parameter."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

HEAD_PREFIX = "decode_head."


def learning_rate(step: ArrayLike, schedule: ConfigDict) -> Float[Array, ""]:
    """The backbone's learning rate at a step (counted from 0): mmcv's `poly` policy with linear warm-up.

        poly(i) = (lr - min_lr) * ((steps - i) / steps) ** power + min_lr
        warm-up, i < w: poly(i) * (1 - (1 - i / w) * (1 - ratio))

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
    remaining = jnp.maximum(schedule.steps - step, 0).astype(dtype) / schedule.steps
    poly = (schedule.lr - schedule.min_lr) * remaining**schedule.power
    poly = poly + schedule.min_lr
    warmup = schedule.warmup_steps
    if warmup == 0:
        return poly
    done, rest = step.astype(dtype), jnp.maximum(warmup - step, 0).astype(dtype)
    return jnp.where(step < warmup, poly * ((done + schedule.warmup_ratio * rest) / warmup), poly)


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW in PyTorch's form (decay decoupled, times the learning rate) for parameters by official name.

    The learning rate of the head (`decode_head.*`), and with it its weight decay, is multiplied by `head_lr_mult`.
    Every parameter decays: the official config exempts names with `norm` in them, but BatchNorm is called `bn` there.
    `no_decay_norm` exempts BatchNorm's scales and biases. `clip_norm` > 0 clips the gradient's global norm.

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
        return {name: not (settings.no_decay_norm and ".bn." in name) for name in params}

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
        optax.stateless(scale_head),
        optax.scale_by_learning_rate(lambda step: learning_rate(step, config.schedule)),
    )
