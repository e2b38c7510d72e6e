"""The shifted depthwise convolution against the library's, values and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.parity import distance
from topformer_jax.ops.depthwise import _shifted, depthwise_conv


def _library(images: jax.Array, kernel: jax.Array) -> jax.Array:
    raise AssertionError("where a gradient is taken, it is not called")


def _results(method: str, images: np.ndarray, kernel: np.ndarray, stride: int) -> list[jax.Array]:
    """The output, and its gradients with respect to image and kernel for a fixed random cotangent.

    `method` "plain sums" is what "auto" takes on a TPU.
    """

    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        if method == "plain sums":
            return _shifted(images, kernel, stride, _library)
        return depthwise_conv(images, kernel, stride, method=method)

    @jax.jit
    def run(images: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> list[jax.Array]:
        out, pullback = jax.vjp(convolve, images, kernel)
        return [out, *pullback(cotangent)]

    shape = (images.shape[0], *((side - 1) // stride + 1 for side in images.shape[1:3]), images.shape[3])
    return run(images, kernel, np.random.default_rng(1).normal(size=shape).astype(images.dtype))


@given(
    k=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    n=st.integers(1, 3),
)
def test_equals_the_library_in_float64(k: int, stride: int, h: int, w: int, n: int) -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(n, h, w, 5)), rng.normal(size=(k, k, 1, 5))
    with jax.enable_x64(True):
        theirs = _results("library", images, kernel, stride)
        for method in ("shifted", "plain sums"):
            ours = _results(method, images, kernel, stride)
            assert all(mine.dtype == jnp.float64 for mine in ours)
            assert [mine.shape for mine in ours] == [yours.shape for yours in theirs]
            assert max(map(distance, ours, theirs)) <= 1e-10


def test_bfloat16_accumulates_in_float32() -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 33, 31, 8)), rng.normal(size=(5, 5, 1, 8))
    images, kernel = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    exact = _results("shifted", images.astype(np.float32), kernel.astype(np.float32), 2)
    for method in ("shifted", "plain sums"):
        ours = _results(method, images, kernel, 2)
        assert all(mine.dtype == jnp.bfloat16 for mine in ours)
        # The last rounding, to 8 bits, is the only one: the cotangent was rounded too, hence two of them.
        assert max(map(distance, ours, exact)) <= 2**-7


@pytest.mark.parametrize(("method", "convolutions"), [("auto", 0), ("shifted", 0), ("library", 1)])
def test_which_form_runs_on_a_cpu(method: str, convolutions: int) -> None:
    program = jax.jit(lambda images, kernel: depthwise_conv(images, kernel, method=method))
    text = program.lower(jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4))).as_text()
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(
    ("platform", "inference", "training"), [("cpu", 0, 0), ("cuda", 1, 2), ("tpu", 1, 0)]
)
def test_which_form_auto_chooses(platform: str, inference: int, training: int) -> None:
    def differentiate(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.grad(lambda kernel: jnp.sum(depthwise_conv(images, kernel) ** 2))(kernel)

    for function, convolutions in ((depthwise_conv, inference), (differentiate, training)):
        program = jax.jit(function).trace(jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)))
        text = program.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="expected one of auto, shifted, library"):
        depthwise_conv(jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)), method="fast")
