"""Folded BatchNorms: the same outputs of every module and network, without a BatchNorm left."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parity import distance, run, settings_for
from tests.test_area import _masked_logits
from topformer_jax import config, models
from topformer_jax.models import layers
from topformer_jax.models.layers import fold_batch_norms


def randomized(model: Any) -> Any:
    """In inference mode, with statistics and factors as after a training."""
    random = np.random.default_rng(0)
    for name, variable in models.named_variables(model).items():
        value = variable.get_value()
        if name.endswith("running_var"):
            variable.set_value(jnp.asarray(random.uniform(0.3, 3, value.shape), value.dtype))
        elif value.ndim == 1:
            variable.set_value(jnp.asarray(random.uniform(-1, 1, value.shape), value.dtype))
    model.eval()
    return model


def batch_norms(model: nnx.Module) -> int:
    return sum(isinstance(module, layers.BatchNorm) for _, module in nnx.iter_modules(model))


def images(dtype: str, height: int = 70, width: int = 99) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(dtype)


@pytest.mark.parametrize("injection", ["multi_sum_cbr", "fuse_sum"])
@pytest.mark.usefixtures("x64")
def test_the_network_in_float64(injection: str) -> None:
    settings = settings_for("tiny", model__injection=injection, model__dtype="float64", model__depths=1)
    model = randomized(models.build(settings))
    folded = fold_batch_norms(model)
    assert batch_norms(model) > 20
    assert batch_norms(folded) == 0
    assert distance(run(folded, images("float64")), run(model, images("float64"))) < 1e-12


@pytest.mark.usefixtures("x64")
def test_the_classifier_in_float64() -> None:
    model = randomized(
        models.build(config.load(config.imagenet("tiny"), {"model.dtype": "float64", "model.depths": 1}))
    )
    folded = fold_batch_norms(model)
    assert batch_norms(folded) == 1  # the head's, which follows none
    found = run(folded, images("float64", 64, 64))
    assert distance(found, run(model, images("float64", 64, 64))) < 1e-12


@pytest.mark.usefixtures("x64")
def test_images_on_a_canvas() -> None:
    """The shifts that fill what is outside of an image stay outside."""
    model = randomized(models.build(settings_for("tiny", model__dtype="float64")))
    pictures = [images("float64")[0], images("float64", 33, 128)[0]]
    pairs = zip(
        _masked_logits(fold_batch_norms(model), pictures, (96, 128)),
        _masked_logits(model, pictures, (96, 128)),
        strict=True,
    )
    assert all(distance(found, expected) < 1e-12 for found, expected in pairs)


def test_in_training_it_is_refused() -> None:
    with pytest.raises(ValueError, match="in inference mode only"):
        fold_batch_norms(models.build(settings_for("tiny")))
