"""`models.build`: the model carries its config, and settings that are not allowed are named."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax import config, load, models
from topformer_jax.runtime.errors import UserError


@pytest.mark.parametrize("recipe", [config.pascal_context("tiny", classes=59), config.imagenet("tiny")])
def test_a_model_carries_its_config(recipe: ConfigDict) -> None:
    """As a static attribute: equal configs give equal graph definitions, and flax's transforms keep it."""
    settings = config.load(recipe, {"model.dropout_ratio": 0.0, "model.drop_path_rate": 0.0})
    model = models.build(settings)
    frozen = FrozenConfigDict(settings)
    assert model.config == load(settings).config == frozen
    settings.seed = 1  # the model has a copy
    assert model.config.seed == 0

    graphdef, state = nnx.split(model)
    same, other = (models.build(config.load(source)) for source in (ConfigDict(frozen), settings))
    assert nnx.graphdef(same) == graphdef
    assert hash(nnx.graphdef(same)) == hash(graphdef)
    assert nnx.graphdef(other) != graphdef
    assert not any(isinstance(leaf, ConfigDict) for leaf in jax.tree.leaves(state))

    assert nnx.merge(graphdef, state).config == nnx.clone(model).config == frozen
    assert models.merge_state_dict(graphdef, models.state_dict(model)).config == frozen
    scale = nnx.jit(lambda model: jnp.asarray(model.config.evaluation.scale))
    assert tuple(scale(model)) == tuple(frozen.evaluation.scale)
    traces = []

    def classes(graphdef: nnx.GraphDef, state: nnx.State) -> jax.Array:
        traces.append(graphdef)
        return jnp.int32(nnx.merge(graphdef, state).config.model.num_classes)

    compiled = jax.jit(classes, static_argnums=0)
    assert compiled(graphdef, state) == compiled(nnx.graphdef(same), state) == frozen.model.num_classes
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("model.variant", "bse", "did you mean 'base'"),
        ("model.injection", "muli_sum", "did you mean 'multi_sum'"),
        ("model.dtype", "float16", "expected one of float32, bfloat16, float64"),
        ("model.conv_impl", "fast", "expected auto or single_op"),
        ("model.precision", "tf32", "expected one of highest, high, default"),
        ("model.dtype", "float64", "JAX_ENABLE_X64"),
        ("model.num_classes", 0, "expected 1 to 100,000"),
        ("model.num_classes", 256, "expected 1 to 255"),
        ("model.head_channels", 0, "expected 1 to 4,096, or none"),
        ("model.dropout_ratio", 1.0, "expected 0 or more and less than 1"),
        ("seed", -1, "expected 0 to 4,294,967,295"),
        ("task", "detection", "expected segmentation or classification"),
    ],
)
def test_settings_that_do_not_exist(key: str, value: Any, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        load(config.ade20k("tiny"), **{key: value})
