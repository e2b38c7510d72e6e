"""The loss in tiles against the plain formulation and against PyTorch: values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import distance, to_nchw, to_nhwc
from topformer_jax.ops import loss as loss_lib
from topformer_jax.ops.loss import VOID, plain_cross_entropy, upsampled_cross_entropy

SIDE = st.integers(1, 9)


def _inputs(seed: int, n: int, cells: Any, pixels: Any, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (n, *pixels)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.2] = VOID
    return rng.normal(size=(n, *cells, classes)) * 4, labels


def _both(function: Any, logits: Any, labels: Any) -> tuple[Any, Any]:
    """The sums, and the gradient of three times the loss."""

    def scaled(logits: Any) -> tuple[Any, Any]:
        sums = function(logits, jnp.asarray(labels))
        return 3 * sums.loss, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(scaled, has_aux=True))(logits)
    return sums, gradient


@given(
    seed=st.integers(0, 99),
    cells=st.tuples(SIDE, SIDE),
    pixels=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    classes=st.integers(1, 7),
    tile=st.sampled_from([(8, 64), (8, 512), (3, 5)]),
)
@pytest.mark.usefixtures("x64")
def test_tiles_are_the_plain_formulation(
    seed: int, cells: Any, pixels: Any, classes: int, tile: tuple[int, int]
) -> None:
    logits, labels = _inputs(seed, 2, cells, pixels, classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_lib, "CPU_TILE", tile)
        ours, our_gradient = _both(upsampled_cross_entropy, jnp.asarray(logits), labels)
    plain, gradient = _both(plain_cross_entropy, jnp.asarray(logits), labels)
    assert abs(float(ours.loss - plain.loss)) <= 1e-12 * max(float(plain.loss), 1)
    assert int(ours.correct) == int(plain.correct)
    assert int(ours.valid) == int(plain.valid) == int((labels != VOID).sum())
    assert np.abs(our_gradient - gradient).max() <= 1e-12 * max(np.abs(gradient).max(), 1)


@pytest.mark.parametrize("cells", [(16, 16), (13, 21)])
def test_float32_against_pytorch(cells: tuple[int, int]) -> None:
    logits, labels = _inputs(0, 2, cells, (8 * cells[0], 8 * cells[1] - 3), 150)
    logits = logits.astype(np.float32)
    tensor = to_nchw(logits).requires_grad_()
    resized = torch.nn.functional.interpolate(tensor, labels.shape[1:], mode="bilinear", align_corners=False)
    target = torch.from_numpy(labels).long()
    loss = torch.nn.functional.cross_entropy(resized, target, ignore_index=VOID, reduction="sum")
    (3 * loss).backward()
    assert tensor.grad is not None
    for function in (upsampled_cross_entropy, plain_cross_entropy):
        ours, gradient = _both(function, jnp.asarray(logits), labels)
        assert abs(float(ours.loss) / loss.item() - 1) <= 1e-6
        assert distance(gradient, to_nhwc(tensor.grad)) <= 1e-6


def test_the_value_alone_and_nothing_but_void() -> None:
    logits, labels = _inputs(1, 1, (4, 4), (32, 32), 5)
    found = upsampled_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    plain = plain_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    assert abs(float(found.loss / plain.loss) - 1) <= 1e-6
    sums, gradient = _both(
        upsampled_cross_entropy, jnp.asarray(logits, jnp.float32), np.full_like(labels, VOID)
    )
    assert (float(sums.loss), int(sums.correct), int(sums.valid)) == (0, 0, 0)
    assert not np.asarray(gradient).any()


def test_large_logits_do_not_overflow() -> None:
    logits = np.zeros((1, 2, 2, 3), np.float32)
    logits[0, 0, 0, 0], logits[0, 1, 1, 1] = 3e4, -3e4
    sums, gradient = _both(upsampled_cross_entropy, jnp.asarray(logits), np.ones((1, 16, 16), np.int32))
    assert np.isfinite(float(sums.loss))
    assert np.isfinite(gradient).all()


def test_memory_is_a_thirtieth() -> None:
    """Of 4 images of 150 classes at 512 x 512; PyTorch keeps at least three arrays as large as the resized logits."""
    logits = jax.ShapeDtypeStruct((4, 64, 64, 150), jnp.float32)
    labels = jax.ShapeDtypeStruct((4, 512, 512), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda logits, labels: upsampled_cross_entropy(logits, labels).loss))
    memory = step.lower(logits, labels).compile().memory_analysis()
    assert memory is not None
    resized = 4 * 512 * 512 * 150 * 4
    print(f"temporary {memory.temp_size_in_bytes / 1e6:.0f} MB, the resized logits {resized / 1e6:.0f} MB")
    assert memory.temp_size_in_bytes <= 3 * resized / 30
