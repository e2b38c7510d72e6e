"""The losses of images, from tiles or class by class, against the plain formulations: values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from benchmarks import traffic
from tests.parity import distance
from tests.reference.loss import plain_dice, plain_jaccard, plain_lovasz
from tests.test_loss import TILINGS, inputs, on_cpu
from topformer_jax.ops import IGNORE_LABEL
from topformer_jax.ops.loss import channel_divergence
from topformer_jax.ops.overlap import upsampled_dice, upsampled_jaccard, upsampled_lovasz

FACTORS = 1.0, 2.0, -0.5, 3.0  # of four images' losses
LOSSES: dict[str, tuple[Any, Any]] = {
    "dice": (upsampled_dice, plain_dice),
    "jaccard": (upsampled_jaccard, plain_jaccard),
    "teacher": (upsampled_jaccard, plain_jaccard),
    "lovasz": (upsampled_lovasz, plain_lovasz),
}


def gradient_of(function: Any) -> Any:
    """A function that returns the gradient of a weighted sum of four images' losses, and the losses."""

    def total(logits: Any, *others: Any) -> tuple[Any, Any]:
        losses = function(logits, *others)
        return jnp.sum(losses * jnp.asarray(FACTORS, losses.dtype)), losses

    return jax.grad(total, has_aux=True)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("name", "tiling"),
    [*((name, TILINGS[2]) for name in LOSSES), ("teacher", TILINGS[3]), ("teacher", TILINGS[5])],
)
def test_losses_of_images_are_the_plain_ones(name: str, tiling: Any, dtype: str, limit: float) -> None:
    """One class does not occur, and one image has no label. The plain loss is in float64, of the same logits."""
    logits, labels = inputs(8, 4, (5, 6), (37, 45), 5)
    logits = logits / 2  # softer: the gradient of Lovász jumps where errors are equal in float32
    labels[labels == 3] = 2
    labels[2] = IGNORE_LABEL
    maps = [logits, inputs(9, 4, (5, 6), (1, 1), 5)[0]]
    maps = [each.astype(dtype) for each in maps[: 1 + (name == "teacher")]]
    function, plain = LOSSES[name]
    with jax.enable_x64(dtype == "float64"), on_cpu(tiling):
        arguments = jnp.asarray(maps[0]), jnp.asarray(labels), *map(jnp.asarray, maps[1:])
        gradient, losses = jax.tree.map(np.asarray, jax.jit(gradient_of(function))(*arguments))
    with jax.enable_x64(True):
        exact = [jnp.asarray(each, "float64") for each in maps]
        plain_gradient, plain_losses = gradient_of(plain)(exact[0], labels, *exact[1:])
    print(f"{distance(losses, plain_losses):.1e} {distance(gradient, plain_gradient):.1e}")
    assert distance(losses, plain_losses) <= limit
    assert distance(gradient, plain_gradient) <= limit
    assert losses.dtype == gradient.dtype == dtype
    assert losses[2] == 0


@pytest.mark.usefixtures("x64")
def test_numbers_by_hand() -> None:
    """Two classes, one of which the network is sure of: p = (1, 0) everywhere, half of the pixels are of class 0."""
    logits = jnp.zeros((1, 2, 2, 2)).at[..., 0].set(100.0)
    labels = jnp.zeros((1, 16, 16), jnp.int32).at[0, :, :8].set(1)
    dice = (1 - (2 * 128 + 1) / (256 + 128 + 1) + 1 - 1 / (128 + 1)) / 2
    jaccard = (1 - 128.001 / 256.001 + 1 - 0.001 / 128.001) / 2
    for function, expected in (
        (upsampled_dice, dice),
        (upsampled_jaccard, jaccard),
        (upsampled_lovasz, 0.75),
    ):
        assert float(function(logits, labels)[0]) == pytest.approx(expected, rel=1e-12)
    # Errors 3/4 at both pixels of the class and 1/4 at the other one: 3/4 until the class is lost, no more after it.
    logits = jnp.log(jnp.array([[[[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]]]))
    labels = jnp.array([[[0, 0, 1]]])
    assert float(upsampled_lovasz(logits, labels)[0]) == pytest.approx((3 / 4 + 3 / 4 * 2 / 3 + 1 / 4 / 3) / 2)


@pytest.mark.parametrize("name", ["jaccard", "teacher", "lovasz", "channels"])
@pytest.mark.usefixtures("x64")
def test_devices_that_share_the_batch(name: str) -> None:
    """Eight images on eight devices: the losses of one device, and no map is sent."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, P("data"))
    logits, labels = inputs(2, 8, (5, 7), (39, 45), 6)
    maps = [logits, inputs(3, 8, (5, 7), (1, 1), 6)[0]]
    arguments: list[Any] = [maps[0], labels, *maps[1 : 1 + (name == "teacher")]]
    function: Any = upsampled_lovasz if name == "lovasz" else upsampled_jaccard
    if name == "channels":
        arguments, function = maps, channel_divergence

    def total(logits: Any, *others: Any) -> tuple[Any, Any]:
        losses = function(logits, *others)
        return jnp.sum(losses**2), losses

    step = jax.jit(jax.grad(total, has_aux=True))
    gradient, losses = step(*map(jnp.asarray, arguments))
    placed = jax.device_put(arguments, place)
    found, shared = step(*placed)
    assert found.sharding.is_equivalent_to(place, 4)
    text = step.lower(*placed).compile().as_text() or ""
    assert traffic.sent_bytes(text) <= 64  # extremes and numbers of classes
    np.testing.assert_allclose(np.asarray(shared), np.asarray(losses), rtol=1e-12)
    assert distance(found, gradient) <= 1e-12
