"""Semantics injection (paper, section 3.3): fuses the local tokens of a scale with the transformer's output.

There are four kinds, by `model.injection`: "multi_sum", "multi_sum_cbr" (officially spelled `muli_sum` and
`muli_sum_cbr`), "fuse_sum" and "fuse_multi". In all of them the global semantics are resized to the local tokens'
size *after* their convolution and activation. A fifth, "none", leaves them out, to show what they are worth.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float
from numpy.random import Generator

from topformer_jax.models.layers import ConvModule, DTypePolicy, hsigmoid
from topformer_jax.ops.resample import Matrices, resize


class _Injection(nnx.Module):
    """What all kinds share: the policy, and the resize of global semantics (for `matrices` see `resize`)."""

    def __init__(self, policy: DTypePolicy):
        self.policy = policy

    def _resize_like(
        self, semantics: Float[Array, "n gh gw c"], local: Float[Array, "n h w _c"], matrices: Matrices | None
    ) -> Float[Array, "n h w c"]:
        _, h, w, _ = local.shape
        method, precision = self.policy.conv_impl, self.policy.matmul_precision
        return resize(semantics, (h, w), matrices=matrices, method=method, precision=precision)


class MultiSum(_Injection):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global))) + resize(ConvBN(global))`, the paper's choice."""

    activation: Callable[[Array], Array] | None = None
    gate_norm = True

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: Generator):
        super().__init__(policy)
        embedding = functools.partial(ConvModule, inputs, outputs, policy=policy, rng=rng)
        self.local_embedding = embedding(activation=self.activation)
        self.global_embedding = embedding(activation=self.activation)
        self.global_act = embedding(norm=self.gate_norm)

    def __call__(
        self,
        local: Float[Array, "n h w inputs"],
        semantics: Float[Array, "n gh gw inputs"],
        matrices: Matrices | None = None,
    ) -> Float[Array, "n h w outputs"]:
        gate = self._resize_like(hsigmoid(self.global_act(semantics)), local, matrices)
        feature = self._resize_like(self.global_embedding(semantics), local, matrices)
        return self.local_embedding(local) * gate + feature


class MultiSumCBR(MultiSum):
    """`MultiSum` with a ReLU after the local and global ConvBN, and a gate with bias instead of BatchNorm."""

    activation = staticmethod(jax.nn.relu)
    gate_norm = False


class FuseSum(_Injection):
    """`ConvBN(local) + resize(ConvBN(global))`."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: Generator):
        super().__init__(policy)
        self.fuse1 = ConvModule(inputs, outputs, policy=policy, rng=rng)
        self.fuse2 = ConvModule(inputs, outputs, policy=policy, rng=rng)

    def __call__(
        self,
        local: Float[Array, "n h w inputs"],
        semantics: Float[Array, "n gh gw inputs"],
        matrices: Matrices | None = None,
    ) -> Float[Array, "n h w outputs"]:
        return self.fuse1(local) + self._resize_like(self.fuse2(semantics), local, matrices)


class FuseMulti(FuseSum):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global)))`."""

    def __call__(
        self,
        local: Float[Array, "n h w inputs"],
        semantics: Float[Array, "n gh gw inputs"],
        matrices: Matrices | None = None,
    ) -> Float[Array, "n h w outputs"]:
        return self.fuse1(local) * self._resize_like(hsigmoid(self.fuse2(semantics)), local, matrices)


class LocalTokens(_Injection):
    """`ConvBN(local)`, without semantics. The transformer stays in the model, and in its size, but has no effect."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: Generator):
        super().__init__(policy)
        self.local_embedding = ConvModule(inputs, outputs, policy=policy, rng=rng)

    def __call__(
        self,
        local: Float[Array, "n h w inputs"],
        semantics: Float[Array, "n gh gw inputs"],
        matrices: Matrices | None = None,
    ) -> Float[Array, "n h w outputs"]:
        return self.local_embedding(local)


INJECTIONS: dict[str, Callable[..., MultiSum | FuseSum | LocalTokens]] = {
    "multi_sum": MultiSum,
    "multi_sum_cbr": MultiSumCBR,
    "fuse_sum": FuseSum,
    "fuse_multi": FuseMulti,
    "none": LocalTokens,
}
