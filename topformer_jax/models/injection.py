"""Semantic injection (paper, section 3.3): what the transformer saw of the whole, given back to each scale.

Four ways, by the names the configs use; the official code spells the first two `muli_sum` and `muli_sum_cbr`.
In all of them the global map is brought to the local one's size *after* its convolution and activation.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from topformer_jax.models.layers import ConvModule, DTypePolicy, hsigmoid
from topformer_jax.ops.resample import resize


class _Injection(nnx.Module):
    """What the four share: policy, and the resize of a global map to the local one."""

    def __init__(self, policy: DTypePolicy):
        self.policy = policy

    def _to_local(self, semantics: Array, local: Array) -> Array:
        return resize(semantics, (local.shape[1], local.shape[2]), precision=self.policy.product_precision)


class MultiSum(_Injection):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global))) + resize(ConvBN(global))`: the paper's own."""

    activation: Callable[[Array], Array] | None = None
    gate_norm = True

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: np.random.Generator):
        super().__init__(policy)
        embedding = functools.partial(ConvModule, inputs, outputs, policy=policy, rng=rng)
        self.local_embedding = embedding(activation=self.activation)
        self.global_embedding = embedding(activation=self.activation)
        self.global_act = embedding(norm=self.gate_norm)

    def __call__(
        self, local: Float[Array, "n h w inputs"], semantics: Float[Array, "n gh gw inputs"]
    ) -> Float[Array, "n h w outputs"]:
        gate = self._to_local(hsigmoid(self.global_act(semantics)), local)
        feature = self._to_local(self.global_embedding(semantics), local)
        return self.local_embedding(local) * gate + feature


class MultiSumCBR(MultiSum):
    """As `MultiSum`, with ReLU after the local and the global ConvBN, and a gate of a plain convolution."""

    activation = staticmethod(jax.nn.relu)
    gate_norm = False


class FuseSum(_Injection):
    """`ConvBN(local) + resize(ConvBN(global))`."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: np.random.Generator):
        super().__init__(policy)
        self.fuse1 = ConvModule(inputs, outputs, policy=policy, rng=rng)
        self.fuse2 = ConvModule(inputs, outputs, policy=policy, rng=rng)

    def __call__(
        self, local: Float[Array, "n h w inputs"], semantics: Float[Array, "n gh gw inputs"]
    ) -> Float[Array, "n h w outputs"]:
        return self.fuse1(local) + self._to_local(self.fuse2(semantics), local)


class FuseMulti(FuseSum):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global)))`."""

    def __call__(
        self, local: Float[Array, "n h w inputs"], semantics: Float[Array, "n gh gw inputs"]
    ) -> Float[Array, "n h w outputs"]:
        return self.fuse1(local) * self._to_local(hsigmoid(self.fuse2(semantics)), local)


INJECTIONS: dict[str, Callable[..., MultiSum | FuseSum]] = {
    "multi_sum": MultiSum,
    "multi_sum_cbr": MultiSumCBR,
    "fuse_sum": FuseSum,
    "fuse_multi": FuseMulti,
}
