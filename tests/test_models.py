"""The network against the reference's outputs, and against the PyTorch network with random weights."""

import itertools
import json
import pathlib
from collections.abc import Callable

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given, strategies as st
from jax.extend.core import Jaxpr
from ml_collections import ConfigDict

from tests.parity import INJECTIONS, distance, model_from, normalize, run, settings_for, to_nchw, to_nhwc
from tests.reference import network as reference
from topformer_jax import config, load, models

Find = Callable[[str], pathlib.Path]
VARIANTS = ("tiny", "small", "base")
PARAMETERS = {"tiny": 1_389_654, "small": 3_034_662, "base": 5_062_646}


def _photo(golden: Find, size: str) -> np.ndarray:
    photo = cv2.imread(str(golden(f"forward/photo_{size}.png")), cv2.IMREAD_COLOR_RGB)
    assert photo is not None
    return photo


def _stages(model: models.Segmenter, images: np.ndarray) -> dict[str, jax.Array]:
    """The output of each part of the network, by the goldens' names."""
    backbone = model.backbone
    tokens, semantics = backbone.extract_features(jnp.asarray(images), None)
    maps = backbone(jnp.asarray(images))
    stages = {f"tpm{index}": token for index, token in enumerate(tokens)}
    stages |= {"ppa": backbone.ppa(tokens), "trans": semantics}
    stages |= {f"sim{index + 1}": injected for index, injected in enumerate(maps)}
    return stages | {"logits": model.decode_head(maps)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_stages(golden: Find, variant: str) -> None:
    model = load(config.ade20k(variant), golden(f"checkpoints/{variant}.pth"))
    assert isinstance(model, models.Segmenter)
    graphdef, state = nnx.split(model)
    with np.load(golden(f"forward/stages_{variant}.npz")) as file:
        images = normalize(file["image"])
        ours = jax.jit(lambda state: _stages(nnx.merge(graphdef, state), images))(state)
        assert set(ours) == set(file) - {"image"}
        errors = {name: distance(ours[name], file[name]) for name in ours}
    print(variant, "96x163", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize(("variant", "size"), [("tiny", "333x500"), ("small", "333x500"), ("base", "512x512")])
def test_golden_logits(golden: Find, variant: str, size: str) -> None:
    with np.load(golden(f"forward/logits_{variant}_{size}.npz")) as file:
        theirs = file["logits"]
    checkpoint = golden(f"checkpoints/{variant}.pth")
    images = normalize(_photo(golden, size))
    error = distance(run(load(config.ade20k(variant), checkpoint), images), theirs)
    print(f"{variant} {size}: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize(("variant", "size"), [("tiny", "333x500"), ("base", "512x512")])
def test_bfloat16_is_as_good_as_the_reference_in_bfloat16(golden: Find, variant: str, size: str) -> None:
    """The label maps of both against the float32 golden.

    These weights, trained for minutes, leave thin margins: rounding nothing but Base's weights to bfloat16
    already changes 2.7 % of its labels. So the measure is what PyTorch makes of the same weights.
    """
    with np.load(golden(f"forward/logits_{variant}_{size}.npz")) as file:
        exact = file["logits"]
    checkpoint = golden(f"checkpoints/{variant}.pth")
    images = normalize(_photo(golden, size))
    ours = run(load(config.ade20k(variant), checkpoint, **{"model.dtype": "bfloat16"}), images)
    assert ours.dtype == np.float32
    network = reference.Segmenter(variant)
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with torch.no_grad():
        theirs = to_nhwc(network.bfloat16().eval()(to_nchw(images).bfloat16()).float())
    labels = exact.argmax(-1)
    top = np.sort(exact, -1)
    clear = top[..., -1] - top[..., -2] > 0.05 * np.abs(exact).max()
    agreement = [float((logits.argmax(-1) == labels).mean()) for logits in (ours, theirs)]
    clearly = float((ours.argmax(-1) == labels)[clear].mean())
    print(
        f"{variant} {size} bfloat16: labels agree on {agreement[0]:.2%}, PyTorch's on {agreement[1]:.2%}; ours on "
        f"{clearly:.2%} of the {clear.mean():.0%} with a margin of 5 % of the range"
    )
    assert 1 - agreement[0] <= 1.5 * (1 - agreement[1])
    assert clearly >= 0.99


def test_golden_classifier(golden: Find) -> None:
    model = load(config.imagenet("tiny"), golden("checkpoints/classification_tiny.pth"))
    assert isinstance(model, models.Classifier)
    with np.load(golden("forward/classification_tiny.npz")) as file:
        images = normalize(file["image"])
        logits = distance(run(model, images), file["logits"])
        graphdef, state = nnx.split(model)
        tokens = jax.jit(lambda state: nnx.merge(graphdef, state).extract_features(jnp.asarray(images), None)[1])(
            state
        )
        pooled = distance(tokens.mean((1, 2)), file["pooled"])
    print(f"classifier: pooled {pooled:.1e}, logits {logits:.1e}")
    assert max(logits, pooled) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_parameters(golden: Find, variant: str) -> None:
    official = json.loads(golden("param_groups.json").read_text())[variant]
    tensors = models.named_variables(models.build(config.ade20k(variant)))
    permutation = {4: (3, 2, 0, 1), 2: (1, 0)}
    shapes = {
        name: [variable.shape[axis] for axis in permutation.get(variable.ndim, range(variable.ndim))]
        for name, variable in tensors.items()
    }
    assert shapes == official["state_dict"]
    parameters = {name: variable for name, variable in tensors.items() if isinstance(variable, nnx.Param)}
    assert set(parameters) == set(official["params"])
    assert sum(variable.size for variable in parameters.values()) == PARAMETERS[variant]


@given(
    h=st.integers(32, 140),
    w=st.integers(32, 140),
    variant=st.sampled_from(VARIANTS),
    injection=st.sampled_from(INJECTIONS),
    depthwise=st.booleans(),
    width=st.sampled_from([None, 24]),
    depths=st.sampled_from([4, 1]),
)
@example(h=70, w=99, variant="tiny", injection="none", depthwise=True, width=None, depths=2)
def test_random_networks(
    h: int, w: int, variant: str, injection: str, depthwise: bool, width: int | None, depths: int
) -> None:
    """float64, so that a wrong formula cannot hide in rounding."""
    official = reference.OFFICIAL_NAMES.get(injection, injection)
    network = reference.Segmenter(variant, 7, official, depthwise, width, depths=depths)
    reference.randomize(network, seed=h)
    images = np.random.default_rng(w).normal(size=(2, h, w, 3))
    with jax.enable_x64(True), torch.no_grad():
        model = model_from(network, _float64(variant, injection, depthwise, width, depths=depths))
        theirs = network.double().eval()(to_nchw(images))
        assert distance(run(model, images), to_nhwc(theirs)) <= 1e-10


@pytest.mark.parametrize(
    ("variant", "depths", "size"), [("tiny", 2, (70, 99)), ("small", 1, (64, 33)), ("base", 4, (101, 32))]
)
def test_random_classifiers(x64: None, variant: str, depths: int, size: tuple[int, int]) -> None:
    network = reference.Classifier(variant, 11, depths=depths)
    reference.randomize(network, seed=0)
    images = np.random.default_rng(1).normal(size=(2, *size, 3))
    changes = {"model.num_classes": 11, "model.depths": depths, "model.dtype": "float64"}
    model = model_from(network, config.load(config.imagenet(variant), changes))
    with torch.no_grad():
        theirs = network.double().eval()(to_nchw(images))
    assert distance(run(model, images), theirs.numpy()) <= 1e-10


@pytest.mark.parametrize("injection", ["multi_sum_cbr", "fuse_sum", "fuse_multi"])
def test_gradients_of_every_parameter(x64: None, injection: str) -> None:
    """In training mode; those of multi_sum are compared with the golden ones in test_step."""
    official = reference.OFFICIAL_NAMES.get(injection, injection)
    network = reference.Segmenter("tiny", 7, official, drop_path=0.0, dropout=0.0, depths=1)
    reference.randomize(network, seed=1)
    settings = _float64("tiny", injection, True, None, depths=1, drop_path_rate=0.0, dropout_ratio=0.0)
    model = model_from(network, settings)
    model.train()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 71, 98, 3))
    network.double().train()
    theirs = network(to_nchw(images))
    weights = rng.normal(size=to_nhwc(theirs).shape)
    (theirs * to_nchw(weights)).sum().backward()

    graphdef, *(parameters, statistics) = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def gradient(parameters: nnx.State) -> nnx.State:
        def loss(parameters: nnx.State) -> jax.Array:
            return jnp.sum(nnx.merge(graphdef, parameters, statistics, copy=True)(images) * weights)

        return jax.grad(loss)(parameters)

    ours = models.named_variables(nnx.merge(graphdef, gradient(parameters), statistics))
    checked = 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        theirs_grad = parameter.grad.numpy()
        mine = np.asarray(ours[name].get_value())
        mine = mine.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(mine.ndim, range(mine.ndim)))
        # A bias in front of a BatchNorm has a gradient of 0 but for rounding, hence the absolute part.
        largest = np.abs(theirs_grad).max()
        assert np.abs(mine - theirs_grad).max() <= 1e-9 * largest + 1e-11, name
        checked += 1
    assert checked == sum(isinstance(variable, nnx.Param) for variable in models.named_variables(model).values())


def test_products_are_full_float32_unless_asked_otherwise() -> None:
    assert _precisions(load(config.ade20k("tiny"), **{"model.conv_impl": "single_op"})) == {"HIGHEST"}
    assert _precisions(load(config.ade20k("tiny"), **{"model.precision": "default"})) == {"DEFAULT"}


def test_bfloat16_keeps_statistics_softmax_and_logits_in_float32() -> None:
    model = load(config.ade20k("tiny"), **{"model.dtype": "bfloat16"})
    dtypes: dict[str, set[str]] = {}
    for equation in _equations(_program(model)):
        for variable in equation.outvars:
            if hasattr(variable.aval, "dtype"):
                dtypes.setdefault(equation.primitive.name, set()).add(str(variable.aval.dtype))
    assert dtypes["exp"] == dtypes["rsqrt"] == {"float32"}
    assert "bfloat16" in dtypes["dot_general"]
    assert all(v.dtype in (np.float32, np.int32) for v in models.named_variables(model).values())


def test_models_of_one_config_share_a_program_and_show_nan() -> None:
    first, second = load(config.ade20k("tiny")), load(config.ade20k("tiny"))
    assert nnx.graphdef(first) == nnx.graphdef(second)
    weight = models.named_variables(first)["backbone.trans.transformer_blocks.0.attn.to_q.c.weight"]
    weight.set_value(jnp.full_like(weight.get_value(), jnp.nan))
    assert np.isnan(run(first, np.ones((1, 64, 64, 3), np.float32))).any()
    with pytest.raises((ValueError, TypeError), match=r"\[n, h, w, 3\]|ype-check"):
        first(np.ones((1, 3, 64, 64), np.float32))


def test_dropout_needs_a_key_and_follows_it() -> None:
    model = models.build(settings_for("tiny", model__drop_path_rate=0.5))
    graphdef, state = nnx.split(model)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)

    @jax.jit
    def draw(seed: int) -> jax.Array:
        return nnx.merge(graphdef, state, copy=True)(images, nnx.Rngs(dropout=jax.random.key(seed)))

    assert np.array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    with pytest.raises(ValueError, match="needs rngs"):
        model(images)


def _float64(variant: str, injection: str, depthwise: bool, width: int | None, **others: float) -> ConfigDict:
    return settings_for(
        variant,
        model__num_classes=7,
        model__injection=injection,
        model__depthwise_head=depthwise,
        model__head_channels=width,
        model__dtype="float64",
        **{f"model__{key}": value for key, value in others.items()},
    )


def _program(model: nnx.Module) -> Jaxpr:
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    return jax.make_jaxpr(lambda state, images: nnx.merge(graphdef, state)(images))(state, images).jaxpr


def _equations(jaxpr: Jaxpr) -> itertools.chain:
    """All equations, those of inner jaxprs too."""
    inner = (value.jaxpr for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "jaxpr"))
    return itertools.chain(jaxpr.eqns, *map(_equations, inner))


def _precisions(model: nnx.Module) -> set[str]:
    products = ("dot_general", "conv_general_dilated")
    found = [eqn.params["precision"] for eqn in _equations(_program(model)) if eqn.primitive.name in products]
    assert len(found) > 50
    return {"DEFAULT" if precision is None else precision[0].name for precision in found}
