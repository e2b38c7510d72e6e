"""BatchNorm with its own backward pass against the plain form, and what it keeps between the passes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.parity import distance
from topformer_jax.ops.batch_norm import batch_norm, plain_batch_norm


def _results(function: Callable, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> list[jax.Array]:
    """The output, the statistics, and the gradients for a fixed random cotangent of the output."""
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(x.dtype)

    @jax.jit
    def run(x: jax.Array, weight: jax.Array, bias: jax.Array, cotangent: jax.Array) -> list[jax.Array]:
        (y, mean, variance), pullback = jax.vjp(function, x, weight, bias)
        return [y, mean, variance, *pullback((cotangent, jnp.zeros_like(mean), jnp.zeros_like(variance)))]

    return run(x, weight, bias, cotangent)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).filter(lambda shape: np.prod(shape) > 2),
    channels=st.integers(1, 5),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_equals_the_plain_form_in_float64(shape: list[int], channels: int, offset: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, channels)) * 3 + offset
    weight, bias = rng.normal(size=channels), rng.normal(size=channels)
    with jax.enable_x64(True):
        ours, plain = (_results(function, x, weight, bias) for function in (batch_norm, plain_batch_norm))
        assert all(mine.dtype == jnp.float64 for mine in ours)
        assert max(map(distance, ours, plain)) <= 1e-9


def test_float32_is_as_exact_as_the_plain_form() -> None:
    """Both against float64, also where the mean is fifty times the deviation."""
    rng = np.random.default_rng(0)
    for offset in (0.0, 50.0):
        x = (rng.normal(size=(4, 32, 32, 8)) + offset).astype(np.float32)
        weight, bias = (rng.normal(size=8).astype(np.float32) for _ in range(2))
        with jax.enable_x64(True):
            exact = _results(plain_batch_norm, *(each.astype(np.float64) for each in (x, weight, bias)))
        errors, plain_errors = (
            [distance(mine, true) for mine, true in zip(_results(each, x, weight, bias), exact, strict=True)]
            for each in (batch_norm, plain_batch_norm)
        )
        print(f"\nmean {offset}: ours {max(errors):.1e}, plain {max(plain_errors):.1e}")
        assert max(errors) <= max(2 * max(plain_errors), 1e-6)


def test_only_the_input_is_kept() -> None:
    """In bfloat16 nothing in float32 of an activation's size lies between the passes."""
    x = jnp.zeros((2, 16, 16, 8), jnp.bfloat16)
    ones = jnp.ones(8)

    def sizes(function: Callable) -> list[tuple[str, int]]:
        _, pullback = jax.vjp(function, x, ones, ones)
        return sorted((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(pullback) if leaf.size > 8)

    assert sizes(batch_norm) == [("bfloat16", x.size)]
    assert ("float32", x.size) in sizes(plain_batch_norm)
