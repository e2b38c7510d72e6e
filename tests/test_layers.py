"""Unit tests of the layers: BatchNorm, activations, dropout, initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from tests.parity import distance
from topformer_jax import config, models
from topformer_jax.models.layers import BatchNorm, Dropout, DTypePolicy, hsigmoid, relu6


def test_batch_norm_over_three_steps() -> None:
    """Against PyTorch in float32: outputs and running statistics in training, then outputs in inference."""
    ours, theirs = BatchNorm(5, policy=DTypePolicy()), torch.nn.BatchNorm2d(5)
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 5)).astype(np.float32)
    ours.weight.set_value(jnp.asarray(weight))
    ours.bias.set_value(jnp.asarray(bias))
    theirs.load_state_dict(theirs.state_dict() | {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    for _ in range(3):
        x = rng.normal(2, 3, size=(2, 3, 4, 5)).astype(np.float32)
        out = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert distance(ours(jnp.asarray(x)), out.detach().numpy()) <= 1e-6
    for mine, yours in ((ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):
        assert yours is not None
        error = distance(mine.get_value(), yours.numpy())
        print(f"running statistics after three steps: {error:.1e}")
        assert error <= 1e-6
    assert ours.num_batches_tracked.get_value() == 3
    ours.eval()
    theirs.eval()
    out = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert distance(ours(jnp.asarray(x)), out.detach().numpy()) <= 1e-6
    assert ours.num_batches_tracked.get_value() == 3


def test_batch_norm_of_a_single_value() -> None:
    with pytest.raises(ValueError, match="more than one value"):
        BatchNorm(5, policy=DTypePolicy())(jnp.zeros((1, 5)))


def test_batch_norm_takes_its_statistics_in_float32() -> None:
    norm = BatchNorm(1, policy=DTypePolicy(dtype=jnp.bfloat16))
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, size=(4096, 1)), jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    assert norm.running_var.dtype == np.float32
    assert distance(norm.running_var.get_value() - 0.9, 0.1 * exact.var(0, ddof=1)) <= 1e-5


@pytest.mark.parametrize(("ours", "theirs"), [(relu6, F.relu6), (hsigmoid, lambda x: F.relu6(x + 3) / 6)])
def test_activations_and_their_corners(ours, theirs) -> None:  # type: ignore[no-untyped-def]
    points = np.array([-4, -3, -1, 0, 0.5, 3, 5.5, 6, 7, np.nan], np.float32)
    leaf = torch.tensor(points, requires_grad=True)
    theirs(leaf).sum().backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(ours(jnp.asarray(points)), theirs(leaf).detach().numpy(), rtol=1e-6)
    gradient = jax.grad(lambda x: ours(x).sum())(jnp.asarray(points))
    np.testing.assert_allclose(gradient[:-1], leaf.grad.numpy()[:-1], rtol=1e-6)


@pytest.mark.parametrize(("dims", "channels"), [((1, 2, 3), 1), ((1, 2), 16)])
def test_dropout(dims: tuple[int, ...], channels: int) -> None:
    dropout = Dropout(0.25, dims)
    x = jnp.ones((64, 3, 5, 16))
    out = np.asarray(dropout(x, nnx.Rngs(dropout=0)))
    factors = out[:, :1, :1, :channels]
    np.testing.assert_array_equal(out, np.broadcast_to(factors, out.shape))
    np.testing.assert_allclose(np.unique(factors), [0, 1 / 0.75])
    assert 0.6 < (factors > 0).mean() < 0.9
    dropout.eval()
    assert dropout(x, None) is x


def test_initial_weights() -> None:
    """The official standard deviations: by the fan-out of a group, except in the head's two layers."""
    expected = {
        "backbone.tpm.stem.0.c": np.sqrt(2 / (9 * 16)),
        "backbone.tpm.layer9.conv.2.c": np.sqrt(2 / 25),
        "backbone.trans.transformer_blocks.0.mlp.fc1.c": np.sqrt(2 / 416),
        "backbone.trans.transformer_blocks.0.mlp.dwconv": np.sqrt(2 / 9),
        "backbone.SIM.2.local_embedding.conv": np.sqrt(2 / 128),
        "decode_head.linear_fuse.conv": np.sqrt(2 / 128),
        "decode_head.conv_seg": 0.01,
    }
    tensors = {
        k: np.asarray(v.get_value()) for k, v in models.named_variables(models.build(config.ade20k("tiny"))).items()
    }
    for name, std in expected.items():
        weight = tensors[f"{name}.weight"]
        assert weight.std() == pytest.approx(std, rel=5 / np.sqrt(2 * weight.size)), name
    for name, tensor in tensors.items():
        if name.endswith((".bias", ".running_mean", ".num_batches_tracked")):
            assert not tensor.any(), name
        if name.endswith((".bn.weight", ".running_var")):
            assert (tensor == 1).all(), name


def test_initial_weights_follow_the_seed() -> None:
    first, again, other = (
        models.named_variables(models.build(config.load(config.ade20k("tiny"), {"seed": seed}))) for seed in (0, 0, 1)
    )
    name = "decode_head.conv_seg.weight"
    np.testing.assert_array_equal(first[name].get_value(), again[name].get_value())
    assert not np.array_equal(first[name].get_value(), other[name].get_value())
