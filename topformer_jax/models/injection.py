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

from topformer_jax.models.layers import ConvModule, hsigmoid

MakeConv = Callable[..., ConvModule]  # makes a layer from the channels of the local tokens to those of the result
Resize = Callable[[Array], Array]  # of global semantics to the size of the local tokens
Local = Float[Array, "n h w inputs"]
Semantics = Float[Array, "n gh gw inputs"]
Injected = Float[Array, "n h w outputs"]


class MultiSum(nnx.Module):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global))) + resize(ConvBN(global))`, the paper's choice.

    "multi_sum_cbr" has a ReLU after the local and global ConvBN, and a gate with bias instead of BatchNorm.
    """

    def __init__(self, conv: MakeConv, activation: Callable[[Array], Array] | None = None, gate_norm: bool = True):
        self.local_embedding = conv(activation=activation)
        self.global_embedding = conv(activation=activation)
        self.global_act = conv(norm=gate_norm)

    def __call__(self, local: Local, semantics: Semantics, resize: Resize) -> Injected:
        gate = resize(hsigmoid(self.global_act(semantics)))
        return self.local_embedding(local) * gate + resize(self.global_embedding(semantics))


class FuseSum(nnx.Module):
    """`ConvBN(local) + resize(ConvBN(global))`."""

    def __init__(self, conv: MakeConv):
        self.fuse1, self.fuse2 = conv(), conv()

    def __call__(self, local: Local, semantics: Semantics, resize: Resize) -> Injected:
        return self.fuse1(local) + resize(self.fuse2(semantics))


class FuseMulti(FuseSum):
    """`ConvBN(local) * resize(hsigmoid(ConvBN(global)))`."""

    def __call__(self, local: Local, semantics: Semantics, resize: Resize) -> Injected:
        return self.fuse1(local) * resize(hsigmoid(self.fuse2(semantics)))


class LocalTokens(nnx.Module):
    """`ConvBN(local)`, without semantics. The transformer stays in the model, and in its size, but has no effect."""

    def __init__(self, conv: MakeConv):
        self.local_embedding = conv()

    def __call__(self, local: Local, semantics: Semantics, resize: Resize) -> Injected:
        return self.local_embedding(local)


INJECTIONS: dict[str, Callable[[MakeConv], nnx.Module]] = {
    "multi_sum": MultiSum,
    "multi_sum_cbr": functools.partial(MultiSum, activation=jax.nn.relu, gate_norm=False),
    "fuse_sum": FuseSum,
    "fuse_multi": FuseMulti,
    "none": LocalTokens,
}
