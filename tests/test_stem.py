"""The stem's shifted convolution against the library's, values and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import distance
from topformer_jax.ops.stem import stem_conv


def _results(method: str, images: np.ndarray, kernel: np.ndarray, stride: int) -> list[jax.Array]:
    """The output, and its gradients with respect to image and kernel for a fixed random cotangent."""

    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return stem_conv(images, kernel, stride, method=method)

    @jax.jit
    def run(images: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        out, pullback = jax.vjp(convolve, images, kernel)
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=out.shape).astype(out.dtype))
        return [out, *pullback(cotangent)]

    return run(images, kernel)


@given(
    k=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2]),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    n=st.integers(1, 3),
    inputs=st.integers(1, 4),
)
def test_equals_the_library_in_float64(k: int, stride: int, h: int, w: int, n: int, inputs: int) -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(n, h, w, inputs)), rng.normal(size=(k, k, inputs, 5))
    with jax.enable_x64(True):
        ours = _results("shifted", images, kernel, stride)
        theirs = _results("library", images, kernel, stride)
        assert [mine.shape for mine in ours] == [yours.shape for yours in theirs]
        assert max(map(distance, ours, theirs)) <= 1e-10


def test_bfloat16_accumulates_in_float32() -> None:
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 33, 31, 3)), rng.normal(size=(3, 3, 3, 8))
    images, kernel = images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    exact = _results("shifted", images.astype(np.float32), kernel.astype(np.float32), 2)
    ours = _results("shifted", images, kernel, 2)
    assert all(mine.dtype == jnp.bfloat16 for mine in ours)
    assert max(map(distance, ours, exact)) <= 2**-7


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_which_form_auto_chooses(platform: str, convolutions: int) -> None:
    program = jax.jit(stem_conv).trace(jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 4)))
    assert (
        program.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution") == convolutions
    )
