"""The token pyramid (paper, section 3.1): a stem and inverted residual blocks; outputs at strides 4, 8, 16, 32."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float
from numpy.random import Generator

from topformer_jax.models.layers import (
    WHOLE,
    ConvBN,
    DTypePolicy,
    ImageArea,
    Mask,
    make_divisible,
    sequential,
)


class Block(NamedTuple):
    """One row of the paper's table: depthwise kernel, expansion ratio, output channels, stride."""

    kernel: int
    expansion: int
    channels: int
    stride: int


class InvertedResidual(nnx.Module):
    """MobileNetV2's block: 1x1 expansion (skipped at ratio 1), depthwise k x k, 1x1 projection.

    ReLU (not ReLU6) follows the first two. At stride 1 with as many outputs as inputs, the input is added.
    """

    def __init__(self, inputs: int, block: Block, *, policy: DTypePolicy, rng: Generator):
        hidden = make_divisible(block.expansion * inputs)
        self.residual = block.stride == 1 and inputs == block.channels
        expand = [ConvBN(inputs, hidden, policy=policy, rng=rng), jax.nn.relu]
        depthwise = ConvBN(hidden, hidden, block.kernel, block.stride, groups=hidden, policy=policy, rng=rng)
        project = ConvBN(hidden, block.channels, policy=policy, rng=rng)
        self.conv = nnx.List([*(expand if block.expansion != 1 else []), depthwise, jax.nn.relu, project])

    def __call__(self, x: Float[Array, "n h w inputs"], mask: Mask = None) -> Float[Array, "n height width channels"]:
        y = sequential(self.conv, x, mask)
        return x + y if self.residual else y


class TokenPyramid(nnx.Module):
    """The stem (3x3, stride 2, 16 channels) and the blocks, called `layer1`, `layer2`, ... as officially.

    Returns the tokens at strides 4, 8, 16 and 32, each `[n, ceil(h / stride), ceil(w / stride), channels]`: the
    outputs of the blocks `taps`, counted from 0.
    """

    def __init__(self, blocks: Sequence[Block], taps: Sequence[int], *, policy: DTypePolicy, rng: Generator):
        inputs = 16
        self.strides = tuple(block.stride for block in blocks)
        self.taps = tuple(taps)
        self.stem = nnx.List([ConvBN(3, inputs, 3, 2, policy=policy, rng=rng), jax.nn.relu])
        for index, block in enumerate(blocks):
            setattr(self, f"layer{index + 1}", InvertedResidual(inputs, block, policy=policy, rng=rng))
            inputs = block.channels

    def __call__(self, images: Float[Array, "n h w 3"], area: ImageArea = WHOLE) -> list[Float[Array, "n _h _w _c"]]:
        with jax.named_scope("stem"):
            x = sequential(self.stem, images, area.mask(images, 1))
        stride = 2
        tokens = []
        for index, block_stride in enumerate(self.strides):
            name = f"layer{index + 1}"
            with jax.named_scope(name):
                x = getattr(self, name)(x, area.mask(x, stride))
            stride *= block_stride
            if index in self.taps:
                tokens.append(x)
        return tokens
