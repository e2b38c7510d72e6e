"""Learning rates and parameter groups against the official ones, AdamW and RMSprop against other code."""

import json
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from topformer_jax import config
from topformer_jax.training.step import build_optimizer, learning_rate

Find = Callable[[str], pathlib.Path]


@pytest.mark.parametrize("wide", [False, True])
def test_every_golden_learning_rate(golden: Find, wide: bool) -> None:
    worst = 0.0
    with jax.enable_x64(wide):
        for row in json.loads(golden("poly_lr.json").read_text()):
            schedule = config.load(
                config.ade20k("tiny"),
                {
                    "schedule.steps": row["max_iters"],
                    "schedule.warmup_steps": row["warmup_iters"],
                    "schedule.lr": row["base_lr"],
                },
            ).schedule
            found = float(jax.jit(lambda step, s=schedule: learning_rate(step, s))(row["iter"]))
            worst = max(worst, abs(found / row["lr"] - 1))
    print(f"learning rates: {worst:.1e} relative")
    assert worst <= (1e-10 if wide else 2e-7)


def test_parameter_groups(golden: Find) -> None:
    """The learning rate and weight decay of each parameter, computed from one update."""
    official = json.loads(golden("param_groups.json").read_text())["tiny"]
    settings = config.load(
        config.ade20k("tiny"), {"schedule.warmup_steps": 0, "optimizer.eps": 0.0, "schedule.power": 0.0}
    )
    assert settings.schedule.lr == official["base_lr"]
    assert [settings.optimizer.beta1, settings.optimizer.beta2] == official["betas"]
    with jax.enable_x64(True):
        transform = build_optimizer(settings)
        params = {name: jnp.full((1,), 2.0, jnp.float64) for name in official["params"]}
        state = transform.init(params)
        gradient = {name: jnp.ones(1, jnp.float64) for name in params}
        with jax.numpy_dtype_promotion("standard"):
            moved = {}
            for decay in (0.0, settings.optimizer.weight_decay):
                settings.optimizer.weight_decay = decay
                updates, _ = build_optimizer(settings).update(gradient, state, params)
                moved[decay] = {name: -float(update[0]) for name, update in updates.items()}
    for name, group in official["params"].items():
        rate = moved[0.0][name]  # the first step of Adam is the sign of the gradient
        assert rate == pytest.approx(group["lr"], rel=1e-7), name
        decay = (moved[0.01][name] - rate) / 2.0 / rate
        assert decay == pytest.approx(group["weight_decay"], rel=1e-7), name


def test_adamw_against_pytorch(x64: None) -> None:
    settings = config.load(
        config.ade20k("tiny"), {"schedule.steps": 30, "schedule.warmup_steps": 3, "schedule.lr": 0.1}
    )
    names = ["backbone.a.bn.weight", "decode_head.b.weight"]
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=(4, 3)) for name in names}
    transform = build_optimizer(settings)
    params: optax.Params = {name: jnp.asarray(value) for name, value in start.items()}
    state = transform.init(params)
    leaves = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [{"params": [leaf], "factor": 10 if "head" in name else 1} for name, leaf in leaves.items()]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step in range(20):
        gradient = {name: rng.normal(size=(4, 3)) for name in names}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update({k: jnp.asarray(v) for k, v in gradient.items()}, state, params)
            params = optax.apply_updates(params, updates)
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradient[name])
        for group in theirs.param_groups:
            group["lr"] = group["factor"] * float(learning_rate(step, settings.schedule))
        theirs.step()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(params[name], leaf.detach().numpy(), rtol=1e-10)


def test_no_decay_norm_and_clipping() -> None:
    settings = config.load(
        config.ade20k("tiny"),
        {"optimizer.no_decay_norm": True, "optimizer.clip_norm": 1.0, "schedule.warmup_steps": 0},
    )
    params = {"backbone.x.bn.weight": jnp.ones(3), "backbone.x.c.weight": jnp.ones(3)}
    transform = build_optimizer(settings)
    with jax.numpy_dtype_promotion("standard"):
        nothing = jax.tree.map(jnp.zeros_like, params)
        updates, _ = transform.update(nothing, transform.init(params), params)
        assert not updates["backbone.x.bn.weight"].any()
        assert updates["backbone.x.c.weight"].all()
        large = jax.tree.map(lambda x: 100 * x, params)
        _, state = transform.update(large, transform.init(params), params)
    moments = jnp.concatenate(list(optax.tree.get(state, "mu").values()))
    assert float(jnp.linalg.norm(moments)) == pytest.approx(0.1, rel=1e-5)
    smoothed = {"head.l.bias": jnp.ones(3), "head.l.weight": jnp.ones((3, 3))}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = transform.update(jax.tree.map(jnp.zeros_like, smoothed), transform.init(smoothed), smoothed)
    assert not updates["head.l.bias"].any()
    assert updates["head.l.weight"].all()


def test_rmsprop_against_its_formula(x64: None) -> None:
    """The lines of timm's RMSpropTF in NumPy, over a warm-up and two decays of the learning rate."""
    settings = config.load(
        config.imagenet("tiny"),
        {"schedule.decay_steps": 8, "schedule.warmup_steps": 3, "optimizer.weight_decay": 0.1},
    )
    assert (settings.optimizer.name, settings.optimizer.eps) == ("rmsprop_tf", 1e-3)
    rng = np.random.default_rng(0)
    names = {"a.c.weight": 0.1, "a.bn.weight": 0.0, "head.l.bias": 0.0}  # the decay of each
    expected = {name: rng.normal(size=(4, 3)) for name in names}
    params: optax.Params = {name: jnp.asarray(value) for name, value in expected.items()}
    transform = build_optimizer(settings)
    state = transform.init(params)
    squares = {name: np.ones((4, 3)) for name in names}
    buffers = {name: np.zeros((4, 3)) for name in names}
    for step in range(20):
        gradient = {name: rng.normal(size=(4, 3)) * 10.0 ** rng.integers(-4, 2) for name in names}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update({k: jnp.asarray(v) for k, v in gradient.items()}, state, params)
            params = optax.apply_updates(params, updates)
        rate = float(learning_rate(step, settings.schedule))
        for name, decay in names.items():
            slope = gradient[name] + decay * expected[name]
            squares[name] += (slope**2 - squares[name]) * (1 - 0.9)
            buffers[name] = 0.9 * buffers[name] + rate * slope / np.sqrt(squares[name] + 1e-3)
            expected[name] = expected[name] - buffers[name]
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-10)


@pytest.mark.parametrize("policy", ["step", "cosine"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_other_schedules(policy: str, wide: bool) -> None:
    """timm's formulas, in Python's floats, at every border."""
    settings = config.load(config.imagenet("tiny"), {"schedule.policy": policy, "schedule.min_lr": 1e-5}).schedule
    steps, every, warmup = settings.steps, settings.decay_steps, settings.warmup_steps
    assert (steps, every, warmup, settings.lr, settings.decay_rate) == (750_600, 3002, 12_510, 0.064, 0.973)
    places = [0, 1, warmup - 1, warmup, every * 5 - 1, every * 5, every * 100, steps // 3, steps - 1, steps]
    worst = 0.0
    for step in places:
        if step < warmup:
            expected = 1e-6 + step * (0.064 - 1e-6) / warmup
        elif policy == "step":
            expected = 0.064 * 0.973 ** (step // every)
        else:
            expected = 1e-5 + 0.5 * (0.064 - 1e-5) * (1 + math.cos(math.pi * step / steps))
        with jax.enable_x64(wide):
            found = float(jax.jit(lambda step: learning_rate(step, settings))(step))
        worst = max(worst, abs(found / expected - 1))
    print(f"{policy}: {worst:.1e} relative")
    assert worst <= (1e-10 if wide else 1e-5)
