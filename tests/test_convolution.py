"""The forms of the convolutions against XLA's convolution, values and both gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.parity import distance
from topformer_jax.ops import convolution
from topformer_jax.ops.convolution import MAX_TERMS, conv

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


def _results(convolve: Convolution, images: np.ndarray, kernel: np.ndarray) -> list[jax.Array]:
    """The output, and the gradients with respect to the images and the kernel for a fixed random cotangent."""

    @jax.jit
    def run(images: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        out, pullback = jax.vjp(convolve, images, kernel)
        cotangent = np.random.default_rng(1).normal(size=out.shape).astype(out.dtype)
        return [out, *pullback(jnp.asarray(cotangent))]

    return run(images, kernel)


def _depthwise(method: str, stride: int) -> Convolution:
    return lambda images, kernel: conv(images, kernel, stride, groups=images.shape[-1], method=method)


@given(
    k=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    n=st.integers(1, 3),
)
def test_depthwise_equals_xla_in_float64(k: int, stride: int, h: int, w: int, n: int) -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(n, h, w, 5)), rng.normal(size=(k, k, 1, 5))
    with jax.enable_x64(True):
        plain, ours = (_results(_depthwise(method, stride), images, kernel) for method in ("single_op", "auto"))
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=ours[0].shape))
        on_tpu = convolution.multiply_add_gradients(jnp.asarray(images), jnp.asarray(kernel), cotangent, stride)
        assert all(mine.dtype == jnp.float64 for mine in ours)
        assert [mine.shape for mine in ours] == [yours.shape for yours in plain]
        assert max(map(distance, ours, plain)) <= 1e-10
        assert max(map(distance, on_tpu, plain[1:])) <= 1e-10


def test_bfloat16_accumulates_in_float32() -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 33, 31, 8)), rng.normal(size=(5, 5, 1, 8))
    images, kernel = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    exact = _results(_depthwise("auto", 2), images.astype(np.float32), kernel.astype(np.float32))
    ours = _results(_depthwise("auto", 2), images, kernel)
    assert all(mine.dtype == jnp.bfloat16 for mine in ours)
    # The last rounding, to 8 bits, is the only one: the cotangent was rounded too, hence two of them.
    assert max(map(distance, ours, exact)) <= 2**-7


@given(
    n=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
)
def test_pointwise_equals_xla_in_float64(n: int, h: int, w: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(n, h, w, inputs)), rng.normal(size=(1, 1, inputs, outputs))
    with jax.enable_x64(True):
        plain = _results(lambda images, kernel: conv(images, kernel, method="single_op"), images, kernel)
        ours = _results(conv, images, kernel)
        assert [mine.shape for mine in ours] == [yours.shape for yours in plain]
        assert max(map(distance, ours, plain)) <= 1e-12


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [1, MAX_TERMS, MAX_TERMS + 1])
@pytest.mark.usefixtures("x64")
def test_pointwise_inference_is_the_matrix_product(inputs: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    images, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 7, 9, inputs), (inputs, 40)))
    exact = np.matmul(*(np.asarray(array, np.float64) for array in (images, weight)))
    found = jax.jit(conv)(images, weight[None, None])
    assert found.dtype == dtype
    bound = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 4e-3}[dtype]
    assert np.abs(np.asarray(found, np.float64) - exact).max() <= bound * np.abs(exact).max()


def test_the_precision_is_that_of_the_gradients_too() -> None:
    def loss(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(images, kernel, precision="high").sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((1, 4, 4, 3)), jnp.ones((1, 1, 3, 5))).as_text()
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGH, HIGH]") >= 2


@pytest.mark.parametrize(
    ("kind", "platform", "inference", "training"),
    [
        ("depthwise", "cpu", 0, 0),
        ("depthwise", "cuda", 1, 2),
        ("depthwise", "tpu", 1, 0),
        ("pointwise", "cpu", 0, 2),
        ("pointwise", "tpu", 1, 2),
    ],
)
def test_which_form_runs(kind: str, platform: str, inference: int, training: int) -> None:
    """How many of XLA's convolutions, or for 1x1 of its matrix products, a program has."""
    channels, kernel = (4, jnp.zeros((3, 3, 1, 4))) if kind == "depthwise" else (1, jnp.zeros((1, 1, 4, 8)))

    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(images, kernel, groups=channels)

    def differentiate(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.grad(lambda kernel: jnp.sum(convolve(images, kernel) ** 2))(kernel)

    operation = "stablehlo.convolution" if kind == "depthwise" else "stablehlo.dot_general"
    for function, count in ((convolve, inference), (differentiate, training)):
        program = jax.jit(function).trace(jnp.zeros((1, 8, 8, 4)), kernel)
        assert program.lower(lowering_platforms=(platform,)).as_text().count(operation) == count
