"""The network put together: the table of its sizes, backbone, decode head, segmenter."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict, FrozenConfigDict
from numpy.random import Generator

from topformer_jax.models.injection import INJECTIONS
from topformer_jax.models.layers import WHOLE, Conv, ConvModule, Dropout, DTypePolicy, ImageArea
from topformer_jax.models.token_pyramid import Block, TokenPyramid
from topformer_jax.models.transformer import Transformer
from topformer_jax.ops.resample import adaptive_avg_pool, resize

Images = Array | np.ndarray
STRIDES = (4, 8, 16, 32)  # of the tokens
SEMANTICS_STRIDE = 64  # of the transformer in the segmenter


@dataclasses.dataclass(frozen=True)
class Variant:
    """One size of the network.

    Attributes:
        blocks: of the token pyramid.
        taps: the blocks (counted from 0) whose outputs are the tokens of strides 4, 8, 16 and 32.
        head_channels: of the injections and the head.
        heads: of the attention.
    """

    blocks: tuple[Block, ...]
    taps: tuple[int, ...]
    head_channels: int
    heads: int

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the tokens of strides 4, 8, 16 and 32."""
        return tuple(self.blocks[tap].channels for tap in self.taps)


def _blocks(*rows: tuple[int, int, int, int]) -> tuple[Block, ...]:
    return tuple(Block(*row) for row in rows)


# fmt: off
VARIANTS = {
    "tiny": Variant(_blocks(
        (3, 1, 16, 1), (3, 4, 16, 2), (3, 3, 16, 1), (5, 3, 32, 2), (5, 3, 32, 1), (3, 3, 64, 2), (3, 3, 64, 1),
        (5, 6, 96, 2), (5, 6, 96, 1)), taps=(2, 4, 6, 8), head_channels=128, heads=4),
    "small": Variant(_blocks(
        (3, 1, 16, 1), (3, 4, 24, 2), (3, 3, 24, 1), (5, 3, 48, 2), (5, 3, 48, 1), (3, 3, 96, 2), (3, 3, 96, 1),
        (5, 6, 128, 2), (5, 6, 128, 1), (3, 6, 128, 1)), taps=(2, 4, 6, 9), head_channels=192, heads=6),
    "base": Variant(_blocks(
        (3, 1, 16, 1), (3, 4, 32, 2), (3, 3, 32, 1), (5, 3, 64, 2), (5, 3, 64, 1), (3, 3, 128, 2), (3, 3, 128, 1),
        (5, 6, 160, 2), (5, 6, 160, 1), (3, 6, 160, 1)), taps=(2, 4, 6, 9), head_channels=256, heads=8),
}
# fmt: on


class PyramidPool(nnx.Module):
    """Pools the tokens of all scales to the coarsest one's size divided by `stride`, and joins their channels."""

    def __init__(self, stride: int, policy: DTypePolicy):
        self.stride = stride
        self.policy = policy

    def __call__(self, tokens: list[Float[Array, "n _h _w _c"]], area: ImageArea = WHOLE) -> Float[Array, "n h w c"]:
        _, h, w, _ = tokens[-1].shape
        size = ((h - 1) // self.stride + 1, (w - 1) // self.stride + 1)
        pooled = []
        for stride, x in zip(STRIDES, tokens, strict=True):
            matrices = area.matrices_between(stride, STRIDES[-1] * self.stride)
            pooled.append(adaptive_avg_pool(x, size, matrices=matrices, **self.policy.form))
        return jnp.concatenate(pooled, axis=-1)


class Backbone(nnx.Module):
    """Token pyramid, pooling and transformer, which segmenter and classifier share.

    Args:
        settings: `config.model`.
        pool_stride: of the pooling after the coarsest scale (officially `c2t_stride`): 2 in the segmenter, whose
            transformer thus runs at stride 64, and 1 in the classifier.
        policy: see `DTypePolicy`.
        rng: draws the initial weights.
    """

    def __init__(self, settings: ConfigDict, pool_stride: int, *, policy: DTypePolicy, rng: Generator):
        variant = VARIANTS[settings.variant]
        self.policy = policy
        self.channels = variant.channels
        self.tpm = TokenPyramid(variant.blocks, variant.taps, policy=policy, rng=rng)
        self.ppa = PyramidPool(pool_stride, policy)
        rates = np.linspace(0, settings.drop_path_rate, settings.depths)
        self.trans = Transformer(sum(self.channels), variant.heads, rates.tolist(), policy=policy, rng=rng)

    def extract_features(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None, area: ImageArea = WHOLE
    ) -> tuple[list[Float[Array, "n _h _w _c"]], Float[Array, "n _h _w c"]]:
        """The tokens of each scale, finest first, and the transformer's output for all scales, joined on channels.

        Args:
            images: normalised.
            rngs: for drop path, in training only.
            area: of the images on canvases; only with `pool_stride` 2.

        Raises:
            ValueError: the images are not floats `[n, h, w, 3]`.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.shape}: expected [n, h, w, 3]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}: expected normalized floats, see topformer_jax.normalize")
        with jax.named_scope("tpm"):
            tokens = self.tpm(jnp.asarray(images).astype(self.policy.dtype), area)
        with jax.named_scope("ppa"):
            pooled = self.ppa(tokens, area)
        with jax.named_scope("trans"):
            return tokens, self.trans(pooled, rngs, area.mask(pooled, SEMANTICS_STRIDE))


class TopFormer(Backbone):
    """The backbone with a semantics injection at strides 8, 16 and 32 (not at 4).

    Returns the three injected feature maps, finest first, with `head_channels` channels each.
    """

    def __init__(self, settings: ConfigDict, head_channels: int, *, policy: DTypePolicy, rng: Generator):
        super().__init__(settings, 2, policy=policy, rng=rng)
        # As officially, slot 0 has no weights: the tokens of stride 4 are an input of the transformer only.
        slots: list[Any] = [None]
        for inputs in self.channels[1:]:
            conv = functools.partial(ConvModule, inputs, head_channels, policy=policy, rng=rng)
            slots.append(INJECTIONS[settings.injection](conv))
        self.SIM = nnx.List(slots)

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None, area: ImageArea = WHOLE
    ) -> list[Float[Array, "n _h _w head_channels"]]:
        tokens, semantics = self.extract_features(images, rngs, area)
        parts = jnp.split(semantics, np.cumsum(self.channels)[:-1].tolist(), axis=-1)
        injected = []
        with jax.named_scope("SIM"):
            for index in range(1, len(tokens)):
                _, h, w, _ = tokens[index].shape
                matrices = area.matrices_between(SEMANTICS_STRIDE, STRIDES[index])
                fit = functools.partial(resize, size=(h, w), matrices=matrices, **self.policy.form)
                injected.append(self.SIM[index](tokens[index], parts[index], fit))
        return injected


class DecodeHead(nnx.Module):
    """The head: sum of the feature maps at the finest one's size, 1x1 conv-BN-ReLU, dropout, 1x1 conv to classes.

    With `depthwise_head` the first convolution has one weight per channel (officially `is_dw`). The logits are in
    `policy.accum_dtype`.
    """

    def __init__(self, settings: ConfigDict, head_channels: int, *, policy: DTypePolicy, rng: Generator):
        self.policy = policy
        channels, groups = head_channels, head_channels if settings.depthwise_head else 1
        # mmcv initialises this layer with the fan-out of a full convolution, also if it is depthwise.
        start: dict[str, Any] = {"activation": jax.nn.relu, "std": math.sqrt(2 / channels)}
        self.linear_fuse = ConvModule(channels, channels, groups, **start, policy=policy, rng=rng)
        self.dropout = Dropout(settings.dropout_ratio, broadcast_dims=(1, 2))
        start = {"bias": True, "std": 0.01}
        self.conv_seg = Conv(channels, settings.num_classes, **start, policy=policy.accum_policy, rng=rng)

    def __call__(
        self,
        feature_maps: list[Float[Array, "n _h _w c"]],
        rngs: nnx.Rngs | None = None,
        area: ImageArea = WHOLE,
    ) -> Float[Array, "n h w classes"]:
        x, *others = feature_maps
        _, h, w, _ = x.shape
        _, finest_stride, *strides = STRIDES
        for stride, other in zip(strides, others, strict=True):
            matrices = area.matrices_between(stride, finest_stride)
            x = x + resize(other, (h, w), matrices=matrices, **self.policy.form)
        x = self.dropout(self.linear_fuse(x), rngs)
        return self.conv_seg(x.astype(self.policy.accum_dtype))


class ConfiguredModel(nnx.Module):
    """What `models.build` and `topformer_jax.load` attach to a model; static parts of its graph definition.

    Attributes:
        config: all settings that the model was built from, those of evaluation too.
        classes: their names in label order, if known.
        palette: their colours; a classifier has none.
        checkpoint_config: the settings that the checkpoint was made with, if it holds them.
    """

    config: FrozenConfigDict
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    checkpoint_config: FrozenConfigDict | None = None


class Segmenter(ConfiguredModel):
    """The whole network: normalised RGB images to logits at stride 8, in float32 or wider.

    `settings` are `config.model`; `topformer_jax.load` and `models.build` make one from a config.
    """

    def __init__(self, settings: ConfigDict, *, policy: DTypePolicy, rng: Generator):
        self.num_classes, self.policy = settings.num_classes, policy
        head_channels = settings.head_channels or VARIANTS[settings.variant].head_channels
        self.backbone = TopFormer(settings, head_channels, policy=policy, rng=rng)
        self.decode_head = DecodeHead(settings, head_channels, policy=policy, rng=rng)

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None, area: ImageArea = WHOLE
    ) -> Float[Array, "n h8 w8 classes"]:
        """The logits; those of images on larger canvases are at the top left, and the rest means nothing."""
        feature_maps = self.backbone(images, rngs, area)
        with jax.named_scope("decode_head"):
            return self.decode_head(feature_maps, rngs, area)
