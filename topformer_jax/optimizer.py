"""AdamW with the poly schedule, as mmcv runs it: warm-up, a faster head, decay on everything."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

HEAD = "decode_head."


def learning_rate(step: ArrayLike, schedule: ConfigDict) -> Float[Array, ""]:
    """The backbone's learning rate at a step (counted from 0), by mmcv's poly policy with linear warm-up.

        poly(i) = (base - least) * ((steps - i) / steps) ** power + least
        warm-up, i < w: poly(i) * (1 - (1 - i / w) * (1 - ratio))

    Written so that nothing cancels in float32: differences are taken of integers, and the warm-up's factor
    is `(i + ratio * (w - i)) / w`.
    """
    real = jnp.zeros(()).dtype
    step = jnp.asarray(step)
    left = jnp.maximum(schedule.steps - step, 0).astype(real) / schedule.steps
    poly = (schedule.lr - schedule.min_lr) * left**schedule.power
    poly = poly + schedule.min_lr
    warmup = schedule.warmup_steps
    if warmup == 0:
        return poly
    done, rest = step.astype(real), jnp.maximum(warmup - step, 0).astype(real)
    return jnp.where(step < warmup, poly * ((done + schedule.warmup_ratio * rest) / warmup), poly)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW for parameters by official name, in PyTorch's decoupled form.

    The head's parameters (`decode_head.*`) move with `head_lr_mult` times the learning rate, their weight
    decay too. Decay is on for every parameter, as it is officially (the official exception is spelled `norm`,
    which no name contains); `no_decay_norm` leaves BatchNorm's out. `clip_norm` > 0 clips the global norm.
    """
    settings = config.optimizer

    def speed_up_head(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        multiplier = settings.head_lr_mult
        return {
            name: update * multiplier if name.startswith(HEAD) else update for name, update in updates.items()
        }

    def decayed(params: optax.Params) -> dict[str, bool]:
        return {name: not (settings.no_decay_norm and ".bn." in name) for name in params}

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
        optax.stateless(speed_up_head),
        optax.scale_by_learning_rate(lambda step: learning_rate(step, config.schedule)),
    )
