"""Resize and pooling against PyTorch's own, values and gradients."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from tests.parity import distance, to_nchw, to_nhwc
from topformer_jax.ops.resample import adaptive_avg_pool, resize

Find = Callable[[str], pathlib.Path]
sides = st.integers(1, 70)


@pytest.mark.parametrize("operation", ["resize", "adaptive_avg_pool"])
def test_golden(golden: Find, operation: str) -> None:
    ours = {"resize": resize, "adaptive_avg_pool": adaptive_avg_pool}[operation]
    with np.load(golden("ops.npz")) as file:
        cases = sorted({key.split("/")[1] for key in file if key.startswith(operation)})
        assert len(cases) == 6
        for case in cases:
            theirs = file[f"{operation}/{case}/out"]
            error = distance(ours(jnp.asarray(file[f"{operation}/{case}/in"]), theirs.shape[1:3]), theirs)
            print(f"{operation}/{case}: {error:.1e}")
            assert error <= 1e-6


@pytest.mark.parametrize("operation", [resize, adaptive_avg_pool])
@pytest.mark.parametrize("method", ["auto", "single_op"])
def test_narrow_products_ask_for_no_precision(operation: Callable, method: str) -> None:
    """A precision is that of float32 products; narrower ones are exact already."""
    for dtype, precision in (("float32", "HIGHEST"), ("bfloat16", None)):
        images = jax.ShapeDtypeStruct((2, 9, 9, 3), dtype)
        text = str(jax.make_jaxpr(lambda x: operation(x, (4, 4), method=method, precision="highest"))(images))
        assert "dot_general" in text
        assert ("HIGHEST" in text) == (precision == "HIGHEST")


@given(h=sides, w=sides, height=sides, width=sides)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_resize_as_torch(h: int, w: int, height: int, width: int, dtype: str) -> None:
    with jax.enable_x64(True):
        images = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(dtype)
        theirs = F.interpolate(to_nchw(images), size=(height, width), mode="bilinear", align_corners=False)
        ours = jax.jit(lambda x: resize(x, (height, width)))(images)
        assert ours.dtype == dtype
        assert distance(ours, to_nhwc(theirs)) <= {"float32": 1e-6, "float64": 1e-14}[dtype]


@given(h=sides, w=sides, height=sides, width=sides)
def test_pooling_as_torch(h: int, w: int, height: int, width: int) -> None:
    with jax.enable_x64(True):
        images = np.random.default_rng(0).normal(size=(2, h, w, 3))
        theirs = F.adaptive_avg_pool2d(to_nchw(images), (height, width))
        ours = jax.jit(lambda x: adaptive_avg_pool(x, (height, width)))(images)
        assert distance(ours, to_nhwc(theirs)) <= 1e-13


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (resize, lambda x: F.interpolate(x, size=(13, 30), mode="bilinear", align_corners=False)),
        (adaptive_avg_pool, lambda x: F.adaptive_avg_pool2d(x, (13, 30))),
    ],
)
def test_gradients_as_torch(x64: None, ours: Callable, theirs: Callable) -> None:
    rng = np.random.default_rng(0)
    images, weights = rng.normal(size=(2, 21, 17, 3)), rng.normal(size=(2, 13, 30, 3))
    ours_grad = jax.grad(lambda x: jnp.sum(ours(x, (13, 30)) * weights))(jnp.asarray(images))
    leaf = to_nchw(images).requires_grad_()
    (theirs(leaf) * to_nchw(weights)).sum().backward()
    assert isinstance(leaf.grad, torch.Tensor)
    assert distance(ours_grad, to_nhwc(leaf.grad)) <= 1e-13


def test_bfloat16_stays_bfloat16_and_sums_in_float32() -> None:
    images = jnp.ones((1, 64, 64, 4), jnp.bfloat16)
    pooled = adaptive_avg_pool(images, (1, 1))
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(pooled, np.float32), 1, rtol=2**-8)
    assert resize(images, (128, 100)).dtype == jnp.bfloat16
