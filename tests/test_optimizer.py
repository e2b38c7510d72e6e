"""Learning rates and parameter groups against the official ones, AdamW against PyTorch's."""

import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from topformer_jax import config
from topformer_jax.optimizer import build_optimizer, learning_rate

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


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_parameter_groups(golden: Find, variant: str) -> None:
    """The learning rate and weight decay of each parameter, computed from one update."""
    official = json.loads(golden("param_groups.json").read_text())[variant]
    settings = config.load(
        config.ade20k(variant), {"schedule.warmup_steps": 0, "optimizer.eps": 0.0, "schedule.power": 0.0}
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
        config.ade20k("tiny"),
        {"schedule.steps": 30, "schedule.warmup_steps": 3, "schedule.lr": 0.1},
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
