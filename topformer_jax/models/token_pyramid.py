"""The token pyramid (paper, section 3.1): a stem and inverted residual blocks; outputs at strides 4, 8, 16, 32."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from topformer_jax.models.layers import ConvBN, DTypePolicy, make_divisible, sequential


class Block(NamedTuple):
    """One row of the paper's table: depthwise kernel, expansion ratio, output channels, stride."""

    kernel: int
    expansion: int
    channels: int
    stride: int


class InvertedResidual(nnx.Module):
    """MobileNetV2's block: 1x1 expansion (skipped at ratio 1), depthwise k x k, 1x1 projection.

    ReLU (not ReLU6) follows the first two, nothing the projection. At stride 1 with as many outputs as inputs the
    input is added to the output.
    """

    def __init__(self, inputs: int, block: Block, *, policy: DTypePolicy, rng: np.random.Generator):
        hidden = make_divisible(block.expansion * inputs)
        self.residual = block.stride == 1 and inputs == block.channels
        expand = [ConvBN(inputs, hidden, policy=policy, rng=rng), jax.nn.relu]
        self.conv = nnx.List(
            [
                *(expand if block.expansion != 1 else []),
                ConvBN(hidden, hidden, block.kernel, block.stride, hidden, policy=policy, rng=rng),
                jax.nn.relu,
                ConvBN(hidden, block.channels, policy=policy, rng=rng),
            ]
        )

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n height width channels"]:
        y = sequential(self.conv, x)
        return x + y if self.residual else y


class TokenPyramid(nnx.Module):
    """The stem (3x3, stride 2, 16 channels) and the blocks, which are called `layer1`, `layer2`, ... as officially.

    Args:
        blocks: the rows of the variant's table.
        taps: the blocks (counted from 0) whose outputs are the tokens of the four scales.

    Returns:
        The tokens at strides 4, 8, 16 and 32, each `[n, ceil(h / stride), ceil(w / stride), channels]`.
    """

    def __init__(
        self, blocks: Sequence[Block], taps: Sequence[int], *, policy: DTypePolicy, rng: np.random.Generator
    ):
        inputs = 16
        self.depth = len(blocks)
        self.taps = tuple(taps)
        self.stem = nnx.List([ConvBN(3, inputs, 3, 2, policy=policy, rng=rng), jax.nn.relu])
        for index, block in enumerate(blocks):
            setattr(self, f"layer{index + 1}", InvertedResidual(inputs, block, policy=policy, rng=rng))
            inputs = block.channels

    def __call__(self, images: Float[Array, "n h w 3"]) -> list[Float[Array, "n _h _w _c"]]:
        x = sequential(self.stem, images)
        tokens = []
        for index in range(self.depth):
            x = getattr(self, f"layer{index + 1}")(x)
            if index in self.taps:
                tokens.append(x)
        return tokens
