"""The paper's figure put together: backbone, decode head, segmenter; and the table of its three sizes."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import FrozenConfigDict

from topformer_jax.models.injection import INJECTIONS
from topformer_jax.models.layers import Conv, ConvModule, DTypePolicy, RandomDrop
from topformer_jax.models.token_pyramid import Block, TokenPyramid
from topformer_jax.models.transformer import Transformer
from topformer_jax.ops.resample import adaptive_avg_pool, resize

Images = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Variant:
    """One size of the network: the pyramid's blocks, where it is tapped, injection head_channels and heads."""

    blocks: tuple[Block, ...]
    taps: tuple[int, ...]
    head_channels: int
    heads: int

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the tapped tokens, strides 4, 8, 16, 32."""
        return tuple(self.blocks[tap].channels for tap in self.taps)


def _blocks(*rows: tuple[int, int, int, int]) -> tuple[Block, ...]:
    return tuple(Block(*row) for row in rows)


VARIANTS = {
    "tiny": Variant(
        blocks=_blocks(
            (3, 1, 16, 1),
            (3, 4, 16, 2),
            (3, 3, 16, 1),
            (5, 3, 32, 2),
            (5, 3, 32, 1),
            (3, 3, 64, 2),
            (3, 3, 64, 1),
            (5, 6, 96, 2),
            (5, 6, 96, 1),
        ),
        taps=(2, 4, 6, 8),
        head_channels=128,
        heads=4,
    ),
    "small": Variant(
        blocks=_blocks(
            (3, 1, 16, 1),
            (3, 4, 24, 2),
            (3, 3, 24, 1),
            (5, 3, 48, 2),
            (5, 3, 48, 1),
            (3, 3, 96, 2),
            (3, 3, 96, 1),
            (5, 6, 128, 2),
            (5, 6, 128, 1),
            (3, 6, 128, 1),
        ),
        taps=(2, 4, 6, 9),
        head_channels=192,
        heads=6,
    ),
    "base": Variant(
        blocks=_blocks(
            (3, 1, 16, 1),
            (3, 4, 32, 2),
            (3, 3, 32, 1),
            (5, 3, 64, 2),
            (5, 3, 64, 1),
            (3, 3, 128, 2),
            (3, 3, 128, 1),
            (5, 6, 160, 2),
            (5, 6, 160, 1),
            (3, 6, 160, 1),
        ),
        taps=(2, 4, 6, 9),
        head_channels=256,
        heads=8,
    ),
}


class PyramidPool(nnx.Module):
    """Averages every scale down to the coarsest one's size over `stride` and joins them on channels."""

    def __init__(self, stride: int, policy: DTypePolicy):
        self.stride = stride
        self.policy = policy

    def __call__(self, tokens: list[Array]) -> Float[Array, "n h w c"]:
        _, h, w, _ = tokens[-1].shape
        size = ((h - 1) // self.stride + 1, (w - 1) // self.stride + 1)
        precision = self.policy.product_precision
        return jnp.concatenate([adaptive_avg_pool(x, size, precision=precision) for x in tokens], axis=-1)


class Backbone(nnx.Module):
    """Token pyramid, pooling and transformer: what segmenter and classifier share.

    `pool_stride` is the coarsest scale's (stride 32) further reduction: 2 to segment, 1 to classify.
    """

    def __init__(
        self,
        variant: Variant,
        pool_stride: int,
        drop_path_rate: float,
        *,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.policy = policy
        self.channels = variant.channels
        self.tpm = TokenPyramid(variant.blocks, variant.taps, policy=policy, rng=rng)
        self.ppa = PyramidPool(pool_stride, policy)
        self.trans = Transformer(
            sum(self.channels), variant.heads, drop_path_rate=drop_path_rate, policy=policy, rng=rng
        )

    def tokens(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None
    ) -> tuple[list[Array], Float[Array, "n _h _w c"]]:
        """The tokens of each scale, and the transformer's output over all scales."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.shape}: expected [n, h, w, 3]")
        with jax.named_scope("tpm"):
            tokens = self.tpm(jnp.asarray(images).astype(self.policy.dtype))
        with jax.named_scope("ppa"):
            pooled = self.ppa(tokens)
        with jax.named_scope("trans"):
            return tokens, self.trans(pooled, rngs)


def _no_injection(local: Array, semantics: Array) -> Array:
    """What stands in an injection's place where there is none."""
    return local


class TopFormer(Backbone):
    """The backbone with a semantic injection at strides 8, 16 and 32 (not at 4).

    Returns the three injected maps, `head_channels` channels each, finest first.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        injection: str,
        head_channels: int,
        drop_path_rate: float,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        super().__init__(variant, 2, drop_path_rate, policy=policy, rng=rng)
        injected: list[Callable[..., Array]] = [
            INJECTIONS[injection](channels, head_channels, policy=policy, rng=rng)
            for channels in self.channels[1:]
        ]
        # Slot 0 has no weights officially either: the finest scale feeds the transformer alone.
        self.SIM = nnx.List([_no_injection, *injected])

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "n _h _w head_channels"]]:
        tokens, semantics = self.tokens(images, rngs)
        borders = [sum(self.channels[: index + 1]) for index in range(len(self.channels) - 1)]
        parts = jnp.split(semantics, borders, axis=-1)
        with jax.named_scope("SIM"):
            return [self.SIM[index](tokens[index], parts[index]) for index in range(1, len(tokens))]


class DecodeHead(nnx.Module):
    """Sums the maps at the finest one's size, fuses them by a 1x1 conv-BN-ReLU, drops channels, classifies.

    Args:
        head_channels: channels of the maps, and of the fused one.
        num_classes: channels of the logits.
        depthwise: fuse with one weight a channel (the Tiny configs' `is_dw`) instead of a full 1x1.
        dropout_ratio: probability that a sample loses a whole channel (`Dropout2d`).
    """

    def __init__(
        self,
        head_channels: int,
        num_classes: int,
        *,
        depthwise: bool,
        dropout_ratio: float,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.policy = policy
        # mmcv's own start for this layer: fan-out is taken over all channels, grouped or not.
        self.linear_fuse = ConvModule(
            head_channels,
            head_channels,
            head_channels if depthwise else 1,
            activation=jax.nn.relu,
            std=math.sqrt(2 / head_channels),
            policy=policy,
            rng=rng,
        )
        self.dropout = RandomDrop(dropout_ratio, shared=(1, 2))
        wide = dataclasses.replace(policy, dtype=policy.wide)
        self.conv_seg = Conv(head_channels, num_classes, bias=True, std=0.01, policy=wide, rng=rng)

    def __call__(self, maps: list[Array], rngs: nnx.Rngs | None = None) -> Float[Array, "n h w classes"]:
        size = (maps[0].shape[1], maps[0].shape[2])
        precision = self.policy.product_precision
        x = sum((resize(x, size, precision=precision) for x in maps[1:]), start=maps[0])
        x = self.dropout(self.linear_fuse(x), rngs)
        return self.conv_seg(x.astype(self.policy.wide))


class Segmenter(nnx.Module):
    """The whole network: normalised RGB images to logits of a stride of 8, in at least float32.

    Args:
        variant: a row of `VARIANTS`.
        num_classes: number of classes.
        injection: a key of `INJECTIONS`.
        head_channels: channels of injections and head; the variant's own where None.
        depthwise_head: see `DecodeHead`.
        drop_path_rate, dropout_ratio: rates in training.
    """

    config: FrozenConfigDict

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        *,
        injection: str = "multi_sum",
        head_channels: int | None = None,
        depthwise_head: bool = False,
        drop_path_rate: float = 0.1,
        dropout_ratio: float = 0.1,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.num_classes, self.policy = num_classes, policy
        head_channels = variant.head_channels if head_channels is None else head_channels
        self.backbone = TopFormer(
            variant,
            injection=injection,
            head_channels=head_channels,
            drop_path_rate=drop_path_rate,
            policy=policy,
            rng=rng,
        )
        self.decode_head = DecodeHead(
            head_channels,
            num_classes,
            depthwise=depthwise_head,
            dropout_ratio=dropout_ratio,
            policy=policy,
            rng=rng,
        )

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "n h8 w8 classes"]:
        maps = self.backbone(images, rngs)
        with jax.named_scope("decode_head"):
            return self.decode_head(maps, rngs)
