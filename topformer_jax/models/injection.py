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

Resize = Callable[[Array], Array]  # of global semantics to the size of the local tokens


class Injection(nnx.Module):
    """One kind of injection: its layers, and `fuse`, which applies them to tokens and semantics."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: Generator):
        self.policy = policy
        self.add_layers(functools.partial(ConvModule, inputs, outputs, policy=policy, rng=rng))

    add_layers: Callable[..., None]  # (conv): in the order of their random draws
    fuse: Callable[..., Array]  # (local, semantics, resize)

    def __call__(
        self,
        local: Float[Array, "n h w inputs"],
        semantics: Float[Array, "n gh gw inputs"],
        matrices: Matrices | None = None,
    ) -> Float[Array, "n h w outputs"]:
        """The injected tokens; for `matrices` see `ops.resample.resize`."""
        _, h, w, _ = local.shape
        return self.fuse(local, semantics, lambda x: resize(x, (h, w), matrices=matrices, **self.policy.form))


class MultiSum(Injection):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global))) + resize(ConvBN(global))`, the paper's choice."""

    activation: Callable[[Array], Array] | None = None
    gate_norm = True

    def add_layers(self, conv: Callable[..., ConvModule]) -> None:
        self.local_embedding = conv(activation=self.activation)
        self.global_embedding = conv(activation=self.activation)
        self.global_act = conv(norm=self.gate_norm)

    def fuse(self, local: Array, semantics: Array, resize: Resize) -> Array:
        gate = resize(hsigmoid(self.global_act(semantics)))
        return self.local_embedding(local) * gate + resize(self.global_embedding(semantics))


class MultiSumCBR(MultiSum):
    """`MultiSum` with a ReLU after the local and global ConvBN, and a gate with bias instead of BatchNorm."""

    activation = staticmethod(jax.nn.relu)
    gate_norm = False


class FuseSum(Injection):
    """`ConvBN(local) + resize(ConvBN(global))`."""

    def add_layers(self, conv: Callable[..., ConvModule]) -> None:
        self.fuse1, self.fuse2 = conv(), conv()

    def fuse(self, local: Array, semantics: Array, resize: Resize) -> Array:
        return self.fuse1(local) + resize(self.fuse2(semantics))


class FuseMulti(FuseSum):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global)))`."""

    def fuse(self, local: Array, semantics: Array, resize: Resize) -> Array:
        return self.fuse1(local) * resize(hsigmoid(self.fuse2(semantics)))


class LocalTokens(Injection):
    """`ConvBN(local)`, without semantics. The transformer stays in the model, and in its size, but has no effect."""

    def add_layers(self, conv: Callable[..., ConvModule]) -> None:
        self.local_embedding = conv()

    def fuse(self, local: Array, semantics: Array, resize: Resize) -> Array:
        return self.local_embedding(local)


INJECTIONS: dict[str, type[Injection]] = {
    "multi_sum": MultiSum,
    "multi_sum_cbr": MultiSumCBR,
    "fuse_sum": FuseSum,
    "fuse_multi": FuseMulti,
    "none": LocalTokens,
}
