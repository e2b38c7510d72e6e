"""The 1x1 convolution and its custom gradients against autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import distance
from topformer_jax.ops.pointwise import pointwise_conv


@given(
    n=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
)
def test_equals_autodiff_in_float64(n: int, h: int, w: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    shapes = (n, h, w, inputs), (inputs, outputs), (n, h, w, outputs)
    with jax.enable_x64(True):
        images, weight, cotangent = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
        found, pullback = jax.vjp(pointwise_conv, images, weight)
        plain, plain_pullback = jax.vjp(jnp.matmul, images, weight)
        ours, theirs = [found, *pullback(cotangent)], [plain, *plain_pullback(cotangent)]
        assert [mine.shape for mine in ours] == [yours.shape for yours in theirs]
        assert max(map(distance, ours, theirs)) <= 1e-12


def test_the_precision_is_that_of_the_gradients_too() -> None:
    def loss(images: jax.Array, weight: jax.Array) -> jax.Array:
        return pointwise_conv(images, weight, precision="high").sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 5))).as_text()
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGH, HIGH]") >= 2
