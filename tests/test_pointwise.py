"""The 1x1 convolution and its custom gradients against autodiff's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.parity import distance
from topformer_jax.ops.pointwise import MAX_TERMS, pointwise_conv


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


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [1, 16, MAX_TERMS, MAX_TERMS + 1])
@pytest.mark.usefixtures("x64")
def test_without_gradients_it_is_the_matrix_product(inputs: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shapes = (2, 7, 9, inputs), (inputs, 40)
    images, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    exact = np.matmul(*(np.asarray(array, np.float64) for array in (images, weight)))
    found = jax.jit(pointwise_conv)(images, weight)
    assert found.dtype == dtype
    bound = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 4e-3}[dtype]
    assert np.abs(np.asarray(found, np.float64) - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize(
    ("inputs", "method", "operation", "count"),
    [(16, "auto", "dot", 0), (16, "library", "convolution", 1), (64, "auto", "dot", 1)],
)
def test_products_on_a_cpu(inputs: int, method: str, operation: str, count: int) -> None:
    def convolve(images: jax.Array, weight: jax.Array) -> jax.Array:
        return pointwise_conv(images, weight, method=method)

    arrays = jnp.ones((1, 8, 8, inputs)), jnp.ones((inputs, 32))
    assert _count(operation, convolve, *arrays) == count


def test_with_gradients_it_stays_the_matrix_product_bitwise() -> None:
    rng = np.random.default_rng(0)
    images, weight = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((1, 8, 8, 16), (16, 32)))
    found, _ = jax.vjp(pointwise_conv, images, weight)
    assert np.array_equal(found, jnp.matmul(images, weight, precision="highest"))


def _count(operation: str, function: Callable[..., jax.Array], *arrays: jax.Array) -> int:
    """How many of an operation the function's program for this machine has, inside of fusions too."""
    return (jax.jit(function).lower(*arrays).compile().as_text() or "").count(f" {operation}(")
