"""The scale-aware semantics extractor (paper, section 3.2): transformer blocks of 1x1 convolutions."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from numpy.random import Generator

from topformer_jax.models.layers import (
    Conv,
    ConvBN,
    Dropout,
    DTypePolicy,
    Mask,
    relu6,
    sequential,
)


class Attention(nnx.Module):
    """Multi-head self-attention over all positions, `softmax(q k^T) v`, then ReLU6 and a 1x1 ConvBN.

    As officially, `1 / sqrt(key)` does not scale the scores. The softmax is in `policy.accum_dtype`. Channels of q, k
    and v are ordered (head, channel); `key` and `value` are channels of one head.
    """

    def __init__(self, features: int, heads: int, key: int, value: int, *, policy: DTypePolicy, rng: Generator):
        self.heads = heads
        self.policy = policy
        self.to_q = ConvBN(features, heads * key, policy=policy, rng=rng)
        self.to_k = ConvBN(features, heads * key, policy=policy, rng=rng)
        self.to_v = ConvBN(features, heads * value, policy=policy, rng=rng)
        self.proj = nnx.List([relu6, ConvBN(heads * value, features, policy=policy, rng=rng)])

    def __call__(self, x: Float[Array, "n h w c"], mask: Mask = None) -> Float[Array, "n h w c"]:
        n, h, w, _ = x.shape
        policy = self.policy

        def split_heads(y: Array) -> Array:
            return y.reshape(n, h * w, self.heads, -1).transpose(0, 2, 1, 3)  # [n, heads, h*w, channels]

        query, key, value = (split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        matmul = functools.partial(jnp.matmul, precision=policy.matmul_precision)
        scores = matmul(query, key.swapaxes(2, 3), preferred_element_type=policy.accum_dtype)
        if mask is not None:  # no weight for keys outside of the image
            scores = jnp.where(mask.reshape(n, 1, 1, h * w), scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(policy.dtype)
        y = matmul(weights, value).transpose(0, 2, 1, 3).reshape(n, h, w, -1)
        return sequential(self.proj, y)


class Mlp(nnx.Module):
    """1x1 ConvBN to `hidden` channels, depthwise 3x3 with a bias and no BatchNorm, ReLU6, 1x1 ConvBN back."""

    def __init__(self, features: int, hidden: int, *, policy: DTypePolicy, rng: Generator):
        self.fc1 = ConvBN(features, hidden, policy=policy, rng=rng)
        self.dwconv = Conv(hidden, hidden, 3, groups=hidden, bias=True, policy=policy, rng=rng)
        self.fc2 = ConvBN(hidden, features, policy=policy, rng=rng)

    def __call__(self, x: Float[Array, "n h w c"], mask: Mask = None) -> Float[Array, "n h w c"]:
        return self.fc2(relu6(self.dwconv(self.fc1(x), mask)))


class TransformerBlock(nnx.Module):
    """Attention and MLP, each with a residual connection and drop path (drops the branch of a whole sample)."""

    def __init__(self, features: int, heads: int, drop_path_rate: float, *, policy: DTypePolicy, rng: Generator):
        self.attn = Attention(features, heads, key=16, value=32, policy=policy, rng=rng)
        self.mlp = Mlp(features, 2 * features, policy=policy, rng=rng)
        self.drop_path = Dropout(drop_path_rate, broadcast_dims=(1, 2, 3))

    def __call__(
        self, x: Float[Array, "n h w c"], rngs: nnx.Rngs | None, mask: Mask = None
    ) -> Float[Array, "n h w c"]:
        x = x + self.drop_path(self.attn(x, mask), rngs)
        return x + self.drop_path(self.mlp(x, mask), rngs)


class Transformer(nnx.Module):
    """A block for each of the drop-path rates."""

    def __init__(self, features: int, heads: int, rates: Sequence[float], *, policy: DTypePolicy, rng: Generator):
        blocks = [TransformerBlock(features, heads, rate, policy=policy, rng=rng) for rate in rates]
        self.transformer_blocks = nnx.List(blocks)

    def __call__(
        self, x: Float[Array, "n h w c"], rngs: nnx.Rngs | None, mask: Mask = None
    ) -> Float[Array, "n h w c"]:
        for block in self.transformer_blocks:
            x = block(x, rngs, mask)
        return x
